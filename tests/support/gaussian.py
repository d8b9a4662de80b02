"""Objectives and samplers against data of which everything is known: latents (2, 2, 2) from N(MEAN, COVARIANCE)."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from utils.diffusion.objectives import MIN_LOSS_WEIGHT, OBJECTIVES, training_scheduler
from utils.diffusion.pipelines import LatentDiffusionPipeline
from utils.diffusion.sampling import FLOW_SAMPLERS, SAMPLERS

SHAPE = (2, 2, 2)  # channels, height, width

D = 8

EYE = torch.eye(D, dtype=torch.float64)


# Most of the mean, and much of the data, lies outside [-1, 1]; the condition number is 10 and no axis is special.
MEAN = torch.tensor([1.5, -2.0, 0.5, 0.0, -1.0, 2.0, -0.3, 0.8], dtype=torch.float64)


AXES = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]

COVARIANCE = AXES @ torch.diag(torch.logspace(math.log10(0.4), math.log10(4), D, dtype=torch.float64)) @ AXES.T

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")

DDPM_TYPES = ("epsilon", "v_prediction", "sample")


# Every objective: prediction type, betas, zero-terminal SNR, flow's shift.
SETTINGS = [(kind, betas, zero, 1.0) for kind in DDPM_TYPES for betas in BETAS for zero in (False, True)]


SETTINGS = [each for each in SETTINGS if not (each[0] == "epsilon" and each[2])]  # refused
SETTINGS += [("flow", "scaled_linear", False, shift) for shift in (1.0, 3.0)]


def fitting(settings):
    return [name for name in SAMPLERS if (name in FLOW_SAMPLERS) == (settings[0] == "flow")]


COMBINATIONS = [(settings, name) for settings in SETTINGS for name in fitting(settings)]


def build(settings, **objective_settings):
    """An objective and the scheduler that would be saved with its model."""
    scheduler = training_scheduler(*settings)
    return OBJECTIVES[settings[0]](scheduler, **objective_settings), scheduler


def power(matrix, exponent):
    """A power of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


# What is known


def scales(objective, timestep):
    """Scales of latents and noise of the objective's own forward process, as float64 numbers."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    timesteps = timestep.reshape(1)
    return tuple(objective.add_noise(*pair, timesteps).double().item() for pair in ((one, zero), (zero, one)))


def posterior(noisy_latents, alpha, sigma, noise_covariance=EYE, input_noise_covariance=None):
    """E[x0 | x] and E[noise | x] for x = alpha x0 + sigma noise, (B, 8) each: regression on jointly Gaussian variables.

    `input_noise_covariance` is that of the noise in x, where it is more than the noise asked for.
    """
    extra = noise_covariance if input_noise_covariance is None else input_noise_covariance
    precision = torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * extra)
    residual = (noisy_latents - alpha * MEAN) @ precision
    return MEAN + alpha * residual @ COVARIANCE, sigma * residual @ noise_covariance


def distance(mean, covariance, true_mean=MEAN, true_covariance=COVARIANCE):
    """How far two Gaussians are apart, in standard deviations of the data: of the mean, and the largest relative
    error of the variance along any direction.
    """
    whiten = power(COVARIANCE, -0.5)
    return (
        (whiten @ (mean - true_mean)).norm().item(),
        torch.linalg.matrix_norm(whiten @ (covariance - true_covariance) @ whiten, 2).item(),
    )


def exact_output(objective, stochastic):
    """Mean and covariance of what infinitely many steps make of N(0, I).

    That is not quite the data: where the last timestep has some signal, N(0, I) is not what the model was trained on
    there. The probability flow of a Gaussian takes x_T to m + C^(1/2) S^(-1/2) (x_T - alpha m), S = alpha^2 C + sigma^2
    I; the reverse diffusion takes it to a draw from the posterior of x0 given x_T.
    """
    if objective.prediction_type == "flow":
        return MEAN, COVARIANCE
    alpha, sigma = scales(objective, torch.tensor(999))
    S = alpha**2 * COVARIANCE + sigma**2 * EYE
    if stochastic:
        gain = alpha * COVARIANCE @ torch.linalg.inv(S)
        return MEAN - gain @ (alpha * MEAN), COVARIANCE - alpha * gain @ COVARIANCE + gain @ gain.T
    transport = power(COVARIANCE, 0.5) @ power(S, -0.5)  # C and S commute
    return MEAN - transport @ (alpha * MEAN), transport @ transport.T


# Samplers, run by the pipeline


class GaussianPipeline(LatentDiffusionPipeline):
    """The pipeline, its own loop included, around a denoiser that has learnt all that `objective` can teach it: the
    target's conditional mean. Predictions are off by `bias`.
    """

    def __init__(self, scheduler, objective, bias=0.0):
        self.scheduler, self.objective, self.bias = scheduler, objective, bias

    class denoiser:
        class config:
            sample_size, in_channels = SHAPE[1], SHAPE[0]

    _execution_device = torch.device("cpu")

    def encode_condition(self, prompt, class_labels, negative_prompt, num_images):
        return {}, num_images

    def progress_bar(self, iterable):
        return iterable

    def maybe_free_model_hooks(self):
        pass

    def conditions(self, values, drop):
        return None

    def predict_from(self, conditioning, noisy_latents, timesteps):
        assert (timesteps == timesteps[0]).all()
        alpha, sigma = scales(self.objective, timesteps[0])
        x0, noise = posterior(noisy_latents.double().flatten(1), alpha, sigma)
        return (self.objective.target(x0, noise, timesteps) + self.bias).view_as(noisy_latents)


def output_of(scheduler, objective, steps, monkeypatch, bias=0.0):
    """Mean and covariance, exactly, of the latents that the pipeline makes from N(0, I) noise.

    In the batch: the origin, whose image is the mean; the unit vectors, whose images less that are the columns of the
    sampler's matrix; and, for DDPM, for each step one row for each unit vector of the noise that this step adds.
    """
    draws = steps if isinstance(scheduler, DDPMScheduler) else 0
    start = torch.zeros(1 + D + D * draws, D, dtype=torch.float64)
    start[1 : 1 + D] = EYE
    drawn = 0

    def unit_noise(shape, **_):
        nonlocal drawn
        first = 1 + D + D * drawn
        noise = torch.zeros(shape[0], D, dtype=torch.float64)
        noise[first : first + D] = EYE
        drawn += 1
        return noise.view(shape)

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", unit_noise)
    pipeline = GaussianPipeline(scheduler, objective, bias)
    latents = pipeline(
        num_inference_steps=steps,
        num_images_per_prompt=len(start),
        latents=start.view(-1, *SHAPE),
        output_type="latent",
    ).images
    assert max(draws - 1, 0) <= drawn <= draws  # from t = 0 none is added
    images = latents.double().flatten(1)
    columns = images[1:] - images[0]
    return images[0], columns.T @ columns


# The loss


class Points:
    """In the place of random draws: points in which data, noise, noise offset and input perturbation, all independent,
    have together exactly their means and covariances. The mean over the points of any square of an affine function is
    therefore its expectation.
    """

    SIZES = (("data", D), ("noise", D), ("noise_offset", SHAPE[0]), ("input_perturbation", D))

    def __init__(self):
        total = sum(size for _, size in self.SIZES)
        points = math.sqrt(total) * torch.cat([torch.eye(total), -torch.eye(total)])  # (2 * total, total)
        parts = points.split([size for _, size in self.SIZES], dim=1)
        self.parts = dict(zip([name for name, _ in self.SIZES], parts, strict=True))
        self.latents = (MEAN + self.parts["data"].double() @ power(COVARIANCE, 0.5)).float().view(-1, *SHAPE)

    def normal(self, name, shape):
        return self.parts[name].view(shape)


def noise_covariance(offset):
    """I + offset^2 11^T in each channel."""
    block = torch.ones(D // SHAPE[0], D // SHAPE[0], dtype=torch.float64)
    return EYE + offset**2 * torch.block_diag(*[block] * SHAPE[0])


def float64_scales(settings, timestep):
    """Scales of latents and noise in float64, from the papers: arXiv 2006.11239; 2102.09672, equation 17, for the cosine;
    2305.08891, algorithm 1, for zero-terminal SNR; 2209.03003 for flow.
    """
    kind, schedule, zero_snr, _ = settings
    if kind == "flow":
        return 1 - timestep / 1000, timestep / 1000
    cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = {
        "linear": np.linspace(0.00085, 0.012, 1000),
        "scaled_linear": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
        "squaredcos_cap_v2": np.minimum(1 - cosine[1:] / cosine[:-1], 0.999),
    }[schedule]
    alphas = np.sqrt(np.cumprod(1 - betas))
    if zero_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return alphas[timestep], math.sqrt(1 - alphas[timestep] ** 2)


def coefficients(kind, alpha, sigma):
    """The target is a x0 + b noise (arXiv 2202.00512, appendix D; 2209.03003)."""
    return {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-sigma, alpha), "flow": (-1, 1)}[kind]


def weight_of(kind, alpha, sigma, snr_gamma):
    """Min-SNR (arXiv 2303.09556), with the floor under zero-terminal SNR."""
    if snr_gamma is None:
        return 1.0
    snr = alpha**2 / sigma**2
    clipped = min(snr, snr_gamma)
    weight = {"epsilon": clipped / snr if snr else 0, "v_prediction": clipped / (snr + 1), "sample": clipped}[kind]
    return max(weight, MIN_LOSS_WEIGHT)


def check_optimum(objective, settings, snr_gamma=None, offset=0.0, perturbation=0.0):
    """At each timestep, asserts that the closed-form optimum has the expected loss that theory gives it, and that affine
    changes A x + b of the prediction add exactly their own weighted mean square: the optimum is one, and the only one.
    """
    kind, points = settings[0], Points()
    of_noise = noise_covariance(offset)
    in_input = of_noise + perturbation**2 * EYE
    generator = torch.Generator().manual_seed(1)
    for timestep in (5, 100, 500, 900, 990, 999):
        alpha, sigma = float64_scales(settings, timestep)
        timesteps = torch.full(
            (len(points.latents),), timestep, dtype=torch.float32 if kind == "flow" else torch.int64
        )
        noise = objective.sample_noise(points.latents, points)
        noisy = objective.add_noise(points.latents, objective.perturb(noise, points), timesteps)
        target = objective.target(points.latents, noise, timesteps)
        x = noisy.double().flatten(1)
        x0, eps = posterior(x, alpha, sigma, of_noise, in_input)
        a, b = coefficients(kind, alpha, sigma)
        optimum = a * x0 + b * eps

        def loss(prediction):
            prediction = prediction.float().view(-1, *SHAPE)
            return objective.loss(prediction, target, timesteps).item()  # noqa: B023

        weight = weight_of(kind, alpha, sigma, snr_gamma)
        # The variance of the target that x does not tell: Schur's complement.
        with_x = a * alpha * COVARIANCE + b * sigma * of_noise
        spread = alpha**2 * COVARIANCE + sigma**2 * in_input
        left = a**2 * COVARIANCE + b**2 * of_noise - with_x @ torch.linalg.inv(spread) @ with_x
        least = loss(optimum)
        # diffusers rescales betas in float32, which moves sigma by 0.2% at the first timesteps.
        assert least == pytest.approx(weight * left.trace().item() / D, rel=5e-3, abs=2e-6 * weight)

        for scale in (0.02, 0.2):
            matrix, constant = (
                scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((D, D), (D,))
            )
            change = x @ matrix + constant
            added = weight * change.square().mean().item()
            assert loss(optimum + change) - least == pytest.approx(added, rel=5e-3)
