"""The bound against distributions of torch, and that a sampler does with the variance what it should."""

import dataclasses

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from utils.crystal.pipeline import CrystalPipeline
from utils.crystal.vae.network import CrystalVAE
from utils.diffusion.conditions import NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.guidance import Guidance
from utils.diffusion.learned_variance import VLB_WEIGHT
from utils.diffusion.objectives import DDPMObjective, training_scheduler
from utils.diffusion.sampling import image_generators, sampling_scheduler
from utils.latents.spec import Normalisation
from utils.models.dit import DiT

TYPES = ("epsilon", "v_prediction", "sample")


def setup(prediction_type, count=64):
    """An objective with a learned variance, and everything about one noised batch of sets (B, 3, 2)."""
    scheduler = training_scheduler(prediction_type, "linear", learned_variance=True)
    objective = DDPMObjective(scheduler)
    generator = torch.Generator().manual_seed(0)
    latents, noise, error, share = (torch.randn(count, 3, 2, generator=generator) for _ in range(4))
    timesteps = torch.randint(0, 1000, (count,), generator=generator)
    timesteps[:4] = torch.tensor([0, 1, 500, 999])
    noisy = objective.add_noise(latents, noise, timesteps)
    prediction = objective.target(latents, noise, timesteps) + 0.1 * error
    return scheduler, objective, latents, noisy, noise, prediction, share.tanh(), timesteps


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_bound_is_that_of_the_distributions(prediction_type):
    """KL of the true posterior of a step and the model's, from x0 and x_t by equations 7, 8 and 15; of the first step
    the likelihood of x0."""
    scheduler, objective, latents, noisy, noise, prediction, share, timesteps = setup(prediction_type)
    target = objective.target(latents, noise, timesteps)
    mask = torch.ones(len(latents), 3, dtype=torch.bool)
    both = objective.sample_losses(torch.cat([prediction, share], dim=-1), target, timesteps, mask)
    simple = (prediction - target).square().mean(dim=(1, 2))
    found = (both - simple).double() / (VLB_WEIGHT * 1000)

    alphas_bar, betas = scheduler.alphas_cumprod.double(), scheduler.betas.double()
    x0 = objective.to_x0(prediction, noisy, timesteps).double()
    for row, t in enumerate(timesteps.tolist()):
        before = alphas_bar[t - 1] if t else torch.tensor(1.0).double()
        beta_tilde = betas[t] * (1 - before) / (1 - alphas_bar[t])
        floor = beta_tilde if t else betas[1] * (1 - alphas_bar[0]) / (1 - alphas_bar[1])
        weight = (share[row].double() + 1) / 2
        std = torch.exp(0.5 * (weight * betas[t].log() + (1 - weight) * floor.log()))

        def mean(of, t=t, before=before, row=row):
            return (
                before.sqrt() * betas[t] / (1 - alphas_bar[t]) * of
                + (1 - betas[t]).sqrt() * (1 - before) / (1 - alphas_bar[t]) * noisy[row].double()
            )

        if t:
            truth = Normal(mean(latents[row].double()), beta_tilde.sqrt().expand(3, 2))
            nats = kl_divergence(truth, Normal(mean(x0[row]), std))
        else:
            nats = -Normal(x0[row], std).log_prob(latents[row].double())
        wanted = nats.mean() / torch.log(torch.tensor(2.0))
        torch.testing.assert_close(found[row], wanted.double(), rtol=2e-2, atol=2e-3)


def test_the_bound_moves_the_variance_alone():
    _, objective, latents, _, noise, prediction, share, timesteps = setup("v_prediction")
    target = objective.target(latents, noise, timesteps)
    prediction.requires_grad_(True)
    share.requires_grad_(True)
    objective.variance_loss(share, prediction - target, timesteps).sum().backward()
    assert prediction.grad is None
    assert share.grad.abs().sum() > 0


def test_padding_is_not_in_it():
    _, objective, latents, _, noise, prediction, share, timesteps = setup("epsilon")
    mask = torch.tensor([True, True, False]).expand(len(latents), -1)
    target = objective.target(latents, noise, timesteps)
    plain = objective.sample_losses(torch.cat([prediction, share], dim=-1), target, timesteps, mask)
    poisoned = torch.cat([prediction, share], dim=-1).clone()
    poisoned[:, 2] = 1e3
    torch.testing.assert_close(objective.sample_losses(poisoned, target, timesteps, mask), plain)


def pipeline_of(share, scheduler_name):
    """A run whose variance is the same everywhere, and whose prediction depends on the noise."""
    torch.manual_seed(0)
    model = DiT(4, 1, 2, 1, 16, 2, latent_kind="set", out_channels=4)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    with torch.no_grad():
        model.proj_out.weight[2:] = 0
        model.proj_out.bias[2:] = share
    scheduler = sampling_scheduler(training_scheduler("v_prediction", learned_variance=True))
    scheduler = type(scheduler).from_config(scheduler.config)  # as it is saved and loaded
    denoiser = ConditionalDenoiser(model, NoCondition()).eval()
    vae = CrystalVAE(16, 1, 2, latent_channels=2, max_atoms=4)
    parts = (sampling_scheduler(scheduler, scheduler_name, 10), vae, Normalisation((0.0,) * 2, (1.0,) * 2), {4: 1})
    return CrystalPipeline(denoiser, *parts)


def sampled(share, scheduler_name):
    numbers = torch.tensor([4, 2])
    return pipeline_of(share, scheduler_name).latents(
        numbers, {}, Guidance(num_inference_steps=10), generator=image_generators(0, 0, 2)
    )


@pytest.mark.parametrize(
    ("name", "uses_it"), [("ddpm", True), ("ddim", False), ("dpmsolver++", False), ("unipc", False)]
)
def test_ddpm_samples_with_it_and_the_others_leave_it_out(name, uses_it):
    small, large = sampled(-1.0, name), sampled(1.0, name)
    assert small.shape == large.shape == (2, 4, 2)
    assert small.isfinite().all()
    assert torch.equal(small, large) is not uses_it


def test_guidance_leaves_the_variance_of_the_conditional_branch():
    pipeline = pipeline_of(0.3, "ddpm")
    both = torch.arange(4 * 4 * 4, dtype=torch.float32).view(4, 4, 4)  # two branches of two sets
    joined = pipeline.with_variance(both, 2)
    assert joined.shape == (4, 8, 2)
    assert torch.equal(joined[:, :4], both[..., :2])
    assert torch.equal(joined[:2, 4:], both[:2, :, 2:])
    assert torch.equal(joined[2:, 4:], both[:2, :, 2:])
    with pytest.raises(ValueError, match="guidance_rescale"):
        pipeline.latents(torch.tensor([4]), {"x": torch.zeros(1)}, Guidance(2.0, rescale=0.5))
    ddim = dataclasses.replace(pipeline, scheduler=sampling_scheduler(pipeline.scheduler, "ddim"))
    assert ddim.with_variance(both, 2).shape == (4, 4, 2)
