"""Losses of a crystal autoencoder, (B,) each: means over the real atoms of a crystal, whatever it is padded to.

Weighted and averaged they are the objective; none is a likelihood in the strict sense, as the reconstruction terms of
image autoencoders are none either.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.tensor_ops import masked_mean


class CrystalPrediction(NamedTuple):
    """What a decoder says of B crystals padded to N sites."""

    element_logits: Tensor  # (B, N, E); column 0 stands for padding and is never right
    frac_vectors: Tensor  # (B, N, 3, 2), cosine and sine of 2 pi times each fractional coordinate, of any length
    lengths: Tensor  # (B, 3), Angstrom over the cube root of the number of atoms
    angles: Tensor  # (B, 3), radians

    def frac_coords(self) -> Tensor:
        """(B, N, 3) in [0, 1)."""
        cosine, sine = self.frac_vectors.unbind(-1)
        turns = (torch.atan2(sine, cosine) / (2 * math.pi)) % 1.0
        return torch.where(turns < 1, turns, turns - turns.ceil())  # of -1e-9 the remainder rounds to one


def frac_vectors(frac_coords: Tensor) -> Tensor:
    """Fractional coordinates (..., 3) as points on circles (..., 3, 2): 0.99 and 0.01 are neighbours there."""
    angles = 2 * math.pi * frac_coords
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def scaled_lengths(lengths: Tensor, num_atoms: Tensor) -> Tensor:
    """Lengths (B, 3) in Angstrom over the cube root of `num_atoms` (B,): about alike for small and large cells."""
    return lengths / num_atoms[:, None] ** (1 / 3)


def reconstruction_losses(
    prediction: CrystalPrediction,
    atomic_numbers: Tensor,
    frac_coords: Tensor,
    lengths: Tensor,
    angles: Tensor,
    attention_mask: Tensor,
) -> dict[str, Tensor]:
    """How far a prediction is from crystals: `atomic_numbers` (B, N), `frac_coords` (B, N, 3), `lengths` (B, 3) in
    Angstrom, `angles` (B, 3) in degrees, `attention_mask` (B, N), True = atom.

    `element`: cross-entropy in nats per atom. `coordinate`: squared distance on the circle of each coordinate, about
    (2 pi error)^2. `length`: squared error of scaled lengths. `angle`: squared error in radians.
    """
    logits = prediction.element_logits.float().flatten(0, 1)
    cross_entropy = F.cross_entropy(logits, atomic_numbers.long().flatten(), reduction="none")
    wanted = frac_vectors(frac_coords)  # (B, N, 3, 2)
    distance = (prediction.frac_vectors.float() - wanted).square().sum(dim=-1)  # (B, N, 3)
    length_error = prediction.lengths.float() - scaled_lengths(lengths, attention_mask.sum(dim=1))
    angle_error = prediction.angles.float() - torch.deg2rad(angles)
    return {
        "element": masked_mean(cross_entropy.view(atomic_numbers.shape), attention_mask),
        "coordinate": masked_mean(distance, attention_mask),
        "length": length_error.square().mean(dim=1),
        "angle": angle_error.square().mean(dim=1),
    }
