"""Guidance at sampling time: a prediction is led away from a weaker one, which is the same model without its condition
(classifier-free guidance, Ho & Salimans 2022, arXiv 2207.12598) or a worse model (autoguidance, Karras et al. 2024,
arXiv 2406.02507).

Predictions may be epsilon, v, x0 or the velocity of flow: at a given latent and timestep each is affine in any other,
so extrapolating one extrapolates all. This file is copied into exported runs, beside the pipeline that uses it: it
imports torch only.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]  # latents (B, ...), timesteps (B,) -> prediction (B, ...)


class Guidance(NamedTuple):
    """How samples are guided, and in how many steps of the sampler."""

    scale: float = 1.0  # 1 is off
    interval: Sequence[float] = (0.0, 1.0)  # shares of the training timesteps, 0 = clean, 1 = noise, where it is on
    rescale: float = 0.0  # how far the guided prediction's std goes back to the unguided one's, 1 = all the way
    num_inference_steps: int = 50

    def arguments(self) -> dict[str, Any]:
        """As `LatentDiffusionPipeline` takes it, and as it is written beside samples."""
        names = ("guidance_scale", "guidance_interval", "guidance_rescale", "num_inference_steps")
        return dict(zip(names, self, strict=True))

    def check(self, with_guide: bool, with_negative_prompt: bool = False) -> None:
        """Raises ValueError, which starts with the argument at fault, for guidance that contradicts itself or would do
        nothing. The scale of an unconditional run without a guide is 1.
        """
        start, end = self.interval
        if not 0 <= start < end <= 1:
            raise ValueError(f"guidance_interval {start:g} {end:g}: START must be below END, both between 0 and 1")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale {self.rescale:g}: it must be between 0 and 1")
        if with_guide and with_negative_prompt:
            raise ValueError(
                "guide_model with negative_prompt: a guide replaces the branch that the negative prompt would stand "
                "in; leave one out"
            )
        needs_guidance = {
            "guidance_interval": (start, end) != (0, 1),
            "guidance_rescale": self.rescale != 0,
            "guide_model": with_guide,
            "negative_prompt": with_negative_prompt,
        }
        for name, is_set in needs_guidance.items():
            if is_set and self.scale == 1:
                raise ValueError(
                    f"{name}: guidance is off (guidance_scale 1, or an unconditional run without guide_model), so "
                    "this would do nothing; leave it out or turn guidance on"
                )

    def scales(self, timesteps: Tensor, num_train_timesteps: int) -> list[float]:
        """The scale at each of the sampler's `timesteps` (S,): `scale` where timestep / num_train_timesteps lies in
        the interval, and 1 elsewhere. Raises ValueError if it lies there at no step.
        """
        # The weight w(sigma) of arXiv 2404.07724, with the interval in shares of the training timesteps.
        start, end = self.interval
        inside = [start <= timestep / num_train_timesteps <= end for timestep in timesteps.tolist()]
        if not any(inside):
            raise ValueError(
                f"guidance_interval {start:g} {end:g}: none of the sampler's {len(inside)} steps lies in it, so "
                "guidance would never be on; widen it or take more num_inference_steps"
            )
        return [self.scale if each else 1.0 for each in inside]


def extrapolate(prediction: Tensor, weaker: Tensor, guidance_scale: float) -> Tensor:
    """weaker + scale * (prediction - weaker), all (B, ...). Scale 1 is the prediction itself."""
    # The scale is 1 + w in arXiv 2207.12598, and w in arXiv 2406.02507.
    return weaker + guidance_scale * (prediction - weaker)


def rescale(guided: Tensor, prediction: Tensor, guidance_rescale: float) -> Tensor:
    """Moves the std of each sample of `guided` (B, ...), over all its other axes, towards that of the unguided
    `prediction`, for guidance inflates it: 0 is off, 1 all the way.
    """
    axes = tuple(range(1, guided.ndim))
    sigma_pos, sigma_cfg = (
        each.float().std(dim=axes, keepdim=True, correction=0) for each in (prediction, guided)
    )  # (B, 1, ...)
    rescaled = guided * (sigma_pos / sigma_cfg.clamp(min=1e-8))  # arXiv 2305.08891, equation 15
    return (guidance_rescale * rescaled + (1 - guidance_rescale) * guided).to(guided.dtype)  # equation 16


def guided_prediction(
    predict: Predict,
    noisy_latents: Tensor,
    timestep: Tensor,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    predict_weaker: Predict | None = None,
) -> Tensor:
    """The prediction (B, ...) extrapolated from a weaker one.

    `predict_weaker` is that of the guide; `predict` then takes the B conditional samples. Without it the unconditional
    branch is the weaker one: `predict` takes 2 B samples, the conditional ones first, and runs both branches in one
    batch. At `guidance_scale` 1 guidance is off, and `predict` alone is called, with the B conditional samples.
    """
    timesteps = timestep.expand(len(noisy_latents))  # (B,)
    if guidance_scale == 1:
        return predict(noisy_latents, timesteps)
    if predict_weaker is None:
        doubled = torch.cat([noisy_latents, noisy_latents])  # (2 B, ...)
        prediction, weaker = predict(doubled, torch.cat([timesteps, timesteps])).chunk(2)
    else:
        prediction, weaker = predict(noisy_latents, timesteps), predict_weaker(noisy_latents, timesteps)
    guided = extrapolate(prediction, weaker, guidance_scale)
    return rescale(guided, prediction, guidance_rescale) if guidance_rescale else guided


def denoise(
    scheduler,
    predict: Predict,
    latents: Tensor,
    guidance: Guidance,
    predict_weaker: Predict | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    progress_bar: Callable[[Tensor], Iterable[Tensor]] = iter,
) -> Tensor:
    """All steps of a sampler, from noise (B, ...) to latents. `predict` and `predict_weaker` are those of
    `guided_prediction`. Raises ValueError for an interval of guidance in which no step lies.
    """
    scheduler.set_timesteps(guidance.num_inference_steps, device=latents.device)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    timesteps = scheduler.timesteps  # (S,)
    scales = guidance.scales(timesteps, scheduler.config.num_train_timesteps)
    for timestep, scale in zip(progress_bar(timesteps), scales, strict=True):
        model_input = latents
        if hasattr(scheduler, "scale_model_input"):
            model_input = scheduler.scale_model_input(latents, timestep)
        model_pred = guided_prediction(predict, model_input, timestep, scale, guidance.rescale, predict_weaker)
        latents = scheduler.step(model_pred, timestep, latents, return_dict=False, **extra)[0]
    return latents
