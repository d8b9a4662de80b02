"""A reverse process whose variance is learnt beside its mean (Nichol & Dhariwal 2021, arXiv 2102.09672): the model
gives twice as many channels, the second half of which says where between its bounds the log-variance of a step lies.
"""

import math

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from utils.tensor_ops import append_dims, masked_mean

# The weight of the bound beside the simple loss, section 3.1; there of a sum over all timesteps, and here of its mean.
VLB_WEIGHT = 0.001


class VarianceLoss:
    """The variational bound of a step as a function of its variance alone: the mean counts as given (section 3.1)."""

    def __init__(self, scheduler: DDPMScheduler, device: torch.device | str = "cpu"):
        alphas_cumprod = scheduler.alphas_cumprod.double()
        betas = scheduler.betas.double()
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior = betas * (1 - before) / (1 - alphas_cumprod)  # beta tilde, equation 7
        posterior[0] = posterior[1]  # which is 0: the first step has no posterior, and its bound is a likelihood

        def table(values: Tensor) -> Tensor:
            return values.float().to(device)  # (T,)

        self.log_betas, self.log_posterior = table(betas.log()), table(posterior.log())
        # What an error of x0 is in the mean of the posterior, equation 8.
        self.mean_per_x0 = table(before.sqrt() * betas / (1 - alphas_cumprod))
        ratio = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        self.x0_per_error = {  # what an error of the prediction is in x0, by prediction type
            "epsilon": table(ratio),
            "v_prediction": table((1 - alphas_cumprod).sqrt()),
            "sample": table(torch.ones_like(ratio)),
        }[scheduler.config.prediction_type]
        self.num_timesteps = len(betas)

    def log_variance(self, share: Tensor, timesteps: Tensor) -> Tensor:
        """The model's log-variance (B, ...) of a step: `share` -1 is that of the posterior, 1 that of the forward step
        (equation 15).
        """
        lower, upper = (append_dims(each[timesteps], share.ndim) for each in (self.log_posterior, self.log_betas))
        weight = (share + 1) / 2
        return weight * upper + (1 - weight) * lower

    def __call__(self, share: Tensor, error: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weighted bits per value of each sample, (B,). `share` (B, ...) is the second half of the model's output,
        `error` (B, ...) the difference of the first half and its target, `mask` (B, N) True = real.
        """
        share, error = share.float(), error.detach().float()
        log_variance = self.log_variance(share, timesteps)
        of_x0 = error * append_dims(self.x0_per_error[timesteps], error.ndim)
        of_mean = of_x0 * append_dims(self.mean_per_x0[timesteps], error.ndim)
        truth = append_dims(self.log_posterior[timesteps], error.ndim)
        divergence = log_variance - truth - 1 + (truth - log_variance).exp() + of_mean.square() * (-log_variance).exp()
        likelihood = math.log(2 * math.pi) + log_variance + of_x0.square() * (-log_variance).exp()
        bits = torch.where(append_dims(timesteps == 0, error.ndim), likelihood, divergence) / (2 * math.log(2))
        return VLB_WEIGHT * self.num_timesteps * masked_mean(bits, mask)
