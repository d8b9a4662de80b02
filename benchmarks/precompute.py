"""Images per second of `precompute_latents.py`, in units of the VAE alone on batches that lie in memory.

    python benchmarks/precompute.py
    python benchmarks/precompute.py --resolutions 256 512 --mixed_precision bf16 --encode_batch_size 32

The VAE has the shape of sd-vae-ft-mse and random weights; images are JPEGs, a quarter larger than they are cached.
What is timed is the writing of the latents, from the files to shards that are safe on the disk, but not the loading of
the VAE.
"""

import logging
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import alternate, benchmark_parser, median_ratio, parsed, report
from random_data import save_vae, write_images

from utils.image import codec as codecs
from utils.image import precompute
from utils.training import setup as run

BLOCKS, LAYERS = (128, 256, 512, 512), 2  # of sd-vae-ft-mse


class Precompute:
    """`precompute_latents.py` on a folder of images, into a new cache each time."""

    def __init__(self, images: Path, vae: Path, resolution: int, args: Namespace, scratch: Path):
        flags = ["--train_data_dir", images, "--resolution", resolution, "--pretrained_vae_model_name_or_path", vae]
        flags += ["--encode_batch_size", args.encode_batch_size, "--mixed_precision", args.mixed_precision]
        flags += ["--rows_per_shard", args.rows_per_shard, "--latents_dir", scratch]
        _, self.args = parsed("precompute_latents", flags)
        self.accelerator = run.make_accelerator(mixed_precision=self.args.mixed_precision, seed=self.args.seed)
        self.scratch = scratch
        self.seconds: list[float] = []  # of writing latents, for each cache that was made

    def __call__(self) -> None:
        write_latents = precompute.write_latents

        def timed(*inputs):
            started = time.perf_counter()
            shards = write_latents(*inputs)
            self.seconds.append(time.perf_counter() - started)
            return shards

        with mock.patch.object(precompute, "write_latents", timed):
            precompute.build_latent_cache(self.args, self.accelerator, self.scratch / str(len(self.seconds)))


def vae_alone(name: Path, resolution: int, args: Namespace, precompute_: Precompute) -> Any:
    """The encoding of as many images, a batch at a time; every batch is the same one."""
    device = precompute_.accelerator.device
    vae = codecs.load_vae(str(name)).to(device)
    size = args.encode_batch_size
    batch = torch.rand(size, 3, resolution, resolution, device=device) * 2 - 1
    batch = batch.contiguous(memory_format=torch.channels_last)  # as pictures lie in memory; 10 % faster on a CPU

    def encode() -> None:
        for first in range(0, args.num_images, size):
            with precompute_.accelerator.autocast():
                mean, std = codecs.encode(vae, batch[: min(size, args.num_images - first)])
            mean.cpu(), std.cpu()

    return encode


def measure(resolution: int, args: Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vae = save_vae(folder / "vae", BLOCKS, LAYERS)
        write_images(folder / "images", args.num_images, resolution)
        cache = Precompute(folder / "images", vae, resolution, args, folder / "caches")
        times = alternate({"cache": cache, "vae": vae_alone(vae, resolution, args, cache)}, args.rounds)
        written = cache.seconds[1:]  # the first warms up
    return {
        "resolution": resolution,
        "precision": args.mixed_precision,
        "VAE alone, images/s": args.num_images / float(np.median(times["vae"])),
        "precompute, images/s": args.num_images / float(np.median(written)),
        "of the VAE's rate": median_ratio(times["vae"], written),
    }


def main() -> None:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--resolutions", nargs="+", type=int, default=[128], help="Of the cached images.")
    parser.add_argument("--num_images", type=int, default=48, help="Images of the data set.")
    parser.add_argument("--encode_batch_size", type=int, default=8, help="Images per VAE call.")
    parser.add_argument("--rows_per_shard", type=int, default=24, help="Images per shard.")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="Of the VAE.")
    parser.add_argument("--rounds", type=int, default=3, help="Turns of each.")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    report(args, [measure(resolution, args) for resolution in args.resolutions])


if __name__ == "__main__":
    main()
