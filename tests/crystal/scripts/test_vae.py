"""train_crystal_vae.py: what is learnt and measured, runs that are killed, two processes, and flags that are refused."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.support.crystals.runs import LATEST, MAX_ATOMS, NUM_CRYSTALS, NUM_TRAIN, TRAIN_VAE, VAE, encoded
from tests.support.processes import SignalAt, checkpoint_tensors, contents, differing, refused, run, scalars, start
from utils.crystal.codec import load_crystal_vae
from utils.crystal.data.table import load_crystals
from utils.crystal.vae.training import measure_latents
from utils.files import fsync_path
from utils.training import checkpoints
from utils.training.step_log import StepLog


def test_the_autoencoder_trains(vae_run, dataset):
    for name in ("loss", "element", "coordinate", "length", "angle", "kl"):
        assert list(scalars(vae_run, f"train/{name}")) == [1, 2, 3, 4, 5, 6]
    losses = {
        name: scalars(vae_run, f"train/{name}")[1] for name in ("element", "coordinate", "length", "angle", "kl")
    }
    expected = losses["element"] + 10 * losses["coordinate"] + losses["length"] + 10 * losses["angle"]
    assert scalars(vae_run, "train/loss")[1] == pytest.approx(expected + 1e-5 * losses["kl"], rel=1e-5)
    losses = list(scalars(vae_run, "train/element").values())
    assert losses[0] > losses[-1]
    for name in ("match_rate", "kl", "active_channels"):
        assert list(scalars(vae_run, f"validation/{name}")) == [3, 6]


def test_the_latents_of_the_training_set_are_measured(vae_run, dataset):
    """Mean and std per channel over all real atoms, of sampled latents."""
    vae = load_crystal_vae(str(vae_run))
    table = load_crystals(str(dataset), "train", MAX_ATOMS)
    assert len(table) == NUM_TRAIN
    means, variances = [], []
    for row in range(len(table)):
        one = table.take(np.array([row]))
        posterior = encoded(vae, one, torch.from_numpy(one.frac_coords))
        means.append(posterior.mean[0, : table.num_atoms[row]])
        variances.append(posterior.logvar[0, : table.num_atoms[row]].exp())
    means, variances = torch.cat(means).double(), torch.cat(variances).double()
    np.testing.assert_allclose(vae.config.latents_mean, means.mean(dim=0), atol=1e-5)
    expected = (means.var(dim=0, correction=0) + variances.mean(dim=0)).sqrt()
    np.testing.assert_allclose(vae.config.latents_std, expected, rtol=1e-4)


def test_killed_and_resumed_autoencoder_is_bit_identical(dataset, vae_run, tmp_path):
    """After a step, while a checkpoint is written, after another step; and when all that is left is to export."""
    flags = ["--dataset_name", dataset, *TRAIN_VAE, "--output_dir", tmp_path / "run", *LATEST]
    kills = [
        SignalAt(StepLog.step_done, 3),
        SignalAt(fsync_path, 2, within=checkpoints),
        SignalAt(StepLog.step_done, 2),
        SignalAt(measure_latents, 1),
    ]
    for fault in kills:
        running = start(VAE, *flags, fault=fault)
        assert running.wait_for_kill(), running.wait().stderr
        assert not (tmp_path / "run" / "vae").exists()
    assert "resuming from" in run(VAE, *flags).stderr
    for step in (4, 6):
        found = checkpoint_tensors(tmp_path / "run", step)
        assert len(found) > 200
        assert differing(found, checkpoint_tensors(vae_run, step)) == []
    assert contents(tmp_path / "run" / "vae") == contents(vae_run / "vae")  # what was measured too
    assert scalars(tmp_path / "run", "train/loss") == scalars(vae_run, "train/loss")


def test_formulas_are_kept_out_without_a_split(dataset, tmp_path):
    """No formula is on both sides; Without translations, in two micro-steps and in bf16."""
    table = pq.read_table(dataset).drop_columns(["split"])
    pq.write_table(table, tmp_path / "all.parquet")
    flags = ["--dataset_name", tmp_path / "all.parquet", *TRAIN_VAE, "--max_train_steps", 1, "--no-use_ema"]
    flags += ["--no-random_translation", "--gradient_accumulation_steps", 2, "--mixed_precision", "bf16"]
    log = run(VAE, *flags, "--output_dir", tmp_path / "run").stderr
    kept_out = re.search(r"(\d+) crystals to train on, (\d+) kept out \(a tenth of the formulas\)", log)
    assert sum(map(int, kept_out.groups())) == NUM_CRYSTALS
    assert 0 < int(kept_out[2]) < NUM_CRYSTALS / 3


def test_two_processes_train_one_autoencoder(dataset, vae_run, tmp_path):
    """Weights to a fiftieth of one step's learning rate, as for images."""
    flags = ["--dataset_name", dataset, *TRAIN_VAE, "--max_train_steps", 4, "--adam_epsilon", 1e-3, "--no-use_ema"]
    run(VAE, *flags, "--output_dir", tmp_path / "one")
    run(VAE, *flags, "--train_batch_size", 4, "--output_dir", tmp_path / "two", processes=2)
    one, two = (load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("one", "two"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 2e-5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset_name", "nowhere/at/all.parquet"], ["--dataset_name", "nowhere/at/all.parquet does not exist"]),
        (["--max_atoms", 1], ["--dataset_name", "cannot be used", "--max_atoms"]),
        (["--validation_dataset_name", "nowhere/at/all.parquet"], ["--validation_dataset_name", "does not exist"]),
        (["--validation_split", "other"], ["no rows of split other"]),
        (["--validation_dataset_name", "x", "--validation_split", "test"], ["both say what is kept out"]),
        (["--vae_size", "huge"], ["--vae_size", "huge"]),
        (["--latent_channels", 0], ["--latent_channels"]),
        (["--no-use_ema", "--ema_decay", 0.9], ["--ema_decay with --no-use_ema"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)  # fmt: skip
def test_an_autoencoder_is_refused(dataset, tmp_path, flags, words):
    result = run(VAE, "--dataset_name", dataset, *TRAIN_VAE, *flags, "--output_dir", tmp_path / "run", check=False)
    message = refused(result)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()
