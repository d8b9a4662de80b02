"""The two things that everything in a training needs: its processes and its folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class Run:
    """A training: the Accelerator of this process, and the folder (`--output_dir`) that all processes write into."""

    accelerator: Accelerator
    folder: Path

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device
