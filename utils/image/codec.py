"""Codecs: frozen autoencoders of diffusers between images and latents, and the one place that normalises latents."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from utils.errors import UserError
from utils.files import read_json
from utils.frozen import load_component
from utils.image.pixel_codec import PixelCodec
from utils.latents.spec import Normalisation

PIXELS = "pixels"  # the name of the codec that changes nothing, where otherwise a VAE is named


def load_autoencoder(path: str) -> ModelMixin:
    """An autoencoder of diffusers, or our PixelCodec, from where its config.json lies."""
    config = Path(path) / "config.json"
    is_pixels = config.is_file() and read_json(config).get("_class_name") == PixelCodec.__name__
    return (PixelCodec if is_pixels else AutoModel).from_pretrained(path)


def load_vae(name_or_path: str) -> ModelMixin:
    """Any autoencoder of diffusers by hub name or folder (itself, or with a `vae/` inside), or the codec of PIXELS, in
    evaluation mode, fp32.
    """
    if name_or_path == PIXELS:
        return PixelCodec().eval()
    vae = load_component(load_autoencoder, name_or_path, "vae", "--pretrained_vae_model_name_or_path")
    if not hasattr(vae, "encode") or not hasattr(vae, "decode"):
        raise UserError(
            f"--pretrained_vae_model_name_or_path: {name_or_path} holds a {type(vae).__name__}, which has no encode "
            "and decode; give an autoencoder such as stabilityai/sd-vae-ft-mse"
        )
    return vae.float().eval().requires_grad_(False)


def encode_blank(vae: ModelMixin, size: int = 64) -> tuple[Tensor, Tensor | None]:
    """`encode` of a blank image: what families of autoencoders name differently in their configs shows in it."""
    return encode(vae, torch.zeros(1, vae.config.in_channels, size, size, device=vae.device, dtype=vae.dtype))


def measure_shape(vae: ModelMixin) -> tuple[int, int]:
    """(channels of a latent, pixels per latent position)."""
    size = 64
    channels, height = encode_blank(vae, size)[0].shape[1:3]
    return channels, size // height


def has_posterior(vae: ModelMixin) -> bool:
    """Whether the encoder gives a distribution (mean and std) rather than one latent."""
    return encode_blank(vae)[1] is not None


@torch.no_grad()
def encode(vae: ModelMixin, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images (B, 3, H, W) in [-1, 1] -> raw latents (B, C, h, w): posterior mean and std, or the latent and None."""
    output = vae.encode(images)
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mean, output.latent_dist.std
    return (output.latents if hasattr(output, "latents") else output.latent), None


@torch.no_grad()
def decode(vae: ModelMixin, raw_latents: Tensor) -> Tensor:
    """Raw latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1]."""
    return vae.decode(raw_latents).sample.clamp(-1, 1)


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, normalisation: Normalisation) -> AutoencoderKL:
    """Moves a normalisation into the 1x1 convolutions at the VAE's latents, in place, and returns it with scaling 1.

    Afterwards the VAE encodes to and decodes from normalised latents. StableDiffusionPipeline knows one scaling factor
    and no shift; a VAE folded like this needs neither, so a run with any normalisation loads there.
    """
    mean, std = (torch.tensor(v, device=vae.device, dtype=vae.dtype) for v in (normalisation.mean, normalisation.std))
    channels = len(mean)
    decode_conv, encode_conv = vae.post_quant_conv, vae.quant_conv
    decode_conv.bias += decode_conv.weight[:, :, 0, 0] @ mean
    decode_conv.weight *= std[None, :, None, None]
    encode_conv.weight[:channels] /= std[:, None, None, None]  # the first half of the moments is the mean,
    encode_conv.bias[:channels] = (encode_conv.bias[:channels] - mean) / std
    encode_conv.bias[channels:] -= 2 * std.log()  # the second half the log-variance
    vae.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
    return vae


@torch.no_grad()
def folded_normalisation(vae: ModelMixin, folded: ModelMixin, channels: int) -> Normalisation:
    """What `fold_normalisation` moved into `folded`, which is `vae` otherwise; of two equal ones mean 0 and std 1."""
    if not is_foldable(vae) or not is_foldable(folded):
        return Normalisation((0.0,) * channels, (1.0,) * channels)
    before, after = vae.quant_conv, folded.quant_conv
    weights, folded_weights = (conv.weight[:channels].flatten(1).double() for conv in (before, after))  # (C, 2 C)
    std = (weights * weights).sum(dim=1) / (weights * folded_weights).sum(dim=1)
    mean = before.bias[:channels].double() - std * after.bias[:channels].double()
    return Normalisation(tuple(mean.tolist()), tuple(std.tolist()))


def is_foldable(vae: ModelMixin) -> bool:
    """Whether `fold_normalisation` can serve this autoencoder."""
    return isinstance(vae, AutoencoderKL) and vae.quant_conv is not None and vae.post_quant_conv is not None
