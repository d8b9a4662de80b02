"""The codec of crystals: a frozen CrystalVAE between crystals and sets of latents."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.crystal.structure import MAX_ATOMIC_NUMBER, Crystal, cell_matrix, wrapped
from utils.crystal.vae.network import CrystalPrediction, CrystalVAE
from utils.errors import UserError
from utils.files import read_json
from utils.frozen import component_path, load_component

VAE_FLAG = "--pretrained_vae_model_name_or_path"


def is_crystal_vae(folder: Path) -> bool:
    """Whether a folder holds a CrystalVAE."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == CrystalVAE.__name__


def load_crystal_vae(name_or_path: str, flag: str = VAE_FLAG) -> CrystalVAE:
    """A CrystalVAE from its folder, or from a run's with a `vae/` in it, in evaluation mode. Raises UserError for
    anything else.
    """
    folder = Path(component_path(name_or_path, "vae"))
    if folder.is_dir() and not is_crystal_vae(folder):
        raise UserError(f"{flag}: {name_or_path} holds no CrystalVAE; give a run of train_crystal_vae.py")
    vae = load_component(CrystalVAE.from_pretrained, name_or_path, "vae", flag)
    return vae.float().eval().requires_grad_(False)


@torch.no_grad()
def reconstruct(vae: CrystalVAE, batch: dict[str, Tensor]) -> list[Crystal]:
    """Crystals through the mean of their posterior and back."""
    mask = batch["attention_mask"]
    return crystals_of(vae.decode(vae.encode(**batch).mean, mask), mask)


def crystals_of(
    prediction: CrystalPrediction, attention_mask: Tensor, counts: list[dict[int, int]] | None = None
) -> list[Crystal]:
    """The most probable crystals of a prediction, without padding.

    `counts`, atomic number -> atoms in the whole cell, clamps each crystal to a composition: among all ways to hand
    the wanted elements to the sites the most probable one is taken.
    """
    num_atoms = attention_mask.sum(dim=1)
    frac_coords = wrapped(prediction.frac_coords().double().cpu().numpy())
    lengths = (prediction.lengths * num_atoms[:, None] ** (1 / 3)).double().cpu().numpy()
    angles = (prediction.angles * (180 / math.pi)).double().cpu().numpy()
    lattices = cell_matrix(lengths, angles)
    log_probs = prediction.element_logits[..., 1:].log_softmax(dim=-1).double().cpu().numpy()  # (B, N, elements)
    crystals = []
    for row, count in enumerate(num_atoms.tolist()):
        if counts is None:
            atomic_numbers = log_probs[row, :count].argmax(axis=-1) + 1
        else:
            atomic_numbers = assigned(log_probs[row, :count], counts[row])
        crystals.append(Crystal(atomic_numbers, frac_coords[row, :count], lattices[row]))
    return crystals


def assigned(log_probs: np.ndarray, counts: dict[int, int]) -> np.ndarray:
    """The elements (n,) of n sites with the highest total of `log_probs` (n, elements) among all that have exactly
    these `counts`.
    """
    from scipy.optimize import linear_sum_assignment

    wanted = np.array([number for number, count in counts.items() for _ in range(count)])
    assert len(wanted) == len(log_probs)
    assert wanted.max() <= MAX_ATOMIC_NUMBER
    scores = np.nan_to_num(log_probs[:, wanted - 1], nan=-1e9, neginf=-1e9)
    sites, places = linear_sum_assignment(scores, maximize=True)
    atomic_numbers = np.empty(len(wanted), dtype=np.int64)
    atomic_numbers[sites] = wanted[places]
    return atomic_numbers
