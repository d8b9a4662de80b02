"""Samplers by name, seeds that belong to an image, and pictures that carry their parameters."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.guidance import Guidance, denoise
from utils.errors import UserError

SAMPLERS: dict[str, type[SchedulerMixin]] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "flow_euler": FlowMatchEulerDiscreteScheduler,
    "flow_heun": FlowMatchHeunDiscreteScheduler,
}
FLOW_SAMPLERS = ("flow_euler", "flow_heun")
# 1% of the noise, as 30 steps of DDIM leave: it moves the mean by 0.03 standard deviations (see test_gaussian.py).
MAX_TIMESTEPS_LEFT = 10


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler samples rectified flow."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler)


def sampling_scheduler(
    trained_with: SchedulerMixin, name: str | None = None, num_inference_steps: int | None = None
) -> SchedulerMixin:
    """The sampler `name` with the noise schedule that the model was trained with; by default DDIM, or Euler for
    flow. Raises UserError for a sampler of the other family, and for a number of steps that it cannot take.
    """
    name = name or ("flow_euler" if is_flow(trained_with) else "ddim")
    if is_flow(trained_with) != (name in FLOW_SAMPLERS):
        fitting = [each for each in SAMPLERS if (each in FLOW_SAMPLERS) == is_flow(trained_with)]
        raise UserError(f"--scheduler {name}: this run was trained for {', '.join(fitting)}; use one of these")
    # Only DDPM samples a learned variance; DPM-Solver++ would take the first three channels for the prediction.
    others = {"variance_type": None} if name == "dpmsolver++" else {}
    scheduler = SAMPLERS[name].from_config(trained_with.config, **others)
    fault = num_inference_steps and fault_of_steps(scheduler, num_inference_steps)
    if fault:
        last = min(num_inference_steps, scheduler.config.num_train_timesteps)
        fewer = next(steps for steps in range(last, 0, -1) if not fault_of_steps(scheduler, steps))
        raise UserError(f"--num_inference_steps {num_inference_steps} with --scheduler {name}: {fault}; use {fewer}")
    return scheduler


def fault_of_steps(scheduler: SchedulerMixin, num_inference_steps: int) -> str | None:
    """Why a sampler would not end at clean latents in so many steps; None where it does."""
    total = scheduler.config.num_train_timesteps
    if is_flow(scheduler):
        return None
    if num_inference_steps > total:
        return f"the model knows {total} timesteps only"
    scheduler.set_timesteps(num_inference_steps)
    # diffusers lays trailing timesteps by a float stride: 61 steps become 62, the last one at t = -1, all noise again.
    if len(scheduler.timesteps) != num_inference_steps:
        return f"diffusers' rounding adds a step at t = {int(scheduler.timesteps[-1])}, which spoils the image"
    # diffusers' DDIM goes total // steps timesteps at a time, whatever its next timestep is.
    if isinstance(scheduler, DDIMScheduler) and total % num_inference_steps > MAX_TIMESTEPS_LEFT:
        left = total % num_inference_steps
        return f"diffusers' DDIM would leave the noise of {left} of {total} timesteps in the image"
    return None


def usable_device(name: str | None) -> torch.device:
    """The named device, by default cuda where there is one. Raises UserError for one that is not here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; use cpu or cuda") from error
    return device


def speed_up(denoiser: Any, torch_compile: bool, fuse_qkv_projections: bool = False) -> None:
    """Makes a denoiser's calls faster, in place. Raises UserError for one that has no projections to fuse."""
    if fuse_qkv_projections:
        if not hasattr(denoiser, "fuse_qkv_projections"):
            raise UserError(
                f"--fuse_qkv_projections: {type(denoiser).__name__} has none apart that could be fused; leave it out"
            )
        denoiser.fuse_qkv_projections()
    if torch_compile:
        denoiser.compile()


def image_generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """One generator for each image: image i of a run has seed `seed + i`, whatever batch it falls into. On the CPU,
    where the same seed gives the same numbers on every machine.
    """
    return [torch.Generator("cpu").manual_seed(seed + i) for i in range(first, first + count)]


def batches(items: Sequence[Any], batch_size: int) -> Iterator[tuple[int, Sequence[Any]]]:
    """(index of the first item, items) of consecutive batches."""
    for first in range(0, len(items), batch_size):
        yield first, items[first : first + batch_size]


@torch.no_grad()
def sample_latents(
    denoiser: ConditionalDenoiser,
    scheduler: SchedulerMixin,
    shape: tuple[int, ...],
    values: Mapping[str, Tensor],
    guidance: Guidance,
    *,
    guide_model: ConditionalDenoiser | None = None,
    generator: list[torch.Generator] | None = None,
    progress_bar: Callable[[Tensor], Iterable[Tensor]] = iter,
    always: Mapping[str, Tensor] | None = None,
    adapt: Callable[[Tensor], Tensor] = lambda model_pred: model_pred,
) -> Tensor:
    """Normalised latents of `shape` (B, ...). `values` are those of some of the run's conditions, (B, ...) by name;
    conditions that are not in it stay open. `always` is what both branches of guidance are told, and `adapt` makes of
    the denoiser's output what the scheduler takes. Raises ValueError for guidance that would do nothing.
    """
    if not values and guide_model is None:
        guidance = guidance._replace(scale=1.0)
    guidance.check(with_guide=guide_model is not None)
    device, count = next(denoiser.parameters()).device, shape[0]
    given = {name: value.to(device) for name, value in (dict(values) | dict(always or {})).items()}
    both = {name: torch.cat([value, value]) for name, value in given.items()}
    drop = torch.arange(2 * count, device=device) >= count  # the second half is the unconditional branch

    def predict(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        size = len(noisy_latents)
        return adapt(denoiser(noisy_latents, timesteps, {name: v[:size] for name, v in both.items()}, drop[:size]))

    predict_weaker = None if guide_model is None else partial(guide_model, values=given, drop=drop[:count])
    latents = randn_tensor(shape, generator=generator, device=device)  # the noise of a sample is its own
    return denoise(
        scheduler,
        predict,
        latents * getattr(scheduler, "init_noise_sigma", 1.0),
        guidance,
        predict_weaker,
        generator=generator,
        progress_bar=progress_bar,
    )


def checked_guidance(
    guidance: Guidance, scheduler: SchedulerMixin, *, with_guide: bool, with_negative_prompt: bool = False
) -> Guidance:
    """The same guidance. Raises UserError, which names the flag, where it contradicts itself or would do nothing."""
    scheduler.set_timesteps(guidance.num_inference_steps)
    try:
        guidance.check(with_guide, with_negative_prompt)
        guidance.scales(scheduler.timesteps, scheduler.config.num_train_timesteps)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return guidance
