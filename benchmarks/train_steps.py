"""What steps of a text-to-image training cost: samples a second, memory, utilisation, waiting for data.

    python benchmarks/train_steps.py --memory_cap_gb 32 --profile -- --config plan.yaml --latents_dir cache
    accelerate launch --num_processes 2 benchmarks/train_steps.py -- --model dit --model_size L/2 --latents_dir cache

What stands behind `--` goes to `train_text_to_image_ldm.py`, whose own loop runs. Utilisation is the share of what the
device reaches in matrix products now, in the same precision. Memory is that of tensors on a GPU, elsewhere what the
process held at most.
"""

import tempfile
import time
from argparse import Namespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import benchmark_parser, report, run_trainer

from utils.training import flops as budget
from utils.training import setup as run
from utils.training.step_log import StepLog, peak_memory


class Clock:
    """Times the steps of a trainer from within it; those of the warm-up do not count."""

    def __init__(self, warm_up: int, profiler: Any = None):
        self.warm_up, self.profiler = warm_up, profiler
        self.seconds: list[float] = []
        self.waits: list[float] = []  # for data, one a step
        self.waited = 0.0
        self.log: StepLog | None = None
        self.make_loader = run.make_loader

    def make_log(self, *args: Any, **settings: Any) -> StepLog:
        """The trainer's own log, which knows the device and the FLOPs of a sample."""
        self.log = StepLog(*args, **settings)
        return self.log

    def timed_batches(self, *args: Any):
        """The trainer's own batches."""
        batches = iter(self.make_loader(*args))
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - started
            yield batch

    def after_step(self, args: Namespace, step: int, step_seconds: float) -> None:
        if step >= self.warm_up:
            self.seconds.append(step_seconds)
            self.waits.append(self.waited)
        self.waited = 0.0
        if self.profiler is not None and step == self.warm_up - 1:
            self.profiler.start()

    def run(self, flags: list[str], num_steps: int) -> None:
        """Runs so many steps, and as many as the warm-up has."""
        with (
            mock.patch.object(run, "make_loader", self.timed_batches),
            mock.patch("utils.training.step_log.StepLog", self.make_log),
        ):
            run_trainer("train_text_to_image_ldm", flags, self.warm_up + num_steps, self.after_step)

    def row(self) -> dict[str, Any]:
        """Medians of the steps."""
        assert self.log is not None
        accelerator, samples = self.log.accelerator, self.log.samples_per_step
        step_seconds = float(np.median(self.seconds))
        memory = peak_memory(accelerator.device)
        threads = torch.get_num_threads()
        precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
        peak = budget.Peak(budget.measured_flops(accelerator.device, precision, threads), "measured")
        assert self.log.flops_per_sample is not None
        rate = budget.model_flops_utilisation
        return {
            "processes": accelerator.num_processes,
            "samples a step": samples,
            "GFLOP a sample": self.log.flops_per_sample / 1e9,
            "ms a step": 1000 * step_seconds,
            "samples/s": samples / step_seconds,
            "memory, GB": memory / 1e9,
            "utilisation": rate(samples / step_seconds, self.log.flops_per_sample, peak, accelerator.num_processes),
            "waiting for data": float(np.median(np.divide(self.waits, self.seconds))),
        }


def profile_rows(profiler: Any, count: int = 12) -> list[dict[str, Any]]:
    """Where the time went: the operators with most of it, by their own share of the device's time."""
    on_gpu = torch.cuda.is_available()
    times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiler.key_averages()
        if not (on_gpu and event.device_type == torch.autograd.DeviceType.CPU)
    }
    total = sum(times.values())
    largest = sorted(times.items(), key=lambda item: -item[1])[:count]
    return [{"operator": name[:80], "share": spent / total} for name, spent in largest]


def main() -> None:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--num_steps", type=int, default=10, help="Steps to measure.")
    parser.add_argument("--warm_up", type=int, default=3, help="Steps before the measured ones.")
    parser.add_argument("--memory_cap_gb", type=float, default=None, help="GPU memory to use at most.")
    parser.add_argument("--profile", action="store_true", help="Also list the operators that take most of the time.")
    parser.add_argument(
        "flags", nargs="*", metavar="-- FLAGS", help="Flags of train_text_to_image_ldm.py, without --output_dir."
    )
    args = parser.parse_args()
    if args.memory_cap_gb is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_cap_gb * 1e9 / total))
    profiler = torch.profiler.profile() if args.profile else None
    clock = Clock(args.warm_up, profiler)
    with tempfile.TemporaryDirectory() as folder:
        clock.run([*args.flags, "--output_dir", f"{folder}/run"], args.num_steps)
    tables = [[clock.row()]]
    if profiler is not None:
        profiler.stop()
        tables.append(profile_rows(profiler))
    if clock.log is not None and clock.log.accelerator.is_main_process:
        report(args, *tables)


if __name__ == "__main__":
    main()
