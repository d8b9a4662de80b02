"""Cells -> latent cache: what `precompute_latents.py --modality expression` runs."""

import logging
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from tqdm.auto import tqdm

from utils import frozen
from utils.expression.codec import batch_numbers, encode_cells, load_expression_vae, rows_of_split
from utils.expression.data.source import open_cells
from utils.expression.data.stream import cell_batch
from utils.expression.data.table import CellTable, read_table
from utils.expression.vae.network import ExpressionVAE
from utils.files import sha256_json
from utils.latents.spec import LatentSpec, Normalisation
from utils.latents.writer import ChannelSums, ShardFolder, finish_cache, found_or_made

logger = logging.getLogger(__name__)
DTYPE = "float32"  # latents of cells are small


def build_cache(args: Namespace, accelerator: Accelerator, cache_dir: Path) -> LatentSpec:
    """Makes the cache that `args` ask for, or finds it finished; the main process does it. Raises UserError for bad
    input and for a folder with another cache or something else in it.
    """
    vae = load_expression_vae(args.pretrained_vae_model_name_or_path)
    source = open_cells(args.dataset_name, args.counts_layer)
    rows = rows_of_split(source, args.pretrained_vae_model_name_or_path, args.split, "--split")
    config = vae.config
    with TemporaryDirectory() as folder:  # for more cells than memory: the files stay mapped when they have no name
        table = read_table(source, rows, config.genes, config.library, Path(folder), args.max_skipped_fraction)
    return build_from(args, accelerator, cache_dir, vae, table)


def facts_of(spec: LatentSpec) -> list[str]:
    """What a cache of cells holds beside latents, for a reader."""
    return []


def build_from(
    args: Namespace, accelerator: Accelerator, cache_dir: Path, vae: ExpressionVAE, table: CellTable
) -> LatentSpec:
    """The cache of these cells, made or found."""
    config = vae.config
    fingerprint = {
        "dataset": {"name": args.dataset_name, "split": args.split, "sha256": table.identity()},
        "vae": frozen.describe(vae, args.pretrained_vae_model_name_or_path),
        "genes": sha256_json(config.genes),
        "library": config.library,
        "content": "moments",
        "dtype": DTYPE,
    }

    def write() -> None:
        write_cache(args, cache_dir, vae.to(accelerator.device), table, fingerprint)

    return found_or_made(accelerator, cache_dir, fingerprint, args.rows_per_shard, write)


def write_cache(
    args: Namespace, cache_dir: Path, vae: ExpressionVAE, table: CellTable, fingerprint: dict[str, Any]
) -> None:
    """Writes the shards and, last of all, the spec."""
    dimensions = vae.config.latent_channels + 1
    spec = LatentSpec(
        kind="vector",
        shape=(dimensions,),
        dtype=DTYPE,
        content="moments",
        num_rows=len(table),
        num_skipped=len(table.skipped),
        normalisation={},  # measured on the way
        vae=args.pretrained_vae_model_name_or_path,
        fingerprint=fingerprint,
        columns={name: "text" if values.dtype == object else "number" for name, values in table.obs.items()},
    )
    numbers, sums = batch_numbers(vae, table), ChannelSums(dimensions)
    shards = ShardFolder(cache_dir / "latents", vector_features(spec))
    with tqdm(total=len(table), unit=" cells", desc="latents") as progress:
        for index, first in enumerate(range(0, len(table), args.rows_per_shard)):
            rows = np.arange(first, min(first + args.rows_per_shard, len(table)))
            moments = []
            for start in range(0, len(rows), args.encode_batch_size):
                batch = cell_batch(table, rows[start : start + args.encode_batch_size], numbers)
                mean, std = encode_cells(vae, {name: values.to(vae.device) for name, values in batch.items()})
                sums.add(mean.cpu().numpy(), std.cpu().numpy())
                moments.append(np.stack([mean.cpu().numpy(), std.cpu().numpy()], axis=1))  # (B, 2, D)
                progress.update(len(mean))
            columns: dict[str, Any] = {"row": rows, "cell_id": table.cell_ids[rows].astype(object)}
            columns |= {"library_size": table.library_sizes[rows], "latents": np.concatenate(moments)}
            columns |= {f"column.{name}": values[rows] for name, values in table.obs.items()}
            shards.write(index, columns, {})
    of_vae = Normalisation.of_vae(vae.config, dimensions)
    finish_cache(cache_dir, shards, spec, skipped=table.skipped, of_vae=of_vae, sums=sums)


def vector_features(spec: LatentSpec) -> datasets.Features:
    """Columns of a table of vectors: moments, who the cell is, its library size, and the columns of obs."""
    features: dict[str, Any] = {
        "row": datasets.Value("int64"),
        "cell_id": datasets.Value("string"),
        "library_size": datasets.Value("float64"),
        "latents": datasets.List(datasets.Value(spec.dtype), length=2 * spec.shape[0]),
    }
    for name, kind in (spec.columns or {}).items():
        features[f"column.{name}"] = datasets.Value("float64" if kind == "number" else "string")
    return datasets.Features(features)
