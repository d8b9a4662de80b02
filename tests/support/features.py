"""Features of known distributions."""

import torch
from torch import Tensor


def gaussian(count: int, dim: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift
