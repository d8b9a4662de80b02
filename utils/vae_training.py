"""What training an image autoencoder needs beside its loop: a look at reconstructions on the way, the measured
latents, and a word where the posterior has gone wrong.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from utils.errors import UserError
from utils.files import write_json
from utils.image_quality import psnr, ssim
from utils.image_stream import ImageStream, to_pixels
from utils.models.image_vae import TrainableVAE
from utils.vae_losses import kl_to_standard_normal

logger = logging.getLogger(__name__)
STATISTICS_FILE = "latent_statistics.json"
NUM_PICTURES = 8
# Below these nothing of an image is left in its latents: nats per latent value, and the share of a channel's variance
# that is due to the image and not to noise. Where the posterior matches the prior that share is the variance of the
# mean over data, whose usual threshold is this one (Burda et al. 2015, arXiv 1509.00519, section 5.2).
MIN_KL, MIN_ACTIVE_SHARE = 0.01, 0.01
# Latents of public autoencoders have stds of 1 to 6; far above, sampled and mean latents decode to different images
# and half precision runs out of range.
MAX_STD = 30.0


@dataclass(frozen=True)
class PosteriorStatistics:
    """Of the latents of many images; lists have an entry for each channel."""

    num_images: int
    mean: list[float]
    std: list[float]  # of sampled latents: what differs between images and positions, and the posterior's noise
    std_of_mean: list[float]  # over images, at the same position
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
        """Channels that tell images apart."""
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
                "channels tell images apart; lower --kl_weight or raise --kl_warmup_steps"
            )
        elif self.active_channels < channels:
            found.append(
                f"partial posterior collapse: only {self.active_channels} of {channels} latent channels tell images "
                "apart; lower --kl_weight, or raise --kl_warmup_steps"
            )
        if max(self.std) > MAX_STD:
            found.append(
                f"variance blow-up: latents have a std of {max(self.std):.3g}, above {MAX_STD:g}; raise --kl_weight "
                "or lower --learning_rate"
            )
        return found


class PosteriorSums:
    """Sums over the posteriors of batches of images, from which their statistics follow."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0  # (C, h, w) float64, and so is the next
        self.square_of_mean: Any = 0.0
        self.variance: Any = 0.0  # (C,), and of the posterior
        self.kl = 0.0

    def add(self, mean: Tensor, logvar: Tensor) -> None:
        """Adds a batch: mean and log-variance (B, C, h, w)."""
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
            self.count, channel_mean.tolist(), std, std_of_mean, posterior_std, self.kl / self.count
        )


class Validation:
    """Reconstructions of the posterior's mean: how near they are to images that training never sees (where there are
    none, to a few that it does), as figures, as pictures, and as what the posterior says of its health.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        held_out: ImageStream | None,
        training: ImageStream,
        batch_size: int,
        eval_features: str | None,
    ):
        self.accelerator, self.output_dir, self.batch_size = accelerator, output_dir, batch_size
        self.images = training if held_out is None else held_out
        self.num_images = min(NUM_PICTURES, len(training.dataset)) if held_out is None else len(held_out.dataset)
        self.what = "training images" if held_out is None else "held-out images"
        self.features: Any = None
        if eval_features is not None:
            from utils.features import load_features

            device = accelerator.device if accelerator.is_main_process else "cpu"  # the others only refuse alike
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
        self.show(side_by_side(*(torch.cat(each)[:NUM_PICTURES] for each in zip(*shown, strict=True))), global_step)

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

    def show(self, picture: np.ndarray, global_step: int) -> None:
        """A picture (H, W, 3) to `samples/step-N.png` and the trackers that take some."""
        folder = self.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / f"step-{global_step:07d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation/reconstructions", picture, global_step, dataformats="HWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"validation/reconstructions": [picture]}, step=global_step)


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> uint8, on the CPU. Values that are not finite become black."""
    return images.float().nan_to_num(-1.0).clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()


def rfid(features: Tensor, of_reconstructions: Tensor) -> float:
    """Fréchet distance between the features (N, D) of images and those of their reconstructions."""
    from utils.metrics_images import Statistics, frechet_distance

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
    vae.save_pretrained(folder)
    write_json(folder / STATISTICS_FILE, asdict(statistics) | {"active_channels": statistics.active_channels})
