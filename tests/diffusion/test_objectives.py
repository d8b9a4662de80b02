"""Objectives and samplers against diffusers' schedulers, formulas in float64, and the closed form of Gaussian data."""

import math
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats

import train_class_cond_ldm
from utils.diffusion.objectives import MIN_LOSS_WEIGHT, OBJECTIVES, training_scheduler
from utils.diffusion.sampling import FLOW_SAMPLERS, SAMPLERS, sampling_scheduler
from utils.draws import SampleDraws
from utils.errors import UserError

DDPM_TYPES = ["epsilon", "v_prediction", "sample"]
SHAPES = [(6, 4, 5, 3), (6, 7, 3), (6, 9)]  # a grid, a set, a vector
TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


def build(prediction_type, settings=None, **scheduler_settings):
    """An objective and the scheduler that would be saved with its model."""
    scheduler = training_scheduler(prediction_type, **scheduler_settings)
    return OBJECTIVES[prediction_type](scheduler, **(settings or {})), scheduler


def latents_and_noise(shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def alphas_cumprod(zero_snr=False):
    """Stable Diffusion's schedule in float64; rescaled as in arXiv 2305.08891, algorithm 1."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    if zero_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


# Forward process and targets


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction_type", DDPM_TYPES)
def test_ddpm_forward_process_and_targets(prediction_type, shape):
    """Noisy latents are those of DDPMScheduler.add_noise, the v target that of get_velocity."""
    objective, _ = build(prediction_type)
    truth = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, noise = latents_and_noise(shape)
    torch.testing.assert_close(
        objective.add_noise(latents, noise, TIMESTEPS), truth.add_noise(latents, noise, TIMESTEPS)
    )
    target = {"epsilon": noise, "sample": latents, "v_prediction": truth.get_velocity(latents, noise, TIMESTEPS)}
    torch.testing.assert_close(objective.target(latents, noise, TIMESTEPS), target[prediction_type])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_forward_process_and_target(shape, shift):
    """Noisy latents are those of FlowMatchEulerDiscreteScheduler.scale_noise; the target is the path's derivative in sigma."""
    objective, scheduler = build("flow", flow_shift=shift)
    latents, noise = latents_and_noise(shape)
    timesteps = scheduler.timesteps[[0, 3, 400, 700, 900, 999]]
    noisy_latents = objective.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy_latents, scheduler.scale_noise(latents, timesteps, noise))
    step = 0.25  # of sigma: the path is straight, so that a finite difference is exact
    further = objective.add_noise(latents, noise, timesteps + 1000 * step)
    difference = (further - noisy_latents) / step
    torch.testing.assert_close(objective.target(latents, noise, timesteps), difference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", [*DDPM_TYPES, "flow"])
def test_to_x0_inverts_the_target(prediction_type, zero_snr, shape):
    """A perfect prediction stands for the very latents, also where no signal is left."""
    if zero_snr and prediction_type in ("epsilon", "flow"):
        pytest.skip("refused")
    objective, _ = build(prediction_type, rescale_betas_zero_snr=zero_snr)
    latents, noise = latents_and_noise(shape)
    noisy_latents = objective.add_noise(latents, noise, TIMESTEPS)
    target = objective.target(latents, noise, TIMESTEPS)
    tolerance = 2e-5 if prediction_type == "epsilon" else 2e-6  # epsilon divides by alpha, 0.07 at the end
    torch.testing.assert_close(
        objective.to_x0(target, noisy_latents, TIMESTEPS), latents, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("prediction_type", DDPM_TYPES)
def test_to_x0_is_the_schedulers(prediction_type):
    """x0 of any prediction is what DDPMScheduler.step calls pred_original_sample."""
    objective, scheduler = build(prediction_type)
    model_pred, sample = latents_and_noise((1, 4, 5, 5))
    for timestep in (0, 321, 999):
        truth = scheduler.step(model_pred, timestep, sample).pred_original_sample
        ours = objective.to_x0(model_pred, sample, torch.tensor([timestep]))
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


# Loss weights


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", DDPM_TYPES)
def test_min_snr_weights(prediction_type, zero_snr, gamma):
    """Weights of all timesteps are arXiv 2303.09556's, computed in float64 from betas that are rescaled first."""
    if zero_snr and prediction_type == "epsilon":
        pytest.skip("refused")
    objective, _ = build(prediction_type, {"snr_gamma": gamma}, rescale_betas_zero_snr=zero_snr)
    alpha_squared = alphas_cumprod(zero_snr)
    snr = alpha_squared / (1 - alpha_squared)
    truth = {
        "epsilon": lambda: np.minimum(snr, gamma) / snr,
        "v_prediction": lambda: np.minimum(snr, gamma) / (snr + 1),
        "sample": lambda: np.minimum(snr, gamma),
    }[prediction_type]()
    weights = objective.loss_weight(torch.arange(1000)).double().numpy()
    assert weights.shape == (1000,)
    learnt = truth > MIN_LOSS_WEIGHT
    assert learnt.mean() > 0.93
    np.testing.assert_allclose(weights[learnt], truth[learnt], rtol=2e-3 if zero_snr else 2e-4)
    np.testing.assert_allclose(weights[~learnt], MIN_LOSS_WEIGHT, rtol=1e-6)
    if zero_snr:
        assert truth[-1] == 0
        assert weights[-1] == pytest.approx(MIN_LOSS_WEIGHT)


def test_weights_are_one_without_min_snr():
    """Without Min-SNR the loss of DDPM and flow is the plain mean squared error."""
    latents, noise = latents_and_noise((6, 4, 5, 3))
    for prediction_type in OBJECTIVES:
        objective, _ = build(prediction_type)
        loss = objective.loss(latents, noise, TIMESTEPS)
        torch.testing.assert_close(loss, torch.nn.functional.mse_loss(latents, noise))


def test_snr_table_sees_the_rescaled_betas():
    """With zero-terminal SNR the last entry is 0, the first is unchanged, and v is then all of the latents."""
    rescaled, _ = build("v_prediction", rescale_betas_zero_snr=True)
    plain, _ = build("v_prediction")
    assert rescaled.snr[-1] == 0
    assert plain.snr[-1] > 0
    torch.testing.assert_close(rescaled.snr[0], plain.snr[0], rtol=1e-3, atol=0)
    latents, noise = latents_and_noise((1, 5))
    torch.testing.assert_close(rescaled.target(latents, noise, torch.tensor([999])), -latents)


def test_loss_weighs_samples_not_elements():
    """The loss is the mean over samples of weight times mean squared error, computed in float64."""
    objective, _ = build("v_prediction", {"snr_gamma": 5.0})
    prediction, target = latents_and_noise((6, 4, 5, 3))
    snr = alphas_cumprod() / (1 - alphas_cumprod())
    weights = (np.minimum(snr, 5) / (snr + 1))[TIMESTEPS.numpy()]
    errors = ((prediction - target).double().numpy() ** 2).mean(axis=(1, 2, 3))
    assert objective.loss(prediction, target, TIMESTEPS).item() == pytest.approx((weights * errors).mean(), rel=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_padding_does_not_change_the_loss(prediction_type):
    """Sets padded with anything have the loss, and the gradient, of the sets without padding."""
    settings = {"snr_gamma": 5.0} if prediction_type == "epsilon" else {}
    objective, _ = build(prediction_type, settings)
    sizes = [3, 5, 1, 4, 2, 5]
    prediction, target = latents_and_noise((6, 5, 3))
    alone = [
        objective.loss(prediction[i : i + 1, :n], target[i : i + 1, :n], TIMESTEPS[i : i + 1])
        for i, n in enumerate(sizes)
    ]
    truth = torch.stack(alone).mean()
    mask = torch.arange(5) < torch.tensor(sizes)[:, None]
    garbage = torch.where(mask[..., None], prediction, 1e3).requires_grad_()
    loss = objective.loss(garbage, target, TIMESTEPS, mask)
    torch.testing.assert_close(loss, truth)
    wider = objective.loss(
        torch.nn.functional.pad(garbage, (0, 0, 0, 4), value=7.0),
        torch.nn.functional.pad(target, (0, 0, 0, 4)),
        TIMESTEPS,
        torch.nn.functional.pad(mask, (0, 4)),
    )
    torch.testing.assert_close(wider, truth)
    (gradient,) = torch.autograd.grad(loss, garbage)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).all()


# Refusals


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_zero_snr_with_epsilon_is_refused(beta_schedule):
    """At zero SNR the input is the noise itself: the objective refuses to be built."""
    scheduler = training_scheduler("epsilon", beta_schedule, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="v_prediction"):
        OBJECTIVES["epsilon"](scheduler)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--prediction_type epsilon --rescale_betas_zero_snr", ["rescale_betas_zero_snr", "epsilon"]),
        ("--prediction_type flow --noise_offset 0.1", ["noise_offset", "flow"]),
        ("--prediction_type flow --input_perturbation 0.1", ["input_perturbation", "flow"]),
        ("--prediction_type flow --snr_gamma 5", ["snr_gamma", "flow"]),
        ("--prediction_type flow --rescale_betas_zero_snr", ["rescale_betas_zero_snr", "flow"]),
        ("--prediction_type flow --beta_schedule linear", ["beta_schedule", "flow"]),
        ("--prediction_type epsilon --flow_shift 3", ["flow_shift", "epsilon"]),
        ("--prediction_type epsilon --timestep_density uniform", ["timestep_density", "epsilon"]),
        ("--rescale_betas_zero_snr --noise_offset 0.1", ["rescale_betas_zero_snr", "noise_offset"]),
        ("--rescale_betas_zero_snr --input_perturbation 0.1", ["rescale_betas_zero_snr", "input_perturbation"]),
    ],
)
def test_combinations_without_meaning_are_refused(monkeypatch, flags, named):
    """A flag that would mean nothing in this mode is refused in one line that names both."""
    monkeypatch.setattr(sys, "argv", ["train", "--output_dir", "unused", *flags.split()])
    with pytest.raises(UserError) as caught:
        train_class_cond_ldm.parse_args()
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in named)


def test_every_meaningful_objective_is_accepted(monkeypatch):
    """What belongs together passes the check."""
    for flags in (
        "--prediction_type epsilon --snr_gamma 5 --noise_offset 0.1 --input_perturbation 0.1",
        "--prediction_type v_prediction --rescale_betas_zero_snr --snr_gamma 5 --beta_schedule linear",
        "--prediction_type flow --flow_shift 3 --timestep_density uniform",
    ):
        monkeypatch.setattr(sys, "argv", ["train", "--output_dir", "unused", *flags.split()])
        assert train_class_cond_ldm.parse_args().prediction_type == flags.split()[1]


# Timesteps


def test_ddpm_timesteps_are_uniform_from_0_to_999():
    """Every timestep, both ends included, gets its share, for draws spread evenly and for real ones."""
    objective, _ = build("epsilon")
    even = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    assert (torch.bincount(objective.sample_timesteps(even), minlength=1000) == 50).all()
    ends = objective.sample_timesteps(torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [0, 999]
    drawn = objective.sample_timesteps(SampleDraws(3, torch.arange(100_000)).uniform("timestep"))
    counts = torch.bincount(drawn, minlength=1000)
    assert counts.shape == (1000,)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7)])
def test_logit_normal_density(mean, std):
    """The logits of sigma are normal with the mean and std asked for (arXiv 2403.03206, equation 19)."""
    objective, _ = build("flow", {"logit_mean": mean, "logit_std": std})
    sigmas = objective.sample_timesteps(SampleDraws(0, torch.arange(100_000)).uniform("timestep")).double() / 1000
    logits = torch.log(sigmas / (1 - sigmas)).numpy()
    assert logits.mean() == pytest.approx(mean, abs=0.015)
    assert logits.std() == pytest.approx(std, abs=0.015)
    assert stats.kstest(logits, "norm", args=(mean, std)).pvalue > 1e-3


def test_uniform_density_of_flow():
    """With the uniform density sigma is the uniform draw itself."""
    objective, _ = build("flow", {"timestep_density": "uniform"})
    uniform = torch.linspace(0.001, 0.999, 500)
    torch.testing.assert_close(objective.sample_timesteps(uniform), 1000 * uniform)


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
def test_timesteps_stay_finite_at_the_ends(density):
    """The smallest and largest draw give timesteps inside (0, 1000)."""
    objective, _ = build("flow", {"timestep_density": density})
    timesteps = objective.sample_timesteps(torch.tensor([0.0, 1 - 2**-24]))
    assert ((timesteps > 0) & (timesteps < 1000)).all()


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_flow_shift(shift):
    """Training's shift is that by which diffusers' scheduler shifts its own sigmas."""
    objective, scheduler = build("flow", {"timestep_density": "uniform"}, flow_shift=shift)
    ours = objective.sample_timesteps(torch.linspace(1, 0.001, 1000, dtype=torch.float64)[1:])
    torch.testing.assert_close(ours, scheduler.timesteps[1:], rtol=1e-5, atol=1e-3)


# Noise


def test_noise_offset_is_one_number_a_channel_and_in_the_target():
    """Offset noise is constant over a channel, has its scale, and is what epsilon must predict."""
    draws = SampleDraws(0, torch.arange(2000))
    latents = torch.zeros(2000, 3, 4, 4)
    plain, _ = build("epsilon")
    offset, _ = build("epsilon", {"noise_offset": 0.2})
    noise = offset.sample_noise(latents, draws)
    difference = noise - plain.sample_noise(latents, draws)  # (B, C, H, W)
    assert difference.flatten(2).std(dim=2).max() < 1e-6
    per_channel = difference[:, :, 0, 0]
    assert per_channel.std().item() == pytest.approx(0.2, rel=0.05)
    assert abs(np.corrcoef(per_channel.numpy().T) - np.eye(3)).max() < 0.08  # another number for each channel
    timesteps = torch.full((2000,), 999)
    noisy_latents = offset.add_noise(latents, offset.perturb(noise, draws), timesteps)
    sigma = math.sqrt(1 - alphas_cumprod()[-1])
    torch.testing.assert_close(noisy_latents, sigma * offset.target(latents, noise, timesteps))


def test_noise_offset_of_a_set_is_the_same_for_all_its_items():
    """Channels of sets (B, N, C) and vectors (B, C) are last."""
    draws = SampleDraws(0, torch.arange(8))
    offset, plain = build("epsilon", {"noise_offset": 0.2})[0], build("epsilon")[0]
    for shape in ((8, 5, 3), (8, 3)):
        difference = offset.sample_noise(torch.zeros(shape), draws) - plain.sample_noise(torch.zeros(shape), draws)
        items = difference.view(8, -1, 3)
        assert (items - items[:, :1]).abs().max() < 1e-6
        assert items[:, 0].std(dim=1).min() > 1e-3  # another number for each channel


def test_input_perturbation_is_not_in_the_target():
    """The input's noise has variance 1 + p^2 and the target the unperturbed noise (arXiv 2301.11706, algorithm 1)."""
    draws = SampleDraws(0, torch.arange(2000))
    latents = torch.zeros(2000, 1, 4, 4)
    objective, _ = build("epsilon", {"input_perturbation": 0.5})
    noise = objective.sample_noise(latents, draws)
    perturbed = objective.perturb(noise, draws)
    extra = perturbed - noise
    assert extra.std().item() == pytest.approx(0.5, rel=0.02)
    assert abs(np.corrcoef(extra.flatten(), noise.flatten())[0, 1]) < 0.02  # and not a multiple of the noise
    timesteps = torch.full((2000,), 500)
    assert torch.equal(objective.target(latents, noise, timesteps), noise)
    assert perturbed.var().item() == pytest.approx(1.25, rel=0.02)
    without, _ = build("epsilon")
    assert torch.equal(without.perturb(noise, draws), noise)


# The closed form of Gaussian data: x0 ~ N(MEAN, STD^2), of which everything is known

MEAN, STD = 0.7, 0.5


def posterior_mean(noisy_latents, alpha, sigma):
    """E[x0 | noisy latents] of Gaussian data."""
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return MEAN + gain * (noisy_latents - alpha * MEAN)


def optimal_prediction(prediction_type, noisy_latents, alpha, sigma):
    """What the perfect model of Gaussian data predicts."""
    x0 = posterior_mean(noisy_latents, alpha, sigma)
    noise = (noisy_latents - alpha * x0) / sigma
    return {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * x0,
        "sample": x0,
        "flow": noise - x0,
    }[prediction_type]


@pytest.mark.parametrize("prediction_type", [*DDPM_TYPES, "flow"])
def test_the_optimal_denoiser_minimises_the_loss(prediction_type):
    """The conditional mean of Gaussian data has the loss that theory gives it, and any other prediction a larger one."""
    objective, _ = build(prediction_type)
    positions = torch.arange(20_000)
    draws = SampleDraws(0, positions)
    latents = MEAN + STD * draws.normal("data", (len(positions), 1))
    noise = objective.sample_noise(latents, draws)
    timesteps = objective.sample_timesteps(draws.uniform("timestep"))
    noisy_latents = objective.add_noise(latents, noise, timesteps)
    if prediction_type == "flow":
        sigma = timesteps.double()[:, None] / 1000
        alpha = 1 - sigma
    else:
        alpha_squared = torch.from_numpy(alphas_cumprod())[timesteps][:, None]
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
    optimal = optimal_prediction(prediction_type, noisy_latents.double(), alpha, sigma).float()
    target = objective.target(latents, noise, timesteps)
    loss = objective.loss(optimal, target, timesteps).item()

    variance = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # of x0 given the noisy latents
    per_x0 = {"epsilon": alpha / sigma, "sample": 1.0, "v_prediction": 1 / sigma, "flow": 1 / sigma}[prediction_type]
    assert loss == pytest.approx((variance * per_x0**2).mean().item(), rel=0.03)
    gap = 0.01  # of a perturbation of mean square 0.01, but for the correlation that chance leaves
    for worse in (optimal + 0.1, optimal - 0.1, optimal + 0.1 * torch.sign(noisy_latents)):
        assert objective.loss(worse, target, timesteps).item() - loss == pytest.approx(gap, abs=0.004)
    for factor in (0.9, 1.1):
        assert objective.loss(factor * optimal, target, timesteps).item() > loss


def allowed(prediction_type):
    return [name for name in SAMPLERS if (name in FLOW_SAMPLERS) == (prediction_type == "flow")]


END_TO_END = [(kind, False, name) for kind in [*DDPM_TYPES, "flow"] for name in allowed(kind)]
END_TO_END += [(kind, True, name) for kind in ("v_prediction", "sample") for name in allowed(kind)]


@pytest.mark.parametrize(("prediction_type", "zero_snr", "sampler"), END_TO_END)
def test_samplers_return_the_distribution_of_the_data(prediction_type, zero_snr, sampler):
    """From the perfect model of N(0.7, 0.5^2) every sampler, from evenly spread noise, returns that mean and std to 0.03.

    100 steps; 400 for DDPM, whose ancestral steps leave too little variance when they are few.
    """
    trained_with = training_scheduler(prediction_type, rescale_betas_zero_snr=zero_snr)
    scheduler = sampling_scheduler(trained_with, sampler)
    scheduler.set_timesteps(400 if sampler == "ddpm" else 100)
    alpha_squared = alphas_cumprod(zero_snr)
    generator = torch.Generator().manual_seed(0)
    quantiles = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    sample = quantiles.float().view(-1, 1, 1, 1) * getattr(scheduler, "init_noise_sigma", 1.0)
    takes_generator = sampler == "ddpm"
    for timestep in scheduler.timesteps:
        if prediction_type == "flow":
            sigma = timestep.item() / 1000
            alpha = 1 - sigma
        else:
            alpha = math.sqrt(alpha_squared[int(timestep)])
            sigma = math.sqrt(1 - alpha_squared[int(timestep)])
        model_input = scheduler.scale_model_input(sample, timestep) if prediction_type != "flow" else sample
        prediction = optimal_prediction(prediction_type, model_input, alpha, sigma)
        extra = {"generator": generator} if takes_generator else {}
        sample = scheduler.step(prediction, timestep, sample, return_dict=False, **extra)[0]
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert sample.std().item() == pytest.approx(STD, abs=0.03)


def test_every_objective_has_samplers():
    """Each objective is listed above with at least two samplers, and the wrong kind is refused by name."""
    for prediction_type in OBJECTIVES:
        scheduler = training_scheduler(prediction_type)
        assert len(allowed(prediction_type)) >= 2
        for name in set(SAMPLERS) - set(allowed(prediction_type)):
            with pytest.raises(UserError, match="--scheduler"):
                sampling_scheduler(scheduler, name)


# Schedulers


@pytest.mark.parametrize("prediction_type", DDPM_TYPES)
def test_training_scheduler_is_stable_diffusions(prediction_type):
    """Stable Diffusion's betas, and no clipping: latents are not in [-1, 1]."""
    scheduler = training_scheduler(prediction_type)
    assert scheduler.config.clip_sample is False
    assert scheduler.config.thresholding is False
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), alphas_cumprod(), rtol=1e-4)
    large = torch.full((1, 1), 7.0)
    x0 = scheduler.step({"sample": large}.get(prediction_type, 0 * large), 0, large).pred_original_sample
    assert x0.item() > 6.9


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in FLOW_SAMPLERS])
def test_few_step_samplers_start_at_the_last_timestep(name, zero_snr):
    """25 steps begin at t = 999, where there is least signal, with the training's schedule and without clipping."""
    trained_with = training_scheduler("v_prediction", rescale_betas_zero_snr=zero_snr)
    scheduler = sampling_scheduler(trained_with, name)
    scheduler.set_timesteps(25)
    assert len(scheduler.timesteps) == 25
    assert int(scheduler.timesteps[0]) == 999
    assert scheduler.config.prediction_type == "v_prediction"
    assert not scheduler.config.get("clip_sample", False)
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy()[:-1], alphas_cumprod(zero_snr)[:-1], rtol=2e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_flow_samplers_start_at_pure_noise(name, shift):
    """Flow starts at sigma 1 (t = 1000), ends at 0, and keeps the shift it was trained with."""
    scheduler = sampling_scheduler(training_scheduler("flow", flow_shift=shift), name)
    scheduler.set_timesteps(25)
    assert scheduler.sigmas[0].item() == pytest.approx(1.0)
    assert scheduler.timesteps[0].item() == pytest.approx(1000.0)
    assert scheduler.sigmas[-1].item() == 0.0
    assert scheduler.config.shift == shift
    middle = np.interp(0.5, np.linspace(0, 1, len(scheduler.sigmas)), scheduler.sigmas.numpy())
    assert middle == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=0.05)


def test_default_samplers():
    """With no name a DDPM run is sampled by DDIM and a flow by Euler."""
    assert type(sampling_scheduler(training_scheduler("epsilon"))) is SAMPLERS["ddim"]
    assert type(sampling_scheduler(training_scheduler("flow"))) is SAMPLERS["flow_euler"]
