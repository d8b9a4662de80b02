"""Sampling of latents that are sets or vectors, with the conditions that are columns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.guidance import check_guidance
from utils.diffusion.pipelines import denoise


@torch.no_grad()
def sample_latents(
    denoiser: ConditionalDenoiser,
    scheduler: SchedulerMixin,
    shape: tuple[int, ...],
    values: Mapping[str, Tensor],
    num_inference_steps: int,
    guidance_scale: float,
    guidance_interval: Sequence[float],
    guidance_rescale: float,
    guide_model: ConditionalDenoiser | None,
    generator: list[torch.Generator] | None,
    progress_bar: Callable[[Tensor], Iterable[Tensor]],
    always: Mapping[str, Tensor] | None = None,
    adapt: Callable[[Tensor], Tensor] = lambda model_pred: model_pred,
) -> Tensor:
    """Normalised latents of `shape` (B, ...). `values` are those of some of the run's conditions, (B, ...) by name;
    conditions that are not in it stay open. `always` is what both branches of guidance are told, and `adapt` makes of
    the denoiser's output what the scheduler takes. Raises ValueError for guidance that would do nothing.
    """
    if not values and guide_model is None:
        guidance_scale = 1.0
    check_guidance(guidance_scale, guidance_interval, guidance_rescale, guide_model is not None, False)
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
        num_inference_steps,
        guidance_scale,
        guidance_interval,
        guidance_rescale,
        predict_weaker,
        generator,
        progress_bar,
    )
