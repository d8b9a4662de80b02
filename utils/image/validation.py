"""Samples while training: grids to look at, and their distance from held-out images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.pipelines import LatentDiffusionPipeline
from utils.diffusion.sampling import fault_of_steps, image_generators, sampling_scheduler
from utils.errors import UserError
from utils.image.args.validation import DEFAULT_EVAL_IMAGES
from utils.image.cache import ImageCache
from utils.image.conditions import IMAGE_CONDITIONS
from utils.image.evaluation.features import Features
from utils.image.evaluation.metrics import Statistics, frechet_distance, polynomial_kernel, squared_mmd
from utils.image.pictures import labelled_grid
from utils.image.pipeline import Exporter
from utils.image.sampler import merge
from utils.training.held_out import HeldOut, share_of
from utils.training.run import Run
from utils.training.step_log import show_picture


@contextmanager
def on_device(accelerator: Accelerator, exporter: Exporter) -> Iterator[None]:
    """The frozen parts on the device, and afterwards where they were: the memory belongs to training."""
    parts = [part for part in (exporter.vae, exporter.text_encoder) if part is not None]
    homes = [part.device for part in parts]
    try:
        for part in parts:
            part.to(accelerator.device)
        yield
    finally:
        for part, home in zip(parts, homes, strict=True):
            part.to(home)
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def quiet_pipeline(model: ConditionalDenoiser, exporter: Exporter) -> LatentDiffusionPipeline:
    """A pipeline around the live model, without a progress bar."""
    pipeline = exporter.pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Grids:
    """Samples `num_images` for each prompt or label (or unconditionally), always from the same noise, so that
    grids of a run compare. Does not touch the random state of training. Raises UserError for a number of steps that
    the sampler cannot take.
    """

    def __init__(
        self, run: Run, exporter: Exporter, *, num_images: int, guidance_scale: float, num_inference_steps: int
    ):
        fault = fault_of_steps(sampling_scheduler(exporter.scheduler), num_inference_steps)
        if fault:
            raise UserError(f"--validation_inference_steps {num_inference_steps}: {fault}; use 20, 25 or 50")
        self.accelerator, self.exporter, self.folder = run.accelerator, exporter, run.folder / "samples"
        self.settings: dict[str, Any] = {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            "num_images_per_prompt": num_images,
        }

    def save(
        self,
        model: ConditionalDenoiser,
        global_step: int,
        prompts: list[str] | None = None,
        class_labels: list[int] | None = None,
        label_names: list[str] | None = None,
    ) -> None:
        """Writes `step-N.png` and the same to the trackers, from the weights that `model` has now."""
        if not self.accelerator.is_main_process:
            return
        conditions: list[dict[str, Any]] = [{"prompt": text} for text in prompts or []]
        conditions += [{"class_labels": label} for label in class_labels or []]
        names = list(prompts or []) + [label_names[i] if label_names else str(i) for i in class_labels or []]
        grid = labelled_grid(self.sample(model, conditions or [{}]), names or [""])
        show_picture(self.accelerator, self.folder, grid, "validation", global_step)

    def sample(self, model: ConditionalDenoiser, conditions: list[dict[str, Any]]) -> list[list[Any]]:
        """A row of images for each condition."""
        pipeline = quiet_pipeline(model, self.exporter)
        count = self.settings["num_images_per_prompt"]
        rows = []
        with on_device(self.accelerator, self.exporter), self.accelerator.autocast():
            for row, condition in enumerate(conditions):
                generators = image_generators(0, row * count, count)
                rows.append(pipeline(**condition, **self.settings, generator=generators).images)
        return rows


def kid(samples: Tensor, reference: Tensor) -> float:
    """Unbiased squared MMD of features (N, D) and (M, D) with KID's kernel, over all of them at once."""
    everything = torch.ones(1, len(samples), dtype=torch.bool)
    return squared_mmd(samples, reference, polynomial_kernel, everything, unbiased=True)[0]


def fid(samples: Tensor, reference: Tensor) -> float:
    """Frechet distance of features (N, D) and (M, D)."""
    return frechet_distance(Statistics.of(samples), Statistics.of(reference))


DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {"kid": kid, "fid": fid}
EVALUATION_SEED = 0


class SampleDistance:
    """How far images for the conditions of held-out rows are from those rows, which the VAE decodes too, so that the
    figure is about the denoiser alone. `metric` is one of `DISTANCES`. Every evaluation starts from the same noise.

    Raises UserError for more images than held-out rows, and for fewer than a Frechet distance needs.
    """

    def __init__(
        self,
        run: Run,
        exporter: Exporter,
        held_out: HeldOut[ImageCache],
        features: Features,
        *,
        metric: str,
        num_images: int | None,
        condition: str,
        guidance_scale: float,
        num_inference_steps: int,
        batch_size: int,
    ):
        count = min(len(held_out), DEFAULT_EVAL_IMAGES) if num_images is None else num_images
        if count > len(held_out):
            raise UserError(
                f"--num_eval_images {count}: each is compared with a held-out image, and there are {len(held_out)}; "
                "hold out more, or sample fewer"
            )
        if metric == "fid" and count <= features.dim:
            raise UserError(
                f"--eval_metric fid: {count} images, but {features.name} has {features.dim} features, and their "
                f"covariance needs at least {features.dim + 1} images; hold out and sample more, or use --eval_metric "
                "kid, which is unbiased however few there are"
            )
        self.accelerator, self.exporter, self.held_out, self.features = run.accelerator, exporter, held_out, features
        self.metric, self.batch_size = metric, batch_size
        self.requests = IMAGE_CONDITIONS[condition].requests(held_out.cache, held_out.rows[:count])
        self.settings: dict[str, Any] = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        self.key = f"validation/{metric}_{features.kind}"
        sampling = f"guidance {guidance_scale:g}, {num_inference_steps} steps"
        self.title = f"{count} images in {features.name}, {sampling}"
        self.identity = f"{count} images in {features.identity}, {sampling}"
        self.reference = self.features_of(self.decoded)  # (count, D)

    def __call__(self, model: ConditionalDenoiser | None) -> float:
        """The distance of a model in evaluation mode, None on a process without one; NaN where a sample is not finite.
        Every process calls this and learns the same.
        """
        pipeline = None if model is None else quiet_pipeline(model, self.exporter)

        def sampled(places: range) -> np.ndarray:
            assert pipeline is not None
            generators = image_generators(EVALUATION_SEED, places.start, len(places))
            requests: dict[str, Any] = merge(self.requests[places.start : places.stop])
            return pipeline(**requests, **self.settings, generator=generators, output_type="np").images

        samples = self.features_of(sampled)
        return DISTANCES[self.metric](samples, self.reference) if bool(samples.isfinite().all()) else float("nan")

    def decoded(self, places: range) -> np.ndarray:
        """The images (B, H, W, 3) in [0, 1] that the VAE makes of the means of held-out latents."""
        cache, vae = self.held_out.cache, self.exporter.vae
        moments = cache.gather(self.held_out.rows[places.start : places.stop])["latents"].float()
        latents = cache.normalisation.normalise(moments[:, 0])  # (B, C, h, w), as the denoiser would give them
        raw_latents = self.exporter.normalisation.denormalise(latents).to(vae.device, vae.dtype)
        images = vae.decode(raw_latents, return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def features_of(self, make: Callable[[range], np.ndarray]) -> Tensor:
        """Features (N, D) of the images (B, H, W, 3) in [0, 1] that `make` gives for places among the N; NaN for an
        image that is not finite. The processes share the work.
        """
        share = share_of(self.accelerator, len(self.requests))
        found = [torch.empty(0, self.features.dim)]
        with on_device(self.accelerator, self.exporter):
            for first in range(share.start, share.stop, self.batch_size):
                with self.accelerator.autocast():  # which is not for the network that makes the features
                    images = make(range(first, min(first + self.batch_size, share.stop)))
                is_finite = torch.from_numpy(np.isfinite(images).all(axis=(1, 2, 3)))  # (B,)
                pixels = torch.from_numpy((np.nan_to_num(images) * 255).round().astype(np.uint8))
                found.append(self.features(pixels).features.masked_fill(~is_finite[:, None], float("nan")))
        return torch.cat(gather_object([torch.cat(found)]))
