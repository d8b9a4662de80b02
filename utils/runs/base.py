"""The run that a training starts from, and a network by --model_config."""

import inspect
import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.args.parsing import read_yaml
from utils.diffusion.conditions import ConditionSum, NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.errors import UserError
from utils.latents.cache import LatentCache
from utils.latents.columns import ColumnCache
from utils.latents.spec import Normalisation
from utils.runs.load import RunFolder
from utils.training.lora import add_lora, start_from

logger = logging.getLogger(__name__)

BASE_FLAG = "--pretrained_model_name_or_path"


def load_base(args: Namespace) -> ConditionalDenoiser | None:
    """The trained denoiser to start from, or None."""
    path = args.pretrained_model_name_or_path
    return RunFolder.find(path, BASE_FLAG).denoiser() if path else None


def fine_tuned(args: Namespace, denoiser: ConditionalDenoiser, base: ConditionalDenoiser) -> ConditionalDenoiser:
    """A new denoiser with the weights of `base`, and with --lora_rank adapters beside them."""
    new_modules = start_from(denoiser, base, BASE_FLAG)
    if args.lora_rank:
        source = args.pretrained_model_name_or_path
        add_lora(denoiser, args.lora_rank, args.lora_alpha, args.lora_target_modules, new_modules, source)
    return denoiser


def take_normalisation(args: Namespace, cache: LatentCache, of_base: Normalisation | None) -> None:
    """Has a cache give the latents that the base was trained in. Raises UserError where others are asked for."""
    if of_base is None or of_base.is_close(cache.normalisation):
        return
    source = args.pretrained_model_name_or_path
    if "latent_normalisation" in args.given:
        raise UserError(
            f"--latent_normalisation {args.latent_normalisation}: {source} was trained in latents of another mean or "
            "std; leave it out, and its own are taken"
        )
    logger.info("latents are normalised as those of %s were", source)
    cache.normalisation = of_base


# Decided by the latents and the condition: a file may repeat them, not contradict them.
DATA_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "class_embed_type",
    "projection_class_embeddings_input_dim",
)


def read_model_config(path: str | None, model_class: type, preset: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the model from a JSON or YAML file (JSON is YAML), such as the config.json of a diffusers model."""
    if path is None:
        return {}
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in read_yaml(path, "--model_config").items()
        if not str(key).startswith("_")
    }
    values.pop("sample_size", None)  # that of the latents
    known = inspect.signature(model_class).parameters
    for key, value in values.items():
        if key not in known:
            raise UserError(f"--model_config {path}: {model_class.__name__} has no argument {key}")
        if key in DATA_ARGUMENTS and value != preset.get(key):
            raise UserError(
                f"--model_config {path}: {key} is {value}, but the data and the condition need "
                f"{preset.get(key)}; leave it out"
            )
    return values


def warn_of_missing(cache: ColumnCache) -> None:
    """Says of how many samples a condition is not known."""
    for name, values in cache.values.items():
        missing = int(((values < 0) if values.dtype == np.int64 else ~np.isfinite(values)).sum())
        if missing:
            logger.warning(
                "%s is not known of %d of %d %s, which train without it", name, missing, len(values), cache.title
            )


def use_conditions_of(base: ConditionalDenoiser, cache: ColumnCache, run_dir: str) -> None:
    """Makes a cache give the values of conditions as the run to start from understands them: its means, stds and
    categories. Raises UserError where it was trained with others than are asked for.
    """
    known: dict[str, dict[str, Any]] = base.conditions.config.get("columns") or {}
    if not known:
        return
    ours, theirs = ({name: settings["kind"] for name, settings in each.items()} for each in (cache.conditions, known))
    if ours != theirs:
        had = ", ".join(f"{name} ({kind})" for name, kind in theirs.items())
        raise UserError(
            f"--condition: {run_dir} was trained with {had}; ask for the same, or start from an unconditional run"
        )
    cache.use_conditions(known)


def refuse_model_flags(args: Namespace, names: Sequence[str] = ("model_size", "model_config")) -> None:
    """Raises UserError for flags that say what a model is, beside a run that says so."""
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name} with --pretrained_model_name_or_path: the run says what its model is; leave it out"
            )


def assembled(
    args: Namespace,
    model_class: Any,
    config: dict[str, Any],
    cache: ColumnCache,
    base: ConditionalDenoiser | None,
) -> ConditionalDenoiser:
    """A model of this `config` with the conditions of a cache; with the weights of `base`, where there is one. Raises
    UserError for arguments that make no model.
    """
    width = config["hidden_size"]
    if cache.conditions:
        config = config | {"projection_class_embeddings_input_dim": width}
    try:
        model = model_class.from_config(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"--model_size/--model_config: {error}") from error
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    conditions = ConditionSum(width, cache.conditions) if cache.conditions else NoCondition()
    denoiser = ConditionalDenoiser(model, conditions)
    return denoiser if base is None else fine_tuned(args, denoiser, base)
