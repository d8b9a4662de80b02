"""What a run of images is asked for: prompts, labels or nothing, checked against the run, sampled, and written beside
the images.
"""

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.diffusion.conditions import NoCondition
from utils.diffusion.pipelines import LatentDiffusionPipeline
from utils.diffusion.sampling import batches, image_generators
from utils.errors import UserError
from utils.files import write_text
from utils.image.conditions import condition_of
from utils.image.modality import IMAGE
from utils.image.pictures import labelled_grid, save_png
from utils.image.pipeline import load_guide, load_run
from utils.runs import sampler as base
from utils.runs.sampler import Request


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
    row = condition_of(pipeline.conditions)
    given = {"--prompt": prompts or None, "--negative_prompt": negative_prompt, "--class_labels": class_labels or None}
    for flag, value in given.items():
        if value is not None and flag not in row.flags:
            what = "labels" if flag == "--class_labels" else "prompts"
            raise UserError(f"{flag}: the run {run_dir} takes no {what}, it is {row.trained}")
    return row.asked(given, pipeline.conditions, run_dir)


def merge(batch: Any) -> dict[str, Any]:
    """The pipeline's arguments for a batch of requests."""
    if not batch[0]:
        return {"num_images_per_prompt": len(batch)}
    return {name: [request[name] for request in batch] for name in batch[0]}


def save_images(
    output_dir: Path, images: list[Image.Image], requests: Sequence[Request], settings: dict[str, Any], seed: int
) -> None:
    """00000.png, 00001.png, ... with their parameters inside, and the same in samples.jsonl."""
    lines = []
    for i, (image, request) in enumerate(zip(images, requests, strict=True)):
        parameters = dict(request) | settings | {"seed": seed + i}
        file_name = f"{i:05d}.png"
        save_png(image, output_dir / file_name, parameters)
        lines.append(json.dumps({"file_name": file_name} | parameters, ensure_ascii=False) + "\n")
    write_text(output_dir / "samples.jsonl", "".join(lines))


class Sampler(base.Sampler):
    """A run of images that is ready to be sampled. A request is the arguments of the pipeline for one image."""

    modality = IMAGE
    load_run = staticmethod(load_run)
    load_guide = staticmethod(load_guide)
    nothing_to_guide = (
        "the run is unconditional, there is nothing to guide towards; leave it out or give --guide_model"
    )
    num_images_per_prompt = 1  # images in a row of the grid, before requests were read from flags

    def requests(self, args: Namespace) -> list[dict[str, Any]]:
        """--num_images_per_prompt times each of --prompt, --prompts_file or --class_labels."""
        prompts = (args.prompt or []) + read_prompts(args.prompts_file)
        asked = requested_images(self.pipeline, self.run_dir, prompts, args.class_labels, args.negative_prompt)
        self.guidance(asked)
        self.num_images_per_prompt = args.num_images_per_prompt
        return [each for each in asked for _ in range(args.num_images_per_prompt)]

    def can_guide(self, requests: Sequence[Request]) -> bool:
        """Whether the run has a condition: each request of such a run names one."""
        return not isinstance(self.pipeline.conditions, NoCondition)

    def has_negative_prompt(self, requests: Sequence[Request]) -> bool:
        """Whether the requests name what guidance leads away from."""
        return any("negative_prompt" in request for request in requests)

    def sample(
        self, requests: Sequence[Request], seed: int, batch_size: int, mixed_precision: str
    ) -> Iterator[list[Image.Image]]:
        """Images for the requests, a batch at a time; number i has seed `seed` + i. Raises UserError where the run
        gives values that are not finite.
        """
        self.pipeline.set_progress_bar_config(disable=True)
        settings = self.guidance(requests).arguments()
        for first, batch in batches(requests, batch_size):
            generators = image_generators(seed, first, len(batch))
            arguments = merge(batch) | settings
            with self.autocast(mixed_precision):
                images = self.pipeline(
                    **arguments, guide_model=self.guide, generator=generators, output_type="np"
                ).images
            faulty = [first + i for i, image in enumerate(images) if not np.isfinite(image).all()]
            if faulty:
                raise UserError(
                    f"--model: image {faulty[0]} holds NaN or infinite values; try --mixed_precision no or a lower "
                    "--guidance_scale, and if that does not help an earlier checkpoint: the weights are damaged"
                )
            yield self.pipeline.image_processor.numpy_to_pil(images)  # (B, H, W, 3) in [0, 1]

    def save(self, folder: Path, samples: list[Image.Image], requests: Sequence[Request], seed: int) -> str:
        """Writes PNGs that carry their parameters, samples.jsonl and grid.png, with a row for each prompt or label."""
        save_images(folder, samples, requests, self.settings(requests), seed)
        count = self.num_images_per_prompt
        rows = [samples[i : i + count][:10] for i in range(0, len(samples), count)]
        encoder = self.pipeline.conditions
        names = [condition_of(encoder).title(request, encoder) for request in requests[::count]]
        labelled_grid(rows[:50], names[:50]).save(folder / "grid.png")
        return f"{len(samples)} images and grid.png in {folder}"
