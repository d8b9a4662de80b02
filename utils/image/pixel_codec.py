"""The codec of `--codec pixels`: no latent space at all.

This file is copied into exported runs. It imports torch and diffusers only.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor


class PixelCodec(ModelMixin, ConfigMixin):
    """An autoencoder whose latents are the images themselves, with the interface of diffusers' autoencoders: what a
    latent space costs and gives is measured against it.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, latent_channels: int = 3, scaling_factor: float = 1.0):
        super().__init__()
        # A model without any tensor has no device, no dtype and no file of weights.
        self.register_buffer("one", torch.ones(()))

    def encode(self, images: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> the same."""
        return AutoencoderTinyOutput(latents=images) if return_dict else (images,)

    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Images (B, 3, H, W) in about [-1, 1] -> the same."""
        return DecoderOutput(sample=latents) if return_dict else (latents,)
