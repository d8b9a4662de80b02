"""The data of a training, from its arguments: a latent cache, made first if need be, or a stream of images."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import SchedulerMixin

from utils import frozen
from utils.diffusion.conditions import encode_text
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.errors import UserError
from utils.files import sha256_json
from utils.image import codec as codecs
from utils.image import networks
from utils.image.cache import ImageCache
from utils.image.data.pixels import BACKGROUNDS, Framing
from utils.image.data.rows import resolve_columns, undecoded
from utils.image.data.sources import dataset_identity, open_image_dataset
from utils.image.data.stream import ImageStream
from utils.image.evaluation.features import load_features
from utils.image.pipeline import Exporter
from utils.image.precompute import build_latent_cache
from utils.image.text import load_text_encoder
from utils.image.vae.network import VAE_PRESETS
from utils.image.validation import SampleDistance
from utils.latents.parts import pool, readers_of, unevenness
from utils.latents.spec import LatentSpec, check_fingerprint
from utils.runs.save import ModelCard
from utils.training.held_out import HeldOut, in_fixed_order
from utils.training.optimizers import enable_xformers
from utils.training.run import Run

logger = logging.getLogger(__name__)


def open_cache(args: Namespace, run: Run) -> ImageCache:
    """The cache of `--latents_dir`, made first if dataset flags are given. Raises UserError if it is not the one asked
    for.
    """
    if args.dataset_name or args.train_data_dir:
        cache_dir = Path(args.latents_dir or run.folder / "latents")
        build_latent_cache(args, run.accelerator, cache_dir)
        return ImageCache(cache_dir, args.latent_normalisation)
    if not args.latents_dir:
        raise UserError("give --latents_dir (a latent cache), or --dataset_name or --train_data_dir to make one")
    folder = args.latents_dir.replace("{process}", str(run.accelerator.process_index))
    specs = gather_specs(folder)
    spec = pool(specs)
    if spec.kind != "image":
        others = {"set": "crystals are for train_crystal_ldm.py", "vector": "cells are for train_expression_ldm.py"}
        raise UserError(f"--latents_dir: {args.latents_dir} holds latents of a {spec.kind}; {others[spec.kind]}")
    check_fingerprint(spec.fingerprint, asked_of_cache(args, spec), args.latents_dir)
    # args.yaml should tell what was trained on, and not the defaults of flags that played no part.
    args.resolution, args.random_flip = spec.fingerprint["resolution"], spec.flips
    args.pretrained_vae_model_name_or_path = spec.vae
    args.codec = codecs.PIXELS if spec.vae == codecs.PIXELS else "vae"
    if spec.text_encoder:
        args.pretrained_text_encoder_name_or_path = spec.text_encoder["name"]
        args.text_encoder_library, args.tokenizer_name = spec.text_encoder["library"], spec.text_encoder["tokenizer"]
    cache = ImageCache(folder, args.latent_normalisation)
    if "part" in spec.fingerprint:
        parts = [each.fingerprint["part"]["index"] for each in specs]
        reader = readers_of(parts, args.train_batch_size)[run.accelerator.process_index]
        cache.join_parts(spec, args.latent_normalisation, reader)
        logger.info(
            "%d parts, read by %d processes; rows of the smallest are seen %.1f %% more often than of the largest",
            len(set(parts)),
            len(parts),
            100 * unevenness(specs),
        )
    return cache


def gather_specs(folder: str) -> list[LatentSpec]:
    """The spec that each process finds in its `folder`. Raises UserError on all if one finds none."""
    found: LatentSpec | str
    try:
        found = LatentSpec.read(folder)
    except UserError as error:
        found = str(error)
    everyones = gather_object([found])
    messages = [each for each in everyones if isinstance(each, str)]
    if messages:
        raise UserError(messages[0])
    return everyones


# Flags that play a part only while a cache is made, and leave no mark in it.
MAKING_FLAGS = (
    "dataset_config_name",
    "dataset_revision",
    "dataset_split",
    "streaming",
    "max_skipped_fraction",
    "encode_batch_size",
    "rows_per_shard",
    "max_cached_captions",
    "decode_workers",
)


def asked_of_cache(args: Namespace, spec: LatentSpec) -> dict[str, Any]:
    """The part of a cache's fingerprint that the given flags decide. Raises UserError for idle ones."""
    for name in MAKING_FLAGS:
        if name in args.typed:
            raise UserError(
                f"--{name} has no effect on a finished cache (--latents_dir {args.latents_dir}); leave it out"
            )
    names = {"resolution": "resolution", "random_flip": "random_flip", "max_samples": "max_samples"}
    names |= {"latent_content": "content", "alpha_background": "alpha_background"}
    asked = {key: getattr(args, name) for name, key in names.items() if name in args.given}
    columns = {kind: f"{kind}_column" for kind in ("image", "caption", "label")}
    if any(name in args.given for name in columns.values()):
        given = {kind: getattr(args, name) for kind, name in columns.items() if name in args.given}
        asked["columns"] = spec.fingerprint["columns"] | given
    if "center_crop" in args.given:
        asked["crop"] = "center" if args.center_crop else f"random, seed {args.seed}"
    if "pretrained_vae_model_name_or_path" in args.given:
        name = args.pretrained_vae_model_name_or_path
        asked["vae"] = frozen.describe(codecs.load_vae(name), name)
    if "pretrained_text_encoder_name_or_path" in args.given and spec.text_encoder:
        name = args.pretrained_text_encoder_name_or_path
        _, text_encoder = load_text_encoder(name, args.text_encoder_library, args.tokenizer_name)
        asked["text_encoder"] = frozen.describe(text_encoder, name)
    return asked


def make_denoiser(args: Namespace, run: Run, cache: ImageCache, condition: str) -> ConditionalDenoiser:
    """The denoiser of the model flags, with xformers' attention where it is asked for."""
    denoiser = networks.build_denoiser(args, cache, condition)
    if args.enable_xformers_memory_efficient_attention:
        enable_xformers(denoiser.model, run.device)
    return denoiser


def make_exporter(args: Namespace, cache: ImageCache, scheduler: SchedulerMixin, condition: str) -> Exporter:
    """What writes the run's folder, with the models that made a cache; the text encoder where the condition is text.
    Raises UserError if they have other weights now.
    """
    spec = cache.spec
    dataset = spec.fingerprint["dataset"]
    name = dataset.get("name") or dataset.get("dataset_name") or "a local dataset"
    num_rows = spec.num_rows - (args.num_validation_samples or 0)
    card = ModelCard(
        title="A latent diffusion model",
        data=f"{name} ({num_rows} images at {spec.fingerprint['resolution']} pixels)",
        settings=f" of {args.train_batch_size} samples per process, prediction type `{args.prediction_type}`,\n"
        f"in the latents of `{spec.vae}`",
        base=args.pretrained_model_name_or_path,
        use_ema=args.use_ema,
        example="python sample.py --model THIS_FOLDER",
        library_name="diffusers",
        breaks=(" ", "\n"),
    )
    return Exporter.of_cache(spec, cache.normalisation, scheduler, card, with_text=condition == "text")


def text_encoder_in_loop(
    cache: ImageCache, exporter: Exporter, denoiser: ConditionalDenoiser, device: torch.device
) -> Any:
    """The text encoder, on the device, of a cache that holds token ids; the denoiser then gets its null caption. None
    where the cache holds the states.
    """
    if cache.caption_content != "input_ids":
        return None
    exporter.text_encoder.to(device)
    null = encode_text(exporter.tokenizer, exporter.text_encoder, [""])
    denoiser.conditions.set_null(null["encoder_hidden_states"][0], int(null["num_tokens"][0]))
    return exporter.text_encoder


def validation_labels(args: Namespace, labels: dict | None) -> list[int]:
    """The labels of the validation grids; none of an unconditional model. Raises UserError for one that is not."""
    if args.unconditional:
        if args.validation_labels:
            raise UserError("--validation_labels with --unconditional: the model knows no labels; leave one out")
        return []
    num_classes = labels["num_classes"] if labels else 0
    wrong = [label for label in args.validation_labels or [] if label >= num_classes]
    if wrong:
        raise UserError(f"--validation_labels: {wrong[0]}, but the classes are 0 to {num_classes - 1}")
    return args.validation_labels or list(range(min(10, num_classes)))


def make_sample_distance(
    args: Namespace, run: Run, exporter: Exporter, held_out: HeldOut | None, condition: str
) -> SampleDistance | None:
    """The distance of samples from held-out images; None without --eval_features."""
    if held_out is None or not args.eval_features:
        return None
    return SampleDistance(
        run,
        exporter,
        held_out,
        load_features(args.eval_features, run.device, "--eval_features"),
        metric=args.eval_metric,
        num_images=args.num_eval_images,
        condition=condition,
        guidance_scale=args.eval_guidance_scale,
        num_inference_steps=args.validation_inference_steps,
        batch_size=args.eval_batch_size,
    )


class ImageData(NamedTuple):
    """Images to train on, images kept out of it (None: there are none), and a hash of what decides them."""

    train: ImageStream
    validation: ImageStream | None
    identity: str


def open_images(args: Namespace) -> ImageData:
    """The images of the dataset flags. Raises UserError for bad input."""
    factor = 2 ** (len(VAE_PRESETS[args.vae_size].block_out_channels) - 1)
    if args.resolution % factor:
        raise UserError(
            f"--resolution: {args.resolution} is not divisible by {factor}, the factor of --vae_size {args.vae_size}"
        )
    source = (args.dataset_name, args.dataset_config_name, args.train_data_dir)
    dataset = open_image_dataset(*source, split=args.dataset_split, revision=args.dataset_revision)
    column = resolve_columns(dataset, args.image_column, None, None).image
    identity = dataset_identity(dataset, *source, args.dataset_split, args.dataset_revision)
    dataset = undecoded(dataset.select_columns([column]), column)
    if args.max_samples is not None:
        dataset = dataset.select(range(min(args.max_samples, len(dataset))))
    settings = [args.resolution, args.center_crop, args.random_flip, args.alpha_background, args.max_samples]
    held_out = None
    if args.validation_split is not None:
        others = open_image_dataset(*source, split=args.validation_split, revision=args.dataset_revision)
        others = undecoded(others.select_columns([resolve_columns(others, column, None, None).image]), column)
        held_out = others.select(np.sort(in_fixed_order(len(others))[: args.num_validation_images]))
    elif args.num_validation_images is not None:
        if args.num_validation_images >= len(dataset):
            raise UserError(
                f"--num_validation_images {args.num_validation_images}: the dataset has {len(dataset)} images, and "
                "some must be left to train on; use fewer"
            )
        rows = np.sort(in_fixed_order(len(dataset))[: args.num_validation_images])
        held_out, dataset = dataset.select(rows), dataset.select(np.delete(np.arange(len(dataset)), rows))
        settings.append(args.num_validation_images)
    background = BACKGROUNDS[args.alpha_background]
    framing = Framing(args.resolution, args.center_crop, background)
    train = ImageStream(dataset, column, framing, args.random_flip, args.seed)
    centred = Framing(args.resolution, True, background)
    validation = None if held_out is None else ImageStream(held_out, column, centred, random_flip=False, seed=0)
    return ImageData(train, validation, sha256_json([identity, settings]))
