"""What training an image autoencoder needs beside its loop: the images, pictures on the way, and the measured
latents.
"""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image

from utils.cache_writer import ChannelSums
from utils.image_stream import ImageStream, to_pixels
from utils.models.image_vae import TrainableVAE

logger = logging.getLogger(__name__)


@torch.no_grad()
def save_reconstructions(
    accelerator: Accelerator,
    output_dir: Path,
    model: TrainableVAE,
    stream: ImageStream,
    global_step: int,
    count: int = 8,
) -> None:
    """Originals above reconstructions of the posterior's mean, with their PSNR in dB, in `samples/step-N.png` and the
    trackers.
    """
    if not accelerator.is_main_process:
        return
    images = to_pixels(stream.__getitems__(list(range(count)))["images"]).to(accelerator.device)
    with accelerator.autocast():
        reconstructions = model.vae.decode(model.vae.encode(images).latent_dist.mean).sample.float().clamp(-1, 1)
    mse = ((reconstructions - images) / 2).square().mean().item()
    psnr = -10 * math.log10(max(mse, 1e-10))
    pixels = torch.cat([images, reconstructions]).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in (pixels[:count], pixels[count:])], axis=0)
    folder = output_dir / "samples"
    folder.mkdir(exist_ok=True)
    Image.fromarray(grid).save(folder / f"step-{global_step:07d}.png")
    logger.info("step %d: reconstructions at %.1f dB PSNR on %d training images", global_step, psnr, count)
    accelerator.log({"validation/psnr": psnr}, step=global_step)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation/reconstructions", grid, global_step, dataformats="HWC")


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, stream: ImageStream, num_samples: int, accelerator: Accelerator) -> None:
    """Measures the latents of up to `num_samples` training images and stores scaling (1 / std) and shift (mean) in the
    config.
    """
    sums = ChannelSums(vae.config.latent_channels)
    total = min(num_samples, stream.order.num_rows)
    for first in range(0, total, 64):
        positions = list(range(first, min(first + 64, total)))  # the first epoch: each image once
        posterior = vae.encode(to_pixels(stream.__getitems__(positions)["images"]).to(accelerator.device)).latent_dist
        sums.add(posterior.mean.float().cpu().numpy(), posterior.std.float().cpu().numpy())
    statistics = ChannelSums.combine([sums.to_json()])
    shift = float(np.mean(statistics["mean"]))
    # One std for all channels: of all values about the common mean.
    variance = np.mean(np.square(statistics["std"]) + np.square(np.array(statistics["mean"]) - shift))
    vae.register_to_config(scaling_factor=float(1 / np.sqrt(variance)), shift_factor=shift)
    logger.info("latents of %d images: shift %.4f, scaling %.4f", total, shift, 1 / np.sqrt(variance))
