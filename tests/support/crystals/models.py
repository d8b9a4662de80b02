"""Crystals of random atoms, some of them garbage, and what a perfect autoencoder would say of them."""

import numpy as np
import torch
from torch import Tensor

from tests.support.crystals.sets import CHANNELS, WIDTH
from utils.crystal.data.table import crystal_batch, make_table
from utils.crystal.files import save_crystals
from utils.crystal.structure import MAX_ATOMIC_NUMBER, Crystal, cell_matrix, to_structure
from utils.crystal.vae.network import CrystalPrediction, frac_vectors, scaled_lengths


def random_crystal(seed: int, atoms: int = 6) -> Crystal:
    """A slanted cell with sites at least 1 Angstrom apart."""
    generator = np.random.default_rng(seed)
    lattice = 5 * np.eye(3) + generator.uniform(-1, 1, (3, 3))
    while True:
        crystal = Crystal(generator.choice([3, 8, 26, 118], atoms), generator.random((atoms, 3)), lattice)
        if (to_structure(crystal).distance_matrix + 9 * np.eye(atoms)).min() > 1:
            return crystal


NAN = float("nan")
GARBAGE = {
    "not a number": Crystal(np.array([11, 17]), np.full((2, 3), NAN), np.full((3, 3), NAN)),
    "infinite": Crystal(np.array([11]), np.array([[0, np.inf, -np.inf]]), 4 * np.eye(3)),
    "no element": Crystal(np.array([0, 200, -5, 8]), np.zeros((4, 3)), 4 * np.eye(3)),
    "flat": Crystal(np.array([3]), np.zeros((1, 3)), np.diag([4.0, 4, 0])),
    "all zero": Crystal(np.array([3]), np.zeros((1, 3)), np.zeros((3, 3))),
    "endless": Crystal(np.array([3]), np.zeros((1, 3)), np.diag([1e200, 4, 4])),
    "outside the cell": Crystal(np.array([3, 7]), np.array([[-7.25, 3.5, 1], [0.2, 0.2, 1e30]]), 4 * np.eye(3)),
    "left-handed": Crystal(np.array([3, 7]), np.array([[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]]), np.diag([4.0, 4, -5])),
    "sites on each other": Crystal(np.array([7] * 30), np.zeros((30, 3)), 3 * np.eye(3)),
    "no atoms": Crystal(np.array([], dtype=np.int64), np.zeros((0, 3)), 4 * np.eye(3)),
    "a needle": Crystal(np.array([3]), np.zeros((1, 3)), np.diag([0.1, 0.1, 5000])),
}


def save(folder, crystals, requests=None, seed=7):
    folder.mkdir(exist_ok=True)
    save_crystals(folder, crystals, requests or [{} for _ in crystals], {"num_inference_steps": 5}, seed)
    return folder


SIZES = (5, 20, 1, 8)  # atoms of the crystals below
TINY_VAE = {"hidden_size": WIDTH, "num_layers": 2, "num_attention_heads": 2, "latent_channels": CHANNELS}


def crystals() -> list[Crystal]:
    """Of `SIZES` atoms in skew cells, anywhere in them."""
    generator = np.random.default_rng(0)
    return [
        Crystal(
            generator.integers(1, MAX_ATOMIC_NUMBER + 1, size),
            generator.random((size, 3)),
            cell_matrix(generator.uniform(3, 9, 3), generator.uniform(70, 110, 3)),
        )
        for size in SIZES
    ]


def batch_of(chosen: list[Crystal], size: int) -> dict[str, Tensor]:
    return crystal_batch(make_table(chosen, max_atoms=size), np.arange(len(chosen)))


def perfect(batch: dict[str, Tensor], radius: float = 1.0) -> CrystalPrediction:
    """The prediction that says what a batch is, sure of its elements."""
    logits = torch.full((*batch["atomic_numbers"].shape, MAX_ATOMIC_NUMBER + 1), -100.0)
    logits.scatter_(2, batch["atomic_numbers"].long()[..., None], 100.0)
    lengths = scaled_lengths(batch["lengths"], batch["attention_mask"].sum(dim=1))
    return CrystalPrediction(logits, radius * frac_vectors(batch["frac_coords"]), lengths, batch["angles"].deg2rad())
