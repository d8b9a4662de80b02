"""When a training ends and which steps count: steps, hours, signals, losses that are not finite.

Whatever a process learns of this, all learn together, once an optimizer step, before the weights move: a rank that
acted alone would leave the others waiting.
"""

import logging
import math
import os
import signal
import time
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import read_json, write_json
from utils.training.checkpoints import checkpoint_steps
from utils.training.run import Run

logger = logging.getLogger(__name__)
ELAPSED_FILE = "elapsed.json"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS_OF_ECHO = 5.0  # a launcher passes on to its processes what these got as well


class RunControl:
    """Ends a training after `max_train_steps`, or so that it ends within `max_train_hours` of wall-clock, or after a
    step in which SIGTERM or SIGINT came, or when told to; keeps steps with a loss or gradient that is not finite from
    the weights.

    The hours count from the start of the process, and over all the processes that went on with a run: the time spent
    is kept in the run's folder. Create it when training is about to start; it takes the signals from then on.
    """

    def __init__(
        self,
        run: Run,
        *,
        max_train_steps: int | None,
        max_train_hours: float | None,
        max_nonfinite_steps: int,
        first_step: int,
        is_resumed: bool,
    ):
        self.accelerator, self.folder = run.accelerator, run.folder
        self.max_train_steps = math.inf if max_train_steps is None else max_train_steps
        self.max_seconds = math.inf if max_train_hours is None else max_train_hours * 3600
        self.max_nonfinite_steps = max_nonfinite_steps
        self.first_step = self.steps_done = first_step
        elapsed = run.folder / ELAPSED_FILE
        before = read_json(elapsed) if is_resumed and elapsed.is_file() else {}
        self.clock_zero = psutil.Process().create_time() - before.get("seconds", 0.0)
        self.step_started = self._seconds()
        self.longest_step = self.longest_tail = self.tail = 0.0  # tail: checkpoint, validation, ...
        self.nonfinite_in_a_row = self.nonfinite_steps = 0
        self.received: signal.Signals | None = None
        self.received_at = 0.0
        self.interrupted = self.is_last = False
        self.reason_to_end: str | None = None
        self.grad_norm = math.nan
        for each in SIGNALS:
            signal.signal(each, self._receive)
        self.seconds = self._agree(self._seconds())[0]

    def _receive(self, number: int, frame) -> None:
        if self.received is None:
            self.received, self.received_at = signal.Signals(number), time.monotonic()
            os.write(2, f"\n{self.received.name}: finishing this step, then writing a checkpoint\n".encode())
        elif time.monotonic() - self.received_at > SECONDS_OF_ECHO:  # who sends it again means it
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _seconds(self) -> float:
        return time.time() - self.clock_zero

    def _agree(self, *values: float | Tensor) -> list[float]:
        """The largest of each value over all processes."""
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        mine = torch.stack([torch.as_tensor(value, device=device).to(dtype) for value in values])
        return self.accelerator.gather(mine[None]).amax(dim=0).tolist()

    @property
    def time_share(self) -> float:
        """Share of the hours that is spent, in [0, 1]; 0 without a limit. The same on every process."""
        return min(1.0, self.seconds / self.max_seconds)

    @property
    def is_finished(self) -> bool:
        """Whether this step was the last of the run: it is evaluated and exported, and not resumed."""
        return self.is_last and not self.interrupted

    def is_due(self, every: int | None, or_stopped: bool = False) -> bool:
        """Whether something that happens every `every` optimizer steps is due after this one: None is never, and the
        last step of a finished run always; with `or_stopped` that of a run that a signal ends, too.
        """
        if every is None:
            return False
        return (self.steps_done + 1) % every == 0 or (self.is_last if or_stopped else self.is_finished)

    def steps(self) -> Iterator[int]:
        """Optimizer steps, counted from 0, until the run is to end."""
        has_time = self.seconds < self.max_seconds
        while has_time and self.steps_done < self.max_train_steps and not self.is_last:
            self.step_started = self._seconds()
            yield self.steps_done
            self.tail = self._seconds() - self.seconds
            self.steps_done += 1

    def may_step(self, loss: Tensor, grad_norm: Tensor | None) -> bool:
        """Whether this step's update may reach the weights: its loss and the norm of its gradient (None where the
        engine keeps it to itself) are finite on every process. Every process calls this once an optimizer step.

        Raises UserError after `max_nonfinite_steps` in a row that were not. Decides, too, whether the step is the
        last.
        """
        norm = torch.zeros((), device=loss.device) if grad_norm is None else grad_norm.detach()
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
        is_bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(norm))
        mine = (
            is_bad,
            self.received is not None,
            self._seconds(),
            self._seconds() - self.step_started,
            self.tail,
            norm,
        )
        # The one moment in a step at which the host waits for the device.
        bad, stop, self.seconds, step, tail, self.grad_norm = self._agree(*mine)
        if self.steps_done > self.first_step:  # the first step compiles and fills caches: no measure
            self.longest_step, self.longest_tail = max(self.longest_step, step), max(self.longest_tail, tail)
        self.interrupted = bool(stop)
        done = self.steps_done + 1
        self.is_last = self.interrupted or done >= self.max_train_steps or self._is_out_of_time()
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if bad else 0
        self.nonfinite_steps += bool(bad)
        if self.nonfinite_in_a_row >= self.max_nonfinite_steps:
            raise UserError(self._nonfinite_message(done))
        return not bad

    def end_early(self, reason: str | None) -> None:
        """Makes this step the last where there is a reason, which is said at the end; before the first step, there is
        none. Every process calls this, with the same reason."""
        if reason is not None:
            self.is_last, self.reason_to_end = True, reason

    def _is_out_of_time(self) -> bool:
        """Whether another step, and what follows this one and that one (checkpoint, validation, evaluation), might not
        fit."""
        return self.seconds + self.longest_step + 2 * self.longest_tail >= self.max_seconds

    def _nonfinite_message(self, done: int) -> str:
        steps = checkpoint_steps(self.folder)
        last_good = f"checkpoint-{steps[-1]} is the last good one: " if steps else "there is no checkpoint yet: "
        how = f"go on with --resume_from_checkpoint checkpoint-{steps[-1]} and" if steps else "start again with"
        return (
            f"--max_nonfinite_steps {self.max_nonfinite_steps}: the loss or its gradient was not finite in steps "
            f"{done - self.nonfinite_in_a_row + 1} to {done}, and none of them reached the weights; {last_good}"
            f"{how} a lower --learning_rate, or --mixed_precision no to find the cause"
        )

    def save_elapsed(self, at_least: float = 0.0) -> None:
        """Writes the time spent so far, for a process that goes on with this run."""
        if self.accelerator.is_main_process:
            write_json(self.folder / ELAPSED_FILE, {"seconds": round(max(self._seconds(), at_least), 1)})

    def seconds_left(self, seconds_per_step: float) -> float:
        """Until the run will end, by steps or by hours, whichever comes first."""
        return min((self.max_train_steps - self.steps_done) * seconds_per_step, self.max_seconds - self.seconds)

    def say_how_it_ended(self) -> None:
        """One line on why training stopped before its last step, and how to go on."""
        is_out_of_time = self.steps_done < self.max_train_steps and not self.interrupted and self.reason_to_end is None
        # What was kept free for a step that might have been long is no time to go on with.
        self.save_elapsed(at_least=self.max_seconds if is_out_of_time else 0.0)
        if self.interrupted:
            logger.info(
                "stopped by a signal after step %d; go on with the same command and --resume_from_checkpoint latest",
                self.steps_done,
            )
        elif self.reason_to_end is not None:
            logger.info("ended after step %d: %s", self.steps_done, self.reason_to_end)
        elif is_out_of_time:
            logger.info("--max_train_hours are used up: %d steps in %.2f h", self.steps_done, self.seconds / 3600)
