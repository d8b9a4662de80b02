"""What a batch costs from the latent cache, against the same batch from tensors in memory; and what memory it takes.

    python benchmarks/cache_read.py
    python benchmarks/cache_read.py --rows 200000 --latents_dir /mnt/disk/cache     # larger than memory; kept

Random batches of 64 rows: latents 4 x 32 x 32 and caption states 77 x 768, float16. All ways are measured in turn, so
that whatever else the machine does falls on all. "loader" is what the trainers iterate, in this process. The cold rows
are read after the kernel was told to forget the files; then an epoch is read with no room left for more than
--headroom bytes of memory that is not a file's.
"""

import os
import resource
import tempfile
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from common import benchmark_parser, report, seconds
from random_data import write_random_cache
from torch.utils.data import DataLoader

from utils.draws import PositionBatches, identity
from utils.image.cache import ImageCache
from utils.latents.cache import LatentStream
from utils.latents.spec import SPEC_FILE
from utils.plan.arithmetic import readable

LATENT = (4, 32, 32)
Gather = Callable[[np.ndarray], Any]


def in_memory(cache: ImageCache) -> dict[str, Gather]:
    """The same batches from tensors that hold the whole cache, by the two ways to index one."""
    columns = cache.gather(np.arange(len(cache)))
    ways = {
        "tensor[rows]": torch.Tensor.__getitem__,
        "tensor.index_select": lambda tensor, i: tensor.index_select(0, i),
    }
    return {
        name: lambda rows, way=way: {key: way(column, torch.from_numpy(rows)) for key, column in columns.items()}
        for name, way in ways.items()
    }


def endless_batches(
    cache: ImageCache, batch_size: int, prepare: Callable[[DataLoader], DataLoader] = identity
) -> Iterator[dict[str, torch.Tensor]]:
    """What the trainers iterate; they do not `prepare` it, since each process has positions of its own already."""
    sampler = PositionBatches(batch_size, 1, 0, 0, 1)
    return iter(prepare(DataLoader(LatentStream(cache, seed=0), batch_sampler=sampler, collate_fn=identity)))


def batch_rows(cache: ImageCache, args: Namespace) -> list[dict[str, Any]]:
    """The first table."""
    loader = endless_batches(cache, args.batch_size)
    prepared = endless_batches(cache, args.batch_size, Accelerator(cpu=True).prepare)
    gathers: dict[str, Gather] = {
        "latent cache": cache.gather,
        "latent cache, loader": lambda rows: next(loader),
        "latent cache, accelerator.prepare(loader)": lambda rows: next(prepared),
        **in_memory(cache),
    }
    rng = np.random.default_rng(1)
    batches = [rng.integers(len(cache), size=args.batch_size) for _ in range(args.rounds)]
    for rows in batches[:10]:  # warm up, and see that all that are given rows give the same
        expected, _, _, *others = (gather(rows) for gather in gathers.values())
        assert all(torch.equal(other[key], expected[key]) for other in others for key in expected)
    # Rows of its own for each, or the second way to index would find those of the first in the CPU's cache.
    turns = zip(*(batches[i * 50 :] + batches[: i * 50] for i in range(len(gathers))))
    times = np.array([[1000 * seconds(partial(g, r)) for g, r in zip(gathers.values(), turn)] for turn in turns])
    medians = np.median(times, axis=0)
    figures = []
    for name, column, median in zip(gathers, times.T, medians):
        low, high = np.quantile(column, (0.1, 0.9))
        ratio = float(medians[0] / median)
        figures.append(
            {"from": name, "median, ms": median, "10 %": low, "90 %": high, "cache / this": ratio}
            | {"loader / this": float(medians[1] / median)}
        )
    return figures


def forget(folder: Path) -> None:
    """Has the kernel drop the shards of a cache from its memory."""
    for shard in folder.glob("*/*.arrow"):
        with open(shard, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold_milliseconds(folder: Path, args: Namespace) -> float:
    """The median of batches of rows that no one has read since the files were forgotten."""
    cache = ImageCache(folder)
    forget(folder)
    rows = np.random.default_rng(2).permutation(len(cache))
    batches = np.array_split(rows[: len(rows) // 4], max(1, len(rows) // 4 // args.batch_size))
    return 1000 * float(np.median([seconds(partial(cache.gather, each)) for each in batches]))


def memory() -> dict[str, int]:
    """Bytes of this process: resident, and of those what is no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return {"resident": 1024 * kilobytes["Rss"], "anonymous": 1024 * kilobytes["Anonymous"]}


def epoch(folder: Path, args: Namespace) -> dict[str, Any]:
    """An epoch of the loader's batches, in a process that may not grow."""
    cache = ImageCache(folder)
    loader = endless_batches(cache, args.batch_size)
    for _ in range(3):
        next(loader)
    before = memory()
    data_segment = 1024 * int(
        next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line[:6] == "VmData")
    )
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_segment + args.headroom, limits[1]))
    took = seconds(lambda: deque(islice(loader, len(cache) // args.batch_size), maxlen=0))
    resource.setrlimit(resource.RLIMIT_DATA, limits)
    after = memory()
    size = sum(shard.stat().st_size for shard in folder.glob("*/*.arrow"))
    return {
        "cache on disk": readable(size),
        "room left": readable(args.headroom),
        "memory, grown by": readable(max(0, after["anonymous"] - before["anonymous"])),
        "files mapped, grown by": readable(max(0, after["resident"] - before["resident"])),
        "samples/s": len(cache) // args.batch_size * args.batch_size / took,
    }


def main() -> None:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--latents_dir", type=Path, default=None, help="The cache. Default: a temporary one.")
    parser.add_argument("--rows", type=int, default=2000, help="Rows of a cache that is made for this.")
    parser.add_argument("--batch_size", type=int, default=64, help="Rows a batch.")
    parser.add_argument("--rounds", type=int, default=300, help="Batches of each kind.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch: a data loader has one.")
    parser.add_argument("--headroom", type=int, default=64_000_000, help="Bytes that an epoch may take.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.latents_dir or Path(scratch)
        if not (folder / SPEC_FILE).is_file():
            write_random_cache(folder, args.rows, LATENT)
        cold, grown = cold_milliseconds(folder, args), epoch(folder, args)
        rows = batch_rows(ImageCache(folder), args)
    rows.append({"from": "latent cache, cold", "median, ms": cold})
    report(args, rows, [grown])


if __name__ == "__main__":
    main()
