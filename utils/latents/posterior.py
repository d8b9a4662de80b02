"""The normal posterior of an autoencoder, and its health: what the latents of many samples say of it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Below these nothing of a sample is left in its latents: nats per latent value, and the share of a channel's variance
# that is due to the sample and not to noise. Where the posterior matches the prior that share is the variance of the
# mean over data, whose usual threshold is this one (Burda et al. 2015, arXiv 1509.00519, section 5.2).
MIN_KL, MIN_ACTIVE_SHARE = 0.01, 0.01
# Latents of public autoencoders have stds of 1 to 6; far above, sampled and mean latents decode to different images
# and half precision runs out of range.
MAX_STD = 30.0

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0  # as diffusers' DiagonalGaussianDistribution


class GaussianPosterior(NamedTuple):
    """A normal distribution for each latent value."""

    mean: Tensor  # (B, ..., D)
    logvar: Tensor  # (B, ..., D)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @classmethod
    def of_moments(cls, moments: Tensor) -> "GaussianPosterior":
        """Of an encoder's output (B, ..., 2 D): means, then log-variances. In fp32."""
        mean, logvar = moments.float().chunk(2, dim=-1)
        return cls(mean, logvar.clamp(MIN_LOGVAR, MAX_LOGVAR))


@dataclass(frozen=True)
class PosteriorStatistics:
    """Of the latents of many samples; lists have an entry for each channel."""

    num_samples: int
    mean: list[float]
    std: list[float]  # of sampled latents: what differs between samples and positions, and the posterior's noise
    std_of_mean: list[float]  # over samples, at the same position
    posterior_std: list[float]  # root mean square
    kl: float  # nats per latent value

    @property
    def shift_and_scaling(self) -> tuple[float, float]:
        """The mean of all values, and 1 / std about it: one number each for all channels, as diffusers' configs have
        them.
        """
        shift = float(np.mean(self.mean))
        variance = np.mean(np.square(self.std) + np.square(np.array(self.mean) - shift))
        return shift, float(1 / np.sqrt(max(variance, 1e-12)))

    @property
    def active_channels(self) -> int:
        """Channels that tell samples apart."""
        signal, noise = np.square(self.std_of_mean), np.square(self.posterior_std)
        return int(np.sum(signal > MIN_ACTIVE_SHARE * (signal + noise)))

    def faults(self) -> list[str]:
        """What is wrong with the posterior, and what to do; empty for a sound one."""
        channels = len(self.mean)
        numbers = [*self.mean, *self.std, *self.posterior_std, self.kl]
        if not np.isfinite(numbers).all():
            return ["variance blow-up: latents are not finite; lower --learning_rate or raise --kl_weight"]
        found = []
        if self.kl < MIN_KL or self.active_channels == 0:
            found.append(
                f"posterior collapse: KL of {self.kl:.2g} nats per latent value, {self.active_channels} of {channels} "
                "channels tell samples apart; lower --kl_weight or raise --kl_warmup_steps"
            )
        elif self.active_channels < channels:
            found.append(
                f"partial posterior collapse: only {self.active_channels} of {channels} latent channels tell samples "
                "apart; lower --kl_weight, or raise --kl_warmup_steps"
            )
        if max(self.std) > MAX_STD:
            found.append(
                f"variance blow-up: latents have a std of {max(self.std):.3g}, above {MAX_STD:g}; raise --kl_weight "
                "or lower --learning_rate"
            )
        return found


class PosteriorSums:
    """Sums over the posteriors of batches of samples, from which their statistics follow."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0  # (C, h, w) float64, and so is the next
        self.square_of_mean: Any = 0.0
        self.variance: Any = 0.0  # (C,), and of the posterior
        self.kl = 0.0

    def add(self, mean: Tensor, logvar: Tensor) -> None:
        """Adds a batch: mean and log-variance (B, C, h, w); atoms or vectors as (B, C, 1, 1)."""
        self.kl += kl_to_standard_normal(mean, logvar).mean().item() * len(mean)
        values = mean.double().cpu()
        self.mean = self.mean + values.sum(dim=0)
        self.square_of_mean = self.square_of_mean + values.square().sum(dim=0)
        self.variance = self.variance + logvar.double().exp().cpu().mean(dim=(2, 3)).sum(dim=0)
        self.count += len(mean)

    def statistics(self) -> PosteriorStatistics:
        """Of all batches together."""
        mean, second = self.mean / self.count, self.square_of_mean / self.count  # (C, h, w)
        posterior = self.variance / self.count
        of_mean = (second - mean.square()).clamp(min=0).mean(dim=(1, 2))
        channel_mean = mean.mean(dim=(1, 2))
        variance = second.mean(dim=(1, 2)) - channel_mean.square() + posterior
        std, std_of_mean, posterior_std = (
            each.clamp(min=0).sqrt().tolist() for each in (variance, of_mean, posterior)
        )
        return PosteriorStatistics(
            num_samples=self.count,
            mean=channel_mean.tolist(),
            std=std,
            std_of_mean=std_of_mean,
            posterior_std=posterior_std,
            kl=self.kl / self.count,
        )


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, elementwise (Kingma & Welling 2013, arXiv 1312.6114, appendix
    B).
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def kl_weight_at(global_step: int, kl_weight: float, warmup_steps: int) -> float:
    """Weight of the KL divergence in optimizer step `global_step`, counted from 0: linear from near zero (Bowman et
    al. 2015, arXiv 1511.06349, section 3.1), as a posterior that is pulled to the prior before the decoder can use it
    may never leave it.
    """
    return kl_weight * min(1.0, (global_step + 1) / (warmup_steps + 1))
