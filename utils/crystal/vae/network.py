"""A variational autoencoder of crystals: a set of atoms in a cell <-> a latent (D,) for each atom.

Both halves are transformers over atoms without positions, so that the order of atoms means nothing. Fractional
coordinates go in and come out as points on circles: there is no edge of the cell at which they would jump.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from utils.crystal.structure import MAX_ATOMIC_NUMBER
from utils.latents.posterior import GaussianPosterior
from utils.models.attention import Attention, RMSNorm, SwiGLU
from utils.tensor_ops import append_dims, masked_mean

NUM_HARMONICS = 4
TYPICAL_LENGTH = 3.0  # Angstrom over the cube root of the number of atoms: where the heads begin


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


class CrystalVAEPreset(NamedTuple):
    hidden_size: int
    num_layers: int  # of each half
    num_attention_heads: int


# fmt: off
CRYSTAL_VAE_SIZES = {
    "small": CrystalVAEPreset(128, 3, 4),  #  1.3M parameters
    "base":  CrystalVAEPreset(256, 4, 8),  #  6.7M
    "large": CrystalVAEPreset(512, 8, 8),  # 51M
}
# fmt: on


class Block(nn.Module):
    """Pre-norm attention among the real atoms and a gated feed-forward."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim, eps=1e-6), RMSNorm(dim, eps=1e-6)
        self.attention = Attention(dim, num_heads)
        self.mlp = SwiGLU(dim, 4.0)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        values = values + self.attention(self.norm1(values), mask=mask)
        return values + self.mlp(self.norm2(values))


class CrystalVAE(ModelMixin, ConfigMixin):
    """`encode` and `decode` of crystals padded to any number of sites; padding changes nothing at the real ones.

    `latents_mean` and `latents_std` are per channel, measured on the training set when training ends.
    """

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 128,
        num_layers: int = 3,
        num_attention_heads: int = 4,
        latent_channels: int = 8,
        max_atoms: int = 20,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        num_elements = MAX_ATOMIC_NUMBER + 1  # and padding
        self.element_embed = nn.Embedding(num_elements, hidden_size)
        self.site_embed = nn.Linear(3 * 2 * NUM_HARMONICS, hidden_size)
        self.cell_embed = nn.Sequential(nn.Linear(7, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.encoder = nn.ModuleList(Block(hidden_size, num_attention_heads) for _ in range(num_layers))
        self.encoder_norm = RMSNorm(hidden_size, eps=1e-6)
        self.to_moments = nn.Linear(hidden_size, 2 * latent_channels)
        self.from_latents = nn.Linear(latent_channels, hidden_size)
        self.decoder = nn.ModuleList(Block(hidden_size, num_attention_heads) for _ in range(num_layers))
        self.decoder_norm = RMSNorm(hidden_size, eps=1e-6)
        self.to_elements = nn.Linear(hidden_size, num_elements)
        self.to_sites = nn.Linear(hidden_size, 6)
        to_parameters = nn.Linear(hidden_size, 6)
        self.to_cell = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), to_parameters)
        nn.init.normal_(self.element_embed.weight, std=1.0)
        with torch.no_grad():  # a cube of usual size
            to_parameters.bias[:3].fill_(TYPICAL_LENGTH)
            to_parameters.bias[3:].fill_(math.pi / 2)

    def encode(
        self, atomic_numbers: Tensor, frac_coords: Tensor, lengths: Tensor, angles: Tensor, attention_mask: Tensor
    ) -> GaussianPosterior:
        """`atomic_numbers` (B, N), `frac_coords` (B, N, 3), `lengths` (B, 3) in Angstrom, `angles` (B, 3) in degrees,
        `attention_mask` (B, N), True = atom -> the posterior of latents (B, N, D).
        """
        harmonics = torch.arange(1, NUM_HARMONICS + 1, device=frac_coords.device)
        circles = frac_vectors(frac_coords[..., None, :] * harmonics[:, None])  # (B, N, harmonics, 3, 2)
        num_atoms = attention_mask.sum(dim=1)
        cell = torch.cat(
            [
                scaled_lengths(lengths, num_atoms) - TYPICAL_LENGTH,
                torch.deg2rad(angles) - math.pi / 2,
                num_atoms[:, None].log() - 2.0,
            ],
            dim=1,
        )  # (B, 7)
        dtype = self.site_embed.weight.dtype
        values = self.element_embed(atomic_numbers.long()) + self.site_embed(circles.flatten(2).to(dtype))
        values = values + self.cell_embed(cell.to(dtype))[:, None]  # (B, N, hidden)
        for block in self.encoder:
            values = block(values, attention_mask)
        return GaussianPosterior.of_moments(self.to_moments(self.encoder_norm(values)))

    def decode(self, latents: Tensor, attention_mask: Tensor) -> CrystalPrediction:
        """Latents (B, N, D) with `attention_mask` (B, N), True = atom, as a prediction of crystals."""
        values = self.from_latents(latents.to(self.from_latents.weight.dtype))
        for block in self.decoder:
            values = block(values, attention_mask)
        values = self.decoder_norm(values)
        weights = append_dims(attention_mask.to(values.dtype), 3)  # (B, N, 1)
        pooled = (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)  # (B, hidden)
        lengths, angles = self.to_cell(pooled).float().chunk(2, dim=1)
        vectors = self.to_sites(values).float().unflatten(-1, (3, 2))
        return CrystalPrediction(self.to_elements(values).float(), vectors, lengths, angles)

    def forward(self, batch: dict[str, Tensor], noise: Tensor) -> tuple[CrystalPrediction, GaussianPosterior]:
        """Crystals and noise (B, N, D) -> their reconstruction from a sample of the posterior, and the posterior."""
        posterior = self.encode(**batch)
        return self.decode(posterior.mean + posterior.std * noise, batch["attention_mask"]), posterior
