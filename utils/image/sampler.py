"""What `sample.py` was asked for: prompts, labels or nothing, checked against the run and written beside the
images.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.pipelines import LatentDiffusionPipeline
from utils.diffusion.sampling import batches, checked_guidance, image_generators
from utils.errors import UserError
from utils.files import write_text
from utils.image.pictures import save_png


def read_prompts(path: str | None) -> list[str]:
    """The non-empty lines of a text file. Raises UserError if there are none."""
    if path is None:
        return []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_file: {path} holds no prompts; write one a line")
    return prompts


def requested_images(
    pipeline: LatentDiffusionPipeline,
    run_dir: Path,
    prompts: list[str],
    class_labels: list[int] | None,
    negative_prompt: str | None,
) -> list[dict[str, Any]]:
    """One dict of pipeline arguments for each prompt or label; of an unconditional run a single empty one.

    Without any, a text-to-image run takes its validation prompts, a class-conditional one every class. Raises
    UserError for what the run was not trained on.
    """
    kind = type(pipeline.conditions).__name__
    if kind != "TextCondition" and (prompts or negative_prompt is not None):
        trained = (
            "class-conditional: use --class_labels" if kind == "ClassCondition" else "unconditional: leave it out"
        )
        flag = "--prompt" if prompts else "--negative_prompt"
        raise UserError(f"{flag}: the run {run_dir} takes no prompts, it is {trained}")
    if kind != "ClassCondition" and class_labels:
        trained = "text-to-image: use --prompt" if kind == "TextCondition" else "unconditional: leave it out"
        raise UserError(f"--class_labels: the run {run_dir} takes no labels, it is {trained}")
    if kind == "TextCondition":
        prompts = prompts or validation_prompts(run_dir)
        negative = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
        return [{"prompt": prompt} | negative for prompt in prompts]
    if kind == "ClassCondition":
        num_classes = pipeline.conditions.config.num_classes
        for label in class_labels or []:
            if label >= num_classes:
                raise UserError(f"--class_labels: {label}, but the classes of {run_dir} are 0 to {num_classes - 1}")
        return [{"class_labels": label} for label in class_labels or range(num_classes)]
    return [{}]


def validation_prompts(run_dir: Path) -> list[str]:
    """The validation prompts a run was trained with. Raises UserError if there are none."""
    path = next(
        (folder / "args.yaml" for folder in (run_dir, run_dir.parent) if (folder / "args.yaml").is_file()), None
    )
    prompts = yaml.safe_load(path.read_text(encoding="utf-8")).get("validation_prompts") if path else None
    if not prompts:
        raise UserError(f"--prompt: the run {run_dir} is text-to-image; give --prompt or --prompts_file")
    return prompts


def guidance_settings(
    pipeline: LatentDiffusionPipeline,
    guidance_scale: float | None,
    guidance_interval: list[float],
    guidance_rescale: float,
    num_inference_steps: int,
    with_guide: bool,
    with_negative_prompt: bool,
) -> dict[str, Any]:
    """Arguments of `pipeline`, with the default scale: 7.5; 2 with a guide; 1 = off for an unconditional run without
    one. Raises UserError for guidance that contradicts itself or would do nothing.
    """
    can_guide = with_guide or type(pipeline.conditions).__name__ != "NoCondition"
    if guidance_scale is None:
        guidance_scale = (2.0 if with_guide else 7.5) if can_guide else 1.0
    elif guidance_scale != 1 and not can_guide:
        raise UserError(
            f"--guidance_scale {guidance_scale:g}: the run is unconditional, there is nothing to guide towards; "
            "leave it out or give --guide_model"
        )
    return checked_guidance(
        pipeline.scheduler,
        guidance_scale,
        guidance_interval,
        guidance_rescale,
        num_inference_steps,
        with_guide,
        with_negative_prompt,
    )


def sample(
    pipeline: LatentDiffusionPipeline,
    wanted: list[dict[str, Any]],
    settings: dict[str, Any],
    seed: int,
    batch_size: int,
    mixed_precision: str,
    guide_model: ConditionalDenoiser | None = None,
) -> Iterator[list[Image.Image]]:
    """Images for the requests, a batch at a time; number i has seed `seed` + i. Raises UserError where the run gives
    values that are not finite.
    """
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    for first, batch in batches(wanted, batch_size):
        generators = image_generators(seed, first, len(batch))
        with torch.autocast(pipeline.device.type, dtype=dtype, enabled=dtype is not None):
            arguments = merge(batch) | settings
            images = pipeline(**arguments, guide_model=guide_model, generator=generators, output_type="np").images
        faulty = [first + i for i, image in enumerate(images) if not np.isfinite(image).all()]
        if faulty:
            raise UserError(
                f"--model: image {faulty[0]} holds NaN or infinite values; try --mixed_precision no or a lower "
                "--guidance_scale, and if that does not help an earlier checkpoint: the weights are damaged"
            )
        yield pipeline.image_processor.numpy_to_pil(images)  # (B, H, W, 3) in [0, 1]


def merge(batch: Any) -> dict[str, Any]:
    """The pipeline's arguments for a batch of requests."""
    if not batch[0]:
        return {"num_images_per_prompt": len(batch)}
    return {name: [request[name] for request in batch] for name in batch[0]}


def names(pipeline: LatentDiffusionPipeline, requests: list[dict[str, Any]]) -> list[str]:
    """A short name of each request, for the grid."""
    label_names = pipeline.conditions.config.get("label_names")
    labels = [request.get("class_labels") for request in requests]
    return [
        request.get("prompt", "") if label is None else (label_names[label] if label_names else str(label))
        for request, label in zip(requests, labels, strict=True)
    ]


def save_images(
    output_dir: Path, images: list[Image.Image], requests: list[dict[str, Any]], settings: dict[str, Any], seed: int
) -> None:
    """00000.png, 00001.png, ... with their parameters inside, and the same in samples.jsonl."""
    lines = []
    for i, (image, request) in enumerate(zip(images, requests, strict=True)):
        parameters = request | settings | {"seed": seed + i}
        file_name = f"{i:05d}.png"
        save_png(image, output_dir / file_name, parameters)
        lines.append(json.dumps({"file_name": file_name} | parameters, ensure_ascii=False) + "\n")
    write_text(output_dir / "samples.jsonl", "".join(lines))
