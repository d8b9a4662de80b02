"""Models that are used and not trained: found by hub name or folder, loaded, and told apart by their weights."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from utils.errors import UserError


def component_path(name_or_path: str, component: str) -> str:
    """The `component` subfolder of a whole pipeline's or run's folder; a hub name, or a folder without one, as it
    is.
    """
    folder = Path(name_or_path)
    if (folder / component).is_dir():
        return str(folder / component)
    return name_or_path


def load_component(load, name_or_path: str, component: str, flag: str):
    """Calls `load(path)` of a library for a hub name or folder; whatever it finds wrong becomes one line that names
    `flag`.
    """
    path = component_path(name_or_path, component)
    looks_local = (
        Path(name_or_path).is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1
    )
    if looks_local and not Path(path).exists():
        raise UserError(
            f"{flag}: the folder {name_or_path} does not exist; give a hub name or a folder with a {component}"
        )
    try:
        return load(path)
    except Exception as error:  # libraries raise OSError, ValueError, KeyError, ... for the same faults
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"{flag}: cannot load a {component} from {name_or_path}: {reason}") from error


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, shapes and bytes of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(model: nn.Module, name_or_path: str) -> dict:
    """What identifies a frozen model in a cache's fingerprint: its class and weights; the name is for the reader."""
    return {"name": name_or_path, "class": type(model).__name__, "sha256": weights_hash(model)}
