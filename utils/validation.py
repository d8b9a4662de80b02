"""Pictures on the way: grids of validation samples."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from utils.errors import UserError
from utils.export import FrozenParts, make_pipeline
from utils.models.denoiser import ConditionalDenoiser
from utils.sampling import fault_of_steps, image_generators, labelled_grid, sampling_scheduler


class Grids:
    """Samples `num_images` for each prompt or label (or unconditionally), always from the same noise, so that
    grids of a run compare. Does not touch the random state of training. Raises UserError for a number of steps that
    the sampler cannot take.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        frozen: FrozenParts,
        folder: Path,
        num_images: int,
        guidance_scale: float,
        num_inference_steps: int,
    ):
        fault = fault_of_steps(sampling_scheduler(frozen.scheduler), num_inference_steps)
        if fault:
            raise UserError(f"--validation_inference_steps {num_inference_steps}: {fault}; use 20, 25 or 50")
        self.accelerator, self.frozen, self.folder = accelerator, frozen, folder
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
        self.folder.mkdir(parents=True, exist_ok=True)
        grid.save(self.folder / f"step-{global_step:07d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation", np.asarray(grid), global_step, dataformats="HWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"validation": [grid]}, step=global_step)

    def sample(self, model: ConditionalDenoiser, conditions: list[dict[str, Any]]) -> list[list[Any]]:
        """A row of images for each condition."""
        frozen_parts = [part for part in (self.frozen.vae, self.frozen.text_encoder) if part is not None]
        homes = [part.device for part in frozen_parts]
        pipeline = make_pipeline(model, self.frozen)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(self.accelerator.device)
        count = self.settings["num_images_per_prompt"]
        rows = []
        with self.accelerator.autocast():
            for row, condition in enumerate(conditions):
                generators = image_generators(0, row * count, count)
                rows.append(pipeline(**condition, **self.settings, generator=generators).images)
        for part, home in zip(frozen_parts, homes, strict=True):
            part.to(home)  # the memory belongs to training
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        return rows
