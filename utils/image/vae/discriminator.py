"""The patch discriminator that sharpens an autoencoder's images, and what its word weighs."""

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from utils.errors import UserError

# Esser et al. 2020 (VQGAN, arXiv 2012.09841), equation 7 and its code.
ADAPTIVE_EPSILON, MAX_ADAPTIVE_WEIGHT = 1e-4, 1e4
ADAM_BETAS = (0.5, 0.9)  # VQGAN's and LDM's
MAX_WIDENING = 8  # the widest layers have eight times the channels of the first


class PatchDiscriminator(ModelMixin, ConfigMixin):
    """Images (B, 3, H, W) -> one logit for each overlapping patch, (B, 1, h, w), positive for real: the N-layer
    discriminator of pix2pix (Isola et al. 2016, arXiv 1611.07004, appendix 6.1.2), as VQGAN and LDM use it.

    It normalises by group, within each sample, where the papers do by batch. Batch norm would let the judgement of an
    image depend on what else is in its micro-batch and on its process, and spectral norm keeps a state that moves
    with each forward pass; with neither is a step of N micro-batches the same as one of one batch.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3, norm_num_groups: int = 16):
        super().__init__()
        width = base_channels
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for depth in range(1, num_layers + 1):
            before, width = width, base_channels * min(2**depth, MAX_WIDENING)
            stride = 2 if depth < num_layers else 1
            layers.append(nn.Conv2d(before, width, 4, stride, 1, bias=False))
            layers += [nn.GroupNorm(norm_num_groups, width), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)  # as DCGAN and pix2pix

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def build_discriminator(num_layers: int, base_channels: int, resolution: int) -> PatchDiscriminator:
    """A new one for square images. Raises UserError where they are too small, or the width does not divide."""
    smallest = 3 * 2**num_layers  # each of the last two layers takes one off the side
    if resolution < smallest:
        raise UserError(
            f"--disc_num_layers {num_layers}: a discriminator of so many layers needs images of at least {smallest} "
            f"pixels, and --resolution is {resolution}; use fewer layers"
        )
    if base_channels % 8:
        raise UserError(f"--disc_channels {base_channels}: expected a multiple of 8, which groups divide; 64 is usual")
    return PatchDiscriminator(base_channels=base_channels, num_layers=num_layers, norm_num_groups=8)


class Adversary(nn.Module):
    """A discriminator and the adaptive weight of its word in the autoencoder's loss.

    VQGAN's weight is |grad of the reconstruction loss| / |grad of the adversarial loss|, at the decoder's last layer.
    It has to be known before the first micro-batch goes backward, and belongs to all the samples of a step: so it is
    that of the step before, summed over micro-batches and processes, and 0 in the first step. As a buffer it is part
    of checkpoints.
    """

    adaptive_weight: Tensor

    def __init__(self, discriminator: PatchDiscriminator):
        super().__init__()
        self.discriminator = discriminator
        self.register_buffer("adaptive_weight", torch.zeros(()))
        self.gradients: list[Tensor] = []  # (2, ...) of both losses, for each micro-batch of a step

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of images (B, 3, H, W)."""
        return self.discriminator(images)

    def measure(self, reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> None:
        """Adds a micro-batch. It asks autograd for two gradients and accumulates none, so the hooks by which DDP
        averages gradients do not run: `rebalance` averages these.
        """
        found = [
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()
            for loss in (reconstruction_loss, adversarial_loss)
        ]
        self.gradients.append(torch.stack(found))

    def rebalance(self, average: Callable[[Tensor], Tensor]) -> None:
        """Sets the weight of the next step from this step's gradients; `average` takes their mean over processes."""
        gradients = average(torch.stack(self.gradients).mean(dim=0))
        reconstruction, adversarial = gradients.flatten(1).norm(dim=1)
        weight = reconstruction / (adversarial + ADAPTIVE_EPSILON)
        self.adaptive_weight.copy_(weight.clamp(0.0, MAX_ADAPTIVE_WEIGHT))
