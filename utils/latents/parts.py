"""A latent cache in parts, each on the disk of another machine: who reads which, and what all of them have in common.

Every process reads one part, and every part is read by as many processes as any other, so that each batch has as much
of each part.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from utils.draws import PartReader
from utils.errors import UserError
from utils.latents.spec import LatentSpec, summary


def readers_of(parts: list[int], batch_size: int) -> list[PartReader]:
    """The reader of each process, from the part that each process opened."""
    return [
        PartReader(
            batch_size=batch_size,
            process_index=process,
            num_processes=len(parts),
            part=part,
            reader=parts[:process].count(part),
            num_readers=parts.count(part),
        )
        for process, part in enumerate(parts)
    ]


def pool(specs: list[LatentSpec]) -> LatentSpec:
    """The spec of the whole cache, from the spec that each process opened. Raises UserError unless these are one
    cache, or all parts of one, each opened by as many processes.
    """
    parts: list[dict[str, Any] | None] = [spec.fingerprint.get("part") for spec in specs]
    if not any(parts):
        for process, spec in enumerate(specs):
            if spec.identity() != specs[0].identity():
                raise UserError(
                    f"--latents_dir: processes 0 and {process} opened different caches; give all processes the same "
                    "one, or a part of one each (--num_parts)"
                )
        return specs[0]
    counts = {part["of"] if part else 1 for part in parts}
    if len(counts) > 1 or None in parts:
        raise UserError(
            "--latents_dir: the processes opened parts of different caches, or some a part and some a whole one: "
            f"{sorted({describe(part) for part in parts})}; make all with the same --num_parts"
        )
    (count,) = counts
    readers = [sum(part is not None and part["index"] == i for part in parts) for i in range(count)]
    if len(set(readers)) > 1:
        raise UserError(
            f"--latents_dir: parts 0 to {count - 1} were opened by {readers} processes, and each must be by as "
            f"many: launch a multiple of {count} processes, and give each its part"
        )
    by_part = {spec.fingerprint["part"]["index"]: spec for spec in specs}
    ordered = [by_part[i] for i in range(count)]
    first = ordered[0]
    for i, spec in enumerate(ordered):
        check_alike(first, spec, i)
    labels = first.labels
    if labels is not None:  # a column of plain integers has as many classes as the largest label of all parts says
        labels = labels | {"num_classes": max(spec.labels["num_classes"] for spec in ordered if spec.labels)}
    return replace(
        first,
        num_rows=sum(spec.num_rows for spec in ordered),
        num_skipped=sum(spec.num_skipped for spec in ordered),
        normalisation=first.normalisation | {"measured": pooled_statistics(ordered)},
        labels=labels,
        fingerprint=first.fingerprint | {"part": {"of": count, "rows": [spec.num_rows for spec in ordered]}},
    )


def describe(part: dict[str, Any] | None) -> str:
    return f"part {part['index']} of {part['of']}" if part else "a whole cache"


def check_alike(first: LatentSpec, spec: LatentSpec, part: int) -> None:
    """Raises UserError unless two parts were made with the same settings."""
    ours, theirs = (each.fingerprint | {"part": each.fingerprint["part"] | {"index": None}} for each in (first, spec))
    if first.captions and spec.captions:
        ours["captions"], theirs["captions"] = first.captions["content"], spec.captions["content"]
    for key in ours:
        if ours[key] != theirs.get(key):
            advice = "give all parts the same --max_cached_captions" if key == "captions" else "make one of them anew"
            raise UserError(
                f"--latents_dir: part 0 was made with {key} = {summary(ours[key])}, and part {part} with {key} = "
                f"{summary(theirs.get(key))}; {advice}"
            )


def pooled_statistics(specs: list[LatentSpec]) -> dict[str, list[float]]:
    """Mean and std of each channel over all parts, weighted by their rows."""
    rows = np.array([spec.num_rows for spec in specs], dtype=np.float64)[:, None]
    means, stds = (np.array([spec.normalisation["measured"][name] for spec in specs]) for name in ("mean", "std"))
    mean = (rows * means).sum(0) / rows.sum()
    square = (rows * (stds**2 + means**2)).sum(0) / rows.sum()
    return {"mean": mean.tolist(), "std": np.sqrt(square - mean**2).tolist()}


def unevenness(specs: list[LatentSpec]) -> float:
    """How much more often a row of the smallest part is seen than one of the largest: 0.1 is a tenth more."""
    rows = [spec.num_rows for spec in specs]
    return max(rows) / max(1, min(rows)) - 1
