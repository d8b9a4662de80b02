"""Objectives and samplers against data of which everything is known: latents (2, 2, 2) from N(MEAN, COVARIANCE).

The perfect denoiser of Gaussian data is affine, and so is every sampler that uses it. So nothing here is drawn at random:
a sampler's mean and covariance follow from where it takes the origin and the unit vectors, and the expectation of a
squared error is the mean over a few points that have the right mean and covariance.
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from scipy import stats

from tests.support.gaussian import (
    COMBINATIONS,
    DDPM_TYPES,
    SETTINGS,
    D,
    build,
    check_optimum,
    coefficients,
    distance,
    exact_output,
    fitting,
    float64_scales,
    output_of,
    posterior,
    scales,
)
from utils.diffusion.objectives import DDPMObjective, training_scheduler
from utils.diffusion.sampling import FLOW_SAMPLERS, MAX_TIMESTEPS_LEFT, SAMPLERS, sampling_scheduler
from utils.errors import UserError

# Relative error of the variance after 100 steps, in the direction that is worst. It is the discretisation's: DDPM, DDIM and
# Euler are of first order; DPM-Solver++ and UniPC of second, but for their last step, from t = 9 to 0. Flow's last step is
# from sigma = 0.001 (0.009 with shift 3), next to nothing, so that Heun keeps its second order.
VARIANCE_TOLERANCE = {
    "ddpm": 0.11,
    "ddim": 0.06,
    "dpmsolver++": 0.025,
    "unipc": 0.025,
    "flow_euler": 0.05,
    "flow_heun": 5e-4,
}


MEAN_TOLERANCE = 0.005  # standard deviations; DDPM and flow's samplers have it to rounding


# What starting from N(0, I) costs: standard deviations of the mean, relative variance. Nothing is left to tell the mean by
# at zero SNR; SD's betas leave alpha = 0.07 or 0.04.
START_ERROR = {"linear": (0.14, 0.005), "scaled_linear": (0.24, 0.014), "squaredcos_cap_v2": (2e-4, 1e-6)}


def start_error(settings):
    kind, betas, zero_snr, _ = settings
    return (0.0, 0.0) if zero_snr or kind == "flow" else START_ERROR[betas]


def check_output(scheduler, objective, monkeypatch, steps=100):
    """Asserts that the pipeline returns what infinitely many steps would, but for the tolerances above; with fewer than 100
    steps the first-order error of the variance is larger, and that of the mean may not be.
    """
    name = next(each for each, kind in SAMPLERS.items() if type(scheduler) is kind)
    truth = exact_output(objective, stochastic=name == "ddpm")
    of_mean, of_variance = distance(*output_of(scheduler, objective, steps, monkeypatch), *truth)
    assert of_mean < MEAN_TOLERANCE
    assert of_variance < VARIANCE_TOLERANCE[name] * 100 / steps


@pytest.mark.parametrize(("settings", "name"), COMBINATIONS)
def test_samplers_return_the_data(settings, name, monkeypatch):
    """100 steps of the pipeline return the Gaussian, and what is missing is what N(0, I) at the start costs, exactly."""
    objective, trained_with = build(settings)
    check_output(sampling_scheduler(trained_with, name, 100), objective, monkeypatch)
    start = distance(*exact_output(objective, name == "ddpm"))
    assert all(error <= allowed + 1e-9 for error, allowed in zip(start, start_error(settings), strict=True))


# The least order that is seen between two numbers of steps, of the variance. DDIM and DDPM come near their 1 only where a
# step's noise is small against the smallest variance of the data. UniPC's errors cancel at about 50 steps.
STEPS_AND_ORDER = {
    "ddpm": (100, 200, 0.75),
    "ddim": (100, 200, 0.85),
    "dpmsolver++": (50, 100, 1.0),
    "unipc": (10, 100, 1.0),
    "flow_euler": (100, 200, 0.95),
    "flow_heun": (15, 30, 1.9),
}


@pytest.mark.parametrize(("settings", "name"), COMBINATIONS)
def test_more_steps_are_better(settings, name, monkeypatch):
    """The error falls with the order of the sampler."""
    objective, trained_with = build(settings)
    few, many, least_order = STEPS_AND_ORDER[name]
    truth = exact_output(objective, name == "ddpm")
    errors = [
        distance(*output_of(sampling_scheduler(trained_with, name), objective, steps, monkeypatch), *truth)[1]
        for steps in (few, many)
    ]
    assert math.log(errors[0] / errors[1]) / math.log(many / few) > least_order


@pytest.mark.parametrize("settings", [("v_prediction", "scaled_linear", True, 1.0), SETTINGS[-1]])
def test_a_saved_sampler_is_as_good_as_the_training_scheduler(settings):
    """A run is saved with its default sampler; the others, made from that one's config, are those made from the
    training's.
    """
    _, trained_with = build(settings)
    saved = sampling_scheduler(trained_with)
    saved = type(saved).from_config(saved.config)
    for name in fitting(settings):
        ours, theirs = sampling_scheduler(saved, name), sampling_scheduler(trained_with, name)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(20)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        table = "sigmas" if hasattr(ours, "sigmas") else "alphas_cumprod"
        assert torch.equal(getattr(ours, table), getattr(theirs, table))
        differences = dict(ours.config).items() ^ dict(theirs.config).items()
        assert {key for key, _ in differences if not key.startswith("_")} == set()


# Numbers of steps that diffusers' samplers cannot take


@pytest.mark.parametrize(
    ("name", "steps"),
    [*((name, 61) for name in ("ddpm", "ddim", "dpmsolver++", "unipc")), ("ddim", 28), ("ddim", 70), ("ddim", 300)],
)
def test_steps_that_spoil_images_are_refused(name, steps, monkeypatch):
    """diffusers' rounding gives 61 steps a 62nd at t = -1, and its DDIM does not end where 1000 % steps is large: refused,
    and rightly, for the Gaussian comes out wrong; the number proposed instead is accepted.
    """
    objective, trained_with = build(("v_prediction", "scaled_linear", True, 1.0))
    with pytest.raises(UserError, match=f"--num_inference_steps {steps} with --scheduler {name}") as caught:
        sampling_scheduler(trained_with, name, steps)
    truth = exact_output(objective, name == "ddpm")

    def errors(number):
        return distance(*output_of(sampling_scheduler(trained_with, name), objective, number, monkeypatch), *truth)

    proposed = int(str(caught.value).rsplit(maxsplit=1)[1])
    assert proposed < steps
    sampling_scheduler(trained_with, name, proposed)
    of_mean, of_variance = errors(steps)
    assert of_mean > 0.05 or of_variance > 0.9
    assert errors(proposed)[0] < 0.04


def test_more_steps_than_timesteps_are_refused():
    """A DDPM model knows 1000 timesteps; a flow has no such limit."""
    with pytest.raises(UserError, match="1000 timesteps only; use 1000"):
        sampling_scheduler(training_scheduler("epsilon"), "unipc", 1001)
    sampling_scheduler(training_scheduler("flow"), "flow_heun", 1001)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_steps_that_are_accepted_end_at_clean_latents(name):
    """Every accepted number gives so many different timesteps from 999 down to the first stride's end."""
    trained_with = training_scheduler("v_prediction")
    refused = []
    for steps in range(1, 131):
        try:
            scheduler = sampling_scheduler(trained_with, name, steps)
        except UserError:
            refused.append(steps)
            continue
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps
        assert len(timesteps) == steps
        assert (timesteps.diff() < 0).all()
        assert timesteps[0] == 999
        assert timesteps[-1] == round(1000 / steps) - 1
        if name == "ddim":
            assert 1000 % steps <= MAX_TIMESTEPS_LEFT
    usual = {1, 2, 4, 5, 8, 10, 20, 25, 30, 40, 50, 100, 125}
    assert usual.isdisjoint(refused)
    if name != "ddim":
        assert refused == [61, 103, 121, 122]


DDPM_SETTINGS = [settings for settings in SETTINGS if settings[0] != "flow"]


@pytest.mark.parametrize("settings", DDPM_SETTINGS)
def test_a_small_error_of_the_model_stays_small(settings, monkeypatch):
    """Predictions off by 0.01 move the image by less than 0.06, but for epsilon under squaredcos_cap_v2, where x0 is the
    prediction's error divided by alpha = 5e-5: the terminal SNR is as good as zero, and DDIM's image moves by 5.
    """
    objective, trained_with = build(settings)
    right, wrong = (
        output_of(sampling_scheduler(trained_with, "ddim"), objective, 50, monkeypatch, bias)[0]
        for bias in (0.0, 0.01)
    )
    moved = (wrong - right).abs().mean().item()
    if settings[:2] == ("epsilon", "squaredcos_cap_v2"):
        assert moved > 1
    else:
        assert moved < 0.06


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_optimal_denoiser_has_the_least_loss(settings, snr_gamma):
    """Of every objective, at every timestep, with Min-SNR or without."""
    if settings[0] == "flow" and snr_gamma:
        pytest.skip("refused")
    objective, _ = build(settings, **({"snr_gamma": snr_gamma} if snr_gamma else {}))
    check_optimum(objective, settings, snr_gamma)


@pytest.mark.parametrize(("offset", "perturbation"), [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
@pytest.mark.parametrize("kind", DDPM_TYPES)
def test_offset_noise_is_in_the_target_and_perturbation_is_not(kind, offset, perturbation):
    """The optimum under offset noise is the posterior for noise of covariance I + offset^2 11^T; input perturbation p only
    adds p^2 I to the noise of the input. The optimum of plain noise is then no optimum.
    """
    settings = (kind, "scaled_linear", False, 1.0)
    objective, _ = build(settings, noise_offset=offset, input_perturbation=perturbation)
    check_optimum(objective, settings, None, offset, perturbation)
    with pytest.raises(AssertionError):
        check_optimum(objective, settings)
    if offset and perturbation:
        with pytest.raises(AssertionError):  # the perturbation counted as noise to predict
            check_optimum(objective, settings, None, math.hypot(offset, perturbation))


@pytest.mark.parametrize("settings", SETTINGS)
def test_x0_of_the_optimal_prediction_is_the_posterior_mean(settings):
    """To float32's rounding, which epsilon's division by alpha enlarges."""
    objective, _ = build(settings)
    kind = settings[0]
    noisy_latents = 3 * torch.randn(64, D, generator=torch.Generator().manual_seed(2))
    for timestep in (0, 5, 100, 500, 900, 998, 999):
        timesteps = torch.full((64,), timestep, dtype=torch.float32 if kind == "flow" else torch.int64)
        alpha, sigma = scales(objective, timesteps[0])
        assert (alpha, sigma) == pytest.approx(float64_scales(settings, timestep), rel=1e-3, abs=2e-5)
        x0, noise = posterior(noisy_latents.double(), alpha, sigma)
        a, b = coefficients(kind, alpha, sigma)
        prediction = (a * x0 + b * noise).float()
        tolerance = 3e-6 / (alpha if kind == "epsilon" else 1)
        ours = objective.to_x0(prediction, noisy_latents, timesteps).double()
        torch.testing.assert_close(ours, x0, rtol=0, atol=tolerance)


# Timesteps


@pytest.mark.parametrize(("density", "mean", "std"), [("uniform", 0.0, 1.0), ("logit_normal", 0.5, 0.7)])
@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shifted_densities(density, mean, std, shift):
    """The shift adds its logarithm to the logit of sigma (arXiv 2403.03206, equation 23), which is normal or logistic."""
    objective, _ = build(("flow", "scaled_linear", False, shift), timestep_density=density)
    objective.logit_mean, objective.logit_std = mean, std
    even = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    logits = torch.logit(objective.sample_timesteps(even).double() / 1000).numpy()
    law = stats.logistic(math.log(shift)) if density == "uniform" else stats.norm(mean + math.log(shift), std)
    # Kolmogorov-Smirnov's statistic of a perfect even sample is half a step.
    assert stats.kstest(logits, law.cdf).statistic < 1 / 20_000


def check_grid(scheduler, objective, steps=50):
    """Asserts that a flow's sampler goes evenly through training's uniform density, shifted once, and tells the model
    the sigma at which it is. The last sigma is shifted twice by diffusers, 0.009 for shift 3: no step of any size.
    """
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas[:-1].unique().flip(0)
    uniform = torch.linspace(1, 0, steps)
    expected = objective.sample_timesteps(uniform) / 1000
    assert (sigmas - expected).abs().max() < 0.01
    assert (scheduler.timesteps.unique().flip(0) / 1000 - sigmas).abs().max() < 1e-6
    assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_flow_samplers_shift_once(name, shift):
    """As training does."""
    objective, trained_with = build(("flow", "scaled_linear", False, shift), timestep_density="uniform")
    check_grid(sampling_scheduler(trained_with, name), objective)


# Each check finds the fault that it is there to find

ZERO_SNR_V = ("v_prediction", "scaled_linear", True, 1.0)


SHIFTED = ("flow", "scaled_linear", False, 3.0)


def leading_spacing(monkeypatch):
    """At 25 steps the sampler starts at t = 961, where the model expects a signal."""
    objective, trained_with = build(ZERO_SNR_V)
    right = DDIMScheduler.from_config(trained_with.config)
    wrong = DDIMScheduler.from_config(trained_with.config, timestep_spacing="leading")
    return lambda faulty: check_output(wrong if faulty else right, objective, monkeypatch, steps=25)


def clipped_samples(monkeypatch):
    objective, trained_with = build(ZERO_SNR_V)
    return lambda faulty: check_output(
        DDPMScheduler.from_config(trained_with.config, clip_sample=faulty), objective, monkeypatch
    )


class SwappedSign(DDPMObjective):
    def target(self, latents, noise, timesteps):
        return -super().target(latents, noise, timesteps)


def swapped_sign_when_sampled(monkeypatch):
    _, trained_with = build(ZERO_SNR_V)
    return lambda faulty: check_output(
        sampling_scheduler(trained_with), (SwappedSign if faulty else DDPMObjective)(trained_with), monkeypatch
    )


def swapped_sign_in_the_loss(monkeypatch):
    trained_with = training_scheduler(*ZERO_SNR_V)
    return lambda faulty: check_optimum((SwappedSign if faulty else DDPMObjective)(trained_with), ZERO_SNR_V)


def unrescaled(faulty):
    """The scheduler that Min-SNR's table must not be made from."""
    return training_scheduler(*ZERO_SNR_V[:2], not faulty)


def snr_of_unrescaled_betas(monkeypatch):
    def check(faulty):
        objective, _ = build(ZERO_SNR_V, snr_gamma=5.0)
        objective.snr = DDPMObjective(unrescaled(faulty)).snr
        check_optimum(objective, ZERO_SNR_V, 5.0)

    return check


def trained_on_unrescaled_betas(monkeypatch):
    """All tables of training, and not of sampling."""
    _, trained_with = build(ZERO_SNR_V)
    return lambda faulty: check_output(
        sampling_scheduler(trained_with), DDPMObjective(unrescaled(faulty)), monkeypatch
    )


def shift_twice(name):
    """A shift of 3 on top of a shift of 3 is one of 9."""

    def fault(monkeypatch):
        objective, _ = build(SHIFTED, timestep_density="uniform")
        return lambda faulty: check_grid(
            sampling_scheduler(training_scheduler(*SHIFTED[:3], 9.0 if faulty else 3.0), name), objective
        )

    return fault


def shift_of_timesteps_only(monkeypatch):
    """The model is told sigmas that are shifted once more than those of the steps."""
    objective, trained_with = build(SHIFTED)
    scheduler = sampling_scheduler(trained_with)
    set_timesteps = scheduler.set_timesteps

    def shifted_again(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        sigmas = scheduler.timesteps / 1000
        scheduler.timesteps = 1000 * 3 * sigmas / (1 + 2 * sigmas)

    def check(faulty):
        if faulty:
            monkeypatch.setattr(scheduler, "set_timesteps", shifted_again)
        check_output(scheduler, objective, monkeypatch)

    return check


PLANTED = {
    "leading spacing": leading_spacing,
    "clipped samples": clipped_samples,
    "v with swapped sign, sampled": swapped_sign_when_sampled,
    "v with swapped sign, loss": swapped_sign_in_the_loss,
    "SNR of unrescaled betas": snr_of_unrescaled_betas,
    "trained on unrescaled betas": trained_on_unrescaled_betas,
    "Euler shifts twice": shift_twice("flow_euler"),
    "Heun shifts twice": shift_twice("flow_heun"),
    "timesteps shifted once more than sigmas": shift_of_timesteps_only,
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name, monkeypatch):
    """The check passes without the fault, and fails with it."""
    check = PLANTED[name](monkeypatch)
    check(False)
    with pytest.raises(AssertionError):
        check(True)
