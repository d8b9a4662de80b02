"""A clock that tests set, and one process in the place of Accelerate."""

import torch

from utils.training import control as run_control
from utils.training.run import Run


class OneProcess:
    """As much of an Accelerator as RunControl asks for."""

    device = torch.device("cpu")
    is_main_process = True

    @staticmethod
    def gather(tensor):
        return tensor


def make_control(folder, **settings):
    """The control of a run of one process in this folder."""
    return run_control.RunControl(Run(OneProcess(), folder), **settings)


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(run_control.time, "time", lambda: self.now)
        process = type("Process", (), {"create_time": lambda _, started=self.now: started})
        monkeypatch.setattr(run_control.psutil, "Process", process)
