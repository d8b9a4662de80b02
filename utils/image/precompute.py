"""Dataset -> latent cache: what `precompute_latents.py` runs, and a trainer that is given a dataset instead of a
cache.
"""

import logging
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm.auto import tqdm

from utils import frozen
from utils.errors import UserError
from utils.image import codec as codecs
from utils.image.data.pixels import BACKGROUNDS, Framing
from utils.image.data.rows import ImageColumns
from utils.image.encoding import LatentEncoder, RowReader, Shard, Source, decode_ahead, encode_captions
from utils.image.text import load_text_encoder
from utils.latents.spec import SPEC_FILE, LatentSpec, Normalisation
from utils.latents.writer import (
    ChannelSums,
    ShardFolder,
    caption_features,
    claim_folder,
    complete_cache,
    distinct_captions,
    finished_cache,
    latent_features,
    write_skipped,
)

logger = logging.getLogger(__name__)


@dataclass
class Encoders:
    """The frozen models of a cache; `tokenizer` and `text_encoder` are None where there are no captions."""

    vae: Any
    content: str
    latent_shape: tuple[int, ...]
    tokenizer: Any = None
    text_encoder: Any = None


def load_encoders(args: Namespace, has_captions: bool) -> Encoders:
    """Loads the models that `args` name. Raises UserError where they do not fit the resolution or the content asked
    for.
    """
    vae = codecs.load_vae(args.pretrained_vae_model_name_or_path)
    channels, factor = codecs.measure_shape(vae)
    if args.resolution % factor:
        raise UserError(
            f"--resolution: {args.resolution} is not divisible by {factor}, the downsampling factor of the VAE "
            f"{args.pretrained_vae_model_name_or_path}; use {args.resolution // factor * factor or factor}"
        )
    if args.latent_content == "moments" and not codecs.has_posterior(vae):
        raise UserError(f"--latent_content moments: {type(vae).__name__} has no posterior; use mean")
    content = args.latent_content or ("moments" if codecs.has_posterior(vae) else "mean")
    encoders = Encoders(vae, content, (channels, args.resolution // factor, args.resolution // factor))
    if has_captions:
        encoders.tokenizer, encoders.text_encoder = load_text_encoder(
            args.pretrained_text_encoder_name_or_path, args.text_encoder_library, args.tokenizer_name
        )
    return encoders


def fingerprint_of(args: Namespace, source: Source, encoders: Encoders) -> dict[str, Any]:
    """Everything that decides the content of a cache, and nothing else."""
    text_encoder = encoders.text_encoder
    return {
        "dataset": source.identity,
        "columns": {"image": source.columns.image, "caption": source.columns.caption, "label": source.columns.label},
        "vae": frozen.describe(encoders.vae, args.pretrained_vae_model_name_or_path),
        "text_encoder": text_encoder and frozen.describe(text_encoder, args.pretrained_text_encoder_name_or_path),
        "resolution": args.resolution,
        "crop": "center" if args.center_crop else f"random, seed {args.seed}",
        "random_flip": args.random_flip,
        "alpha_background": args.alpha_background,
        "max_samples": args.max_samples,
        "content": encoders.content,
        "dtype": "float16",
    } | source.part()


def build_cache(args: Namespace, accelerator: Accelerator, cache_dir: Path) -> LatentSpec:
    """The cache, or the part of it, that `precompute_latents.py` is asked for: as `build_latent_cache` makes it."""
    return build_latent_cache(args, accelerator, cache_dir, (args.part_index, args.num_parts))


def facts_of(spec: LatentSpec) -> list[str]:
    """What a cache of images holds beside latents, for a reader."""
    captions, labels = spec.captions, spec.labels
    facts = [f"{captions['count']} distinct captions ({captions['content']})"] if captions else []
    return facts + ([f"{labels['num_classes']} classes"] if labels else [])


def build_latent_cache(
    args: Namespace, accelerator: Accelerator, cache_dir: Path, part: tuple[int, int] = (0, 1)
) -> LatentSpec:
    """Makes the cache that `args` ask for, or the `part` (index, count) of it, goes on with an unfinished one, or
    finds it finished; every process calls this.

    Raises UserError for bad input, for a folder with another cache or with something else in it, and when more than
    `args.max_skipped_fraction` of the images are unreadable.
    """
    source = Source(args, part)
    encoders = load_encoders(args, has_captions=source.columns.caption is not None)
    fingerprint = fingerprint_of(args, source, encoders)
    if (cache_dir / SPEC_FILE).is_file():
        return finished_cache(cache_dir, fingerprint, accelerator.is_main_process)
    plan = fingerprint | {"rows_per_shard": args.rows_per_shard, "max_cached_captions": args.max_cached_captions}
    plan["mixed_precision"] = accelerator.mixed_precision  # shards of one cache are encoded alike
    with accelerator.main_process_first():
        claim_folder(cache_dir, plan)
    encoders.vae.to(accelerator.device)
    latents = write_latents(args, accelerator, cache_dir, source, encoders)
    accelerator.wait_for_everyone()
    check_skipped(
        args.max_skipped_fraction, cache_dir, latents.manifests(), source.num_part_rows(), accelerator.is_main_process
    )
    captions = None
    if encoders.text_encoder is not None:
        captions = write_captions(args, accelerator, cache_dir, latents, encoders)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_cache(args, cache_dir, latents, captions, source.columns, encoders, fingerprint)
    accelerator.wait_for_everyone()
    return LatentSpec.read(cache_dir)


def write_latents(
    args: Namespace, accelerator: Accelerator, cache_dir: Path, source: Source, encoders: Encoders
) -> ShardFolder:
    """Writes this process's share of the latent shards that are not there yet."""
    columns, shape = source.columns, encoders.latent_shape
    encoder = LatentEncoder(
        encoders.vae, encoders.content, args.random_flip, args.encode_batch_size, accelerator.autocast
    )
    length = encoder.planes * int(np.prod(shape))
    features = latent_features(length, args.random_flip, columns.label is not None, columns.caption is not None)
    shards = ShardFolder(cache_dir / "latents", features)
    framing = Framing(args.resolution, args.center_crop, BACKGROUNDS[args.alpha_background])
    reader = RowReader(columns, framing, args.seed)
    world, rank = accelerator.num_processes, accelerator.process_index
    done = sum(manifest["num_rows"] + len(manifest["skipped"]) for manifest in shards.manifests())
    if done:
        logger.info("going on with %s: %d images are done", cache_dir, done)
    num_skipped = 0
    num_rows = source.num_part_rows()
    share = num_rows and -(-num_rows // world)  # each process writes about as many
    name = "latents" if world == 1 else f"latents, process 1 of {world}"
    bar = tqdm(total=share, initial=done // world, unit=" images", desc=name, disable=rank > 0)
    wanted = source.chunks(lambda i: i % world == rank and not shards.is_done(i))
    chunks = ((index, source.first_row(index), rows) for index, rows in wanted)
    ahead = 2 * (args.encode_batch_size + args.decode_workers)
    with ThreadPoolExecutor(args.decode_workers) as pool, ThreadPoolExecutor(1) as writer, bar as progress:
        writing = None  # one shard is on its way to the disk while the next is encoded
        for index, reads in groupby(decode_ahead(chunks, reader, pool, ahead), key=itemgetter(0)):
            shard = Shard(encoder, shape, columns)
            for _, row, read in reads:
                shard.add(read, row)
                progress.update()
            encoded = shard.columns_and_manifest()
            if writing is not None:
                writing.result()
            writing = writer.submit(shards.write, index, *encoded)
            num_skipped += len(shard.skipped)
            if num_rows and num_skipped > args.max_skipped_fraction * num_rows:
                break  # nothing that follows can mend it; `check_skipped` will say so
        if writing is not None:
            writing.result()
    return shards


def check_skipped(
    max_fraction: float, cache_dir: Path, manifests: list[dict[str, Any]], num_rows: int | None, is_main_process: bool
) -> None:
    """Writes skipped.jsonl, and raises UserError if too many images, or all, were skipped."""
    skipped = [entry for manifest in manifests for entry in manifest["skipped"]]
    kept = sum(manifest["num_rows"] for manifest in manifests)
    report = cache_dir / "skipped.jsonl"
    if is_main_process:
        write_skipped(report, skipped)
        if skipped:
            logger.warning("%d images were skipped; %s lists them", len(skipped), report)
    total = num_rows or kept + len(skipped)
    if len(skipped) > max_fraction * total or not kept:
        example = f" (row {skipped[0]['row']}: {skipped[0]['reason']})" if skipped else ""
        raise UserError(
            f"--max_skipped_fraction {max_fraction}: {len(skipped)} of {total} images are unreadable{example};"
            f" {report} lists them: mend the data, or raise the limit"
        )


def write_captions(
    args: Namespace, accelerator: Accelerator, cache_dir: Path, latents: ShardFolder, encoders: Encoders
) -> dict[str, Any]:
    """Writes this process's share of the caption table, and says what is in it: states of every distinct caption, or
    token ids where there are more captions than `args.max_cached_captions`.
    """
    captions = list(distinct_captions(latents).items())
    content = "hidden_states" if len(captions) <= args.max_cached_captions else "input_ids"
    width = encoders.text_encoder.config.hidden_size
    shape = [encoders.tokenizer.model_max_length] + ([width] if content == "hidden_states" else [])
    shards = ShardFolder(cache_dir / "captions", caption_features(content, int(np.prod(shape))))
    encoders.text_encoder.to(accelerator.device)
    world, rank = accelerator.num_processes, accelerator.process_index
    with tqdm(total=len(captions), unit=" captions", desc="captions", disable=rank > 0) as progress:
        for index, first in enumerate(range(0, len(captions), args.rows_per_shard)):
            chunk = captions[first : first + args.rows_per_shard]
            if index % world == rank and not shards.is_done(index):
                ids, texts = (list(column) for column in zip(*chunk, strict=True))
                encoded = encode_captions(
                    encoders.tokenizer, encoders.text_encoder, texts, content, args.encode_batch_size
                )
                shards.write(index, {"caption_id": ids, "caption": texts} | encoded, {})
            progress.update(len(chunk))
    return {"content": content, "shape": shape, "count": len(captions), "hidden_size": width}


def finish_cache(
    args: Namespace,
    cache_dir: Path,
    latents: ShardFolder,
    captions: dict[str, Any] | None,
    columns: ImageColumns,
    encoders: Encoders,
    fingerprint: dict[str, Any],
) -> None:
    """Makes the tables loadable and completes the cache."""
    manifests = latents.finish()
    if captions is not None:
        features = caption_features(captions["content"], int(np.prod(captions["shape"])))
        ShardFolder(cache_dir / "captions", features).finish()
    labels = text_encoder = None
    if columns.label is not None:
        # A column of plain integers has as many classes as its largest label says.
        num_classes = columns.num_classes or 1 + max(manifest["max_label"] for manifest in manifests)
        labels = {"num_classes": num_classes, "names": columns.label_names}
    if captions is not None:
        names = ("pretrained_text_encoder_name_or_path", "text_encoder_library", "tokenizer_name")
        text_encoder = dict(
            zip(("name", "library", "tokenizer"), (getattr(args, name) for name in names), strict=True)
        )
    vae_normalisation = Normalisation.of_vae(encoders.vae.config, encoders.latent_shape[0])
    spec = LatentSpec(
        kind="image",
        shape=encoders.latent_shape,
        dtype="float16",
        content=encoders.content,
        flips=args.random_flip,
        num_rows=sum(manifest["num_rows"] for manifest in manifests),
        num_skipped=sum(len(manifest["skipped"]) for manifest in manifests),
        normalisation={
            "vae": asdict(vae_normalisation),
            "measured": ChannelSums.combine([m["sums"] for m in manifests]),
        },
        captions=captions,
        labels=labels,
        vae=args.pretrained_vae_model_name_or_path,
        text_encoder=text_encoder,
        fingerprint=fingerprint,
    )
    complete_cache(cache_dir, spec)
