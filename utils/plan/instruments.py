"""Instruments of `plan_budget.py`: a latent cache without data, clocks, memory."""

import gc
import itertools
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from utils.diffusion.conditions import encode_text
from utils.errors import UserError
from utils.files import fsync_path, sha256_file
from utils.image.cache import ImageCache
from utils.image.encoding import LatentEncoder
from utils.image.precompute import Encoders
from utils.latents.cache import Draw
from utils.latents.spec import LatentSpec, Normalisation
from utils.latents.writer import ChannelSums
from utils.plan.arithmetic import STAGES, Pace, readable
from utils.training.held_out import NUM_QUARTERS
from utils.training.step_log import peak_memory


def synthetic_spec(
    latent_shape: tuple[int, ...], content: str, num_classes: int, states_shape: tuple[int, int], caption_content: str
) -> LatentSpec:
    """The spec of a cache that is not there, with labels, and captions as states (S, D) or as token ids."""
    plain = {"mean": [0.0] * latent_shape[0], "std": [1.0] * latent_shape[0]}
    captions = {
        "content": caption_content,
        "shape": states_shape if caption_content == "hidden_states" else states_shape[:1],
        "count": 1,
        "hidden_size": states_shape[1],
    }
    return LatentSpec(
        kind="image",
        shape=latent_shape,
        dtype="float16",
        content=content,
        flips=False,
        num_rows=0,
        num_skipped=0,
        normalisation={"vae": plain, "measured": plain},
        captions=captions,
        labels={"num_classes": num_classes, "names": None},
        vae="none",
        text_encoder=None,
        fingerprint={},
    )


class SyntheticCache(ImageCache):
    """A latent cache of images that are random numbers in memory, of the shapes of `spec`. Costs what a real one
    costs, but for the disk.
    """

    ROWS = 64  # any row is one of these

    def __init__(self, spec: LatentSpec):
        self.spec = spec
        self.normalisation = Normalisation((0.0,) * spec.shape[0], (1.0,) * spec.shape[0])
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(self.ROWS, *shape, generator=generator).half()

        self.columns = {"latents": normal(2 if spec.content == "moments" else 1, *spec.shape)}
        if spec.labels:
            self.columns["class_labels"] = torch.arange(self.ROWS) % spec.labels["num_classes"]
        if spec.captions:
            self.caption_content, shape = spec.captions["content"], tuple(spec.captions["shape"])
            if self.caption_content == "hidden_states":
                self.columns["encoder_hidden_states"] = normal(*shape)
            else:
                self.columns["input_ids"] = torch.ones(self.ROWS, *shape, dtype=torch.int32)
            self.columns["num_tokens"] = torch.full((self.ROWS,), shape[0])

    def __len__(self) -> int:
        return self.ROWS

    def gather(self, rows: np.ndarray, draw: Draw | None = None) -> dict[str, Tensor]:
        """A batch of rows (B,); flips and captions are all the same."""
        index = torch.from_numpy(rows)
        return {name: column[index] for name, column in self.columns.items()}

    def null_caption(self) -> tuple[Tensor, int]:
        return self.columns["encoder_hidden_states"][0], 2


class StageClock:
    """Times the stages of training steps, on CUDA by events, so that no stage waits for the device; and tells the most
    memory that was held since it was made.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.steps: list[list[tuple[str, float | torch.cuda.Event]]] = []

    def _stamp(self) -> float | torch.cuda.Event:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        wait_for(self.device)
        return time.perf_counter()

    def start_step(self) -> None:
        self.steps.append([("", self._stamp())])

    def end_stage(self, name: str) -> None:
        """What happened since the last call, or since the step began, was stage `name`."""
        self.steps[-1].append((name, self._stamp()))

    def pace(self, micro_steps: int) -> Pace:
        """Medians over the steps but the first, each of `micro_steps`."""
        wait_for(self.device)
        totals: list[dict[str, float]] = []
        for stamps in self.steps[1:]:
            totals.append(dict.fromkeys(STAGES, 0.0))
            for (_, before), (name, now) in itertools.pairwise(stamps):
                totals[-1][name] += seconds_between(before, now)
        medians = {name: float(np.median([total[name] for total in totals])) for name in STAGES}
        return Pace.of_step(medians, micro_steps, peak_memory(self.device))


def seconds_between(before: float | torch.cuda.Event, now: float | torch.cuda.Event) -> float:
    """Of two stamps of one kind."""
    if isinstance(before, float) and isinstance(now, float):
        return now - before
    assert isinstance(before, torch.cuda.Event)
    assert isinstance(now, torch.cuda.Event)
    return before.elapsed_time(now) / 1000


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device, warm_up: int = 1) -> float:
    """Seconds of one call, after `warm_up` calls that are not counted."""
    for _ in range(warm_up):
        function()
    wait_for(device)
    started = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - started


def process_age() -> float:
    """Seconds since this process began."""
    return time.time() - psutil.Process().create_time()


def usable_bytes(device: torch.device, cap_gb: float | None) -> float:
    """Memory that this process may fill: what is free on a CUDA device, elsewhere all there is, up to a cap."""
    wait_for(device)
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().total
    return min(available, cap_gb * 1e9 if cap_gb else available)


def pace_or_none(measure: Callable[[], Pace], device: torch.device) -> Pace | None:
    """What `measure` gives, or None where the device ran out of memory."""
    try:
        return measure()
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    # Only now are the frames gone that held the tensors.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def name_of(device: torch.device) -> str:
    """A device as a person would call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} thread(s))"


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())


def tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(tensor_bytes, state.values()))
    return sum(map(tensor_bytes, state)) if isinstance(state, list | tuple) else 0


def write_seconds(folder: Path, num_bytes: int, sample_bytes: int = 1 << 28) -> float:
    """Seconds to write, sync and hash so many bytes in a folder, as a checkpoint does; from a sample of at most
    `sample_bytes`, whose file is deleted. Raises UserError if there is no room for them.
    """
    if shutil.disk_usage(folder).free < num_bytes:
        raise UserError(
            f"--output_dir: a checkpoint takes {readable(num_bytes)}, and there is less free in {folder}; make room, "
            "or give a folder on another disk"
        )
    sample = os.urandom(min(num_bytes, sample_bytes))
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".plan-") as file:
        started = time.perf_counter()
        file.write(sample)
        file.flush()
        fsync_path(Path(file.name))
        sha256_file(Path(file.name))
        return (time.perf_counter() - started) * num_bytes / len(sample)


def guided_batch(
    cache: SyntheticCache, num_images: int, guidance_scale: float, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """What a denoiser takes at one step of sampling: both branches of guidance in one batch."""
    size = num_images * (1 if guidance_scale == 1 else 2)
    values = {name: value.to(device) for name, value in cache.gather(np.arange(size) % len(cache)).items()}
    if "input_ids" in values and cache.spec.captions:
        shape = (size, len(values["input_ids"][0]), cache.spec.captions["hidden_size"])
        values["encoder_hidden_states"] = torch.zeros(shape, device=device)
    drop = torch.arange(size, device=device) < size - num_images
    return torch.zeros(size, *cache.spec.shape, device=device), torch.zeros(size, device=device), values, drop


def evaluation_seconds(
    model: torch.nn.Module,
    cache: SyntheticCache,
    num_rows: int,
    num_images: int,
    batch_size: int,
    num_inference_steps: int,
    guidance_scale: float,
    device: torch.device,
) -> float:
    """Seconds that the denoiser takes in one evaluation: the loss of `num_rows` held-out latents, and `num_images`
    samples. Without the VAE, and the network of the features."""
    seconds = 0.0
    for count, calls, scale in (
        (num_rows, NUM_QUARTERS, 1.0),
        (num_images, num_inference_steps, guidance_scale),
    ):
        if count:
            batch = guided_batch(cache, min(count, batch_size), scale, device)
            seconds += math.ceil(count / batch_size) * calls * seconds_of(partial(model, *batch), device)
    return seconds


def encoding_seconds(
    encoders: Encoders, resolution: int, flips: bool, batch_size: int, accelerator: Accelerator
) -> float:
    """Seconds that VAE and text encoder take for one image and its caption, as precompute_latents.py runs them: the
    text encoder on the CPU or GPU of the accelerator."""
    device = accelerator.device
    encoder = LatentEncoder(encoders.vae.to(device), encoders.content, flips, batch_size, accelerator.autocast)
    images = np.random.default_rng(0).integers(256, size=(batch_size, resolution, resolution, 3), dtype=np.uint8)
    sums = ChannelSums(encoders.latent_shape[0])
    seconds = seconds_of(lambda: encoder.encode(images, sums), device) * (1 + flips)
    if encoders.text_encoder is not None:
        texts = [f"picture number {i}" for i in range(batch_size)]
        text_encoder = encoders.text_encoder.to(device)
        seconds += seconds_of(lambda: encode_text(encoders.tokenizer, text_encoder, texts), device)
    return seconds / batch_size
