"""Makes images, crystals or cells with a trained run.

    python sample.py --guidance_scale 7.5
    python sample.py --model runs/mine --prompt "a red apple" --prompt "two birds" --num_images_per_prompt 4
    python sample.py --model runs/cifar/checkpoint-20000 --class_labels 3 5 --scheduler dpmsolver++
    python sample.py --model runs/crystals --composition LiFePO4 --property band_gap=1.5 --num_samples 16
    python sample.py --model runs/pbmc/ldm --class_label "CD4+ T Helper2" --num_samples 500

Images come as PNGs that carry their parameters and as one grid; crystals as CIF files, a parquet and a picture; cells
as an .h5ad of counts. Sample number i has seed SEED + i: the same one, to rounding, whatever the batch size.
"""

import argparse
from pathlib import Path

from utils.args import columns as condition_args
from utils.args import sampling as sample_args
from utils.args.parsing import parse_with_config, positive_int, run_script
from utils.crystal import args as crystal_args
from utils.expression import args as expression_args
from utils.image.args import requests as args_requests


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args_requests.add_request_args(parser)
    parser.add_argument(
        "--num_images_per_prompt", type=positive_int, default=4, help="Number of images per prompt or label."
    )
    crystal_args.add_crystal_request_args(parser)
    expression_args.add_expression_request_args(parser)
    sample_args.add_sampler_args(parser)
    sample_args.add_speed_args(parser)
    parser.add_argument("--lora", default=None, help="Folder lora/ of a run that was fine-tuned from --model.")
    parser.add_argument("--output_dir", default=None, help="New or empty folder. Default: MODEL/sampled/NUMBER.")
    args = parse_with_config(parser)
    args_requests.check_request_args(args)
    return args


CELLS_AT_ONCE = 1024  # where --batch_size says nothing: they are small
OF_KINDS = {
    "images": crystal_args.OF_IMAGES,
    "crystals": crystal_args.OF_CRYSTALS,
    "cells": expression_args.OF_CELLS,
}


def refuse_other_kinds(args: argparse.Namespace, run_dir: Path, kind: str) -> None:
    """Raises UserError for flags that only runs of other kinds take."""
    others = {name for names in OF_KINDS.values() for name in names} - set(OF_KINDS[kind])
    condition_args.refuse_requests(args, tuple(sorted(others)), f"{run_dir} makes {kind}")


def sampling_settings(args: argparse.Namespace, run_dir: Path, pipeline, settings: dict) -> dict:
    """What is written beside the samples: enough to make them again."""
    named = {name: getattr(args, name) for name in ("guide_model", "ema_sigma_rel", "lora") if getattr(args, name)}
    return settings | named | {"model": str(run_dir), "scheduler": type(pipeline.scheduler).__name__}


def sample_images(args: argparse.Namespace, run_dir: Path) -> None:
    from tqdm.auto import tqdm

    from utils.diffusion import sampling
    from utils.image import pictures
    from utils.image import sampler as requests
    from utils.image.pipeline import load_run
    from utils.runs import load

    # Load
    refuse_other_kinds(args, run_dir, "images")
    pipeline = load_run(run_dir, args.ema_sigma_rel, lora_dir=args.lora)
    guide = requests.load_guide(args.guide_model, pipeline) if args.guide_model else None
    pipeline.scheduler = sampling.sampling_scheduler(pipeline.scheduler, args.scheduler, args.num_inference_steps)
    device = sampling.usable_device(args.device)
    pipeline.to(device)
    sampling.speed_up(pipeline.denoiser, args.torch_compile, args.fuse_qkv_projections)
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
    output_dir = Path(args.output_dir) if args.output_dir else load.next_folder(run_dir / "sampled")
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
    settings = sampling_settings(args, run_dir, pipeline, settings)
    requests.save_images(output_dir, images, wanted, settings, args.seed)
    count = args.num_images_per_prompt
    rows = [images[i : i + count] for i in range(0, len(images), count)]
    pictures.labelled_grid([row[:10] for row in rows[:50]], names[::count][:50]).save(output_dir / "grid.png")
    print(f"{len(images)} images and grid.png in {output_dir}")


def sample_crystals(args: argparse.Namespace, run_dir: Path) -> None:
    from tqdm.auto import tqdm

    from utils.crystal import files as crystal_files
    from utils.crystal import pictures
    from utils.crystal import sampler as crystal_requests
    from utils.crystal.matching import is_structurally_valid
    from utils.crystal.pipeline import load_crystal_guide, load_crystal_run
    from utils.diffusion import sampling
    from utils.runs import load

    # Load
    refuse_other_kinds(args, run_dir, "crystals")
    pipeline = load_crystal_run(run_dir, args.ema_sigma_rel, lora_dir=args.lora)
    guide = load_crystal_guide(args.guide_model, pipeline) if args.guide_model else None
    pipeline.scheduler = sampling.sampling_scheduler(pipeline.scheduler, args.scheduler, args.num_inference_steps)
    device = sampling.usable_device(args.device)
    pipeline.to(device)
    sampling.speed_up(pipeline.denoiser, args.torch_compile)
    if guide is not None:
        guide.to(device)
    asked = crystal_requests.requested_crystals(
        pipeline,
        run_dir,
        args.composition or [],
        args.chemical_system or [],
        args.property or [],
        args.clamp_composition,
    )
    settings = crystal_requests.guidance_settings(
        pipeline,
        asked,
        args.guidance_scale,
        args.guidance_interval,
        args.guidance_rescale,
        args.num_inference_steps,
        with_guide=guide is not None,
    )
    wanted = [each for each in asked for _ in range(args.num_samples)]
    num_atoms = crystal_requests.numbers_of_atoms(pipeline, wanted, args.num_atoms, args.seed)
    if args.clamp_composition:
        crystal_requests.clamped_counts(wanted, num_atoms)  # refuses what cannot be, before the folder is made
    output_dir = Path(args.output_dir) if args.output_dir else load.next_folder(run_dir / "sampled")
    output_dir.mkdir(parents=True, exist_ok=True)

    # Sample
    crystals = []
    progress = tqdm(total=len(wanted), unit=" crystals")
    for batch in crystal_requests.sample_crystals(
        pipeline,
        wanted,
        num_atoms,
        settings,
        args.seed,
        args.batch_size,
        args.mixed_precision,
        args.clamp_composition,
        guide,
    ):
        crystals += batch
        progress.update(len(batch))
    progress.close()

    # Save
    settings = sampling_settings(args, run_dir, pipeline, settings) | {"clamp_composition": args.clamp_composition}
    crystal_files.save_crystals(output_dir, crystals, wanted, settings, args.seed)
    pictures.crystal_grid(crystals[:64]).save(output_dir / "crystals.png")
    valid = sum(is_structurally_valid(crystal) for crystal in crystals)
    print(f"{len(crystals)} crystals ({valid} of valid structure) and crystals.png in {output_dir}")


def sample_cells(args: argparse.Namespace, run_dir: Path) -> None:
    import numpy as np
    from tqdm.auto import tqdm

    from utils.diffusion import sampling
    from utils.expression import files as expression_files
    from utils.expression import sampler as expression_requests
    from utils.expression.pipeline import load_expression_guide, load_expression_run
    from utils.runs import load

    # Load
    refuse_other_kinds(args, run_dir, "cells")
    pipeline = load_expression_run(run_dir, args.ema_sigma_rel, lora_dir=args.lora)
    guide = load_expression_guide(args.guide_model, pipeline) if args.guide_model else None
    pipeline.scheduler = sampling.sampling_scheduler(pipeline.scheduler, args.scheduler, args.num_inference_steps)
    device = sampling.usable_device(args.device)
    pipeline.to(device)
    sampling.speed_up(pipeline.denoiser, args.torch_compile)
    if guide is not None:
        guide.to(device)
    asked = expression_requests.requested_cells(pipeline, run_dir, args.class_label or [], args.property or [])
    if asked == [{}]:
        wanted = expression_requests.as_trained(pipeline, args.num_samples, args.seed)
    else:
        wanted = [each for each in asked for _ in range(args.num_samples)]
    settings = expression_requests.guidance_settings(
        pipeline,
        wanted,
        args.guidance_scale,
        args.guidance_interval,
        args.guidance_rescale,
        args.num_inference_steps,
        with_guide=guide is not None,
    )
    output_dir = Path(args.output_dir) if args.output_dir else load.next_folder(run_dir / "sampled")
    output_dir.mkdir(parents=True, exist_ok=True)
    batch_size = args.batch_size if "batch_size" in args.given else CELLS_AT_ONCE

    # Sample
    drawn = []
    progress = tqdm(total=len(wanted), unit=" cells")
    for batch in expression_requests.sample_cells(
        pipeline, wanted, settings, args.seed, batch_size, args.mixed_precision, guide
    ):
        drawn.append(batch)
        progress.update(len(batch.counts))
    progress.close()

    # Save
    counts, library_sizes = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    settings = sampling_settings(args, run_dir, pipeline, settings)
    expression_files.save_cells(output_dir, counts, library_sizes, pipeline.genes, wanted, settings, args.seed)
    print(f"{len(counts)} cells of {counts.shape[1]} genes in {output_dir / expression_files.CELLS_FILE}")


def main(args: argparse.Namespace) -> None:
    from utils.modalities import modality_of
    from utils.runs.load import newest_run

    run_dir = Path(args.model) if args.model else newest_run(Path("runs"))
    modality = modality_of(run_dir).name
    if modality == "expression":
        sample_cells(args, run_dir)
    else:
        (sample_crystals if modality == "crystal" else sample_images)(args, run_dir)


if __name__ == "__main__":
    run_script(main, parse_args)
