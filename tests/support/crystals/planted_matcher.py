"""A matcher of structures that hangs, fails or dies as the first element says; imported in processes of its own."""

import os
import signal
import sys
import time
from pathlib import Path

from utils.crystal.structure import Crystal


def planted(a: Crystal, b: Crystal) -> float:
    assert "torch" not in sys.modules
    if a.atomic_numbers[0] == 1:
        time.sleep(60)
    if a.atomic_numbers[0] == 2:  # as a loop in C: deaf to a polite end
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if a.atomic_numbers[0] == 3:
        raise ValueError
    if a.atomic_numbers[0] == 4:
        os._exit(1)
    return float(a.atomic_numbers[0])


def hangs(a: Crystal, b: Crystal) -> bool:
    time.sleep(30)
    return True


def says_who(folder: str, seconds: float) -> None:
    """Leaves the number of its process as a file in a folder, then sleeps."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(seconds)
