"""Makes images with a trained run, as PNGs that carry their parameters and as one grid.

    python sample.py --guidance_scale 7.5
    python sample.py --model runs/mine --prompt "a red apple" --prompt "two birds" --num_images_per_prompt 4
    python sample.py --model runs/cifar/checkpoint-20000 --class_labels 3 5 --scheduler dpmsolver++

Image number i has seed SEED + i: the same picture, to rounding, whatever the batch size.
"""

import argparse
from pathlib import Path

from utils import sample_args
from utils.parsing import parse_with_config, positive_int, run_script


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample_args.add_request_args(parser)
    sample_args.add_sampler_args(parser)
    parser.add_argument(
        "--num_images_per_prompt", type=positive_int, default=4, help="Images for each prompt or label."
    )
    parser.add_argument("--output_dir", default=None, help="New or empty folder. Default: MODEL/sampled/NUMBER.")
    args = parse_with_config(parser)
    sample_args.check_request_args(args)
    return args


def main(args: argparse.Namespace) -> None:
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
    images = []
    progress = tqdm(total=len(wanted), unit=" images")
    for batch in requests.sample(
        pipeline, wanted, settings, args.seed, args.batch_size, args.mixed_precision, guide_model=guide
    ):
        images += batch
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
