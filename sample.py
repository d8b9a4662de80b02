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

from utils.args.checks import check_new_folder
from utils.args.parsing import parse_with_config, run_script
from utils.args.sampling import add_sampler_args, add_speed_args
from utils.modalities import add_request_args, check_request_args, modality_of, refuse_other_requests


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=None, help="A run's folder or a checkpoint. Default: the newest run below runs/."
    )
    add_request_args(parser)
    add_sampler_args(parser, batch_size=None)
    add_speed_args(parser)
    parser.add_argument("--lora", default=None, help="Folder lora/ of a run that was fine-tuned from --model.")
    parser.add_argument("--output_dir", default=None, help="New or empty folder. Default: MODEL/sampled/NUMBER.")
    args = parse_with_config(parser)
    check_request_args(args)
    check_new_folder(args.output_dir)
    return args


def main(args: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from utils.runs.load import newest_run, next_folder

    # Load
    run_dir = Path(args.model) if args.model else newest_run(Path("runs"))
    modality = modality_of(run_dir)
    refuse_other_requests(args, run_dir)
    sampler = modality.load("sampler:Sampler").of(args, run_dir, args.lora)  # run, guide and schedule, on the device
    sampler.speed_up(args.torch_compile, args.fuse_qkv_projections)
    requests = sampler.requests(args)  # one a sample
    output_dir = Path(args.output_dir) if args.output_dir else next_folder(run_dir / "sampled")
    output_dir.mkdir(parents=True, exist_ok=True)
    batch_size = args.batch_size or modality.batch_size

    # Sample
    samples = []
    with tqdm(total=len(requests), unit=f" {modality.samples}") as progress:
        for batch in sampler.sample(requests, args.seed, batch_size, args.mixed_precision):
            samples += batch
            progress.update(len(batch))

    # Save
    print(sampler.save(output_dir, samples, requests, args.seed))


if __name__ == "__main__":
    run_script(main, parse_args)
