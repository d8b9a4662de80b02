"""train_expression_vae.py: what is learnt and measured, runs that are killed, two processes, genes, and splits."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.support.cells.runs import (
    CACHE,
    CELLS,
    GENES,
    LATEST,
    LDM,
    NUM_TEST,
    NUM_TRAIN,
    NUM_VAL,
    TRAIN_VAE,
    VAE,
    cache_flags,
    split_of,
    table_of,
    without,
)
from tests.support.processes import (
    SignalAt,
    checkpoint_tensors,
    contents,
    differing,
    dropout_seeds,
    run,
    scalars,
    start,
)
from utils.draws import keys
from utils.expression.cache import VectorCache
from utils.expression.codec import load_expression_vae
from utils.expression.data.genes import choose_genes
from utils.expression.data.source import open_cells
from utils.expression.data.store import GrowingFile
from utils.expression.vae import training as vae_training
from utils.expression.vae.training import measure_latents
from utils.files import fsync_path, write_json
from utils.latents.posterior import kl_weight_at
from utils.training import checkpoints
from utils.training.setup import save_args
from utils.training.step_log import StepLog

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")


def test_the_autoencoder_trains(vae_run, data):
    """Every cell has its split, each type in each; the weight of the divergence rises; the best weights are exported."""
    curves = {name: scalars(vae_run, f"train/{name}") for name in ("loss", "nll", "kl")}
    for step in range(1, 7):
        bound = curves["nll"][step] + kl_weight_at(step - 1, 1.0, 2) * curves["kl"][step]
        assert curves["loss"][step] == pytest.approx(bound / GENES, rel=1e-5)
    assert list(curves["loss"]) == [1, 2, 3, 4, 5, 6]
    assert curves["nll"][6] < curves["nll"][1]
    for name in ("elbo", "kl", "active_channels", "cell_correlation", "gene_correlation"):
        assert list(scalars(vae_run, f"validation/{name}")) == [3, 6]
    best = json.loads((vae_run / "best.json").read_text())
    losses = scalars(vae_run, "validation/loss")
    assert best["loss"] == pytest.approx(min(losses.values()))
    assert losses[best["global_step"]] == pytest.approx(best["loss"])
    exported = load_file(vae_run / "vae" / "diffusion_pytorch_model.safetensors")
    assert differing(exported, load_file(vae_run / "best.safetensors")) == []
    split = pq.read_table(vae_run / "vae" / "cells.parquet").to_pydict()
    assert split["cell_id"] == list(data.adata.obs_names)
    assert split["split"] == split_of(data).tolist()
    for name, count in (("train", NUM_TRAIN), ("val", NUM_VAL), ("test", NUM_TEST)):
        assert split["split"].count(name) == count
        assert set(data.types[np.array(split["split"]) == name]) == set(data.types)
    assert load_expression_vae(str(vae_run)).config.genes == list(data.adata.var_names)


def test_the_dispersion_has_a_learning_rate_of_its_own(vae_run):
    """--dispersion_learning_rate is --learning_rate by default here; Adam's first steps are as long as that."""
    first, second = (load_file(vae_run / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    moved = (second["log_theta"] - first["log_theta"]).abs().median().item()
    assert 2e-3 < moved < 2.1e-2  # two steps of at most 1e-2


def test_statistics_of_the_training_cells(vae_run, data):
    vae = load_expression_vae(str(vae_run))
    table = table_of(data, vae, "train")
    assert len(table) == NUM_TRAIN
    posterior = vae.encode(torch.from_numpy(table.dense(slice(None))), torch.from_numpy(table.library_sizes))
    mean, variance = posterior.mean.double().numpy(), posterior.logvar.double().exp().numpy()
    logs = np.log(table.library_sizes)
    np.testing.assert_allclose(vae.config.latents_mean, [*mean.mean(axis=0), logs.mean()], rtol=1e-4, atol=1e-5)
    stds = [*np.sqrt(mean.var(axis=0) + variance.mean(axis=0)), logs.std()]
    np.testing.assert_allclose(vae.config.latents_std, stds, rtol=1e-4)
    about = json.loads((vae_run / "vae" / "latent_statistics.json").read_text())
    assert about["num_samples"] == NUM_TRAIN
    assert about["held_out"] == json.loads((vae_run / "best.json").read_text())


def test_killed_and_resumed_autoencoder_is_bit_identical(data, vae_run, tmp_path):
    """After a step, while a checkpoint is written, between the best weights and what is said of them, and when all
    that is left is to export. It has dropout."""
    flags = ["--dataset_name", data.few, *TRAIN_VAE, "--output_dir", tmp_path / "run", *LATEST]
    kills = [
        SignalAt(StepLog.step_done, 3),
        SignalAt(write_json, 1, within=vae_training),
        SignalAt(fsync_path, 2, within=checkpoints),
        SignalAt(measure_latents, 1),
    ]
    for fault in kills:
        running = start(VAE, *flags, fault=fault)
        assert running.wait_for_kill(), running.wait().stderr
        assert not (tmp_path / "run" / "vae").exists()
    assert "resuming from" in run(VAE, *flags).stderr
    for step in (4, 6):
        found = checkpoint_tensors(tmp_path / "run", step)
        assert len(found) > 60
        assert differing(found, checkpoint_tensors(vae_run, step)) == []
    ours, theirs = contents(tmp_path / "run"), contents(vae_run)
    same = [name for name in theirs if name.startswith(("vae/", "best.", "cells.parquet"))]
    assert len(same) == 7
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert scalars(tmp_path / "run", "train/loss") == scalars(vae_run, "train/loss")


@pytest.mark.parametrize("name", ["autoencoder", "joint denoiser"])
def test_each_batch_has_dropout_masks_of_its_own(data, joint_flags, tmp_path, name):
    """Those of its first sample, as all draws are."""
    flags = joint_flags if name == "joint denoiser" else ["--dataset_name", data.few, *TRAIN_VAE]
    flags = [*flags, "--train_batch_size", 4, "--gradient_accumulation_steps", 2, "--max_train_steps", 2, "--seed", 5]
    script = LDM if name == "joint denoiser" else VAE
    seeds = dropout_seeds(script, *flags, "--output_dir", tmp_path / "run", path=tmp_path / "seeds")
    # Before them, the seed of new weights, where noise is drawn to measure latents.
    assert seeds[-4:] == [int(key >> np.uint64(1)) for key in keys(5, "dropout", np.array([0, 4, 8, 12]))]


def test_two_processes_train_one_autoencoder(data, batched, tmp_path):
    """Without dropout: weights to a fraction of a step's learning rate."""
    flags = ["--dataset_name", data.few, *without(batched.flags, "--ema_decay"), "--no-use_ema"]
    flags += ["--max_train_steps", 4, "--adam_epsilon", 1e-3]
    for name, processes in (("one", 1), ("two", 2)):
        run(VAE, *flags, "--train_batch_size", 16 // processes, "--output_dir", tmp_path / name, processes=processes)
    assert json.loads((tmp_path / "two" / "checkpoint-4" / "manifest.json").read_text())["num_processes"] == 2
    one, two = (load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4
    first, second = (scalars(tmp_path / name, "train/nll") for name in ("one", "two"))
    assert list(second.values()) == pytest.approx(list(first.values()), rel=1e-5)


def test_genes_are_chosen_on_the_training_cells_and_files_hold_the_counts(data, tmp_path):
    """From a genome, with libraries of all of it, in bf16 and micro-steps; killed before there was a run."""
    flags = ["--dataset_name", data.whole, *TRAIN_VAE, "--num_genes", 30, "--library", "all"]
    flags += ["--likelihood", "gaussian"]
    flags += ["--low_memory", "--mixed_precision", "bf16", "--gradient_accumulation_steps", 2, "--max_train_steps", 4]
    flags += ["--output_dir", tmp_path / "run", *LATEST]
    assert start(VAE, *flags, fault=SignalAt(GrowingFile.finish, 2)).wait_for_kill()
    assert list((tmp_path / "run" / "counts" / "train").glob(".tmp-*"))
    assert start(VAE, *flags, fault=SignalAt(save_args, 1)).wait_for_kill()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["counts"]
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    assert "counts are taken from" in run(VAE, *flags).stderr
    vae, source = load_expression_vae(str(tmp_path / "run")), open_cells(str(data.whole))
    rows = np.flatnonzero(split_of(data) == "train")
    assert vae.config.genes == choose_genes(source, rows, 30)
    assert vae.to_shares.out_features == 31
    run(CACHE, *cache_flags(data.whole, tmp_path / "run"), "--split", "all", "--latents_dir", tmp_path / "cache")
    cache = VectorCache(tmp_path / "cache")
    everything = open_cells(str(data.whole)).counts.read(0, CELLS).sum(axis=1).A1
    np.testing.assert_array_equal(cache.table.data.column("library_size").to_numpy(), everything)
    log_library = cache.gather(np.arange(CELLS))["latents"][:, 0, -1]
    np.testing.assert_allclose(log_library.exp(), everything, rtol=1e-5)


def test_the_split_of_a_column(data, tmp_path):
    flags = [*without(TRAIN_VAE, "--label_column"), "--dataset_name", data.few, "--split_column", "split"]
    flags += ["--max_train_steps", 1, "--output_dir", tmp_path / "run"]
    assert "490 cells to train on, 70 to watch it, 140 kept for the test" in run(VAE, *flags).stderr
    split = pq.read_table(tmp_path / "run" / "vae" / "cells.parquet").column("split").to_pylist()
    assert split == data.adata.obs["split"].tolist()
