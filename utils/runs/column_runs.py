"""What trainings on columns share: which conditions a cache gives, what is hidden of them, which run to start from,
and how a denoiser is put together.
"""

import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.diffusion.conditions import ConditionSum, NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.draws import SampleDraws
from utils.errors import UserError
from utils.image.networks import fine_tuned
from utils.latents.columns import ColumnCache

logger = logging.getLogger(__name__)


def warn_of_missing(cache: ColumnCache) -> None:
    """Says of how many samples a condition is not known."""
    for name, values in cache.values.items():
        missing = int(((values < 0) if values.dtype == np.int64 else ~np.isfinite(values)).sum())
        if missing:
            logger.warning(
                "%s is not known of %d of %d %s, which train without it", name, missing, len(values), cache.title
            )


def draw_drops(draws: SampleDraws, prob: float, names: Sequence[str]) -> Tensor:
    """Which conditions of which samples are hidden, (B, number of conditions): all at once with probability `prob`,
    and each by itself with the same, so that any part of several can be asked for.
    """
    everything = draws.uniform("condition_drop") < prob  # (B,)
    if len(names) < 2:
        return everything
    each = [draws.uniform(f"condition_drop.{name}") < prob for name in names]
    return torch.stack(each, dim=1) | everything[:, None]


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
