"""The parts of a crystal training, from its arguments: data, cache, denoiser."""

import logging
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from diffusers import SchedulerMixin

from utils.args.columns import parse_conditions
from utils.crystal.cache import CONDITION_KINDS, OF_ATOMS, SetCache, describe_condition
from utils.crystal.codec import load_crystal_vae
from utils.crystal.data.table import CrystalTable, load_crystals
from utils.crystal.pipeline import Exporter
from utils.diffusion.denoiser import ConditionalDenoiser, own_config
from utils.errors import UserError
from utils.files import sha256_json
from utils.frozen import weights_hash
from utils.models.dit import DIT_SIZES, DiT
from utils.runs.base import (
    assembled,
    load_base,
    read_model_config,
    refuse_model_flags,
    take_normalisation,
    use_conditions_of,
    warn_of_missing,
)
from utils.runs.load import RunFolder
from utils.runs.save import ModelCard, column_settings

logger = logging.getLogger(__name__)
HELD_OUT_OF = 10  # one formula in so many, where the source says nothing


class CrystalData(NamedTuple):
    """Crystals to train on, crystals kept out of it, and a hash of what decides them."""

    train: CrystalTable
    validation: CrystalTable
    identity: str


def open_crystal_data(args: Namespace) -> CrystalData:
    """The crystals of the data flags. Raises UserError for bad input."""
    limits = {"max_atoms": args.max_atoms, "max_skipped_fraction": args.max_skipped_fraction}
    train = load_crystals(args.dataset_name, args.dataset_split, max_samples=args.max_samples, **limits)
    if args.validation_dataset_name:
        validation = load_crystals(args.validation_dataset_name, flag="--validation_dataset_name", **limits)
        what = args.validation_dataset_name
    elif "split" in train.columns or not Path(args.dataset_name).exists():  # of a hub dataset splits are its own
        validation = load_crystals(args.dataset_name, args.validation_split, **limits)
        what = f"split {args.validation_split}"
    elif "validation_split" in args.typed:
        raise UserError(f"--validation_split: {args.dataset_name} has no column split; leave it out, or add one")
    else:
        is_held_out = held_out_formulas(train.columns["formula"])
        if is_held_out.all() or not is_held_out.any():
            raise UserError(
                f"--dataset_name: {args.dataset_name} has too few formulas to keep a tenth of them out; give "
                "--validation_dataset_name"
            )
        train, validation = train.take(~is_held_out), train.take(is_held_out)
        what = "a tenth of the formulas"
    logger.info("%d crystals to train on, %d kept out (%s)", len(train), len(validation), what)
    return CrystalData(train, validation, sha256_json([train.identity(), validation.identity()]))


def held_out_formulas(formulas: np.ndarray) -> np.ndarray:
    """Which rows (R,) are kept out: all crystals of a formula or none, the same in every run and for every subset."""
    return np.array([zlib.crc32(formula.encode()) % HELD_OUT_OF == 0 for formula in formulas])


def open_set_cache(args: Namespace) -> SetCache:
    """The cache of --latents_dir, which gives the values of the conditions asked for. Raises UserError for a column
    that is not there or says nothing.
    """
    cache = SetCache(args.latents_dir, args.latent_normalisation)
    asked = parse_conditions(args.condition, CONDITION_KINDS, OF_ATOMS)
    conditions = {name: describe_condition(cache, kind, name) for name, kind in asked.items()}
    cache.use_conditions(conditions)
    warn_of_missing(cache)
    return cache


def make_exporter(args: Namespace, cache: SetCache, scheduler: SchedulerMixin) -> Exporter:
    """What writes the run's folder, with the autoencoder of a cache. Raises UserError if it has other weights now."""
    spec = cache.spec
    num_rows = spec.num_rows - (args.num_validation_samples or 0)
    card = ModelCard(
        title="A latent diffusion model of crystals",
        data=f"{spec.fingerprint['dataset']['name']} ({num_rows} crystals of up to {spec.shape[0]} atoms)",
        settings=column_settings(args.condition or [], spec.vae),
        base=args.pretrained_model_name_or_path,
        use_ema=args.use_ema,
        example="python sample.py --model THIS_FOLDER --num_samples 16",
        tags=("crystals",),
    )
    return Exporter.of_cache(spec, cache.normalisation, scheduler, card)


def build_set_denoiser(args: Namespace, cache: SetCache) -> ConditionalDenoiser:
    """A new DiT for the sets and the conditions of a cache, or the run of --pretrained_model_name_or_path."""
    max_atoms, channels = cache.spec.shape
    base = load_base(args)
    if base is None:
        num_layers, hidden_size, heads = DIT_SIZES[args.model_size or "S"]
        config: dict[str, Any] = {"num_layers": num_layers, "hidden_size": hidden_size, "num_attention_heads": heads}
        config |= {"latent_kind": "set", "sample_size": max_atoms, "patch_size": 1, "in_channels": channels}
        config |= {"out_channels": 2 * channels} if args.learned_variance else {}
        config |= read_model_config(args.model_config, DiT, config)
        if config["latent_kind"] != "set":
            raise UserError(
                f"--model_config {args.model_config}: latent_kind {config['latent_kind']}; crystals are a set"
            )
    else:
        check_base(args, base, cache)
        config = own_config(base.model) | {"sample_size": max_atoms}
    return assembled(args, DiT, config, cache, base)


def check_base(args: Namespace, base: ConditionalDenoiser, cache: SetCache) -> None:
    """Raises UserError for a run to start from that is of other latents, and for a --model_size beside it."""
    flag = "--pretrained_model_name_or_path"
    refuse_model_flags(args)
    config = base.model.config
    if args.learned_variance != (config.out_channels == 2 * config.in_channels):
        raise UserError(f"--learned_variance: {args.pretrained_model_name_or_path} was trained otherwise; keep to it")
    if config.get("latent_kind") != "set" or config.in_channels != cache.spec.shape[1]:
        raise UserError(
            f"{flag}: {args.pretrained_model_name_or_path} knows {config.get('latent_kind')} latents of "
            f"{config.in_channels} channels, and --latents_dir has sets of {cache.spec.shape[1]}; precompute with the "
            "VAE of that run"
        )
    run_dir = Path(args.pretrained_model_name_or_path)
    run = RunFolder.find(run_dir, flag)
    if weights_hash(load_crystal_vae(str(run.path / "vae"))) != cache.spec.fingerprint["vae"]["sha256"]:
        raise UserError(
            f"{flag}: {run_dir} knows latents of another VAE; precompute --latents_dir with {run.path / 'vae'}"
        )
    take_normalisation(args, cache, run.normalisation())
    use_conditions_of(base, cache, str(run_dir))
