"""Makes images with a trained run, as PNGs that carry their parameters and as one grid.

    python sample.py --guidance_scale 7.5
    python sample.py --model runs/mine --prompt "a red apple" --prompt "two birds" --num_images_per_prompt 4
    python sample.py --model runs/cifar/checkpoint-20000 --class_labels 3 5 --scheduler dpmsolver++

Image number i has seed SEED + i: the same picture, to rounding, whatever the batch size.
"""

import argparse
from pathlib import Path

from utils.errors import UserError
from utils.parsing import (
    fraction,
    non_negative_float,
    non_negative_int,
    parse_with_config,
    positive_float,
    positive_int,
    run_script,
)

SCHEDULERS = ("ddpm", "ddim", "dpmsolver++", "unipc", "flow_euler", "flow_heun")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=None, help="A run's folder or a checkpoint. Default: the newest run below runs/."
    )
    parser.add_argument("--prompt", action="append", default=None, help="What to draw; may be repeated.")
    parser.add_argument("--prompts_file", default=None, help="Text file with one prompt a line.")
    parser.add_argument(
        "--negative_prompt", default=None, help="What guidance leads away from, instead of from nothing."
    )
    parser.add_argument("--class_labels", nargs="+", type=non_negative_int, default=None, help="Default: every class.")
    parser.add_argument(
        "--num_images_per_prompt", type=positive_int, default=4, help="Images for each prompt or label."
    )
    parser.add_argument(
        "--guidance_scale",
        type=non_negative_float,
        default=None,
        help="1 = off. Default: 7.5; 2 with --guide_model; off for an unconditional run without one.",
    )
    parser.add_argument(
        "--guidance_interval",
        nargs=2,
        metavar=("START", "END"),
        type=fraction,
        default=[0.0, 1.0],
        help="Shares of the timesteps, 0 = clean, 1 = noise, between which guidance is on. Default: always.",
    )
    parser.add_argument(
        "--guidance_rescale",
        type=fraction,
        default=0.0,
        help="How far the guided prediction's std goes back to the unguided one's; 0 = off, 1 = all the way.",
    )
    parser.add_argument(
        "--guide_model",
        default=None,
        help="A weaker run, or an earlier checkpoint, that guidance leads away from (autoguidance).",
    )
    parser.add_argument("--num_inference_steps", type=positive_int, default=50, help="Steps of the sampler.")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default=None, help="Default: DDIM, or Euler for flow.")
    parser.add_argument(
        "--ema_sigma_rel",
        type=positive_float,
        default=None,
        help="Sample EDM2's average of this relative width, made of the snapshots that --ema_sigma_rels kept.",
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="Seed of the first image.")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="Images made at once.")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="Autocast.")
    parser.add_argument("--device", default=None, help="cuda, cpu, ... Default: cuda where there is one.")
    parser.add_argument("--output_dir", default=None, help="New or empty folder. Default: MODEL/sampled/NUMBER.")
    args = parse_with_config(parser)
    if args.prompts_file and not Path(args.prompts_file).is_file():
        raise UserError(f"--prompts_file: the file {args.prompts_file} does not exist")
    if args.output_dir and Path(args.output_dir).is_file():
        raise UserError(f"--output_dir: {args.output_dir} is a file; give a new folder")
    if args.output_dir and Path(args.output_dir).is_dir() and any(Path(args.output_dir).iterdir()):
        raise UserError(f"--output_dir: {args.output_dir} is not empty; give a new folder")
    return args


def main(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm

    from utils import requests, sampling
    from utils.export import load_run

    # Load
    run_dir = Path(args.model) if args.model else requests.newest_run(Path("runs"))
    pipeline = load_run(run_dir, args.ema_sigma_rel)
    guide = requests.load_guide(args.guide_model, pipeline) if args.guide_model else None
    pipeline.scheduler = sampling.sampling_scheduler(pipeline.scheduler, args.scheduler, args.num_inference_steps)
    device = sampling.usable_device(args.device)
    pipeline.to(device)
    if guide is not None:
        guide.to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = (args.prompt or []) + requests.read_prompts(args.prompts_file)
    wanted = requests.requested_images(pipeline, run_dir, prompts, args.class_labels, args.negative_prompt)
    settings = requests.guidance_settings(
        pipeline,
        args.guidance_scale,
        args.guidance_interval,
        args.guidance_rescale,
        args.num_inference_steps,
        with_guide=guide is not None,
        with_negative_prompt=args.negative_prompt is not None,
    )
    wanted = [each for each in wanted for _ in range(args.num_images_per_prompt)]
    output_dir = Path(args.output_dir) if args.output_dir else requests.next_folder(run_dir / "sampled")
    output_dir.mkdir(parents=True, exist_ok=True)

    # Sample
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    images = []
    progress = tqdm(total=len(wanted), unit=" images")
    for first, batch in sampling.batches(wanted, args.batch_size):
        generators = sampling.image_generators(args.seed, first, len(batch))
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            request = requests.merge(batch) | settings
            images += pipeline(**request, guide_model=guide, generator=generators).images
        progress.update(len(batch))
    progress.close()

    # Save
    names = requests.names(pipeline, wanted)
    settings |= {"guide_model": args.guide_model} if args.guide_model else {}
    settings |= {} if args.ema_sigma_rel is None else {"ema_sigma_rel": args.ema_sigma_rel}
    settings |= {"model": str(run_dir), "scheduler": type(pipeline.scheduler).__name__}
    requests.save_images(output_dir, images, wanted, settings, args.seed)
    count = args.num_images_per_prompt
    rows = [images[i : i + count] for i in range(0, len(images), count)]
    sampling.labelled_grid([row[:10] for row in rows[:50]], names[::count][:50]).save(output_dir / "grid.png")
    print(f"{len(images)} images and grid.png in {output_dir}")


if __name__ == "__main__":
    run_script(main, parse_args)
