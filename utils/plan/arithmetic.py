"""The arithmetic of a plan: micro-batch, number of steps, bytes on disk. No tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from utils.errors import UserError

STAGES = ("forward + backward", "optimizer", "EMA", "other")
EACH_MICRO_STEP = ("forward + backward", "other")
CAPTION_BYTES = 60  # assumed size of a caption's text; small beside 118 KB of CLIP-L states


@dataclass(frozen=True)
class Pace:
    """Measured seconds of each stage (per micro-step for EACH_MICRO_STEP, else per optimizer step) and peak memory."""

    seconds: dict[str, float]
    peak_bytes: int

    @classmethod
    def of_step(cls, seconds: dict[str, float], micro_steps: int, peak_bytes: int) -> "Pace":
        """Made from the seconds of each stage in an optimizer step of `micro_steps`."""
        return cls({k: v / micro_steps if k in EACH_MICRO_STEP else v for k, v in seconds.items()}, peak_bytes)

    def stages(self, micro_steps: int) -> dict[str, float]:
        """Seconds of each stage in an optimizer step of `micro_steps`."""
        return {k: v * micro_steps if k in EACH_MICRO_STEP else v for k, v in self.seconds.items()}

    def step_seconds(self, micro_steps: int) -> float:
        return sum(self.stages(micro_steps).values())


PaceOf = Callable[[int], Pace | None]  # micro-batch size -> its pace; None if memory runs out


def largest_that_fits(fits: Callable[[int], bool], limit: int) -> int:
    """The largest size in [1, limit] that fits, by doubling and then bisection; 0 if not even 1 does. Assumes that a
    size does not fit if a smaller one does not."""
    good, size = 0, 1
    while fits(size):
        if size == limit:
            return limit
        good, size = size, min(2 * size, limit)
    bad = size
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def quickest_that_fits(pace_of: PaceOf, effective: int, limit: int, memory_limit: float) -> int:
    """The micro-batch among 1, 2, 4, ... up to `limit` with the most samples per second; 0 if none fits. Stops at a
    size that is a tenth slower than the best, and before one that would not fit if memory kept growing at the same
    rate."""
    best, best_seconds, size, last_bytes = 0, math.inf, 1, None
    while size <= limit:
        pace = pace_of(size)
        if pace is None or pace.peak_bytes > memory_limit:
            break
        seconds = pace.step_seconds(math.ceil(effective / size)) / (math.ceil(effective / size) * size)
        if seconds > 1.1 * best_seconds:
            break
        if seconds < best_seconds:
            best, best_seconds = size, seconds
        growth = 0 if last_bytes is None else 2 * (pace.peak_bytes - last_bytes)
        if pace.peak_bytes + growth > memory_limit:
            break
        size, last_bytes = 2 * size, pace.peak_bytes
    return best


def find_micro_batch(pace_of: PaceOf, effective: int, limit: int, memory_limit: float, by_memory: bool) -> int:
    """The largest micro-batch that fits (`by_memory`, for devices that are faster with larger batches), or the fastest
    one. Raises UserError if a single sample does not fit."""

    def fits(size: int) -> bool:
        pace = pace_of(size)
        return pace is not None and pace.peak_bytes <= memory_limit

    limit = min(limit, effective)
    found = (
        largest_that_fits(fits, limit) if by_memory else quickest_that_fits(pace_of, effective, limit, memory_limit)
    )
    if not found:
        raise UserError(
            f"--memory_gb/--memory_margin: a micro-batch of one sample does not fit in {readable(memory_limit)}; "
            "take a smaller --model_size, or add --gradient_checkpointing or --optimizer adamw_8bit"
        )
    return found


def settle_batch(effective: int, largest: int) -> tuple[int, int]:
    """(train_batch_size, gradient_accumulation_steps) with micro-batches of at most `largest`. Their product is
    exactly `effective` if that needs no micro-batch below half of `largest`, otherwise as close as possible."""
    largest = min(largest, effective)
    divisor = max(size for size in range(1, largest + 1) if effective % size == 0)
    if 2 * divisor >= largest:
        return divisor, effective // divisor
    micro_steps = math.ceil(effective / largest)
    return round(effective / micro_steps), micro_steps


@dataclass(frozen=True)
class Overheads:
    """Seconds besides training steps: once (start, export), per checkpoint, per validation and per evaluation."""

    once: float = 0.0
    checkpoint: float = 0.0
    validation: float = 0.0
    evaluation: float = 0.0


def planned_steps(
    hours: float,
    step_seconds: float,
    overheads: Overheads,
    checkpointing_steps: int,
    validation_steps: int,
    eval_steps: int | None = None,
) -> int:
    """Number of optimizer steps that fit into `hours`, together with what follows the last one. Raises UserError if
    there is no time for any."""
    outside = overheads.once + overheads.checkpoint + overheads.validation + overheads.evaluation
    each = step_seconds + overheads.checkpoint / checkpointing_steps + overheads.validation / validation_steps
    each += overheads.evaluation / eval_steps if eval_steps else 0.0
    steps = math.floor((3600 * hours - outside) / each)
    if steps < 1:
        raise UserError(
            f"--hours {hours:g}: start, last checkpoint and export take {outside:.1f} s, and a step "
            f"{step_seconds:.1f} s; give more hours, or a smaller model or batch"
        )
    return steps


def cache_bytes(
    num_images: int,
    latent_shape: tuple[int, ...],
    moments: bool = True,
    flips: bool = False,
    labels: bool = False,
    num_captions: int = 0,
    states_shape: tuple[int, ...] | None = None,
    sequence_length: int = 77,
    caption_bytes: float = CAPTION_BYTES,
) -> int:
    """Bytes of a latent cache, from its columns (utils/latents/writer.py): float16 latents, and `num_captions`
    distinct captions with float16 states (S, D) = `states_shape` or, if that is None, with token ids."""
    row: float = 8 + 2 * math.prod(latent_shape) * (1 + moments) * (1 + flips) + 8 * labels
    if num_captions:
        row += 4 + 4 + caption_bytes + 4 + 8  # a list of one text, and a list of one id
    content = 4 * sequence_length if states_shape is None else 2 * math.prod(states_shape)
    return round(num_images * row + num_captions * (8 + 4 + caption_bytes + 8 + content))


def readable(value: float, units: tuple[str, ...] = ("B", "KB", "MB", "GB", "TB", "PB")) -> str:
    """Bytes as text in a suitable unit, such as 16.4 KB."""
    power = min(len(units) - 1, int(math.log10(max(value, 1)) // 3))
    return f"{value / 1000**power:.3g} {units[power]}"
