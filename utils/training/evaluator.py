"""Evaluation while a model trains: its history, the best weights so far, and early stopping.

    RUN/evaluations.json       every evaluation, in order, and on what it was made
    RUN/best/                  a model of its own, in the format of a finished run, with evaluation.json
    RUN/.best-STEP/            the best weights at the time of a checkpoint that is still there

So a run that resumes from any of its checkpoints knows its best weights so far, and how long ago they were found.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from torch import nn

from utils.diffusion.objectives import Objective
from utils.errors import UserError
from utils.files import BEING_WRITTEN, fsync_path, read_json, write_json
from utils.training.checkpoints import checkpoint_steps
from utils.training.held_out import HeldOut, validation_losses
from utils.training.run import Run

logger = logging.getLogger(__name__)
HISTORY_FILE, BEST, BEST_FILE = "evaluations.json", "best", "evaluation.json"
TEMPORARY = f"{BEING_WRITTEN}best"
LOSS = "validation/loss"

Evaluation = dict[str, Any]  # "global_step", and the values by their names in the trackers
WriteModel = Callable[[Path, Any, int], None]  # folder, model with the averaged weights, optimizer steps


class SampleMetric(Protocol):
    """A figure of samples, lower is better: `utils/image/validation.py` has that of images."""

    key: str  # its name in the trackers
    title: str  # what it is measured with, for a reader
    identity: str  # what decides its value, beside the weights and the held-out latents

    def __call__(self, model: Any) -> float:
        """The figure of a model in evaluation mode, None on a process without one. Every process calls this and learns
        the same."""


def lowest(history: list[Evaluation], key: str) -> Evaluation | None:
    """The first evaluation with the lowest value; None where there is no value that is a number."""
    measured = [each for each in history if not math.isnan(each.get(key, math.nan))]
    return min(measured, key=lambda each: each[key], default=None)


def without_improvement(values: list[float], min_delta: float = 0.0) -> int:
    """How many values came after the last that lay more than `min_delta` below the one before it that had."""
    reference, count = math.inf, 0
    for value in values:
        improved = value < reference - min_delta  # never true of NaN
        reference, count = (value, 0) if improved else (reference, count + 1)
    return count


@dataclass(frozen=True)
class EvaluationSettings:
    """How evaluations are made, and what hangs on them."""

    batch_size: int  # of a process
    best_metric: str = "loss"  # the validation loss, or "samples": the figure of the sample metric
    patience: int | None = None  # evaluations without improvement before training ends; None: it never does
    min_delta: float = 0.0  # a smaller improvement counts as none


class Evaluator:
    """Evaluates a model on held-out latents while it trains. Every process has this object, and all call each of its
    methods together.

    `write_model` writes averaged weights with all that is needed to sample them. `first_step` is the step that a run
    resumes from: evaluations after it are forgotten. `text_encoder` encodes captions of which the cache holds token
    ids. Raises UserError where earlier evaluations were made on something else.
    """

    def __init__(
        self,
        run: Run,
        *,
        held_out: HeldOut,
        objective: Objective,
        write_model: WriteModel,
        first_step: int,
        settings: EvaluationSettings,
        sample_metric: SampleMetric | None = None,
        text_encoder: Any = None,
    ):
        self.accelerator, self.folder = run.accelerator, run.folder
        self.held_out, self.objective, self.write_model = held_out, objective, write_model
        self.settings, self.sample_metric, self.text_encoder = settings, sample_metric, text_encoder
        by_samples = sample_metric is not None and settings.best_metric == "samples"
        self.key = sample_metric.key if sample_metric is not None and by_samples else LOSS
        self.measured_on = {LOSS: held_out.identity}
        if sample_metric is not None:
            self.measured_on[sample_metric.key] = f"{sample_metric.identity}, {held_out.identity}"
            logger.info("%s: of %s", sample_metric.key, sample_metric.title)
        self.history = self._read_history(first_step)
        self.is_first = True
        run.accelerator.wait_for_everyone()  # all have read before one writes
        if run.is_main and (run.folder / HISTORY_FILE).is_file():
            self._restore_best()
            self._write_history()

    def _read_history(self, first_step: int) -> list[Evaluation]:
        path = self.folder / HISTORY_FILE
        if not path.is_file():
            return []
        saved = read_json(path)
        for key, identity in self.measured_on.items():
            had = saved["measured_on"].get(key, identity)
            if had != identity:
                raise UserError(
                    f"--resume_from_checkpoint: {key} in {path} was measured on {had}, and this run would measure it "
                    f"on {identity}; give the same flags as then, or delete {path} to begin anew"
                )
        self.measured_on = saved["measured_on"] | self.measured_on
        return [each for each in saved["evaluations"] if each["global_step"] <= first_step]

    def _write_history(self) -> None:
        content = {"measured_on": self.measured_on, "evaluations": self.history}
        write_json(self.folder / HISTORY_FILE, content)

    def _restore_best(self) -> None:
        """Makes `best/` what it was when the last evaluation of the history had been made."""
        shutil.rmtree(self.folder / TEMPORARY, ignore_errors=True)
        best, wanted = self.folder / BEST, lowest(self.history, self.key)
        if step_of(best) == (wanted and wanted["global_step"]):
            return
        if best.is_dir():
            logger.info("%s is of step %s, not the best that this run had at its checkpoint", best, step_of(best))
            shutil.rmtree(best)
        spare = self.folder / f".{BEST}-{wanted and wanted['global_step']}"
        if spare.is_dir():
            spare.replace(best)

    def evaluate(self, model: nn.Module | None, global_step: int) -> None:
        """Measures a model in evaluation mode (None on a process without one) after `global_step` optimizer steps,
        logs the figures, and keeps the model if there was no better one.
        """
        started = time.perf_counter()
        quarters = validation_losses(
            self.accelerator,
            model,
            self.held_out,
            self.objective,
            batch_size=self.settings.batch_size,
            text_encoder=self.text_encoder,
        )
        values = {LOSS: sum(quarters) / len(quarters)}
        values |= {f"{LOSS}_quarter_{i}": loss for i, loss in enumerate(quarters, start=1)}
        if self.sample_metric is not None:
            values[self.sample_metric.key] = self.sample_metric(model)
        (values,) = broadcast_object_list([values])  # to the last bit: all must agree on when to end
        self.accelerator.log(values, step=global_step)
        evaluation: Evaluation = {"global_step": global_step} | values
        self.history.append(evaluation)
        best = lowest(self.history, self.key)
        if self.accelerator.is_main_process:
            if best is evaluation or (best is not None and not (self.folder / BEST).is_dir()):
                self._keep(model, evaluation)
            self._write_history()
            self._prune()
        self.accelerator.wait_for_everyone()
        figures = ", ".join(f"{name} {value:.5g}" for name, value in values.items() if "quarter" not in name)
        at = "" if best is None or best is evaluation else f" (best: {best[self.key]:.5g} at {best['global_step']})"
        logger.info("step %d: %s%s", global_step, figures, at)
        if self.is_first:
            logger.info("an evaluation takes about %.1f s", time.perf_counter() - started)
        self.is_first = False

    def _keep(self, model: nn.Module | None, evaluation: Evaluation) -> None:
        """Puts a model into `best/`, complete or not at all, and what it replaces aside."""
        best, temporary = self.folder / BEST, self.folder / TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)
        self.write_model(temporary, model, evaluation["global_step"])
        titles = {} if self.sample_metric is None else {"samples": self.sample_metric.title}
        about = {"best_metric": self.key, "measured_on": self.measured_on} | titles
        write_json(temporary / BEST_FILE, about | evaluation)
        for path in temporary.rglob("*"):
            if path.is_file():
                fsync_path(path)
        if best.is_dir():
            spare = self.folder / f".{BEST}-{step_of(best)}"
            shutil.rmtree(spare, ignore_errors=True)
            best.replace(spare)
        temporary.replace(best)
        fsync_path(self.folder)

    def _prune(self) -> None:
        """Deletes what was the best once, but not what was it when a checkpoint was written that is still there:
        a run that goes on from there needs it.
        """
        reached = (
            lowest([each for each in self.history if each["global_step"] <= step], self.key)
            for step in checkpoint_steps(self.folder)
        )
        needed = {f".{BEST}-{each['global_step']}" for each in reached if each is not None}
        for spare in self.folder.glob(f".{BEST}-*"):
            if spare.name not in needed:
                shutil.rmtree(spare)

    @property
    def reason_to_end(self) -> str | None:
        """Why training should end now: the last `patience` evaluations brought no improvement. None where they did."""
        values = [each[self.key] for each in self.history if self.key in each]
        patience = self.settings.patience
        if patience is None or without_improvement(values, self.settings.min_delta) < patience:
            return None
        best = lowest(self.history, self.key)
        what = f"--early_stopping_patience {patience}: {self.key} has not fallen in as many evaluations; "
        if best is None:
            return what + "it never was a number"
        return what + f"the lowest, {best[self.key]:.5g}, is of step {best['global_step']}: {self.folder / BEST}"


def step_of(best: Path) -> int | None:
    """The optimizer steps of the model in a folder that an `Evaluator` wrote; None where there is none."""
    return read_json(best / BEST_FILE)["global_step"] if (best / BEST_FILE).is_file() else None
