"""What a row of the table of modalities says. Imports no torch."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from utils.files import read_json

AddFlags = Callable[[ArgumentParser], None]
CheckFlags = Callable[[Namespace], None]  # raises UserError for combinations that make no sense


@dataclass(frozen=True)
class Modality:
    """One kind of data: a folder of `utils` with rooms of fixed names, and what scripts must know of it."""

    name: str  # its folder, and what --modality takes
    samples: str  # for messages and progress bars
    autoencoder: str  # the class by which a run's folder is told; "" is any other
    guidance_scale: float  # the default where something is asked for and no weaker run guides; 1 is off
    batch_size: int  # samples that are made at once by default
    precompute_flags: tuple[AddFlags, CheckFlags]  # of precompute_latents.py --modality NAME
    evaluation_flags: tuple[AddFlags, CheckFlags]  # of evaluate.py --modality NAME
    request_flags: tuple[AddFlags, ...]  # of sample.py; two modalities may share a group
    check_requests: CheckFlags | None = None  # of what can be told wrong before a run is read

    def load(self, address: str) -> Any:
        """What a file of the folder defines: "sampler:Sampler". The file is imported now and not before."""
        file, _, name = address.partition(":")
        return getattr(import_module(f"utils.{self.name}.{file}"), name)

    def is_run(self, path: Path) -> bool:
        """Whether a run's folder, or one of its checkpoints, is of this modality, by the class of its autoencoder."""
        return self.autoencoder in autoencoders_of(path)

    def request_names(self) -> set[str]:
        """The flags of sample.py by which a run of this modality is asked for something."""
        parser = ArgumentParser(add_help=False)
        for add_flags in self.request_flags:
            add_flags(parser)
        return set(vars(parser.parse_args([])))


def autoencoders_of(path: Path) -> list[str]:
    """The class of the autoencoder in a run's folder, or beside one of its checkpoints."""
    configs = (folder / "vae" / "config.json" for folder in (path, path.parent))
    return [str(read_json(each).get("_class_name")) for each in configs if each.is_file()]
