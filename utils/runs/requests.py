"""What a run that was trained on columns is asked for: numbers and categories by their names, checked against it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.latents.columns import category_name, category_numbers

Columns = Mapping[str, Mapping[str, Any]]  # the conditions of a run: name -> kind and settings


def parse_assignments(
    columns: Columns, run_dir: Path, texts: Sequence[str], flags: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Several NAME=VALUE of --property, as the conditions take them. `flags` are those that kinds of conditions have
    of their own. Raises UserError.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, value = parse_assignment(columns, run_dir, text, flags or {})
        if name in found:
            raise UserError(f"--property {text}: {name} is asked for twice; ask once")
        found[name] = value
    return found


def parse_assignment(columns: Columns, run_dir: Path, text: str, flags: Mapping[str, str]) -> tuple[str, Any]:
    """NAME=VALUE of --property, as the condition takes it. Raises UserError."""
    name, equals, value = text.partition("=")
    settings = columns.get(name)
    if not equals or not value:
        raise UserError(f"--property {text}: write NAME=VALUE, as in band_gap=1.5")
    if settings is not None and settings["kind"] in flags:
        raise UserError(f"--property {text}: use {flags[name]} {value}")
    if settings is None:
        raise UserError(f"--property {text}: {not_a_condition(columns, run_dir, name)}")
    if settings["kind"] == "property":
        return name, parse_number(text, value)
    return name, known_category(settings["names"], value, f"--property {text}")


def parse_number(text: str, value: str) -> float:
    """The number of an assignment. Raises UserError for one that the model could not be told."""
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise UserError(f"--property {text}: {value} is not a number")
    if abs(number) > float(np.finfo(np.float32).max):
        raise UserError(f"--property {text}: too large for single precision; give a smaller number")
    return number


def known_category(names: Sequence[str], value: str, flag: str) -> str:
    """The category that `value` names. Raises UserError, which begins with `flag`, for one that the run never saw."""
    found = category_name(value)
    if found is None or found not in names:
        known = ", ".join(names[:20])
        raise UserError(f"{flag}: the run knows these: {known}{', ...' if len(names) > 20 else ''}")
    return found


def not_a_condition(columns: Columns, run_dir: Path, name: str) -> str:
    """What a run is not conditioned on, and what it is."""
    known = ", ".join(f"{column} ({settings['kind']})" for column, settings in columns.items())
    return f"{run_dir} was not trained with the condition {name}; it has {known or 'none'}"


def column_values(settings: Mapping[str, Any], given: Sequence[Any]) -> Tensor:
    """Numbers, or names of categories, as the values (B,) that a condition takes."""
    if settings["kind"] == "property":
        return torch.tensor(given, dtype=torch.float32)
    return torch.from_numpy(category_numbers(np.array(given, dtype=object), settings["names"]))
