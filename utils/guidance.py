"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) at sampling time.

This file is copied into exported runs, beside the pipeline that uses it: it imports torch only.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def guided_prediction(
    predict: Callable[[Tensor, Tensor], Tensor], noisy_latents: Tensor, timestep: Tensor, guidance_scale: float
) -> Tensor:
    """The prediction (B, ...) extrapolated from the unconditional branch: null + scale * (conditional - null).

    `predict` takes latents and timesteps of 2 B samples, the conditional ones first, and runs both branches in one
    batch. At `guidance_scale` 1 guidance is off, and `predict` is called with the B conditional samples only.
    """
    if guidance_scale == 1:
        return predict(noisy_latents, timestep.expand(len(noisy_latents)))
    doubled = torch.cat([noisy_latents, noisy_latents])  # (2 B, ...)
    conditional, unconditional = predict(doubled, timestep.expand(len(doubled))).chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
