"""What a training says of itself while it runs: to the trackers and on the progress bar."""

import math
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from utils.training.control import RunControl
from utils.training.flops import model_flops_utilisation, peak_flops
from utils.training.run import Run


class StepLog:
    """The losses of a training, in the trackers and on the progress bar. They accumulate on the device and are read
    only when logged. Steps that were skipped are in no mean.
    """

    def __init__(self, run: Run, control: RunControl, samples_per_step: int, flops_per_sample: int | None = None):
        self.accelerator, self.control = run.accelerator, control
        self.samples_per_step, self.flops_per_sample = samples_per_step, flops_per_sample
        self.step_loss = torch.zeros((), device=run.device)  # sum over the micro-steps of this step
        self.total = torch.zeros((), device=run.device)
        self.step_terms: dict[str, Tensor] = {}  # name -> (sum, count) over the micro-steps of this step
        self.terms: dict[str, Tensor] = {}
        self.micro_steps = self.steps = 0
        self.micro_steps_of_step = 0
        self.started = time.perf_counter()
        self.progress = tqdm(
            total=None if math.isinf(control.max_train_steps) else control.max_train_steps,
            initial=control.first_step,
            unit="step",
            disable=not run.is_main,
        )

    def add(self, loss: Tensor, **terms: Tensor) -> None:
        """Counts the loss of a micro-step, and what else of it is to be seen in the trackers by itself."""
        self.step_loss += loss.detach().float()
        self.micro_steps_of_step += 1
        for name, term in terms.items():
            once = torch.stack([term.detach().float(), torch.ones_like(self.step_loss)])
            self.step_terms[name] = self.step_terms.get(name, 0.0) + once

    def step_done(self, moved: bool) -> None:
        """Counts an optimizer step, and its losses if it moved the weights."""
        if moved:
            self.total += self.step_loss
            self.micro_steps += self.micro_steps_of_step
            for name, term in self.step_terms.items():
                self.terms[name] = self.terms.get(name, 0.0) + term
        self.step_loss.zero_()
        self.step_terms = {}
        self.micro_steps_of_step = 0
        self.steps += 1
        self.progress.update()

    def flush(self, learning_rate: float, global_step: int) -> None:
        """Writes the means since the last call, over all processes, to the trackers and the progress bar. Every
        process calls this."""
        mean_loss = self.total / self.micro_steps if self.micro_steps else torch.full_like(self.total, math.nan)
        loss = self.accelerator.reduce(mean_loss, reduction="mean").item()
        seconds_per_step = (time.perf_counter() - self.started) / self.steps
        hours_left = self.control.seconds_left(seconds_per_step) / 3600
        values = {
            "train/loss": loss,
            "train/grad_norm": self.control.grad_norm,
            "train/learning_rate": learning_rate,
            "train/skipped_steps": self.control.nonfinite_steps,
            "train/samples_per_second": self.samples_per_step / seconds_per_step,
            "train/memory_gb": peak_memory(self.accelerator.device) / 1e9,
            "train/hours_left": hours_left,
        }
        if self.terms:
            sums = self.accelerator.reduce(torch.stack([*self.terms.values()]))  # (terms, 2)
            means = (sums[:, 0] / sums[:, 1]).tolist()
            values |= {f"train/{name}": mean for name, mean in zip(self.terms, means, strict=True)}
        if self.flops_per_sample is not None:
            speed = values["train/samples_per_second"]
            values["train/model_tflops"] = speed * self.flops_per_sample / 1e12
            if self.accelerator.device.type == "cuda":  # of a CPU the peak would have to be measured each time
                peak = peak_flops(self.accelerator.device, self.accelerator.mixed_precision)
                num_devices = self.accelerator.num_processes
                values["train/mfu"] = model_flops_utilisation(speed, self.flops_per_sample, peak, num_devices)
        self.accelerator.log(values, step=global_step)
        self.control.save_elapsed()
        self.total.zero_()
        self.terms = {}
        self.micro_steps = self.steps = 0
        self.started = time.perf_counter()
        shown = {
            "loss": f"{loss:.4f}",
            "lr": f"{learning_rate:.2e}",
            "samples/s": f"{values['train/samples_per_second']:.1f}",
            "GB": f"{values['train/memory_gb']:.1f}",
            "left": f"{hours_left:.2f}h",
        }
        if "train/mfu" in values:
            shown["mfu"] = f"{values['train/mfu']:.0%}"
        if self.control.nonfinite_steps:
            shown["skipped"] = str(self.control.nonfinite_steps)
        self.progress.set_postfix(shown)

    def close(self) -> None:
        """Ends the progress bar, and says how the run ended."""
        self.progress.close()
        self.control.say_how_it_ended()


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of tensors on a CUDA device, elsewhere of resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # which counts in kilobytes, but on macOS in bytes


def show_picture(accelerator: Accelerator, folder: Path, picture: Image.Image, tag: str, global_step: int) -> None:
    """A picture to `folder/step-N.png` and, as `tag`, to the trackers that take some."""
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"step-{global_step:07d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(tag, np.asarray(picture), global_step, dataformats="HWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({tag: [picture]}, step=global_step)
