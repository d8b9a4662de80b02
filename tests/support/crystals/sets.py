"""Tiny DiTs of sets, random numbers for them, and columns that they may be asked for."""

import math

import torch
from torch import Tensor

from tests.support.processes import with_random_weights
from utils.models.dit import DiT

MAX_ATOMS, CHANNELS, WIDTH = 20, 4, 32
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TINY_DIT = {"num_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2, "patch_size": 1, "in_channels": CHANNELS}


def set_dit(style: str = "modern", **settings) -> DiT:
    torch.manual_seed(1)
    return with_random_weights(
        DiT(**TINY_DIT | {"latent_kind": "set", "sample_size": MAX_ATOMS} | settings, style=style)
    )


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def permuted(values: Tensor, order: Tensor) -> Tensor:
    """`values` (B, N, ...) with the items of each row in `order` (B, N)."""
    return torch.stack([row[places] for row, places in zip(values, order, strict=True)])


def shuffles(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(size, generator=generator) for _ in range(count)])


COLUMNS = {
    "band_gap": {"kind": "property", "mean": 1.5, "std": 0.5},
    "composition": {"kind": "composition", "num_elements": 5},
    "spacegroup": {"kind": "class", "names": ["1", "225"]},
}
VALUES = {
    "band_gap": torch.tensor([1.0, 2.5, math.nan, 0.0]),
    "composition": torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0.25, 0.75], [0.0] * 5]),
    "spacegroup": torch.tensor([0, 1, -1, 1]),
}
