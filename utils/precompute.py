"""Dataset -> latent cache: what `precompute_latents.py` runs, and a trainer that is given a dataset instead of a cache."""

import logging
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from utils import codecs
from utils.cache_writer import (
    ChannelSums,
    ShardFolder,
    caption_features,
    caption_id,
    distinct_captions,
    latent_features,
    write_skipped,
)
from utils.conditions import encode_text, tokenize
from utils.data_images import (
    BadImage,
    ImageColumns,
    decode_image,
    normalise_captions,
    resize_and_crop,
    resolve_columns,
    undecoded,
)
from utils.errors import UserError
from utils.files import read_json, write_json
from utils.image_sources import dataset_identity, open_image_dataset
from utils.latent_cache import SPEC_FILE, LatentSpec, check_fingerprint
from utils.text_encoders import load_text_encoder

logger = logging.getLogger(__name__)
PLAN_FILE = "plan.json"  # the fingerprint of a cache that is being written


class Source:
    """The rows of a dataset in chunks of consecutive rows; a row is a dict with the image still encoded."""

    def __init__(self, args: Namespace):
        self.max_samples = args.max_samples
        self.rows_per_shard = args.rows_per_shard
        dataset = open_image_dataset(
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            split=args.dataset_split,
            revision=args.dataset_revision,
            streaming=args.streaming,
        )
        self.columns: ImageColumns = resolve_columns(
            dataset, args.image_column, args.caption_column, args.label_column
        )
        self.identity = dataset_identity(
            dataset,
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            args.dataset_split,
            args.dataset_revision,
        )
        wanted = [self.columns.image, self.columns.caption, self.columns.label]
        dataset = dataset.select_columns([name for name in dict.fromkeys(wanted) if name])
        self.dataset = undecoded(dataset, self.columns.image)
        self.num_rows = None if args.streaming else min(len(self.dataset), args.max_samples or len(self.dataset))

    def num_chunks(self) -> int | None:
        """How many chunks there are; None for a stream, whose end is not known."""
        return None if self.num_rows is None else -(-self.num_rows // self.rows_per_shard)

    def chunks(self, wanted) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(index, rows) of every chunk for which `wanted(index)`. A stream is read through, but decoded only where wanted."""
        if self.num_rows is not None:
            for index in filter(wanted, range(self.num_chunks() or 0)):
                first = index * self.rows_per_shard
                yield index, [self.dataset[i] for i in range(first, min(first + self.rows_per_shard, self.num_rows))]
            return
        index, rows = 0, []
        stream = self.dataset if self.max_samples is None else self.dataset.take(self.max_samples)
        for row in stream:
            rows.append(row)
            if len(rows) == self.rows_per_shard:
                if wanted(index):
                    yield index, rows
                index, rows = index + 1, []
        if rows and wanted(index):
            yield index, rows


def prepare_row(
    row: dict[str, Any], row_index: int, args: Namespace, columns: ImageColumns
) -> tuple[np.ndarray | None, str]:
    """The cropped uint8 image (R, R, 3), or None and the reason why this row is skipped."""
    try:
        image = decode_image(row[columns.image])
    except BadImage as reason:
        return None, str(reason)
    # Keyed by the row, so that a restart, or another number of processes, cuts the same crop.
    generator = np.random.default_rng([args.seed, row_index])
    if columns.label is not None and row[columns.label] is None:
        return None, f"no label in column {columns.label}"
    return resize_and_crop(image, args.resolution, args.center_crop, generator), ""


class ImageEncoder:
    """A frozen VAE that turns uint8 images into what the cache stores."""

    def __init__(self, vae, content: str, flips: bool, batch_size: int, accelerator: Accelerator):
        self.vae = vae.to(accelerator.device)
        self.content, self.flips, self.batch_size, self.accelerator = content, flips, batch_size, accelerator

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Images (B, R, R, 3) uint8 -> mean and std (B, C, H, W) float32."""
        pixels = torch.from_numpy(images).to(self.accelerator.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with self.accelerator.autocast():
            mean, std = codecs.encode(self.vae, pixels)
        if not torch.isfinite(mean).all():
            raise UserError(
                "--mixed_precision: the VAE gives latents that are not finite in this precision; use --mixed_precision no"
            )
        return mean.float().cpu().numpy(), None if std is None else std.float().cpu().numpy()

    def __call__(self, images: list[np.ndarray], sums: ChannelSums, progress: tqdm) -> dict[str, np.ndarray]:
        """The latent columns of a shard, (rows, planes * C * H * W) float16 each."""
        columns: dict[str, list[np.ndarray]] = {"latents": []} | ({"latents_flipped": []} if self.flips else {})
        for start in range(0, len(images), self.batch_size):
            batch = np.stack(images[start : start + self.batch_size])
            for name, oriented in zip(columns, (batch, batch[:, :, ::-1].copy())):
                mean, std = self.encode(oriented)
                planes = [mean] if self.content == "mean" else [mean, std]
                columns[name].append(np.stack(planes, axis=1).reshape(len(oriented), -1).astype(np.float16))
                sums.add(mean, std if self.content == "moments" else None)
            progress.update(len(batch))
        return {name: np.concatenate(parts) for name, parts in columns.items() if parts}


def fingerprint_of(
    args: Namespace, source: Source, vae, vae_factor: int, text_encoder, content: str
) -> dict[str, Any]:
    """Everything that decides the content of a cache, and nothing else."""
    if args.resolution % vae_factor:
        raise UserError(
            f"--resolution: {args.resolution} is not divisible by {vae_factor}, the downsampling factor of the VAE "
            f"{args.pretrained_vae_model_name_or_path}; use {args.resolution // vae_factor * vae_factor or vae_factor}"
        )
    return {
        "dataset": source.identity,
        "columns": {"image": source.columns.image, "caption": source.columns.caption, "label": source.columns.label},
        "vae": codecs.describe(vae, args.pretrained_vae_model_name_or_path),
        "text_encoder": text_encoder and codecs.describe(text_encoder, args.pretrained_text_encoder_name_or_path),
        "resolution": args.resolution,
        "crop": "center" if args.center_crop else f"random, seed {args.seed}",
        "random_flip": args.random_flip,
        "max_samples": args.max_samples,
        "content": content,
        "dtype": "float16",
    }


def build_latent_cache(args: Namespace, accelerator: Accelerator, cache_dir: Path) -> LatentSpec:
    """Makes the cache that `args` ask for, goes on with an unfinished one, or finds it finished; every process calls this.

    Raises UserError for bad input, for a folder with another cache or with something else in it, and when more than
    `args.max_skipped_fraction` of the images are unreadable.
    """
    source = Source(args)
    vae = codecs.load_vae(args.pretrained_vae_model_name_or_path)
    tokenizer = text_encoder = None
    if source.columns.caption:
        tokenizer, text_encoder = load_text_encoder(
            args.pretrained_text_encoder_name_or_path, args.text_encoder_library, args.tokenizer_name
        )
    content = args.latent_content or ("moments" if codecs.has_posterior(vae) else "mean")
    if content == "moments" and not codecs.has_posterior(vae):
        raise UserError(f"--latent_content moments: {type(vae).__name__} has no posterior; use mean")
    factor = codecs.downsampling_factor(vae)
    fingerprint = fingerprint_of(args, source, vae, factor, text_encoder, content)
    if (cache_dir / SPEC_FILE).is_file():
        spec = LatentSpec.read(cache_dir)
        check_fingerprint(spec.fingerprint, fingerprint, cache_dir)
        return spec
    with accelerator.main_process_first():
        claim_folder(cache_dir, fingerprint, args.rows_per_shard)

    latents_shape = codecs.encode(vae, torch.zeros(1, 3, args.resolution, args.resolution))[0].shape[1:]
    encoder = ImageEncoder(vae, content, args.random_flip, args.encode_batch_size, accelerator)
    latents = write_latents(args, accelerator, cache_dir, source, encoder, tuple(latents_shape))
    accelerator.wait_for_everyone()
    manifests = latents.manifests()
    check_skipped(args, cache_dir, manifests, accelerator.is_main_process)
    captions = None
    if text_encoder is not None:
        captions = write_captions(args, accelerator, cache_dir, latents, tokenizer, text_encoder)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        spec = LatentSpec(
            kind="image",
            shape=tuple(latents_shape),
            dtype="float16",
            content=content,
            flips=args.random_flip,
            num_rows=sum(m["num_rows"] for m in manifests),
            num_skipped=sum(len(m["skipped"]) for m in manifests),
            normalisation={
                "vae": vars(codecs.Normalisation.of_vae(vae.config, latents_shape[0])),
                "measured": ChannelSums.combine([m["sums"] for m in manifests]),
            },
            captions=captions,
            labels=label_summary(source.columns, manifests),
            vae=args.pretrained_vae_model_name_or_path,
            text_encoder=captions
            and {
                "name": args.pretrained_text_encoder_name_or_path,
                "library": args.text_encoder_library,
                "tokenizer": args.tokenizer_name,
            },
            fingerprint=fingerprint,
        )
        finish_cache(cache_dir, latents, captions, spec)
    accelerator.wait_for_everyone()
    return LatentSpec.read(cache_dir)


def claim_folder(cache_dir: Path, fingerprint: dict[str, Any], rows_per_shard: int) -> None:
    """Takes an empty folder for this cache, or one in which this very cache was begun."""
    plan = fingerprint | {"rows_per_shard": rows_per_shard}
    if (cache_dir / PLAN_FILE).is_file():
        check_fingerprint(read_json(cache_dir / PLAN_FILE), plan, cache_dir)
        return
    if cache_dir.exists() and any(cache_dir.iterdir()):
        raise UserError(f"--latents_dir: {cache_dir} is not empty and holds no latent cache; give another folder")
    cache_dir.mkdir(parents=True, exist_ok=True)
    write_json(cache_dir / PLAN_FILE, plan)


def write_latents(
    args: Namespace,
    accelerator: Accelerator,
    cache_dir: Path,
    source: Source,
    encoder: ImageEncoder,
    shape: tuple[int, ...],
) -> ShardFolder:
    """Writes this process's share of the latent shards that are not there yet."""
    planes = 2 if encoder.content == "moments" else 1
    columns = source.columns
    features = latent_features(
        planes * int(np.prod(shape)), encoder.flips, columns.label is not None, columns.caption is not None
    )
    shards = ShardFolder(cache_dir / "latents", features)
    rank, world = accelerator.process_index, accelerator.num_processes
    done = sum(read_json(path)["num_rows"] for path in shards.folder.glob("shard-*.json"))
    if done:
        logger.info("going on: %d images are in the cache already", done)
    num_skipped = 0
    with (
        ThreadPoolExecutor(args.decode_workers) as pool,
        tqdm(
            total=source.num_rows,
            initial=done,
            unit=" images",
            desc="latents",
            disable=not accelerator.is_main_process,
        ) as progress,
    ):
        for index, rows in source.chunks(lambda i: i % world == rank and not shards.is_done(i)):
            first = index * args.rows_per_shard
            prepared = list(
                pool.map(lambda pair: prepare_row(pair[1], pair[0], args, columns), enumerate(rows, first))
            )
            kept = [i for i, (image, _) in enumerate(prepared) if image is not None]
            skipped = [
                {"row": first + i, "path": image_path(rows[i], columns), "reason": reason}
                for i, (image, reason) in enumerate(prepared)
                if image is None
            ]
            sums = ChannelSums(shape[0])
            stored = encoder([image for image, _ in prepared if image is not None], sums, progress)
            stored = stored or {
                name: np.zeros((0, planes * int(np.prod(shape))), np.float16) for name in features if "latents" in name
            }
            stored["row"] = [first + i for i in kept]
            manifest = {"skipped": skipped, "sums": sums.to_json()}
            if columns.label:
                stored["label"] = [int(rows[i][columns.label]) for i in kept]
                manifest["max_label"] = max(stored["label"], default=-1)
                check_labels(stored["label"], columns, first)
            if columns.caption:
                stored["caption"] = [normalise_captions(rows[i][columns.caption]) for i in kept]
                stored["caption_id"] = [[caption_id(text) for text in texts] for texts in stored["caption"]]
            shards.write(index, stored, manifest)
            num_skipped += len(skipped)
            if source.num_rows and num_skipped > args.max_skipped_fraction * source.num_rows:
                break  # nothing that follows can mend it: `check_skipped` says so
    return shards


def image_path(row: dict[str, Any], columns: ImageColumns) -> str | None:
    """The file an image came from, where the dataset knows."""
    value = row[columns.image]
    return value.get("path") if isinstance(value, dict) else None


def check_labels(labels: list[int], columns: ImageColumns, first_row: int) -> None:
    """Labels are counted from 0 and, where the dataset names its classes, below their number."""
    bad = [
        label for label in labels if label < 0 or (columns.num_classes is not None and label >= columns.num_classes)
    ]
    if bad:
        limit = "" if columns.num_classes is None else f" to {columns.num_classes - 1}"
        raise UserError(
            f"--label_column {columns.label}: found label {bad[0]} near row {first_row}, expected 0{limit}"
        )


def check_skipped(args: Namespace, cache_dir: Path, manifests: list[dict[str, Any]], is_main_process: bool) -> None:
    """Writes skipped.jsonl and raises UserError if too many images, or all, were skipped."""
    skipped = [entry for manifest in manifests for entry in manifest["skipped"]]
    kept = sum(manifest["num_rows"] for manifest in manifests)
    if is_main_process:
        write_skipped(cache_dir / "skipped.jsonl", skipped)
        if skipped:
            logger.warning("%d images were skipped; %s lists them", len(skipped), cache_dir / "skipped.jsonl")
    share = len(skipped) / max(1, kept + len(skipped))
    if share > args.max_skipped_fraction or not kept:
        example = f", e.g. row {skipped[0]['row']}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(
            f"--max_skipped_fraction {args.max_skipped_fraction}: {len(skipped)} of {kept + len(skipped)} images were skipped{example}; "
            f"see {cache_dir / 'skipped.jsonl'}, mend the data or raise the limit"
        )


def write_captions(
    args: Namespace, accelerator: Accelerator, cache_dir: Path, latents: ShardFolder, tokenizer, text_encoder
) -> dict[str, Any]:
    """Writes this process's share of the caption table: states of every distinct caption, or token ids if there are too many."""
    captions = list(distinct_captions(latents).items())
    content = "hidden_states" if len(captions) <= args.max_cached_captions else "input_ids"
    length = tokenizer.model_max_length
    shape = [length, text_encoder.config.hidden_size] if content == "hidden_states" else [length]
    shards = ShardFolder(cache_dir / "captions", caption_features(content, int(np.prod(shape))))
    text_encoder = text_encoder.to(accelerator.device)
    chunks = range(0, len(captions), args.rows_per_shard)
    progress = tqdm(total=len(captions), unit=" captions", desc="captions", disable=not accelerator.is_main_process)
    for index, first in enumerate(chunks):
        if index % accelerator.num_processes == accelerator.process_index and not shards.is_done(index):
            chunk = captions[first : first + args.rows_per_shard]
            states, counts = encode_caption_chunk(
                [text for _, text in chunk], content, tokenizer, text_encoder, args.encode_batch_size
            )
            ids, texts = zip(*chunk, strict=True)
            shards.write(index, {"caption_id": ids, "caption": texts, "num_tokens": counts, content: states}, {})
            progress.update(len(chunk))
    progress.close()
    return {"content": content, "shape": shape, "count": len(captions), "hidden_size": text_encoder.config.hidden_size}


def encode_caption_chunk(
    texts: list[str], content: str, tokenizer, text_encoder, batch_size: int
) -> tuple[np.ndarray, list[int]]:
    """States (M, S * D) float16 or token ids (M, S) int32 of captions, and their counts of real tokens."""
    if content == "input_ids":
        input_ids, counts = tokenize(tokenizer, texts)
        return input_ids.numpy().astype(np.int32), counts.tolist()
    states, counts = [], []
    for start in range(0, len(texts), batch_size):
        values = encode_text(tokenizer, text_encoder, texts[start : start + batch_size])
        states.append(values["encoder_hidden_states"].flatten(1).cpu().numpy().astype(np.float16))
        counts += values["num_tokens"].tolist()
    return np.concatenate(states), counts


def label_summary(columns: ImageColumns, manifests: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Number and names of the classes; an integer column without names has as many as its largest label says."""
    if columns.label is None:
        return None
    num_classes = columns.num_classes or 1 + max(manifest["max_label"] for manifest in manifests)
    return {"num_classes": num_classes, "names": columns.label_names}


def finish_cache(cache_dir: Path, latents: ShardFolder, captions: dict[str, Any] | None, spec: LatentSpec) -> None:
    """Makes the tables loadable and, last of all, writes the spec by which readers know that the cache is whole."""
    latents.finish()
    if captions is not None:
        ShardFolder(
            cache_dir / "captions", caption_features(captions["content"], int(np.prod(captions["shape"])))
        ).finish()
    write_json(cache_dir / SPEC_FILE, spec.to_json())
    (cache_dir / PLAN_FILE).unlink()
