"""What sampling costs beside the calls of the models, and what its speed-ups do.

    python benchmarks/sampling.py                         # small models with random weights
    python benchmarks/sampling.py --model runs/mine       # a trained run, which the effect on the image needs

First table: `sample.py`'s way from requests to PNGs, against the very same calls of text encoder, denoiser and VAE
with the very same inputs and nothing else. Second: settings that may make sampling faster, each in turn with none;
PSNR is that of its images to those without it, from the same seeds.
"""

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import ROOT, alternate, benchmark_parser, median_ratio, report, run_python, seconds
from PIL import Image
from random_data import save_text_encoder, save_vae, write_random_cache

from utils.diffusion import sampling
from utils.image import sampler
from utils.image.pipeline import load_run

Call = Callable[[], Any]
# 12M and 11M parameters.
CONFIGS = {"unet": {"block_out_channels": [96, 160, 160]}, "dit": {"num_layers": 4}}


def make_run(folder: Path, model: str) -> Path:
    """A run of random weights: 12M parameters or so, latents of 4 x 16 x 16."""
    vae = save_vae(folder / "vae", (16, 32, 32, 32), 1)
    text_encoder = save_text_encoder(folder / "text", num_layers=2)
    write_random_cache(folder / "cache", 8, (4, 16, 16), vae=vae, text_encoder=text_encoder)
    (folder / "config.json").write_text(json.dumps(CONFIGS[model]))
    flags = ["--latents_dir", folder / "cache", "--output_dir", folder / "run", "--model", model]
    flags += ["--model_size", "S/2" if model == "dit" else "cifar10", "--model_config", folder / "config.json"]
    flags += ["--train_batch_size", 1, "--max_train_steps", 1, "--report_to", "none"]
    run_python(ROOT / "train_text_to_image_ldm.py", *flags)
    return folder / "run"


def recorded_calls(pipeline, sample: Call) -> list[Call]:
    """The calls of models that `sample` makes, to be made again."""
    calls: list[Call] = []

    def recording(method):
        def call(*inputs, **named):
            calls.append(partial(method, *inputs, **named))
            return method(*inputs, **named)

        return call

    methods = [(pipeline.denoiser, "forward"), (pipeline.vae, "decode"), (pipeline.text_encoder, "forward")]
    with ExitStack() as patches:
        for module, name in methods:
            if module is not None:
                patches.enter_context(mock.patch.object(module, name, recording(getattr(module, name))))
        sample()
    return calls


class Sampler:
    """What `sample.py` does between loading a run and its grid, with settings that can be changed one at a time."""

    def __init__(self, run_dir: Path, args: Namespace):
        self.run_dir, self.args = run_dir, args
        self.scheduler, self.steps, self.precision = None, args.num_inference_steps, args.mixed_precision
        self.batch_size = args.num_images
        self.pipeline = load_run(run_dir)
        self.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)
        self.trained_with = self.pipeline.scheduler

    def images(self) -> list[Image.Image]:
        pipeline = self.pipeline
        pipeline.scheduler = sampling.sampling_scheduler(self.trained_with, self.scheduler, self.steps)
        some = [{"prompt": f"the digit {i % 10}"} for i in range(self.args.num_images)]
        if type(pipeline.conditions).__name__ == "ClassCondition":
            some = [{"class_labels": i % 10} for i in range(self.args.num_images)]
        guidance = {"guidance_scale": self.args.guidance_scale, "guidance_interval": (0, 1), "guidance_rescale": 0}
        flags = Namespace(num_inference_steps=self.steps, **guidance)
        made = sampler.Sampler(flags, self.run_dir, pipeline, guide=None)
        return [image for batch in made.sample(some, 0, self.batch_size, self.precision) for image in batch]

    def images_to_files(self) -> None:
        """As above, and the PNGs."""
        with tempfile.TemporaryDirectory() as folder:
            images = self.images()
            sampler.save_images(Path(folder), images, [{}] * len(images), {}, 0)


def overhead(run_dir: Path, args: Namespace, model: str) -> dict[str, Any]:
    """The first table's row."""
    sampler = Sampler(run_dir, args)
    calls = recorded_calls(sampler.pipeline, sampler.images)

    @torch.no_grad()
    def models_alone() -> None:
        half = args.mixed_precision == "bf16"
        with torch.autocast(sampler.pipeline.device.type, torch.bfloat16, enabled=half):
            for call in calls:
                call()

    times = alternate({"sample": sampler.images_to_files, "models": models_alone}, args.rounds)
    sampler.batch_size = 1
    singly = [seconds(sampler.images) for _ in range(args.rounds)]
    return {
        "model": model,
        "images": args.num_images,
        "model calls alone, s": float(np.median(times["models"])),
        "sample.py, s": float(np.median(times["sample"])),
        "sample.py / calls": median_ratio(times["sample"], times["models"]),
        "one image at a time / all at once": median_ratio(singly, times["sample"]),
    }


def with_bf16(sampler: Sampler) -> None:
    sampler.precision = "bf16"


def with_channels_last(sampler: Sampler) -> None:
    sampler.pipeline.denoiser.to(memory_format=torch.channels_last)
    sampler.pipeline.vae.to(memory_format=torch.channels_last)


def with_compile(sampler: Sampler) -> None:
    sampling.speed_up(sampler.pipeline.denoiser, torch_compile=True)


def with_fused_qkv(sampler: Sampler) -> None:
    sampling.speed_up(sampler.pipeline.denoiser, torch_compile=False, fuse_qkv_projections=True)


def with_few_steps(sampler: Sampler) -> None:
    flow = sampling.is_flow(sampler.trained_with)
    sampler.scheduler, sampler.steps = ("flow_heun", 10) if flow else ("dpmsolver++", 20)


SPEED_UPS: dict[str, list[Callable[[Sampler], None]]] = {
    "bf16": [with_bf16],
    "channels last": [with_channels_last],
    "channels last, bf16": [with_channels_last, with_bf16],
    "fused QKV": [with_fused_qkv],
    "compiled": [with_compile],
    "compiled, bf16": [with_compile, with_bf16],
    "few steps": [with_few_steps],
}


def psnr(images: list[Image.Image], reference: list[Image.Image]) -> float:
    """Peak signal-to-noise ratio in dB, of all pixels together."""
    ours, theirs = (np.stack([np.asarray(each, dtype=np.float64) for each in some]) for some in (images, reference))
    return float(10 * np.log10(255**2 / max(np.square(ours - theirs).mean(), 1e-10)))


def speed_ups(run_dir: Path, args: Namespace, model: str) -> list[dict[str, Any]]:
    """The second table: each setting against none, in turn."""
    plain = Sampler(run_dir, args)
    reference = plain.images()
    rows = []
    for name, changes in SPEED_UPS.items():
        if changes == [with_fused_qkv] and not hasattr(plain.pipeline.denoiser, "fuse_qkv_projections"):
            continue
        faster = Sampler(run_dir, args)
        for change in changes:
            change(faster)
        times = alternate({"plain": plain.images, "faster": faster.images}, args.rounds)
        row = {"model": model, "setting": name, "time / plain": median_ratio(times["faster"], times["plain"])}
        rows.append(row | {"PSNR to plain, dB": psnr(faster.images(), reference)})
    return rows


def main() -> None:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--model", default=None, help="A trained run. Default: random weights, a U-Net and a DiT.")
    parser.add_argument("--num_images", type=int, default=8, help="Images, of as many prompts or labels.")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="Steps of the sampler.")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="1 = off.")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="Of the first table.")
    parser.add_argument("--rounds", type=int, default=3, help="Turns of each.")
    parser.add_argument("--no_speed_ups", action="store_true", help="The first table only.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = {"run": Path(args.model)} if args.model else {m: make_run(Path(scratch) / m, m) for m in CONFIGS}
        tables = [[overhead(run_dir, args, model) for model, run_dir in runs.items()]]
        if not args.no_speed_ups:
            tables.append([row for model, run_dir in runs.items() for row in speed_ups(run_dir, args, model)])
        report(args, *tables)


if __name__ == "__main__":
    main()
