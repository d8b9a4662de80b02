"""The row of a modality in the table of modalities. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from utils.files import read_json


@dataclass(frozen=True)
class Modality:
    """One kind of data: a folder of `utils` with rooms of fixed names, and what scripts must know of it."""

    name: str  # its folder in `utils`, and its value of --modality
    samples: str  # for messages and progress bars
    autoencoder: str  # class name that marks a run's folder; "" stands for any other class

    def is_run(self, path: Path) -> bool:
        """Whether a run's folder, or one of its checkpoints, is of this modality, by its autoencoder's class."""
        return self.autoencoder in autoencoders_of(path)


def autoencoders_of(path: Path) -> list[str]:
    """Class names of the autoencoders in a run's folder, or beside one of its checkpoints."""
    configs = (folder / "vae" / "config.json" for folder in (path, path.parent))
    return [str(read_json(each).get("_class_name")) for each in configs if each.is_file()]
