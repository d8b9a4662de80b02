"""What training an image autoencoder needs beside its loop: a look at reconstructions on the way, the measured
latents, and a word where the posterior has gone wrong.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from utils.errors import UserError
from utils.files import make_folder, write_json
from utils.image.data.stream import ImageStream, to_pixels
from utils.image.vae.network import TrainableVAE
from utils.image.vae.quality import psnr, ssim
from utils.latents.posterior import PosteriorStatistics, PosteriorSums
from utils.training.run import Run
from utils.training.step_log import show_picture

logger = logging.getLogger(__name__)
STATISTICS_FILE = "latent_statistics.json"
NUM_PICTURES = 8


class Validation:
    """Reconstructions of the posterior's mean: how near they are to images that training never sees (where there are
    none, to a few that it does), as figures, as pictures, and as what the posterior says of its health.
    """

    def __init__(
        self,
        run: Run,
        *,
        held_out: ImageStream | None,
        training: ImageStream,
        batch_size: int,
        eval_features: str | None,
    ):
        self.accelerator, self.folder, self.batch_size = run.accelerator, run.folder / "samples", batch_size
        self.images = training if held_out is None else held_out
        self.num_images = min(NUM_PICTURES, len(training.dataset)) if held_out is None else len(held_out.dataset)
        self.what = "training images" if held_out is None else "held-out images"
        self.features: Any = None
        if eval_features is not None:
            from utils.image.evaluation.features import load_features

            device = run.device if run.is_main else "cpu"  # the others only refuse alike
            self.features = load_features(eval_features, device, "--eval_features")
            if self.num_images <= self.features.dim:
                raise UserError(
                    f"--eval_features: the FID in {self.features.dim} features needs more images than that, and "
                    f"{self.num_images} are held out; raise --num_validation_images, or take --validation_split"
                )

    @torch.no_grad()
    def run(self, model: TrainableVAE, global_step: int) -> None:
        """Measures the weights that `model` has now; the main process does it, the others wait at the next step."""
        if not self.accelerator.is_main_process:
            return
        sums = PosteriorSums()
        measured: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "features": [], "their_features": []}
        shown: list[tuple[Tensor, Tensor]] = []
        for first in range(0, self.num_images, self.batch_size):
            positions = list(range(first, min(first + self.batch_size, self.num_images)))
            images = to_pixels(self.images.__getitems__(positions)["images"]).to(self.accelerator.device)
            with self.accelerator.autocast():
                posterior = model.vae.encode(images).latent_dist
                reconstructions = to_uint8(model.vae.decode(posterior.mean).sample)  # (B, 3, H, W)
            originals = to_uint8(images)
            sums.add(posterior.mean, posterior.logvar)
            measured["psnr"].append(psnr(originals, reconstructions))
            measured["ssim"].append(ssim(originals, reconstructions))
            if self.features is not None:
                measured["features"].append(self.features(originals.permute(0, 2, 3, 1)).features)
                measured["their_features"].append(self.features(reconstructions.permute(0, 2, 3, 1)).features)
            if first < NUM_PICTURES:
                shown.append((originals, reconstructions))
        statistics = sums.statistics()
        figures = {
            "psnr": torch.cat(measured["psnr"]).mean().item(),
            "ssim": torch.cat(measured["ssim"]).mean().item(),
            "kl": statistics.kl,
            "active_channels": float(statistics.active_channels),
            "latent_std": max(statistics.std),
        }
        if self.features is not None:
            figures["rfid"] = rfid(torch.cat(measured["features"]), torch.cat(measured["their_features"]))
        self.report(figures, statistics, global_step)
        picture = side_by_side(*(torch.cat(each)[:NUM_PICTURES] for each in zip(*shown, strict=True)))
        tag = "validation/reconstructions"
        show_picture(self.accelerator, self.folder, Image.fromarray(picture), tag, global_step)

    def report(self, figures: dict[str, float], statistics: PosteriorStatistics, global_step: int) -> None:
        """To the log and the trackers."""
        measured = f", rFID {figures['rfid']:.2f} in {self.features.name}" if "rfid" in figures else ""
        logger.info(
            "step %d: %.2f dB PSNR, %.4f SSIM%s on %d %s; KL %.3f nats per latent value, %d of %d channels active",
            global_step,
            figures["psnr"],
            figures["ssim"],
            measured,
            self.num_images,
            self.what,
            statistics.kl,
            statistics.active_channels,
            len(statistics.mean),
        )
        for fault in statistics.faults():
            logger.warning("step %d: %s", global_step, fault)
        self.accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=global_step)


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> uint8, on the CPU. Values that are not finite become black."""
    return images.float().nan_to_num(-1.0).clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()


def rfid(features: Tensor, of_reconstructions: Tensor) -> float:
    """Fréchet distance between the features (N, D) of images and those of their reconstructions."""
    from utils.image.evaluation.metrics import Statistics, frechet_distance

    return frechet_distance(Statistics.of(features), Statistics.of(of_reconstructions))


def side_by_side(originals: Tensor, reconstructions: Tensor) -> np.ndarray:
    """A picture (2 H, N W, 3): each of N images (N, 3, H, W) above its reconstruction."""
    rows = [np.concatenate(list(each.permute(0, 2, 3, 1).numpy()), axis=1) for each in (originals, reconstructions)]
    return np.concatenate(rows, axis=0)


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKL, stream: ImageStream, num_samples: int, batch_size: int, device: torch.device
) -> PosteriorStatistics:
    """Measures the latents of up to `num_samples` training images, and stores scaling (1 / std) and shift (mean) in
    the config. Says what is wrong with them.
    """
    sums = PosteriorSums()
    total = min(num_samples, stream.order.num_rows)
    for first in range(0, total, batch_size):
        positions = list(range(first, min(first + batch_size, total)))  # the first epoch: each image once
        posterior = vae.encode(to_pixels(stream.__getitems__(positions)["images"]).to(device)).latent_dist
        sums.add(posterior.mean, posterior.logvar)
    statistics = sums.statistics()
    shift, scaling = statistics.shift_and_scaling
    vae.register_to_config(scaling_factor=scaling, shift_factor=shift)
    logger.info("latents of %d training images: shift %.4f, scaling %.4f", total, shift, scaling)
    for fault in statistics.faults():
        logger.warning("at the end: %s", fault)
    return statistics


def save_vae(vae: AutoencoderKL, statistics: PosteriorStatistics, folder: Path) -> None:
    """Writes the autoencoder in diffusers format, and beside its config the statistics of each channel. The config has
    places for those too, `latents_mean` and `latents_std`; they stay empty, because diffusers' pipelines for SDXL
    apply them on top of the scaling, and others apply the scaling alone.
    """
    make_folder(folder)
    vae.save_pretrained(folder)
    write_json(folder / STATISTICS_FILE, asdict(statistics) | {"active_channels": statistics.active_channels})
