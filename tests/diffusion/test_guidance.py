"""Guidance: the maths against closed forms and diffusers, and whole samplings of Gaussian data of which the end is known.
Faults that trainers are known for are put back, and must be found."""

import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

from tests.support.guidance import label_of_dropped, normal, zeros_for_dropped
from utils.diffusion.conditions import ClassCondition, NoCondition
from utils.diffusion.guidance import Guidance, extrapolate, guided_prediction, rescale
from utils.diffusion.objectives import DDPMObjective, training_scheduler
from utils.diffusion.pipelines import LatentDiffusionPipeline

SHAPES = [(3, 8), (3, 5, 4), (3, 2, 4, 4)]  # vectors, sets, grids


# The maths


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_extrapolation_is_the_score_of_a_sharpened_density(shape, scale):
    """For Gaussians p and q, the guided epsilon is that of p^scale q^(1 - scale), a Gaussian too."""
    alpha, sigma, x = 0.6, 0.8, normal(*shape)
    (mean, variance), (weak_mean, weak_variance) = [
        (alpha * m, alpha**2 * s**2 + sigma**2) for m, s in ((1.5, 0.5), (-1, 2))
    ]
    guided = extrapolate(sigma * (x - mean) / variance, sigma * (x - weak_mean) / weak_variance, scale)
    precision = scale / variance + (1 - scale) / weak_variance
    centre = (scale * mean / variance + (1 - scale) * weak_mean / weak_variance) / precision
    torch.testing.assert_close(guided, sigma * precision * (x - centre))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_extrapolation_is_the_same_in_every_parameterisation(prediction_type):
    """The clean latents that a guided prediction stands for do not depend on what is predicted."""
    objectives = [DDPMObjective(training_scheduler(kind)) for kind in ("epsilon", prediction_type)]
    noisy_latents, timesteps = normal(3, 2, 4, 4).float(), torch.tensor([10, 400, 700])
    clean = [normal(3, 2, 4, 4, seed=seed).float() for seed in (1, 2)]
    x0 = []
    for objective in objectives:
        alpha, sigma = objective.alpha_sigma(timesteps, 4)
        predictions = [objective.target(each, (noisy_latents - alpha * each) / sigma, timesteps) for each in clean]
        x0.append(objective.to_x0(extrapolate(*predictions, 3.0), noisy_latents, timesteps))
    torch.testing.assert_close(*x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_rescale_is_equation_16(shape, strength):
    """Sample by sample, in numpy: the std over all axes but the batch's."""
    guided, prediction = (
        4 * normal(*shape) * torch.arange(1, 4).view(3, *(1,) * (len(shape) - 1)),
        normal(*shape, seed=1),
    )
    found = rescale(guided, prediction, strength)
    for ours, x_cfg, x_pos in zip(found, guided.numpy(), prediction.numpy(), strict=True):
        truth = strength * x_cfg * x_pos.std() / x_cfg.std() + (1 - strength) * x_cfg
        np.testing.assert_allclose(ours, truth, rtol=1e-5)
    if strength == 1:
        torch.testing.assert_close(found.flatten(1).std(dim=1), prediction.flatten(1).std(dim=1), rtol=1e-5, atol=0)


def test_rescale_is_that_of_diffusers():
    guided, prediction = 3 * normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    torch.testing.assert_close(
        rescale(guided, prediction, 0.7), rescale_noise_cfg(guided, prediction, 0.7), rtol=1e-5, atol=0
    )


def test_rescale_keeps_dtype_and_zeros():
    """A model whose last layer is still zero predicts zero, whose std cannot be divided by."""
    assert not rescale(torch.zeros(2, 3), torch.zeros(2, 3), 0.7).any()
    assert rescale(normal(2, 8).bfloat16(), normal(2, 8).bfloat16(), 0.7).dtype == torch.bfloat16


def test_guide_is_called_once_with_the_conditional_samples():
    latents, prediction, weaker = (normal(3, 2, 4, 4, seed=seed) for seed in range(3))
    calls = []

    def model(name, result):
        return lambda noisy, timesteps: (calls.append((name, noisy, timesteps.tolist())), result)[1]

    guided = guided_prediction(model("main", prediction), latents, torch.tensor(7), 3.0, 0.4, model("guide", weaker))
    torch.testing.assert_close(guided, rescale(weaker + 3 * (prediction - weaker), prediction, 0.4))
    assert [name for name, _, _ in calls] == ["main", "guide"]
    assert all(torch.equal(noisy, latents) and timesteps == [7, 7, 7] for _, noisy, timesteps in calls)
    calls.clear()
    off = guided_prediction(model("main", prediction), latents, torch.tensor(7), 1.0, 0.4, model("guide", weaker))
    assert torch.equal(off, prediction)
    assert [name for name, _, _ in calls] == ["main"]


def test_scales_follow_the_interval():
    """Both ends belong to it; the whole range holds every timestep of either family."""
    timesteps = torch.tensor([1000.0, 999, 800, 500.5, 200, 199.9, 0])
    assert Guidance(4.0, (0.2, 0.8)).scales(timesteps, 1000) == [1, 1, 4, 4, 4, 1, 1]
    assert Guidance(4.0).scales(timesteps, 1000) == [4] * 7
    assert Guidance(4.0, (0.0, 0.4)).scales(torch.tensor([249, 0]), 500) == [1, 4]
    with pytest.raises(ValueError, match=r"^guidance_interval 0.6 0.7: none of the sampler's 7 steps"):
        Guidance(4.0, (0.6, 0.7)).scales(timesteps, 1000)


REFUSED = {
    "guidance_interval 0.8 0.2": (4.0, (0.8, 0.2), 0.0, False, False),
    "guidance_interval 0.5 0.5": (4.0, (0.5, 0.5), 0.0, False, False),
    "guidance_interval 0.5 2": (4.0, (0.5, 2.0), 0.0, False, False),
    "guidance_rescale 1.5": (4.0, (0.0, 1.0), 1.5, False, False),
    "guide_model with negative_prompt": (4.0, (0.0, 1.0), 0.0, True, True),
    "guidance_interval": (1.0, (0.0, 0.5), 0.0, False, False),
    "guidance_rescale": (1.0, (0.0, 1.0), 0.7, False, False),
    "guide_model": (1.0, (0.0, 1.0), 0.0, True, False),
    "negative_prompt": (1.0, (0.0, 1.0), 0.0, False, True),
}


@pytest.mark.parametrize("start", REFUSED)
def test_contradictions_are_refused(start):
    *settings, with_guide, with_negative_prompt = REFUSED[start]
    with pytest.raises(ValueError, match=f"^{start}:"):
        Guidance(*settings).check(with_guide, with_negative_prompt)


def test_sound_guidance_is_not_refused():
    Guidance().check(with_guide=False)
    Guidance(0.0, (0.1, 0.9), 1.0).check(with_guide=True)
    Guidance(4.0, [0.0, 1.0], 0.5).check(with_guide=False, with_negative_prompt=True)


def test_guidance_is_written_by_the_names_of_the_flags():
    """And by those that the diffusers pipeline takes."""
    arguments = Guidance(3.0, (0.1, 0.9), 0.5, 20).arguments()
    names = ["guidance_scale", "guidance_interval", "guidance_rescale", "num_inference_steps"]
    assert list(arguments) == names
    assert list(arguments.values()) == [3.0, (0.1, 0.9), 0.5, 20]
    assert set(names) <= set(inspect.signature(LatentDiffusionPipeline.__call__).parameters)


# Whole samplings of which the end is known: latents from N(0, std^2) under rectified flow. The perfect velocity is d/dt of
# log sigma(t) times the latents, sigma(t)^2 = (1 - t)^2 std^2 + t^2, so that noise x ends as std x; guided velocities add up
# in the exponent.


class GaussianVelocity(ModelMixin, ConfigMixin):
    """The perfect flow model of N(0, std^2). The std is the pooled condition (B, 1), or, of an unconditional model, its
    own."""

    @register_to_config
    def __init__(self, std: float = 1.0, in_channels: int = 1, sample_size: int = 2):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, class_labels=None, **unused):
        std = torch.tensor(self.config.std) if class_labels is None else class_labels.view(-1, 1, 1, 1)
        t = timestep.view(-1, 1, 1, 1) / 1000
        return (sample * (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2),)


def gaussian_pipeline(conditions, **denoiser):
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1)
    pipeline = LatentDiffusionPipeline(
        vae, FlowMatchEulerDiscreteScheduler(), conditions, transformer=GaussianVelocity(**denoiser)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def class_pipeline(stds=(0.5, 0.8), null_std=1.5):
    conditions = ClassCondition(len(stds), 1)
    with torch.no_grad():
        conditions.embedding.weight.copy_(torch.tensor([*stds, null_std])[:, None])
    return gaussian_pipeline(conditions)


def known_end(std, weak_std, scale, interval=(0.0, 1.0)):
    """What noise of 1 becomes: log std, and in the interval (scale - 1) times the difference of the two velocities."""

    def travelled(of_std):
        start, end = (math.log(math.hypot((1 - t) * of_std, t)) for t in interval)
        return start - end

    return math.exp(math.log(std) + (scale - 1) * (travelled(std) - travelled(weak_std)))


def assert_ends_as_known(pipeline, scale, interval=(0.0, 1.0), stds=(0.5, 0.8), null_std=1.5):
    found = pipeline(
        class_labels=[0, 1], guidance_scale=scale, guidance_interval=interval, num_inference_steps=500,
        latents=torch.ones(2, 1, 2, 2), output_type="latent",
    ).images  # fmt: skip
    for latents, std in zip(found, stds, strict=True):
        torch.testing.assert_close(
            latents, torch.full_like(latents, known_end(std, null_std, scale, interval)), rtol=0.02, atol=0
        )


@pytest.mark.parametrize(
    ("scale", "interval"), [(1.0, (0.0, 1.0)), (3.0, (0.0, 1.0)), (3.0, (0.25, 0.75)), (0.0, (0.0, 0.5))]
)
def test_classifier_free_guidance_of_gaussians(scale, interval):
    assert_ends_as_known(class_pipeline(), scale, interval)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_autoguidance_of_gaussians_without_condition(scale, interval):
    """An unconditional model led away from one that is too wide: narrower than itself."""
    main, guide = gaussian_pipeline(NoCondition(), std=0.8), gaussian_pipeline(NoCondition(), std=1.2)
    found = main(
        guide_model=guide.predict, guidance_scale=scale, guidance_interval=interval, num_inference_steps=500,
        latents=torch.ones(1, 1, 2, 2), output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(found, torch.full_like(found, known_end(0.8, 1.2, scale, interval)), rtol=0.02, atol=0)


def test_autoguidance_of_gaussians_with_condition():
    """The guide sees the class, and never the null."""
    main, guide = class_pipeline(), class_pipeline((0.6, 1.1), null_std=float("nan"))
    found = main(
        class_labels=[0, 1], guide_model=guide.predict, guidance_scale=2.0, num_inference_steps=500,
        latents=torch.ones(2, 1, 2, 2), output_type="latent",
    ).images  # fmt: skip
    for latents, stds in zip(found, [(0.5, 0.6), (0.8, 1.1)], strict=True):
        torch.testing.assert_close(latents, torch.full_like(latents, known_end(*stds, 2.0)), rtol=0.02, atol=0)


def test_a_pipeline_refuses_what_does_nothing():
    unconditional, conditional = gaussian_pipeline(NoCondition()), class_pipeline()
    with pytest.raises(ValueError, match=r"^guidance_rescale: guidance is off"):
        unconditional(guidance_rescale=0.7)
    with pytest.raises(ValueError, match=r"^guidance_interval: guidance is off"):
        conditional(class_labels=0, guidance_scale=1.0, guidance_interval=(0.1, 0.9))
    with pytest.raises(ValueError, match="no text condition"):
        conditional(class_labels=0, negative_prompt="blue")


@pytest.mark.parametrize(
    "forward", [zeros_for_dropped, label_of_dropped(0), label_of_dropped(1), label_of_dropped(None)],
    ids=["zeros", "class 0", "last class", "not dropped"],
)  # fmt: skip
def test_fault_wrong_null_of_classes(monkeypatch, forward):
    assert_ends_as_known(class_pipeline(), 3.0)
    monkeypatch.setattr(ClassCondition, "forward", forward)
    with pytest.raises(AssertionError):
        assert_ends_as_known(class_pipeline(), 3.0)
