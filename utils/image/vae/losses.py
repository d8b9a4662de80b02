"""Losses of image autoencoders: how far a reconstruction is, how far the posterior, and what a discriminator says.

Images are (B, 3, H, W) in [-1, 1]; every loss is a mean over the batch, so that micro-batches add up to a batch.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

RECONSTRUCTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "mse": F.mse_loss}
MAX_SCALES = 4


def multi_scale_gradient_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical derivatives of two images, at full size and at up to
    three halvings. It sees edges, which L1 and MSE alone let blur, and needs no weights.

    Source: Li and Snavely 2018, MegaDepth, arXiv 1804.00607, equation 4.
    """
    difference = reconstruction - images  # derivatives are linear: those of the difference are the differences
    total, scales = difference.new_zeros(()), 0
    while scales < MAX_SCALES and min(difference.shape[-2:]) >= 2:
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        difference = F.avg_pool2d(difference, 2)
        scales += 1
    return total / max(scales, 1)


class FitLoss:
    """What pulls a reconstruction to its image: the error per pixel, and perceptual terms where they have a weight.

    `lpips` maps two batches of images to (B,) distances; it may be None where its weight is 0.
    """

    def __init__(
        self,
        reconstruction_loss: str,
        gradient_weight: float,
        lpips_weight: float,
        lpips: Callable[[Tensor, Tensor], Tensor] | None,
    ):
        self.pixel_loss = RECONSTRUCTION_LOSSES[reconstruction_loss]
        self.gradient_weight, self.lpips_weight, self.lpips = gradient_weight, lpips_weight, lpips

    def __call__(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and its terms without their weights."""
        terms = {"reconstruction_loss": self.pixel_loss(reconstruction, images)}
        loss = terms["reconstruction_loss"]
        if self.gradient_weight:
            terms["gradient_loss"] = multi_scale_gradient_loss(reconstruction, images)
            loss = loss + self.gradient_weight * terms["gradient_loss"]
        if self.lpips_weight and self.lpips is not None:
            terms["lpips"] = self.lpips(reconstruction, images).mean()
            loss = loss + self.lpips_weight * terms["lpips"]
        return loss, terms


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


# The hinge loss (Lim & Ye 2017, arXiv 1705.02894), as VQGAN and LDM use it.


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Falls as the discriminator takes reconstructions for images."""
    return -fake_logits.mean()


def discriminator_losses(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(loss on images, loss on reconstructions); the discriminator's is the mean of the two."""
    return F.relu(1 - real_logits).mean(), F.relu(1 + fake_logits).mean()
