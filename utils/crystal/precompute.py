"""Crystals -> latent cache: what `precompute_latents.py --modality crystal` runs."""

import logging
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from utils import frozen
from utils.crystal.codec import load_crystal_vae
from utils.crystal.data.table import CrystalTable, crystal_batch, load_crystals, translated
from utils.crystal.vae.network import CrystalVAE
from utils.draws import SampleDraws
from utils.errors import UserError
from utils.latents.spec import LatentSpec, Normalisation
from utils.latents.writer import ChannelSums, ShardFolder, finish_cache, found_or_made

logger = logging.getLogger(__name__)
DTYPE = "float32"  # latents of crystals are small, and half precision would move atoms


def build_cache(args: Namespace, accelerator: Accelerator, cache_dir: Path) -> LatentSpec:
    """Makes the cache that `args` ask for, or finds it finished; the main process does it. Raises UserError for bad
    input and for a folder with another cache or something else in it.
    """
    vae = load_crystal_vae(args.pretrained_vae_model_name_or_path)
    if args.max_atoms > vae.config.max_atoms:
        raise UserError(
            f"--max_atoms {args.max_atoms}: the VAE was trained with up to {vae.config.max_atoms} atoms; use as many"
        )
    table = load_crystals(
        args.dataset_name, args.dataset_split, args.max_atoms, args.max_samples, args.max_skipped_fraction
    )
    fingerprint = {
        "dataset": {"name": args.dataset_name, "split": args.dataset_split, "sha256": table.identity()},
        "vae": frozen.describe(vae, args.pretrained_vae_model_name_or_path),
        "max_atoms": args.max_atoms,
        "num_translations": args.num_translations,
        "seed": args.seed,
        "content": "moments",
        "dtype": DTYPE,
    }

    def write() -> None:
        write_cache(args, cache_dir, vae.to(accelerator.device), table, fingerprint)

    return found_or_made(accelerator, cache_dir, fingerprint, args.rows_per_shard, write)


def facts_of(spec: LatentSpec) -> list[str]:
    """What a cache of crystals holds beside latents, for a reader."""
    return [f"{spec.num_translations} translations of each"] if spec.num_translations > 1 else []


def write_cache(
    args: Namespace, cache_dir: Path, vae: CrystalVAE, table: CrystalTable, fingerprint: dict[str, Any]
) -> None:
    """Writes the shards and, last of all, the spec."""
    channels = vae.config.latent_channels
    kinds = {name: "text" if values.dtype == object else "number" for name, values in table.columns.items()}
    spec = LatentSpec(
        kind="set",
        shape=(args.max_atoms, channels),
        dtype=DTYPE,
        content="moments",
        num_rows=len(table),
        num_skipped=len(table.skipped),
        normalisation={},  # measured on the way
        vae=args.pretrained_vae_model_name_or_path,
        fingerprint=fingerprint,
        num_translations=args.num_translations,
        num_items={str(count): times for count, times in sorted(Counter(table.num_atoms.tolist()).items())},
        columns=kinds,
    )
    shards = ShardFolder(cache_dir / "latents", set_features(spec))
    sums = ChannelSums(channels)
    with tqdm(total=len(table), unit=" crystals", desc="latents") as progress:
        for index, first in enumerate(range(0, len(table), args.rows_per_shard)):
            rows = np.arange(first, min(first + args.rows_per_shard, len(table)))
            columns: dict[str, Any] = {"row": rows, "atomic_numbers": table.atomic_numbers[rows]}
            columns |= {f"column.{name}": values[rows] for name, values in table.columns.items()}
            parts = []
            for start in range(0, len(rows), args.encode_batch_size):
                some = rows[start : start + args.encode_batch_size]
                parts.append(encode_rows(vae, table, some, args.num_translations, args.seed, sums))
                progress.update(len(some))
            moved = np.concatenate(parts, axis=1)  # (translations, rows, 2, N, D)
            columns |= dict(zip(spec.variants(), moved, strict=True))
            shards.write(index, columns, {})
    of_vae = Normalisation.of_vae(vae.config, channels)
    finish_cache(cache_dir, shards, spec, skipped=table.skipped, of_vae=of_vae, sums=sums)


def set_features(spec: LatentSpec) -> datasets.Features:
    """Columns of a table of sets: latents of each translation, atoms, and the columns of the source."""
    size, channels = spec.shape
    tensor = datasets.List(datasets.Value(spec.dtype), length=2 * size * channels)
    features: dict[str, Any] = {"row": datasets.Value("int64")}
    features |= dict.fromkeys(spec.variants(), tensor)
    features["atomic_numbers"] = datasets.List(datasets.Value("uint8"), length=size)
    for name, kind in (spec.columns or {}).items():
        features[f"column.{name}"] = datasets.Value("float64" if kind == "number" else "string")
    return datasets.Features(features)


@torch.no_grad()
def encode_rows(
    vae: CrystalVAE, table: CrystalTable, rows: np.ndarray, num_translations: int, seed: int, sums: ChannelSums
) -> np.ndarray:
    """Means and stds (translations, B, 2, N, D) of the latents of some crystals, moved by vectors that are keyed by
    the row; zero at padding. With one translation none is moved.
    """
    batch = {name: values.to(vae.device) for name, values in crystal_batch(table, rows).items()}
    mask, frac_coords = batch["attention_mask"], batch["frac_coords"]
    moments: list[Tensor] = []
    for number in range(num_translations):
        if num_translations > 1:
            positions = torch.from_numpy(rows * num_translations + number)
            batch["frac_coords"] = translated(frac_coords, SampleDraws(seed, positions, vae.device))
        posterior = vae.encode(**batch)
        sums.add(posterior.mean[mask].cpu().numpy(), posterior.std[mask].cpu().numpy())
        moments.append(torch.stack([posterior.mean, posterior.std], dim=1) * mask[:, None, :, None])
    return torch.stack(moments).cpu().numpy()
