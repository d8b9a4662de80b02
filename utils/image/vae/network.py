"""AutoencoderKL (diffusers) from presets, for training from scratch."""

from typing import NamedTuple

from diffusers import AutoencoderKL
from torch import Tensor, nn

from utils.latents.posterior import kl_to_standard_normal


class VAEPreset(NamedTuple):
    block_out_channels: tuple[int, ...]  # one level each: the downsampling factor is 2 ** (levels - 1)
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    mid_block_add_attention: bool


# fmt: off
VAE_PRESETS = {
    #                  channels              layers latent groups attention
    "fast":  VAEPreset((32, 64, 64),             1,    4,    16,   False),
    "small": VAEPreset((64, 128, 128),           1,    4,    32,   True),
    "base":  VAEPreset((96, 192, 384, 384),      2,    4,    32,   True),
    "sd":    VAEPreset((128, 256, 512, 512),     2,    4,    32,   True),   # that of Stable Diffusion 1 and 2
}
# fmt: on


def build_vae(preset: str, sample_size: int) -> AutoencoderKL:
    """A new AutoencoderKL for RGB images of `sample_size`. Its scaling is 1 until training has measured it."""
    chosen = VAE_PRESETS[preset]
    levels = len(chosen.block_out_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=sample_size,
        scaling_factor=1.0,
        **chosen._asdict(),
    )


class TrainableVAE(nn.Module):
    """An AutoencoderKL whose forward gives all that the loss needs, in one call (one forward of a DDP module a
    step).
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and noise (B, C, h, w) -> reconstructions and the posterior's KL divergence (B, C, h,
        w).
        """
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, kl_to_standard_normal(posterior.mean, posterior.logvar)

    def latent_shape(self, images: Tensor) -> tuple[int, ...]:
        """Shape of the latents of images (B, 3, H, W)."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return (len(images), self.vae.config.latent_channels, images.shape[2] // factor, images.shape[3] // factor)

    @property
    def last_layer(self) -> Tensor:
        """The weight (3, C, 3, 3) that a reconstruction comes out of."""
        return self.vae.decoder.conv_out.weight

    def compile_parts(self) -> None:
        """Compiles all but the layers around the latents and the last one, in place. A compiled region has one
        backward for all its weights: were the last layer inside, its gradient alone would cost that of the whole.
        """
        for part in (self.vae.encoder, self.vae.decoder.mid_block, *self.vae.decoder.up_blocks):
            part.compile()
