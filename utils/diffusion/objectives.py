"""What a denoiser learns: the forward process, the regression target and the weight of the loss.

Two families share one interface (`sample_timesteps`, `sample_noise`, `add_noise`, `target`, `loss_weight`, `to_x0`,
`loss`): DDPM (Ho et al. 2020, arXiv 2006.11239) with its three parameterisations, and rectified flow (Liu et al. 2022,
arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206). Both are built from a diffusers scheduler, the one that is
saved with the model, so that sampling cannot disagree with training. `timesteps` are what the model is told: (B,) in
[0, 1000].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from utils.diffusion.learned_variance import VarianceLoss
from utils.draws import SampleDraws
from utils.tensor_ops import append_dims, masked_mean, num_channels, per_channel

# arXiv 2303.09556, section 3.4, with snr = alpha^2 / sigma^2 and g = snr_gamma.
MIN_SNR_WEIGHTS = {
    "epsilon": lambda snr, g: snr.clamp(max=g) / snr,
    "v_prediction": lambda snr, g: snr.clamp(max=g) / (snr + 1),
    "sample": lambda snr, g: snr.clamp(max=g),
}
# Under zero-terminal SNR the v weight would be exactly 0 at the last timestep, which would then never be learnt.
MIN_LOSS_WEIGHT = 1e-3


class Objective(ABC):
    """What both families share. `noise_offset` and `input_perturbation` are 0 = off, and refused where they mean
    nothing.
    """

    noise_offset = 0.0
    input_perturbation = 0.0

    @abstractmethod
    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Uniform numbers (B,) in [0, 1) -> timesteps (B,), by the inverse of the timestep density's distribution."""

    def sample_noise(self, latents: Tensor, draws: SampleDraws) -> Tensor:
        """Noise like `latents`. The offset, one number a channel, belongs to the noise and so to the
        target.
        """
        noise = draws.normal("noise", latents.shape)
        if self.noise_offset:
            offset = draws.normal("noise_offset", (len(latents), num_channels(latents)))
            noise = noise + self.noise_offset * per_channel(offset, latents)
        return noise

    def perturb(self, noise: Tensor, draws: SampleDraws) -> Tensor:
        """The noise that the model's input gets; the target keeps the unperturbed one (arXiv 2301.11706, algorithm
        1).
        """
        if not self.input_perturbation:
            return noise
        return noise + self.input_perturbation * draws.normal("input_perturbation", noise.shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process: `latents` (B, ...) at `timesteps` (B,)."""
        alpha, sigma = self.alpha_sigma(timesteps, latents.ndim)
        return alpha * latents + sigma * noise

    @abstractmethod
    def alpha_sigma(self, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """Scales of latents and noise at `timesteps` (B,), with `ndim` axes to broadcast."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict, like `latents`."""

    @abstractmethod
    def to_x0(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction stands for."""

    def loss_weight(self, timesteps: Tensor) -> Tensor:
        """Weight of each sample's loss, (B,)."""
        return torch.ones(timesteps.shape, device=timesteps.device)

    def sample_losses(
        self, model_pred: Tensor, target: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Weighted mean squared error of each sample, (B,) in float32. `mask` (B, N), True = real, for sets."""
        squared_error = (model_pred.float() - target.float()).square()
        return self.loss_weight(timesteps) * masked_mean(squared_error, mask)

    def loss(self, model_pred: Tensor, target: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of `sample_losses`, a scalar."""
        return self.sample_losses(model_pred, target, timesteps, mask).mean()


class DDPMObjective(Objective):
    """Discrete-time diffusion with epsilon, v (arXiv 2202.00512, appendix D) or x0 ("sample") prediction."""

    def __init__(
        self,
        scheduler: DDPMScheduler,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
        device: torch.device | str = "cpu",
    ):
        is_learned = scheduler.config.variance_type == "learned_range"
        self.variance_loss = VarianceLoss(scheduler, device) if is_learned else None
        self.prediction_type = scheduler.config.prediction_type
        if scheduler.config.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "zero-terminal SNR leaves nothing to predict epsilon from at the last timestep: use v_prediction"
            )
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
        self.input_perturbation = input_perturbation
        # After any rescaling of the betas, which the scheduler has done: the SNR table must see the rescaled ones.
        alphas_cumprod = scheduler.alphas_cumprod.double()
        self.alphas = alphas_cumprod.sqrt().float().to(device)  # (T,)
        self.sigmas = (1 - alphas_cumprod).sqrt().float().to(device)  # (T,)
        self.snr = (alphas_cumprod / (1 - alphas_cumprod)).float().to(device)  # (T,)

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        return (uniform * len(self.alphas)).long()  # (B,) in {0, ..., T - 1}

    def alpha_sigma(self, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        return append_dims(self.alphas[timesteps], ndim), append_dims(self.sigmas[timesteps], ndim)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(timesteps, latents.ndim)
        targets = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: alpha * noise - sigma * latents,
            "sample": lambda: latents,
        }
        return targets[self.prediction_type]()

    def to_x0(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(timesteps, noisy_latents.ndim)
        predictions = {
            "epsilon": lambda: (noisy_latents - sigma * model_pred) / alpha,
            "v_prediction": lambda: alpha * noisy_latents - sigma * model_pred,
            "sample": lambda: model_pred,
        }
        return predictions[self.prediction_type]()

    def sample_losses(
        self, model_pred: Tensor, target: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """With a learned variance `model_pred` has the share of the variance behind the prediction, on the last axis
        (`L_hybrid` of arXiv 2102.09672, equation 16).
        """
        if self.variance_loss is None:
            return super().sample_losses(model_pred, target, timesteps, mask)
        prediction, share = model_pred.chunk(2, dim=-1)
        losses = super().sample_losses(prediction, target, timesteps, mask)
        return losses + self.variance_loss(share, prediction - target, timesteps, mask)

    def loss_weight(self, timesteps: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return super().loss_weight(timesteps)
        snr = self.snr[timesteps]
        return MIN_SNR_WEIGHTS[self.prediction_type](snr, self.snr_gamma).clamp(min=MIN_LOSS_WEIGHT)


class FlowObjective(Objective):
    """Rectified flow: straight paths (1 - sigma) x0 + sigma noise, the velocity noise - x0 as target, sigma = t /
    1000.
    """

    prediction_type = "flow"

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        timestep_density: str = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
    ):
        self.num_train_timesteps = scheduler.config.num_train_timesteps
        self.shift = scheduler.config.shift
        self.timestep_density = timestep_density
        self.logit_mean, self.logit_std = logit_mean, logit_std

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        quantiles = {
            "uniform": lambda u: u,
            # arXiv 2403.03206, equation 19: the logit of sigma is normal.
            "logit_normal": lambda u: torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u)),
        }
        sigmas = quantiles[self.timestep_density](uniform.double().clamp(1e-6, 1 - 1e-6))
        sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)  # the same, equation 23: resolution shift
        return (sigmas * self.num_train_timesteps).float()  # (B,) in (0, 1000)

    def alpha_sigma(self, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        sigma = append_dims(timesteps.float() / self.num_train_timesteps, ndim)
        return 1 - sigma, sigma

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def to_x0(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        _, sigma = self.alpha_sigma(timesteps, noisy_latents.ndim)
        return noisy_latents - sigma * model_pred


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "epsilon": DDPMObjective,
    "v_prediction": DDPMObjective,
    "sample": DDPMObjective,
    "flow": FlowObjective,
}


def training_scheduler(
    prediction_type: str,
    beta_schedule: str = "scaled_linear",
    rescale_betas_zero_snr: bool = False,
    flow_shift: float = 1.0,
    learned_variance: bool = False,
) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """The scheduler whose config is saved with the model and from which objective and samplers are built.

    DDPM's betas are Stable Diffusion's (0.00085 to 0.012) unless `beta_schedule` is "squaredcos_cap_v2"; samples are
    never clipped, for latents have no bounds; and spacing is "trailing", so that few-step samplers start at the last
    timestep (arXiv 2305.08891, section 3.3).
    """
    if prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=flow_shift)
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,  # unused by trailing spacing; StableDiffusionPipeline complains of any other value
        rescale_betas_zero_snr=rescale_betas_zero_snr,
        variance_type="learned_range" if learned_variance else "fixed_small",
    )
