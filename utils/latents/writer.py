"""Writing the latent cache so that it can be killed at any moment and started again, by any number of processes.

The source is cut into chunks of consecutive rows; chunk k becomes shard k, whoever writes it. A shard is written to a
temporary name, synced and renamed, and only then its manifest (`shard-00012.json`: counts, skipped rows, sums of
latents, sha256) appears the same way: a shard with a manifest is done, one without is written again.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from accelerate import Accelerator

from utils.errors import UserError
from utils.files import (
    names_in,
    read_json,
    remove_unfinished,
    replace_durably,
    sha256_file,
    temporary_path,
    write_json,
    write_text,
)
from utils.latents.spec import SPEC_FILE, LatentSpec, Normalisation, check_fingerprint


def caption_id(caption: str) -> int:
    """A 63-bit id of a caption's content: every process gives the same caption the same id, with no need to ask the
    others.
    """
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") >> 1


def latent_features(
    length: int, flips: bool, has_label: bool, has_captions: bool, dtype: str = "float16"
) -> datasets.Features:
    """Columns of the latents table; `length` numbers a latent."""
    tensor = datasets.List(datasets.Value(dtype), length=length)
    features: dict[str, Any] = {"row": datasets.Value("int64"), "latents": tensor}
    if flips:
        features["latents_flipped"] = tensor
    if has_label:
        features["label"] = datasets.Value("int64")
    if has_captions:
        features["caption"] = datasets.List(datasets.Value("string"))
        features["caption_id"] = datasets.List(datasets.Value("int64"))
    return datasets.Features(features)


def caption_features(content: str, length: int) -> datasets.Features:
    """Columns of the captions table; `content` is "hidden_states" (float16) or "input_ids" (int32)."""
    dtype = "float16" if content == "hidden_states" else "int32"
    return datasets.Features(
        {
            "caption_id": datasets.Value("int64"),
            "caption": datasets.Value("string"),
            "num_tokens": datasets.Value("int64"),
            content: datasets.List(datasets.Value(dtype), length=length),
        }
    )


class ShardFolder:
    """One table of the cache: a folder of numbered shards that opens with `datasets.load_from_disk` once
    `finish`ed.
    """

    def __init__(self, folder: Path, features: datasets.Features):
        self.folder = folder
        self.features = features
        folder.mkdir(parents=True, exist_ok=True)

    def arrow_path(self, index: int) -> Path:
        return self.folder / f"shard-{index:06d}.arrow"

    def manifest_path(self, index: int) -> Path:
        return self.folder / f"shard-{index:06d}.json"

    def is_done(self, index: int) -> bool:
        """Whether shard `index` is complete on disk."""
        return self.manifest_path(index).is_file() and self.arrow_path(index).is_file()

    def write(self, index: int, columns: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Writes a shard. Fixed-size columns are arrays (rows, n), others lists of Python values."""
        schema = self.features.arrow_schema
        arrays = [self._to_arrow(columns[field.name], field.type) for field in schema]
        temporary = temporary_path(self.arrow_path(index))
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        digest = sha256_file(temporary)
        replace_durably(temporary, self.arrow_path(index))
        write_json(self.manifest_path(index), {"num_rows": len(arrays[0]), "sha256": digest} | manifest)

    @staticmethod
    def _to_arrow(values: Any, type_: pa.DataType) -> pa.Array:
        if pa.types.is_fixed_size_list(type_):
            flat = np.ascontiguousarray(values).reshape(-1)
            return pa.FixedSizeListArray.from_arrays(pa.array(flat, type_.value_type), type_.list_size)
        return pa.array(values, type=type_)

    def manifests(self) -> list[dict[str, Any]]:
        """Manifests of the shards that are done, in order."""
        return [read_json(path) for path in sorted(self.folder.glob("shard-*.json"))]

    def finish(self) -> list[dict[str, Any]]:
        """Lists the shards in the files by which `datasets` knows a dataset, and returns their manifests.

        Empty shards are left out of the list. Raises UserError if a shard is missing.
        """
        manifests = self.manifests()
        for index in range(len(manifests)):
            if not self.is_done(index):
                raise UserError(f"{self.folder}: shard {index} is missing; run the same command again, it continues")
        files = [self.arrow_path(i).name for i, manifest in enumerate(manifests) if manifest["num_rows"]]
        remove_unfinished(self.folder)
        datasets.DatasetInfo(features=self.features).write_to_directory(str(self.folder))
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in files],
            "_fingerprint": hashlib.sha256("".join(m["sha256"] for m in manifests).encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        write_json(self.folder / "state.json", state)
        return manifests

    def read_columns(self, names: list[str]) -> Iterator[pa.Table]:
        """The named columns, shard by shard, in order."""
        for path in sorted(self.folder.glob("shard-*.arrow")):
            with pa.memory_map(str(path)) as source:
                yield pa.ipc.open_stream(source).read_all().select(names)


class ChannelSums:
    """Sums over latents, per channel, from which mean and std follow; they add up over shards."""

    def __init__(self, channels: int):
        self.count, self.total, self.squares = 0, np.zeros(channels), np.zeros(channels)

    def add(self, mean: np.ndarray, std: np.ndarray | None = None) -> None:
        """Adds latents (B, C, ...): their posterior means and, where there is a posterior, its stds."""
        axes = (0, *range(2, mean.ndim))
        mean = mean.astype(np.float64)
        second_moment = mean**2 if std is None else mean**2 + std.astype(np.float64) ** 2
        self.count += mean.size // mean.shape[1]
        self.total += mean.sum(axis=axes)
        self.squares += second_moment.sum(axis=axes)

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total.tolist(), "squares": self.squares.tolist()}

    @staticmethod
    def combine(parts: list[dict[str, Any]]) -> dict[str, list[float]]:
        """Mean and std per channel of all parts together."""
        parts = [part for part in parts if part["count"]]
        count = sum(part["count"] for part in parts)
        mean = np.sum([part["total"] for part in parts], axis=0) / count
        variance = np.sum([part["squares"] for part in parts], axis=0) / count - mean**2
        return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 1e-12)).tolist()}


def distinct_captions(latents: ShardFolder) -> dict[int, str]:
    """id -> caption of all captions in the latents table, in order of first appearance, after the empty one."""
    captions = {caption_id(""): ""}
    for table in latents.read_columns(["caption_id", "caption"]):
        ids = table.column("caption_id").combine_chunks().flatten().to_pylist()
        for key, caption in zip(ids, table.column("caption").combine_chunks().flatten().to_pylist(), strict=True):
            captions.setdefault(key, caption)
    return captions


def write_skipped(path: Path, skipped: list[dict[str, Any]]) -> None:
    """skipped.jsonl: one line for each image that could not be used."""
    write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped))


def found_or_made(
    accelerator: Accelerator,
    cache_dir: Path,
    fingerprint: dict[str, Any],
    rows_per_shard: int,
    write: Callable[[], None],
) -> LatentSpec:
    """The spec of the cache with this `fingerprint`, finished or made now by `write`, which the main process calls.
    Raises UserError for a folder with another cache or something else in it.
    """
    is_finished = (cache_dir / SPEC_FILE).is_file()
    accelerator.wait_for_everyone()  # all have looked before one writes: what they find, they find alike
    if is_finished:
        return finished_cache(cache_dir, fingerprint, accelerator.is_main_process)
    if accelerator.is_main_process:
        claim_folder(cache_dir, fingerprint | {"rows_per_shard": rows_per_shard})
        write()
    accelerator.wait_for_everyone()
    return LatentSpec.read(cache_dir)


def finish_cache(
    cache_dir: Path,
    shards: ShardFolder,
    spec: LatentSpec,
    *,
    skipped: list[dict[str, Any]],
    of_vae: Normalisation,
    sums: ChannelSums,
) -> None:
    """Completes a cache whose shards are written; the spec says what was measured on the way."""
    shards.finish()
    write_skipped(cache_dir / "skipped.jsonl", skipped)
    normalisation = {"vae": asdict(of_vae), "measured": ChannelSums.combine([sums.to_json()])}
    complete_cache(cache_dir, replace(spec, normalisation=normalisation))


PLAN_FILE = "plan.json"  # the fingerprint of a cache that is being written


def claim_folder(cache_dir: Path, plan: dict[str, Any]) -> None:
    """Takes an empty folder for this cache, or one in which this very cache was begun."""
    if (cache_dir / PLAN_FILE).is_file():
        check_fingerprint(read_json(cache_dir / PLAN_FILE), plan, cache_dir)
        return
    if cache_dir.exists() and (not cache_dir.is_dir() or names_in(cache_dir)):
        raise UserError(f"--latents_dir: {cache_dir} is not empty and holds no latent cache; give another folder")
    cache_dir.mkdir(parents=True, exist_ok=True)
    write_json(cache_dir / PLAN_FILE, plan)


def complete_cache(cache_dir: Path, spec: LatentSpec) -> None:
    """Writes the spec by which readers know that the cache is whole, and takes away what an unfinished one has."""
    remove_unfinished(cache_dir)
    write_json(cache_dir / SPEC_FILE, asdict(spec))
    (cache_dir / PLAN_FILE).unlink(missing_ok=True)


def finished_cache(cache_dir: Path, fingerprint: dict[str, Any], is_main_process: bool) -> LatentSpec:
    """The spec of a finished cache. Raises UserError if the cache is another one."""
    spec = LatentSpec.read(cache_dir)
    check_fingerprint(spec.fingerprint, fingerprint, cache_dir)
    if is_main_process:
        with contextlib.suppress(OSError):  # mostly it is gone, and the cache may lie where nothing can be written
            (cache_dir / PLAN_FILE).unlink()  # the process that wrote the spec was killed before it did so
    return spec
