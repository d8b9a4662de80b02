"""Small autoencoders, and images for them."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from utils.image.vae.network import TrainableVAE, build_vae
from utils.latents.spec import Normalisation

# What no plain scaling can say.
PER_CHANNEL = Normalisation((0.3, -1.2, 2.0, 0.0), (0.5, 1.7, 4.0, 0.25))


def tiny_kl(**settings):
    """8 x 8 latents of 16 x 16 images, with weights large enough that every layer shows."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**(config | settings)).eval()


def random_images(batch=2, size=16):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def images(count=4, side=16, seed=0):
    """Smooth random images (B, 3, H, W) in [-1, 1]."""
    noise = torch.randn(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=side, mode="bilinear").clamp(-1, 1)


def autoencoder():
    torch.manual_seed(0)
    return TrainableVAE(build_vae("fast", 16))
