"""Pictures on the way: grids of validation samples, made from the averaged weights."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from utils.export import FrozenParts, make_pipeline
from utils.models.denoiser import ConditionalDenoiser
from utils.sampling import image_generators, labelled_grid


def save_grid(
    args: Namespace,
    accelerator: Accelerator,
    model: ConditionalDenoiser,
    frozen: FrozenParts,
    global_step: int,
    prompts: list[str] | None = None,
    class_labels: list[int] | None = None,
    label_names: list[str] | None = None,
) -> None:
    """Samples `num_validation_images` for each prompt or label (or unconditionally) into `samples/step-N.png` and the
    trackers.

    Always the same noise, so that grids compare. Does not touch the random state of training.
    """
    if not accelerator.is_main_process:
        return
    count = args.num_validation_images
    frozen_parts = [part for part in (frozen.vae, frozen.text_encoder) if part is not None]
    homes = [part.device for part in frozen_parts]
    pipeline = make_pipeline(model, frozen)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(accelerator.device)
    settings: dict[str, Any] = {
        "guidance_scale": args.validation_guidance_scale,
        "num_inference_steps": args.validation_inference_steps,
        "num_images_per_prompt": count,
    }
    conditions: list[dict[str, Any]] = [{"prompt": text} for text in prompts or []]
    conditions += [{"class_labels": label} for label in class_labels or []]
    names = list(prompts or []) + [label_names[i] if label_names else str(i) for i in class_labels or []]
    with accelerator.autocast():
        rows = [
            pipeline(**condition, **settings, generator=image_generators(0, row * count, count)).images
            for row, condition in enumerate(conditions or [{}])
        ]
    for part, home in zip(frozen_parts, homes, strict=True):
        part.to(home)  # the memory belongs to training
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    grid = labelled_grid(rows, names or [""])
    folder = Path(args.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"step-{global_step:07d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(
                "validation (EMA)" if args.use_ema else "validation", np.asarray(grid), global_step, dataformats="HWC"
            )
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation": [grid]}, step=global_step)
