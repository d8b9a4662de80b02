"""What benchmarks share: clocks, a trainer that is timed from within, reports."""

import importlib
import json
import os
import platform
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import accelerate
import diffusers
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.training.control import RunControl

ROOT = Path(__file__).resolve().parent.parent


def benchmark_parser(description: str) -> ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures.")
    return parser


# Clocks


def synchronise() -> None:
    """Waits for what the device was given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes, with all that it gives the device to do."""
    synchronise()
    started = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - started


def alternate(candidates: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each candidate in each round. They take turns, so that what else the machine does falls on all."""
    for _ in range(warm_up):
        for call in candidates.values():
            call()
    turns = [{name: seconds(call) for name, call in candidates.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in candidates}


def median_ratio(first: list[float], second: list[float]) -> float:
    """The median over rounds of what the first took in units of what the second took in the same round."""
    return float(np.median(np.divide(first, second)))


def run_python(*command: Any, threads: int | None = None, log: Path | None = None) -> str:
    """What a Python process prints, with so many threads. What it says of errors and progress goes to the terminal, or
    to `log`. Raises CalledProcessError where it fails.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with open(log, "w") if log else nullcontext() as errors:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=True,
        )
    return done.stdout


def parsed(script: str, flags: list[Any]) -> tuple[ModuleType, Namespace]:
    """A script of the suite as a module, and what it makes of a command line."""
    module = importlib.import_module(script)
    with mock.patch.object(sys, "argv", [script, *map(str, flags)]):
        return module, module.parse_args()


class Enough(Exception):
    """Ends a training whose steps have been measured, before its last checkpoint and its export."""


def run_trainer(
    script: str, flags: list[Any], num_steps: int, after_step: Callable[[Namespace, int, float], None]
) -> None:
    """Runs so many steps of a training script's own `main` here. `after_step(args, step, seconds)` is called between
    them, and what that takes is in none of the steps.
    """
    last = ["--max_train_steps", num_steps + 1, "--checkpointing_steps", num_steps + 1]
    trainer, args = parsed(script, [*flags, *last])
    steps_of = RunControl.steps

    def timed_steps(control: RunControl):
        for step in steps_of(control):
            synchronise()
            started = time.perf_counter()
            yield step
            synchronise()
            after_step(args, step, time.perf_counter() - started)
            if step + 1 == num_steps:
                raise Enough

    with mock.patch.object(RunControl, "steps", timed_steps), suppress(Enough):
        trainer.main(args)


# Reports


def machine() -> dict[str, Any]:
    """What the figures were made on and with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, accelerate)}
    return {
        "device": device,
        "processor": platform.machine(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        **versions,
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    """Rows of figures as a Markdown table; one that lacks a column has nothing there."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        [*lines, *("| " + " | ".join(shown(row.get(name, "")) for name in columns) + " |" for row in rows)]
    )


def shown(value: Any) -> str:
    """A figure for a table: three digits that count."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def report(args: Namespace, *tables: list[dict[str, Any]]) -> None:
    """Prints tables of figures, and writes them with the settings and the machine to `--output`."""
    print(f"{Path(sys.argv[0]).name}: {', '.join(f'{key} {value}' for key, value in machine().items())}")
    for rows in tables:
        print("\n" + as_table(rows), flush=True)
    if args.output is not None:
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "output"}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figures = {"machine": machine(), "settings": settings, "tables": tables}
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
