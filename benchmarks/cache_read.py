"""What a batch costs from the latent cache, against the same batch from tensors in memory.

    python benchmarks/cache_read.py

Random batches of 64 rows of a cache of 2,000: latents 4 x 32 x 32 and caption states 77 x 768, float16. The two are
measured in turn, so that whatever else the machine does falls on both.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cache_writer import ShardFolder, caption_features, caption_id, latent_features
from utils.files import write_json
from utils.latent_cache import SPEC_FILE, LatentCache, LatentSpec

LATENT, STATES = (4, 32, 32), (77, 768)


def write_cache(folder: Path, rows: int, rows_per_shard: int) -> None:
    """A cache of random numbers: each row has a caption of its own, and caption row 0 is the empty one."""
    rng = np.random.default_rng(0)
    captions = ["", *(f"caption {i}" for i in range(rows))]
    ids = list(map(caption_id, captions))
    latents = ShardFolder(folder / "latents", latent_features(int(np.prod(LATENT)), False, True, True))
    states = ShardFolder(folder / "captions", caption_features("hidden_states", int(np.prod(STATES))))
    for index, first in enumerate(range(0, rows, rows_per_shard)):
        some = range(first, min(first + rows_per_shard, rows))
        columns = {
            "row": list(some),
            "latents": rng.standard_normal((len(some), *LATENT), dtype=np.float32).astype(np.float16),
            "label": [row % 10 for row in some],
            "caption": [[captions[row + 1]] for row in some],
            "caption_id": [[ids[row + 1]] for row in some],
        }
        latents.write(index, columns, {})
    for index, first in enumerate(range(0, len(captions), rows_per_shard)):
        some = range(first, min(first + rows_per_shard, len(captions)))
        columns = {
            "caption_id": [ids[row] for row in some],
            "caption": [captions[row] for row in some],
            "num_tokens": [2 + row % 75 for row in some],
            "hidden_states": rng.standard_normal((len(some), *STATES), dtype=np.float32).astype(np.float16),
        }
        states.write(index, columns, {})
    latents.finish()
    states.finish()
    plain = {"mean": [0.0] * LATENT[0], "std": [1.0] * LATENT[0]}
    spec = LatentSpec(
        kind="image",
        shape=LATENT,
        dtype="float16",
        content="mean",
        flips=False,
        num_rows=rows,
        num_skipped=0,
        normalisation={"vae": plain, "measured": plain},
        captions={"content": "hidden_states", "shape": STATES, "count": len(captions), "hidden_size": STATES[1]},
        labels={"num_classes": 10, "names": None},
        vae="none",
        text_encoder=None,
        fingerprint={},
    )
    write_json(folder / SPEC_FILE, asdict(spec))


Gather = Callable[[np.ndarray], dict[str, torch.Tensor]]


def in_memory(cache: LatentCache) -> dict[str, Gather]:
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


def seconds(gather: Gather, rows: np.ndarray) -> float:
    started = time.perf_counter()
    gather(rows)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="Rows of the cache.")
    parser.add_argument("--batch_size", type=int, default=64, help="Rows a batch.")
    parser.add_argument("--rounds", type=int, default=300, help="Batches of each kind.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch: a data loader has one.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), args.rows, rows_per_shard=512)
        cache = LatentCache(folder)
        gathers = {"latent cache": cache.gather, **in_memory(cache)}
        rng = np.random.default_rng(1)
        batches = [rng.integers(args.rows, size=args.batch_size) for _ in range(args.rounds)]
        for rows in batches[:10]:  # warm up, and see that all give the same
            expected, *others = (gather(rows) for gather in gathers.values())
            assert all(torch.equal(other[key], expected[key]) for other in others for key in expected)
        # Rows of its own for each, or the second way to index would find those of the first in the CPU's cache.
        turns = zip(*(batches[i * 50 :] + batches[: i * 50] for i in range(len(gathers))))
        times = np.array([[seconds(g, r) * 1000 for g, r in zip(gathers.values(), turn)] for turn in turns])
    medians = np.median(times, axis=0)
    print(f"{args.batch_size} of {args.rows} rows, {args.threads} thread(s): ms a batch")
    print("| from | median | 10 % | 90 % | cache / this |\n|---|---|---|---|---|")
    for name, column, median in zip(gathers, times.T, medians):
        low, high = np.quantile(column, (0.1, 0.9))
        print(f"| {name} | {median:.2f} | {low:.2f} | {high:.2f} | {medians[0] / median:.2f} |")


if __name__ == "__main__":
    main()
