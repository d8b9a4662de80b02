"""Flags and data of tiny runs on crystals of four prototypes."""

import argparse
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from utils.crystal.pipeline import load_run
from utils.diffusion.guidance import Guidance

VAE, CACHE, LDM = "train_crystal_vae.py", "precompute_latents.py", "train_crystal_ldm.py"
LATEST = ["--resume_from_checkpoint", "latest"]
BASE = "--pretrained_model_name_or_path"
MAX_ATOMS, CHANNELS = 8, 4
# fmt: off
TRAIN_VAE = [
    "--max_atoms", MAX_ATOMS, "--latent_channels", CHANNELS, "--max_train_steps", 6, "--train_batch_size", 8,
    "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--checkpointing_steps", 2, "--logging_steps", 1,
    "--checkpoints_total_limit", 9, "--validation_steps", 3, "--num_validation_crystals", 4, "--num_match_processes", 1,
]
TRAIN_LDM = [
    "--max_train_steps", 8, "--train_batch_size", 8, "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--ema_decay", 0.8,
    "--checkpointing_steps", 4, "--logging_steps", 1, "--num_validation_crystals", 3, "--validation_inference_steps", 2,
]
CONDITIONS = ["--condition", "composition", "property:band_gap", "class:spacegroup"]
# fmt: on

# Sites with their element by number, the space group, and lattice constants that hold any two elements apart.
FACES = [(0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)]
PROTOTYPES = {
    "rocksalt": ([(0, *site) for site in FACES] + [(1, (x + 0.5) % 1, y, z) for x, y, z in FACES], 225, 4.5, 7.0),
    "CsCl": ([(0, 0, 0, 0), (1, 0.5, 0.5, 0.5)], 221, 3.0, 5.0),
    "perovskite": ([(0, 0, 0, 0), (1, 0.5, 0.5, 0.5), *((2, *site) for site in np.roll(FACES[1:], 0, 0))], 221, 3.6, 5.0),
}  # fmt: skip
NUM_CRYSTALS, NUM_VAL, NUM_TEST = 60, 8, 8
NUM_TRAIN = NUM_CRYSTALS - NUM_VAL - NUM_TEST
GAPS = range(0, 60, 7)  # rows without a band gap
INFINITE = 3  # the row whose band gap is infinite


def rows_of_crystals() -> dict[str, list]:
    generator = np.random.default_rng(0)
    rows: dict[str, list] = {
        name: [] for name in ("atomic_numbers", "frac_coords", "lattice", "spacegroup", "prototype")
    }
    for i in range(NUM_CRYSTALS):
        name = list(PROTOTYPES)[i % len(PROTOTYPES)]
        sites, number, low, high = PROTOTYPES[name]
        elements = generator.choice(np.arange(1, 90), 3, replace=False)
        rows["atomic_numbers"].append([int(elements[int(site[0])]) for site in sites])
        rows["frac_coords"].append([float(x) for site in sites for x in site[1:]])
        rows["lattice"].append((generator.uniform(low, high) * np.eye(3)).flatten().tolist())
        rows["spacegroup"].append(number)
        rows["prototype"].append(None if i % 10 == 4 else "" if i % 10 == 5 else name)
    rows["material_id"] = [f"mp-{i}" for i in range(NUM_CRYSTALS)]
    gaps = np.round(generator.gamma(2.0, 1.0, NUM_CRYSTALS), 3)
    rows["band_gap"] = [
        None if i in GAPS else float("inf") if i == INFINITE else float(gaps[i]) for i in range(NUM_CRYSTALS)
    ]
    rows["constant"] = [0.1] * NUM_CRYSTALS  # the std of which is not zero in floating point
    rows["nothing"] = [None] * NUM_CRYSTALS
    rows["positions"] = [float(i) for i in range(NUM_CRYSTALS)]
    rows["split"] = ["train"] * NUM_TRAIN + ["val"] * NUM_VAL + ["test"] * NUM_TEST
    return rows


def sampled(folder, values, guidance_scale=1.0):
    pipeline = load_run(folder)
    num_atoms = torch.tensor([5, 8])
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    guidance = Guidance(guidance_scale, num_inference_steps=3)
    latents = pipeline.latents(num_atoms, values, guidance, generator=generators)
    found = pipeline.decode(latents, num_atoms)
    assert [len(crystal.atomic_numbers) for crystal in found] == [5, 8]
    assert all(np.isfinite(crystal.frac_coords).all() and np.isfinite(crystal.lattice).all() for crystal in found)
    return latents


def encoded(vae, table, frac_coords):
    """The posterior of crystals of one size, without padding."""
    count = int(table.num_atoms[0])
    with torch.no_grad():
        return vae.encode(
            torch.from_numpy(table.atomic_numbers[:, :count]),
            frac_coords[:, :count],
            torch.from_numpy(table.lengths),
            torch.from_numpy(table.angles),
            torch.ones(len(table), count, dtype=torch.bool),
        )


def cache_args(dataset, vae, **settings):
    """What precompute_latents.py parses."""
    defaults = {
        "dataset_name": str(dataset), "dataset_split": "train", "max_atoms": MAX_ATOMS, "max_samples": 10, "seed": 0,
        "max_skipped_fraction": 0.05, "pretrained_vae_model_name_or_path": str(vae), "num_translations": 1,
        "encode_batch_size": 4, "rows_per_shard": 100,
    }  # fmt: skip
    return argparse.Namespace(**defaults | settings)


def other_vae(vae_run, folder):
    """The same autoencoder but for one number."""
    shutil.copytree(vae_run / "vae", folder / "vae")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["to_moments.bias"][0] += 0.01
    save_file(weights, file, metadata={"format": "pt"})
    return folder
