"""What making a cache of sets or vectors takes beside its rows: found where it is finished, completed at the end."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from utils.image.codec import Normalisation
from utils.image.precompute import claim_folder, complete_cache, finished_cache
from utils.latents.cache import SPEC_FILE, LatentSpec
from utils.latents.writer import ChannelSums, ShardFolder, write_skipped


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
    skipped: list[dict[str, Any]],
    of_vae: Normalisation,
    sums: ChannelSums,
) -> None:
    """Completes a cache whose shards are written; the spec says what was measured on the way."""
    shards.finish()
    write_skipped(cache_dir / "skipped.jsonl", skipped)
    normalisation = {"vae": asdict(of_vae), "measured": ChannelSums.combine([sums.to_json()])}
    complete_cache(cache_dir, replace(spec, normalisation=normalisation))
