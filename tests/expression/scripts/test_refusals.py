"""The scripts of cells as a user runs them: autoencoder, latent cache, denoiser, both together, adapters, samples; killed,
divided, refused.
"""

import importlib
import json
import math
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare

import sample as sample_script
from tests.support.models import DIT_CONFIG
from tests.support.processes import (
    SignalAt,
    checkpoint_tensors,
    contents,
    differing,
    dropout_seeds,
    refused,
    run,
    scalars,
    snapshot,
    start,
)
from utils.diffusion.denoiser import ConditionalDenoiser, JointDenoiser
from utils.draws import SampleDraws, StreamOrder, keys
from utils.errors import UserError
from utils.expression.cache import JointCache, VectorCache, encode_jointly
from utils.expression.codec import load_expression_vae
from utils.expression.data.genes import choose_genes
from utils.expression.data.source import open_cells
from utils.expression.data.table import read_table, stratified_split
from utils.expression.pipeline import load_columns, load_expression_run
from utils.latents.columns import category_name
from utils.latents.posterior import kl_weight_at
from utils.latents.spec import LatentSpec
from utils.models.dit import DiT
from utils.models.vector_mlp import VectorMLP
from utils.training.lora import is_adapted

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")

from tests.support.pbmc import write_pbmc68k  # noqa: E402
from utils.expression.data.h5ad import write_h5ad  # noqa: E402

VAE, CACHE, LDM, SAMPLE = "train_expression_vae.py", "precompute_latents.py", "train_expression_ldm.py", "sample.py"
LATEST = ["--resume_from_checkpoint", "latest"]
BASE = "--pretrained_model_name_or_path"
GENES, CHANNELS = 40, 4
CELLS, NUM_TRAIN, NUM_VAL, NUM_TEST = 700, 490, 70, 140
# fmt: off
TRAIN_VAE = [
    "--label_column", "cell_type", "--latent_channels", CHANNELS, "--hidden_size", 24, "--max_train_steps", 6,
    "--train_batch_size", 16, "--lr_warmup_steps", 0, "--learning_rate", 1e-2, "--ema_decay", 0.8, "--kl_warmup_steps", 2,
    "--checkpointing_steps", 2, "--checkpoints_total_limit", 9, "--logging_steps", 1, "--validation_steps", 3,
]
TRAIN_LDM = [
    "--max_train_steps", 8, "--train_batch_size", 16, "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--ema_decay", 0.8,
    "--checkpointing_steps", 4, "--logging_steps", 1, "--num_validation_cells", 20, "--validation_inference_steps", 2,
]
# fmt: on
CONDITIONS = ["--condition", "class:cell_type", "property:age"]
MLP_CONFIG = {"num_layers": 2, "hidden_size": 32}


# ---- cells, and runs that many tests share


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """700 blood cells: `whole` (765 genes) and `few` (the 40 with the most counts) as files, and `few` in memory."""
    folder = tmp_path_factory.mktemp("cells")
    whole = write_pbmc68k(folder / "whole.h5ad")
    totals = np.asarray(whole.X.sum(axis=0)).ravel()
    few = whole[:, np.sort(np.argsort(-totals)[:GENES])].copy()
    place = np.arange(CELLS)
    types = few.obs["cell_type"].astype(str).to_numpy()
    few.obs["donor"] = np.where(types == types[0], "D3", np.array(["D1", "D2", "D3"])[place % 3])
    few.obs["lane"] = place % 2 + 1
    few.obs["age"] = np.where(place % 10 == 4, np.nan, 20.0 + place % 60)
    few.obs["split"] = np.array(["train"] * 7 + ["val"] + ["test"] * 2)[place % 10]
    few.obs["no_val"] = np.where(place % 10 < 8, "train", "test")
    few.obs["fold"] = place % 3
    few.obs["flat"] = "the same"
    few.obs["partial"] = np.where(place == 5, None, types)
    few.obs["rare"] = np.where(place < 4, "rare", "common")
    few.obs["n_counts"] = np.asarray(few.X.sum(axis=1)).ravel()
    few.obs["library_size"] = place * 1.0
    write_h5ad(few, folder / "few.h5ad")
    return SimpleNamespace(folder=folder, whole=folder / "whole.h5ad", few=folder / "few.h5ad", adata=few, types=types)


@pytest.fixture(scope="session")
def vae_run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "run"
    run(VAE, "--dataset_name", data.few, *TRAIN_VAE, "--output_dir", folder)
    return folder


def cache_flags(file, vae) -> list:
    return ["--modality", "expression", "--dataset_name", file, "--pretrained_vae_model_name_or_path", vae,
            "--rows_per_shard", 100, "--encode_batch_size", 64]  # fmt: skip


def make_caches(folder: Path, file: Path, vae: Path) -> dict[str, Path]:
    for split in ("train", "val"):
        run(CACHE, *cache_flags(file, vae), "--split", split, "--latents_dir", folder / split)
    return {split: folder / split for split in ("train", "val")}


@pytest.fixture(scope="session")
def caches(data, vae_run, tmp_path_factory):
    return make_caches(tmp_path_factory.mktemp("caches"), data.few, vae_run)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Flags of a tiny denoiser of each architecture."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in (("mlp", MLP_CONFIG), ("dit", DIT_CONFIG)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    return {name: ["--architecture", name, "--model_config", folder / f"{name}.json"] for name in ("mlp", "dit")}


@pytest.fixture(scope="session")
def ldm_flags(caches, models):
    """Without --output_dir."""
    return [*models["mlp"], "--latents_dir", caches["train"], *TRAIN_LDM]


@pytest.fixture(scope="session")
def evaluated(caches):
    return ["--eval_steps", 4, "--validation_latents_dir", caches["val"]]


@pytest.fixture(scope="session")
def conditional(ldm_flags, evaluated, tmp_path_factory):
    """A finished run of v-prediction with two conditions; and what it said."""
    folder = tmp_path_factory.mktemp("conditional") / "run"
    return folder, run(LDM, *ldm_flags, *CONDITIONS, *evaluated, "--output_dir", folder).stderr


@pytest.fixture(scope="session")
def unconditional(ldm_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unconditional") / "run"
    run(LDM, *ldm_flags, "--prediction_type", "flow", "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def joint_flags(data, ldm_flags, evaluated):
    """The autoencoder learns as fast as the denoiser, for it to be seen in a few steps."""
    flags = ["--joint_vae", "--dataset_name", data.few, "--vae_learning_rate", 1e-3]
    return [*ldm_flags, "--condition", "class:cell_type", *evaluated, *flags]


@pytest.fixture(scope="session")
def joint(joint_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint") / "run"
    return folder, run(LDM, *joint_flags, "--output_dir", folder).stderr


@pytest.fixture(scope="session")
def batched(data, tmp_path_factory):
    """An autoencoder that knows batches, loses counts, and has no dropout; and its caches."""
    folder = tmp_path_factory.mktemp("batched")
    flags = [*TRAIN_VAE, "--batch_column", "donor", "--likelihood", "zinb", "--dropout", 0]
    run(VAE, "--dataset_name", data.few, *flags, "--output_dir", folder / "vae")
    return SimpleNamespace(vae=folder / "vae", caches=make_caches(folder, data.few, folder / "vae"), flags=flags)


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """A function that runs sample.py in this process and returns what it left behind."""
    numbers = iter(range(1000))

    def call(model: Path, *flags, steps: int = 3):
        out = tmp_path / f"sampled{next(numbers)}"
        words = ["--model", model, "--num_inference_steps", steps, "--device", "cpu", "--output_dir", out, *flags]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        sample_script.main(sample_script.parse_args())
        return anndata.read_h5ad(out / "cells.h5ad")

    return call


def without(flags, *names):
    """Flags without some, and their values."""
    return [each for i, each in enumerate(flags) if each not in names and flags[i - 1] not in names]


def table_of(data, vae, split: str):
    """The cells of a split, as the autoencoder saw them."""
    source, config = open_cells(str(data.few)), vae.config
    rows = np.flatnonzero(split_of(data) == split)
    return read_table(source, rows, config.genes, config.library)


def split_of(data) -> np.ndarray:
    return stratified_split(data.types, CELLS, 0.1, 0.2, 0)


# ---- the autoencoder


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
        ("utils.training.step_log:StepLog.step_done", 3),
        ("utils.expression.vae.training:write_json", 1),
        ("utils.training.checkpoints:fsync_path", 2),
        ("utils.expression.vae.training:measure_latents", 1),
    ]
    for function, count in kills:
        running = start(VAE, *flags, fault=SignalAt(function, count))
        assert running.wait_for_kill(), running.wait().stderr
        assert not (tmp_path / "run" / "vae").exists()
    assert "going on from" in run(VAE, *flags).stderr
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
    assert start(VAE, *flags, fault=SignalAt("utils.expression.data.store:GrowingFile.finish", 2)).wait_for_kill()
    assert list((tmp_path / "run" / "counts" / "train").glob(".tmp-*"))
    assert start(VAE, *flags, fault=SignalAt("utils.training.setup:save_args", 1)).wait_for_kill()
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


# ---- the cache


@pytest.mark.parametrize("kind", ["plain", "batches"])
def test_the_cache_holds_what_the_autoencoder_gives(data, caches, vae_run, batched, kind):
    """Each row is the cell that it says it is: library, columns, and the moments of its counts."""
    folders, vae = (caches, vae_run) if kind == "plain" else (batched.caches, batched.vae)
    vae = load_expression_vae(str(vae))
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        cache = VectorCache(folders[split])
        obs = data.adata.obs.loc[cache.cell_ids]
        assert cache.cell_ids.tolist() == data.adata.obs_names[split_of(data) == split].tolist()
        assert len(cache) == count
        assert len(list((folders[split] / "latents").glob("*.arrow"))) == -(-count // 100)
        assert cache.column("cell_type", "class").tolist() == obs["cell_type"].tolist()
        np.testing.assert_array_equal(cache.column("age", "property"), obs["age"])
        counts = torch.from_numpy(data.adata[cache.cell_ids].X.toarray())
        libraries = counts.sum(dim=1)
        np.testing.assert_array_equal(cache.table.data.column("library_size").to_numpy(), libraries)
        donors = torch.tensor([["D1", "D2", "D3"].index(donor) for donor in obs["donor"]])
        moments = cache.gather(np.arange(count))["latents"]  # (R, 2, D + 1)
        for row in range(0, count, 7):
            part = slice(row, row + 1)
            posterior = vae.encode(counts[part], libraries[part], donors[part] if kind == "batches" else None)
            torch.testing.assert_close(moments[row, 0, :-1], posterior.mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(moments[row, 1, :-1], posterior.std[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments[:, 0, -1].exp(), libraries, rtol=1e-5, atol=0)
        assert not moments[:, 1, -1].any()


def test_normalisations_of_the_cache(caches, vae_run):
    """That of the autoencoder is the measured one, for it was measured on the same cells."""
    vae, measured = (VectorCache(caches["train"], name).normalisation for name in ("vae", "measured"))
    config = load_expression_vae(str(vae_run)).config
    assert list(vae.mean) == torch.tensor(config.latents_mean).tolist()
    np.testing.assert_allclose(vae.mean, measured.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(vae.std, measured.std, rtol=1e-4)
    cache = VectorCache(caches["train"])
    latents = cache.normalise(cache.gather(np.arange(NUM_TRAIN)), SampleDraws(0, torch.arange(NUM_TRAIN)))
    assert latents.mean(dim=0).abs().max() < 0.2
    assert (latents.std(dim=0) - 1).abs().max() < 0.15


def test_a_cache_killed_and_started_again(data, vae_run, caches, tmp_path):
    flags = [*cache_flags(data.few, vae_run), "--latents_dir", tmp_path / "cache"]
    assert start(CACHE, *flags, fault=SignalAt("utils.files:replace_durably", 1)).wait_for_kill()  # with no plan.json
    assert start(CACHE, *flags, fault=SignalAt("utils.expression.precompute:encode_cells", 4)).wait_for_kill()
    assert not (tmp_path / "cache" / "latent_spec.json").exists()
    assert "dataset = " in refused(run(CACHE, *flags, "--split", "val", check=False))
    run(CACHE, *flags)
    assert contents(tmp_path / "cache") == contents(caches["train"])
    (tmp_path / "cache" / "plan.json").write_text("{}")  # killed when all but its deletion was done
    run(CACHE, *flags)
    assert contents(tmp_path / "cache") == contents(caches["train"])
    before = snapshot(tmp_path / "cache")
    run(CACHE, *flags)  # which finds it
    assert snapshot(tmp_path / "cache") == before
    assert "dataset = " in refused(run(CACHE, *flags, "--split", "val", check=False))


# ---- the denoiser


def test_a_conditional_run(conditional, caches):
    folder, log = conditional
    missing = int(np.isnan(VectorCache(caches["train"]).column("age", "property")).sum())
    assert f"age is not known of {missing} of {NUM_TRAIN} cells, which train without it" in log
    assert "two sets of 20 real cells lie" in log
    losses = scalars(folder, "train/loss")
    assert list(losses) == list(range(1, 9))
    assert list(scalars(folder, "validation/loss")) == [4, 8]
    assert scalars(folder, "validation/latent_distance")[8] > 0
    assert (folder / "samples" / "step-0000008.png").is_file()
    average = load_file(folder / "checkpoint-8" / "ema.safetensors")
    exported = load_expression_run(folder).denoiser.state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in average.items())
    columns = load_columns(folder / "training_columns.parquet")
    assert Counter(columns["cell_type"]) == Counter(VectorCache(caches["train"]).column("cell_type", "class"))
    for each in (folder, folder / "best", folder / "checkpoint-4"):
        pipeline = load_expression_run(each)
        assert list(pipeline.columns) == ["age", "cell_type"]
        assert len(pipeline.columns["cell_type"]["names"]) == 10
    assert (folder / "vae" / "cells.parquet").is_file()


def test_the_first_loss(unconditional, caches):
    """A new model predicts zero: the mean square of noise minus latents."""
    cache, positions = VectorCache(caches["train"]), np.arange(16)
    draws = SampleDraws(0, torch.from_numpy(positions))
    latents = cache.normalise(cache.gather(StreamOrder(0, NUM_TRAIN).rows(positions)), draws)
    expected = (draws.normal("noise", latents.shape) - latents).square().mean().item()
    assert scalars(unconditional, "train/loss")[1] == pytest.approx(expected, rel=1e-5)


def test_killed_and_resumed_denoiser_is_bit_identical(ldm_flags, evaluated, conditional, tmp_path):
    """After a step, while a checkpoint is written, while the best is kept, and before the export."""
    expected, _ = conditional
    flags = [*ldm_flags, *CONDITIONS, *evaluated, "--output_dir", tmp_path / "run", *LATEST]
    check_killed(flags, expected, tmp_path / "run", seed=0)


def check_killed(flags, expected, folder, seed):
    chance = random.Random(seed)
    kills = [
        ("utils.training.step_log:StepLog.step_done", chance.randint(1, 3)),
        ("utils.training.checkpoints:fsync_path", 2),
        ("utils.training.evaluator:Evaluator._keep", 1),
        ("utils.training.step_log:StepLog.step_done", 6),
        ("utils.expression.validation:CellSamples.save", 1),
    ]
    for function, count in kills:
        running = start(LDM, *flags, fault=SignalAt(function, count))
        assert running.wait_for_kill(), (function, running.wait().stderr)
        assert not (folder / "model_index.json").exists()
    assert "going on from" in run(LDM, *flags).stderr
    found = checkpoint_tensors(folder, 8)
    assert len(found) > 50
    assert differing(found, checkpoint_tensors(expected, 8)) == []
    ours, theirs = contents(folder), contents(expected)
    ends = (".safetensors", ".bin", ".json", ".parquet", "README.md")
    same = [name for name in theirs if name.endswith(ends) and not name.endswith(("elapsed.json", "manifest.json"))]
    assert len(same) >= 25
    assert [name for name in same if ours.get(name) != theirs[name]] == []
    for tag in ("train/loss", "validation/loss"):
        assert scalars(folder, tag) == scalars(expected, tag)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_other_objectives(ldm_flags, models, tmp_path, kind, sample):
    """Unconditional, and with rows held out; of a transformer, with snapshots, in bf16."""
    extra = {"epsilon": [*models["dit"], "--snr_gamma", 5, "--ema_sigma_rels", 0.1, "--ema_snapshot_steps", 1,
                         "--mixed_precision", "bf16", "--gradient_checkpointing"],
             "sample": ["--latent_normalisation", "measured", "--num_validation_cells", 1]}[kind]  # fmt: skip
    flags = [*ldm_flags, "--max_train_steps", 2, "--eval_steps", 1, "--num_validation_samples", 6, *extra]
    log = run(LDM, *flags, "--prediction_type", kind, "--output_dir", tmp_path / "run").stderr
    assert f"{NUM_TRAIN - 6} samples in the data" in log
    pipeline = load_expression_run(tmp_path / "run")
    assert not pipeline.columns
    assert isinstance(pipeline.denoiser.model, DiT if kind == "epsilon" else VectorMLP)
    cells = sample(tmp_path / "run", "--num_samples", 5, "--mixed_precision", "bf16" if kind == "epsilon" else "no")
    assert cells.shape == (5, GENES)
    if kind == "epsilon":
        averaged = sample(tmp_path / "run", "--num_samples", 5, "--ema_sigma_rel", 0.1)
        assert averaged.uns["latent_diffusion"]["ema_sigma_rel"] == 0.1


def encoder_tensors(folder, step):
    """Weights of the encoders of a run's conditions."""
    prefix = "model.safetensors/conditions."
    found = checkpoint_tensors(folder, step)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def test_what_is_dropped_is_not_learnt(ldm_flags, conditional, tmp_path):
    """With all hidden the nulls alone move; by default everything does."""
    first, last = (encoder_tensors(conditional[0], step) for step in (4, 8))
    assert len(differing(first, last)) == len(first)
    flags = [*ldm_flags, *CONDITIONS, "--cond_drop_prob", 1, "--adam_weight_decay", 0]
    run(LDM, *flags, "--output_dir", tmp_path / "run")
    moved = differing(*(encoder_tensors(tmp_path / "run", step) for step in (4, 8)))
    assert sorted(moved) == ["encoders.0.null_embedding", "encoders.1.null_embedding"]


# ---- samples


def test_as_a_user_samples(conditional, data, tmp_path):
    """In a process of its own: whole counts of the right genes, labels as asked, how it was made; scanpy opens it."""
    folder, _ = conditional
    words = ["--model", folder, "--class_label", "CD34+", "Dendritic", "--property", "age=33.5", "--num_samples", 6]
    words += ["--num_inference_steps", 4, "--seed", 7, "--output_dir", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".tmp-1-cells.h5ad").write_bytes(b"half of")  # of a killed process
    assert "12 cells of 40 genes in" in run(SAMPLE, *words).stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cells.h5ad"]
    cells = sc.read_h5ad(tmp_path / "out" / "cells.h5ad")
    assert cells.shape == (12, GENES)
    assert list(cells.var_names) == list(data.adata.var_names)
    counts = cells.X.toarray()
    assert (counts == np.rint(counts)).all()
    assert counts.min() == 0
    assert cells.obs["cell_type"].tolist() == ["CD34+"] * 6 + ["Dendritic"] * 6
    assert cells.obs["age"].tolist() == [33.5] * 12
    assert cells.obs["seed"].tolist() == list(range(7, 19))
    np.testing.assert_array_equal(cells.obs["n_counts"], counts.sum(axis=1))
    assert (np.abs(np.log(cells.obs["n_counts"] / cells.obs["library_size"])) < 1).all()
    made = cells.uns["latent_diffusion"]
    assert made["model"] == str(folder)
    assert (made["guidance_scale"], made["num_inference_steps"], made["seed"]) == (1.0, 4, 7)
    assert made["scheduler"] == "DDIMScheduler"
    sc.pp.normalize_total(cells)
    sc.pp.log1p(cells)
    sc.pp.pca(cells, n_comps=3)
    open_cells(str(tmp_path / "out" / "cells.h5ad"))  # as data it is sound too
    assert "is not empty" in refused(run(SAMPLE, *words, check=False))


def test_labels_that_are_not_asked_come_as_in_training(sample, conditional, data):
    cells = sample(conditional[0], "--num_samples", 900, steps=1)
    expected = Counter(data.types[split_of(data) == "train"])
    found = Counter(cells.obs["cell_type"])
    common = [name for name, times in expected.items() if times > 10]
    rest = [sum(times for name, times in counts.items() if name not in common) for counts in (found, expected)]
    seen = [*(found[name] for name in common), rest[0]]
    wanted = 900 / NUM_TRAIN * np.array([*(expected[name] for name in common), rest[1]])
    assert chisquare(seen, wanted).pvalue > 1e-3
    assert 0.05 < cells.obs["age"].isna().mean() < 0.15  # as it is missing in training


def test_a_sample_is_the_same_in_any_batch(sample, conditional):
    """Libraries to rounding, and counts but for a draw that this tips."""
    flags = ("--num_samples", 20, "--guidance_scale", 2)
    whole = sample(conditional[0], *flags)
    for size in (1, 7):
        part = sample(conditional[0], *flags, "--batch_size", size)
        np.testing.assert_allclose(part.obs["library_size"], whole.obs["library_size"], rtol=1e-4)
        assert (part.X != whole.X).sum() <= 2
        assert part.obs["cell_type"].tolist() == whole.obs["cell_type"].tolist()
    later = sample(conditional[0], "--num_samples", 5, "--guidance_scale", 2, "--seed", 15)
    assert (later.X != whole[15:].X).sum() <= 1


def test_each_condition_reaches_the_model(sample, conditional):
    """Alone and together, guided or not; a value is told as it is."""
    folder, asked = conditional[0], ["--class_label", "CD34+"]
    found = [
        sample(folder, "--num_samples", 3, *flags).obs["library_size"].to_numpy()
        for flags in (asked, ["--property", "age=20"], [*asked, "--property", "age=20"], ["--property", "age=79"],
                      [*asked, "--guidance_scale", 3])
    ]  # fmt: skip
    for i, one in enumerate(found):
        assert all((one != other).all() for other in found[:i])
    same = sample(folder, "--num_samples", 3, "--property", "cell_type=CD34+").obs["library_size"]
    np.testing.assert_array_equal(same, found[0])


def test_a_checkpoint_is_sampled(sample, conditional):
    """With the averaged weights of its step; the last is the finished run."""
    folder = conditional[0]
    early, last, whole = (
        sample(each, "--num_samples", 4) for each in (folder / "checkpoint-4", folder / "checkpoint-8", folder)
    )
    assert (last.X != whole.X).nnz == 0
    assert (early.obs["library_size"] != whole.obs["library_size"]).all()


def test_a_weaker_model_guides(sample, conditional):
    """At scale 2, if nothing else is said."""
    folder = conditional[0]
    plain = sample(folder, "--num_samples", 4)
    guided = sample(folder, "--num_samples", 4, "--guide_model", folder / "checkpoint-4")
    assert guided.uns["latent_diffusion"]["guidance_scale"] == 2
    assert guided.uns["latent_diffusion"]["guide_model"] == str(folder / "checkpoint-4")
    assert (guided.obs["library_size"] != plain.obs["library_size"]).all()


def test_columns_that_have_names_of_ours(sample, ldm_flags, tmp_path):
    """Of a condition the obs of samples hold what was asked; what was drawn stands beside it."""
    flags = [*ldm_flags, "--condition", "property:n_counts", "property:library_size", "--max_train_steps", 1]
    run(LDM, *flags, "--output_dir", tmp_path / "run")
    cells = sample(tmp_path / "run", "--num_samples", 3, "--property", "n_counts=77")
    assert cells.obs["n_counts"].tolist() == [77.0] * 3
    np.testing.assert_array_equal(cells.obs["generated_n_counts"], np.asarray(cells.X.sum(axis=1)).ravel())
    assert (cells.obs["library_size"] > 0).all()
    assert sorted(sample(tmp_path / "run", "--num_samples", 3).obs) == [
        *("generated_library_size", "generated_n_counts", "library_size", "n_counts", "seed")
    ]


# ---- batches


@pytest.fixture(scope="session")
def joint_batched(data, batched, models, tmp_path_factory):
    """Joint runs of an autoencoder with batches, which are a condition too: by one process and by two."""
    folder = tmp_path_factory.mktemp("joint_batched")
    flags = [*models["mlp"], "--latents_dir", batched.caches["train"], *TRAIN_LDM, "--adam_epsilon", 1e-4]
    flags += ["--joint_vae", "--dataset_name", data.few, "--vae_learning_rate", 1e-3, "--joint_latents", "live"]
    flags += ["--condition", "class:donor", "--eval_steps", 4, "--validation_latents_dir", batched.caches["val"]]
    for name, processes in (("one", 1), ("two", 2)):
        run(LDM, *flags, "--train_batch_size", 16 // processes, "--output_dir", folder / name, processes=processes)
    return folder


def test_two_processes_train_both_models_as_one(joint_batched):
    """The same losses, and weights to 1e-5 of the largest of each tensor; as for images."""
    one, two = (load_file(joint_batched / name / "checkpoint-8" / "model.safetensors") for name in ("one", "two"))
    manifest = json.loads((joint_batched / "two" / "checkpoint-8" / "manifest.json").read_text())
    assert manifest["num_processes"] == 2
    for tag in ("train/loss", "train/nll", "train/kl", "train/diffusion_loss", "validation/loss"):
        first, second = (scalars(joint_batched / name, tag) for name in ("one", "two"))
        assert list(second.values()) == pytest.approx(list(first.values()), rel=1e-5)
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 1e-5 * tensor.abs().max().clamp(min=1e-3), name
    assert any(name.startswith("vae.") for name in one)


def test_cells_of_a_batch(sample, joint_batched, batched, data):
    """The decoder is told the batch that is asked for; without, those of the training cells."""
    pipeline = load_expression_run(joint_batched / "one")
    assert pipeline.vae.config.batch_names == ["D1", "D2", "D3"]
    found = sample(joint_batched / "one", "--class_label", "D1", "D3", "--num_samples", 4)
    assert found.obs["donor"].tolist() == ["D1"] * 4 + ["D3"] * 4
    cells = sample(joint_batched / "one", "--num_samples", 300, steps=1)
    expected = Counter(data.adata.obs["donor"][split_of(data) == "train"])
    seen = Counter(cells.obs["donor"])
    wanted = [300 / NUM_TRAIN * times for times in expected.values()]
    assert chisquare([seen[name] for name in expected], wanted).pvalue > 1e-3


def test_batches_are_drawn_where_they_are_no_condition(sample, batched, models, data, tmp_path):
    """For the decoder, from the training cells of the same type."""
    flags = [*models["mlp"], "--latents_dir", batched.caches["train"], *TRAIN_LDM, "--max_train_steps", 1]
    run(LDM, *flags, "--condition", "class:cell_type", "--output_dir", tmp_path / "run")
    columns = load_columns(tmp_path / "run" / "training_columns.parquet")
    assert sorted(columns) == ["cell_type", "donor"]
    train = split_of(data) == "train"
    assert columns["donor"].tolist() == data.adata.obs["donor"][train].tolist()
    assert sample(tmp_path / "run", "--class_label", data.types[0], "--num_samples", 5).shape == (5, GENES)
    assert "donor" not in sample(tmp_path / "run", "--num_samples", 5).obs


# ---- both together


def vae_tensors(folder) -> dict:
    return load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")


def test_a_joint_run(joint, vae_run, caches, data):
    """Both models move, each evaluation and checkpoint has its own autoencoder, latents keep the normalisation that
    was trained in, and those of the new autoencoder are measured anew."""
    folder, _ = joint
    curves = {name: scalars(folder, f"train/{name}") for name in ("loss", "diffusion_loss", "nll", "kl")}
    for step in range(1, 9):
        bound = (curves["nll"][step] + curves["kl"][step]) / GENES
        assert curves["loss"][step] == pytest.approx(curves["diffusion_loss"][step] + bound, rel=1e-5)
    before, after = vae_tensors(vae_run), vae_tensors(folder)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert all(name.startswith("log_library") for name in still)  # a buffer
    for step in (4, 8):
        stored = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        assert {name.removeprefix("vae.") for name in stored if name.startswith("vae.")} == set(before)
    average = load_file(folder / "checkpoint-8" / "ema.safetensors")
    for name, tensor in after.items():
        assert f"vae.{name}" not in average or torch.equal(average[f"vae.{name}"], tensor)
    assert "vae.log_theta" in average
    trained_in = json.loads((folder / "latent_normalisation.json").read_text())
    cache = VectorCache(caches["train"])
    assert trained_in == {"mean": list(cache.normalisation.mean), "std": list(cache.normalisation.std)}
    vae = load_expression_vae(str(folder))
    table = table_of(data, vae, "train")
    mean = vae.encode(torch.from_numpy(table.dense(slice(None))), torch.from_numpy(table.library_sizes)).mean
    np.testing.assert_allclose(vae.config.latents_mean[:-1], mean.double().mean(dim=0), rtol=1e-4, atol=1e-5)
    assert not np.allclose(vae.config.latents_mean[:-1], trained_in["mean"][:-1], rtol=1e-3)
    pipelines = [load_expression_run(each) for each in (folder, folder / "checkpoint-8", folder / "checkpoint-4")]
    assert [list(each.normalisation.mean) for each in pipelines] == [trained_in["mean"]] * 3
    states = [each.vae.state_dict() for each in pipelines]
    assert differing(states[0], states[1]) == []
    assert "log_theta" in differing(states[0], states[2])


def test_a_joint_run_is_sampled(sample, joint):
    for each in (joint[0], joint[0] / "best", joint[0] / "checkpoint-4"):
        cells = sample(each, "--num_samples", 4, "--class_label", "CD34+")
        assert cells.obs["cell_type"].tolist() == ["CD34+"] * 4


def test_killed_and_resumed_joint_run_is_bit_identical(joint_flags, joint, tmp_path):
    """The autoencoder has dropout here too."""
    check_killed([*joint_flags, "--output_dir", tmp_path / "run", *LATEST], joint[0], tmp_path / "run", seed=1)


def test_the_autoencoder_has_a_learning_rate_of_its_own(joint_flags, vae_run, tmp_path):
    """Next to none here, while the denoiser learns."""
    flags = [*joint_flags, "--vae_learning_rate", 1e-9, "--max_train_steps", 4, "--output_dir", tmp_path / "run"]
    run(LDM, *flags)
    before, after = vae_tensors(vae_run), vae_tensors(tmp_path / "run")
    assert max((before[name] - after[name]).abs().max().item() for name in before) < 1e-7
    weights = load_file(tmp_path / "run" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["proj_out.weight"].any()


@pytest.mark.parametrize("live", [False, True])
def test_what_the_loss_of_the_denoiser_moves(data, caches, vae_run, live):
    """Detached: the denoiser alone; live: the encoder too; never the decoder, which the likelihood moves."""
    cache, vae = JointCache(caches["train"]), load_expression_vae(str(vae_run)).requires_grad_(True)
    cache.attach(str(data.few), None, vae)
    torch.manual_seed(0)
    denoiser = ConditionalDenoiser(VectorMLP(CHANNELS + 1, **MLP_CONFIG), torch.nn.Identity())
    denoiser.conditions.forward = lambda values, drop: SimpleNamespace(
        pooled_projections=None, encoder_hidden_states=None, encoder_attention_mask=None
    )
    torch.nn.init.normal_(denoiser.model.proj_out.weight)
    both, rows = JointDenoiser(denoiser, vae), np.arange(100, 108)
    batch, draws = cache.gather(rows), SampleDraws(0, torch.from_numpy(rows))
    found = encode_jointly(both, cache, batch, draws, live)
    prediction = both(found.latents, torch.tensor([500]), batch, torch.zeros(8, dtype=torch.bool))
    prediction.square().mean().backward()

    def moved(module) -> bool:
        return any(each.grad is not None and bool(each.grad.any()) for each in module.parameters())

    assert moved(denoiser.model)
    assert moved(vae.encoder) == moved(vae.to_moments) == live
    assert not moved(vae.decoder)
    assert not moved(vae.to_shares)
    (found.nll + found.kl).mean().backward() if not live else None
    with torch.no_grad():  # the same latents in both ways: a sample of the posterior of these cells
        posterior = vae.encode(batch["counts"], batch["library_size"])
        raw = posterior.mean + posterior.std * draws.normal("posterior", posterior.mean.shape)
        raw = torch.cat([raw, batch["library_size"].log()[:, None]], dim=1)
        torch.testing.assert_close(found.latents, cache.normalisation.normalise(raw))
        torch.testing.assert_close(cache.normalise(batch, draws), found.latents.detach())
    if not live:
        assert moved(vae.encoder)
        assert moved(vae.decoder)


def test_cells_are_found_by_name(data, caches, vae_run, tmp_path):
    """In whatever order a file has them; and another file, or other counts, are refused."""
    vae, rows = load_expression_vae(str(vae_run)), np.arange(NUM_TRAIN)
    expected = JointCache(caches["train"])
    expected.attach(str(data.few), None, vae)
    ids = expected.cell_ids
    np.testing.assert_array_equal(expected.gather(rows)["counts"], data.adata[ids].X.toarray())
    write_h5ad(data.adata[np.random.default_rng(0).permutation(CELLS)].copy(), tmp_path / "moved.h5ad")
    moved = JointCache(caches["train"])
    moved.attach(str(tmp_path / "moved.h5ad"), None, vae)
    for name, values in expected.gather(rows).items():
        assert torch.equal(moved.gather(rows)[name], values), name
    write_h5ad(data.adata[200:].copy(), tmp_path / "part.h5ad")
    with pytest.raises(UserError, match=r"--dataset_name: \d+ of 490 cells of the latent cache are not in"):
        JointCache(caches["train"]).attach(str(tmp_path / "part.h5ad"), None, vae)
    other = data.adata.copy()
    other.layers["twice"] = other.X * 2
    write_h5ad(other, tmp_path / "other.h5ad")
    with pytest.raises(UserError, match=r"490 cells of .* have other counts than in the latent cache, .*--counts_"):
        JointCache(caches["train"]).attach(str(tmp_path / "other.h5ad"), "twice", vae)


def test_a_cache_is_stale_after_a_joint_run(joint, ldm_flags, data, tmp_path):
    """What it holds are latents of the autoencoder before: refused for the run, and for its checkpoints, also of one
    that was never finished, whose folder still has the autoencoder that it began with. A new cache is taken."""
    flags = [*without(ldm_flags, "--architecture", "--model_config"), "--condition", "class:cell_type"]
    unfinished = tmp_path / "unfinished"
    shutil.copytree(joint[0], unfinished)
    (unfinished / "model_index.json").unlink()
    shutil.rmtree(unfinished / "vae")
    spec = LatentSpec.read(flags[flags.index("--latents_dir") + 1])
    shutil.copytree(Path(spec.vae) / "vae", unfinished / "vae")
    for base in (joint[0], joint[0] / "checkpoint-4", unfinished, unfinished / "checkpoint-4"):
        message = refused(run(LDM, *flags, BASE, base, "--output_dir", tmp_path / "run", check=False))
        assert f"{BASE}: {base} knows latents of another VAE; precompute --latents_dir with" in message
    run(CACHE, *cache_flags(data.few, joint[0]), "--latents_dir", tmp_path / "cache")
    run(LDM, *flags, BASE, joint[0], "--latents_dir", tmp_path / "cache", "--output_dir", tmp_path / "run")


def test_a_finished_joint_run_goes_on(joint, joint_flags, tmp_path):
    """Until it has something new, its folder keeps the autoencoder that belongs to its denoiser."""
    shutil.copytree(joint[0], tmp_path / "run")
    flags = [*joint_flags, "--output_dir", tmp_path / "run", *LATEST]
    before = contents(tmp_path / "run" / "vae")
    assert start(
        LDM, *flags, "--max_train_steps", 12, fault=SignalAt("utils.training.setup:announce", 1)
    ).wait_for_kill()
    assert contents(tmp_path / "run" / "vae") == before
    run(LDM, *flags, "--max_train_steps", 12)
    assert contents(tmp_path / "run" / "vae") != before


# ---- adapters


def test_adapters_of_an_unconditional_run_learn_a_condition(sample, ldm_flags, unconditional, data, tmp_path):
    flags = [*without(ldm_flags, "--architecture", "--model_config"), "--learning_rate", 1e-2]
    flags += ["--condition", "class:cell_type", BASE, unconditional, "--lora_rank", 4]
    flags += ["--eval_steps", 4, "--num_validation_samples", 6]
    before = snapshot(unconditional)
    run(LDM, *flags, "--output_dir", tmp_path / "run")
    assert snapshot(unconditional) == before
    weights = checkpoint_tensors(tmp_path / "run", 8)
    base = load_expression_run(unconditional).denoiser.model.state_dict()
    frozen = {name.removeprefix("model.safetensors/model."): tensor for name, tensor in weights.items()
              if name.startswith("model.safetensors/model.") and "lora_" not in name and "pooled" not in name}  # fmt: skip
    assert len(frozen) == len(base)
    for name, tensor in frozen.items():
        assert torch.equal(tensor, base[name.replace(".base_layer", "")]), name
    adapters = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    up = [tensor for name, tensor in adapters.items() if "lora_B" in name]  # which start at zero
    assert len(up) == 6  # three of each of two blocks
    assert all(tensor.any() for tensor in up)
    for folder in (tmp_path / "run", tmp_path / "run" / "best", tmp_path / "run" / "checkpoint-4"):
        assert not is_adapted(load_expression_run(folder).denoiser.model)
    asked = ["--class_label", "CD34+", "--num_samples", 4]
    tuned = sample(tmp_path / "run", *asked).obs["library_size"]
    merged = sample(unconditional, *asked, "--lora", tmp_path / "run" / "lora").obs["library_size"]
    # the exported weights are averaged after merging, the adapters before: close, not equal
    np.testing.assert_allclose(np.log(merged), np.log(tuned), atol=0.1)
    free = sample(unconditional, "--num_samples", 30, "--lora", tmp_path / "run" / "lora")  # as its own training set
    assert set(free.obs["cell_type"]) <= set(data.types)
    assert free.obs["cell_type"].tolist() == sample(tmp_path / "run", "--num_samples", 30).obs["cell_type"].tolist()


def test_full_fine_tuning_starts_from_the_run(ldm_flags, caches, conditional, tmp_path):
    """On other cells, whose conditions keep the mean, the std and the categories that it knows."""
    flags = [*without(ldm_flags, "--architecture", "--model_config"), BASE, conditional[0], "--learning_rate", 1e-9]
    flags += ["--latents_dir", caches["val"], "--adam_weight_decay", 0, "--max_train_steps", 1]
    message = refused(run(LDM, *flags, "--condition", "class:donor", "--output_dir", tmp_path / "run", check=False))
    assert "was trained with age (property), cell_type (class); ask for the same" in message
    run(LDM, *flags, *CONDITIONS, "--output_dir", tmp_path / "run")
    first, last = (load_expression_run(each) for each in (conditional[0], tmp_path / "run"))
    assert last.columns == first.columns
    theirs = first.denoiser.state_dict()
    for name, tensor in last.denoiser.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


def test_fine_tuning_goes_on_in_the_latents_of_its_base(ldm_flags, caches, tmp_path):
    """Whatever mean and std this run would give them by default."""
    others = [*ldm_flags, "--latents_dir", caches["val"], "--latent_normalisation", "measured"]
    run(LDM, *others, "--max_train_steps", 1, "--output_dir", tmp_path / "base")
    flags = [*without(ldm_flags, "--architecture", "--model_config"), "--max_train_steps", 1, BASE, tmp_path / "base"]
    assert "latents are normalised as those of" in run(LDM, *flags, "--output_dir", tmp_path / "run").stderr
    base, tuned = (contents(tmp_path / name)["latent_normalisation.json"] for name in ("base", "run"))
    assert tuned == base
    flags += ["--latent_normalisation", "vae", "--output_dir", tmp_path / "others"]
    assert "--latent_normalisation vae: " in refused(run(LDM, *flags, check=False))


# ---- what is refused

# fmt: off
REFUSED_VAE = [
    ([], "--dataset_name is required"),
    (["--dataset_name", "x", "--num_genes", 1], "--num_genes 1: a cell of one gene"),
    *(
        (["--dataset_name", "x", "--split_column", "split", flag, value], f"{flag} with --split_column: the column says")
        for flag, value in (("--validation_fraction", 0.1), ("--test_fraction", 0.1), ("--split_seed", 1), ("--label_column", "a"))
    ),
    (["--dataset_name", "x", "--likelihood", "poisson"], "--likelihood: invalid choice"),
    (["--dataset_name", "x", "--library", "some"], "--library: invalid choice"),
    (["--dataset_name", "x", "--latent_channels", 0], "--latent_channels: 0 is not a whole number of at least 1"),
    (["--dataset_name", "x", "--no-use_ema", "--ema_decay", 0.9], "--ema_decay with --no-use_ema"),
    (["--dataset_name", "x", "--dropout", 2], "--dropout"),
]
JOINT = ["--joint_vae", "--dataset_name", "x"]
REFUSED_LDM = [
    (["--dataset_name", "x"], "--dataset_name without --joint_vae: the autoencoder stays as it is"),
    (["--counts_layer", "x"], "--counts_layer without --joint_vae"),
    (["--vae_learning_rate", 1e-5], "--vae_learning_rate without --joint_vae"),
    (["--joint_latents", "live"], "--joint_latents without --joint_vae"),
    (["--kl_weight", 1], "--kl_weight without --joint_vae"),
    (["--joint_vae"], "--joint_vae needs --dataset_name"),
    ([*JOINT, BASE, "base", "--lora_rank", 4], "--lora_rank with --joint_vae"),
    ([*JOINT, "--ema_sigma_rels", 0.1], "--ema_sigma_rels with --joint_vae"),
    ([*JOINT, "--optimizer", "muon"], "--optimizer muon with --joint_vae"),
    (["--cond_drop_prob", 0.2], "--cond_drop_prob without --condition"),
    (["--validation_guidance_scale", 2], "--validation_guidance_scale without --condition"),
    (["--architecture", "unet"], "--architecture: invalid choice"),
    (["--model_size", "huge"], "--model_size: invalid choice"),
    (["--lora_rank", 4], f"--lora_rank without {BASE}"),
    (["--eval_steps", 2], "--eval_steps without latents to evaluate on"),
    (["--early_stopping_patience", 2], "--early_stopping_patience without --eval_steps"),
    (["--tread_ratio", 0.5], "unrecognized arguments: --tread_ratio"),
]
# fmt: on


def names_of_flags(value) -> str:
    return " ".join(map(str, value))[:50] if isinstance(value, list) else ""


@pytest.mark.parametrize(("flags", "expected"), REFUSED_VAE, ids=names_of_flags)
def test_flags_of_an_autoencoder(monkeypatch, flags, expected):
    check_parsing(monkeypatch, VAE, [*flags, "--output_dir", "o"], expected)


@pytest.mark.parametrize(("flags", "expected"), REFUSED_LDM, ids=names_of_flags)
def test_flags_of_a_denoiser(monkeypatch, unconditional, flags, expected):
    flags = [unconditional if each == "base" else each for each in flags]
    check_parsing(monkeypatch, LDM, [*flags, "--latents_dir", "l", "--output_dir", "o"], expected)


def check_parsing(monkeypatch, name, flags, expected):
    """Said before anything is loaded, in one line."""
    script = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    with pytest.raises(UserError, match=re.escape(expected)) as raised:
        script.parse_args()
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="session")
def bad_cells(data):
    """Files that are no counts, or not those of the autoencoder."""

    def write(name, change):
        adata = data.adata.copy()
        adata = change(adata) or adata
        adata.write_h5ad(data.folder / f"{name}.h5ad")  # ours would refuse to

    def log_normalised(adata):
        adata.layers["counts"] = adata.X.copy()
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)

    def with_value(value):
        def change(adata):
            dense = adata.X.toarray()
            dense[3, 2] = value
            adata.X = dense

        return change

    def others(adata):
        adata.obs_names = [f"other-{i}" for i in range(CELLS)]

    def renamed(adata):
        adata.var_names = ["MALAT1", "MALAT1", *adata.var_names[2:]]

    write("log", log_normalised)
    write("negative", with_value(-1))
    write("nan", with_value(np.nan))
    write("twice", renamed)
    write("other genes", lambda adata: adata[:, 5:].copy())
    write("other cells", others)
    return data.folder


# fmt: off
BAD_CELLS = {
    "logarithms": (["--dataset_name", "log.h5ad"], ["--dataset_name", "does not hold counts", "--counts_layer counts does"]),
    "a negative count": (["--dataset_name", "negative.h5ad"], ["--dataset_name", "does not hold counts", "negative"]),
    "NaN": (["--dataset_name", "nan.h5ad"], ["--dataset_name", "does not hold counts"]),
    "genes of one name": (["--dataset_name", "twice.h5ad"], ["--dataset_name", "MALAT1", "more than once"]),
    "no such file": (["--dataset_name", "nowhere.h5ad"], ["--dataset_name", "nowhere.h5ad does not exist"]),
    "no such layer": (["--counts_layer", "counts"], ["--counts_layer", "no layer counts"]),
    "no such label": (["--label_column", "type"], ["--label_column", "no column type", "cell_type"]),
    "a cell without a label": (["--label_column", "partial"], ["--label_column", "1 of 700 cells have no partial"]),
    "one label": (["--label_column", "flat"], ["--label_column", "all cells have one flat"]),
    "a type of four cells": (["--label_column", "rare"], ["--label_column", "fewer than 5 cells", "rare: 4"]),
    "no such split": (["--split_column", "where"], ["--split_column", "no column where"]),
    "another column as split": (["--split_column", "cell_type"], ["--split_column cell_type", "expected train, val, test"]),
    "a split without val": (["--split_column", "no_val"], ["--split_column no_val", "no cell is of val"]),
    "nothing to watch": (["--validation_fraction", 0], ["--validation_fraction 0", "give some"]),
    "nothing to train on": (["--test_fraction", 0.95], ["--validation_fraction, --test_fraction", "leave no cells"]),
    "no such batch": (["--batch_column", "lanes"], ["--batch_column", "no column lanes"]),
    "one batch": (["--batch_column", "flat"], ["--batch_column flat", "one batch"]),
    "a cell without a batch": (["--batch_column", "partial"], ["--batch_column partial", "1 cells have none"]),
    "an unseen batch": (["--batch_column", "split", "--split_column", "split"], ["--batch_column split", "one batch (train)"]),
    "muon": (["--optimizer", "muon"], ["--optimizer muon", "log_theta has a learning rate of its own"]),
}
# fmt: on


@pytest.mark.parametrize("name", BAD_CELLS)
def test_bad_cells(data, bad_cells, tmp_path, name):
    flags, words = BAD_CELLS[name]
    flags = [bad_cells / each if str(each).endswith(".h5ad") else each for each in flags]
    common = without(TRAIN_VAE, "--label_column") if "--split_column" in flags else TRAIN_VAE
    result = run(VAE, "--dataset_name", data.few, *common, *flags, "--output_dir", tmp_path / "run", check=False)
    message = refused(result)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_cells_that_are_not_those_of_the_autoencoder(bad_cells, vae_run, batched, tiny_vae, data, tmp_path):
    cases = [
        ([*cache_flags(bad_cells / "other genes.h5ad", vae_run)], ["--dataset_name: 5 of 40 genes are not in"]),
        ([*cache_flags(bad_cells / "other cells.h5ad", vae_run)], ["--split train: no cell of", "or all"]),
        ([*cache_flags(bad_cells / "log.h5ad", vae_run)], ["--dataset_name", "does not hold counts"]),
        ([*cache_flags(data.few, tiny_vae)], ["--pretrained_vae_model_name_or_path", "no ExpressionVAE"]),
        ([*cache_flags(data.whole, batched.vae), "--split", "all"], ["--dataset_name", "batches by obs['donor']"]),
        ([*cache_flags(data.few, vae_run), "--split", "some"], ["--split: invalid choice"]),
        ([*cache_flags(data.few, vae_run), "--seed", 1], ["--seed with --modality expression"]),
        (["--modality", "expression", "--pretrained_vae_model_name_or_path", vae_run], ["--dataset_name is required"]),
    ]
    for flags, words in cases:
        message = refused(run(CACHE, *flags, "--latents_dir", tmp_path / "cache", check=False))
        assert all(word in message for word in words), message


# fmt: off
BAD_DENOISERS = {
    "no such column": (["--condition", "class:type"], ["--condition", "no column type", "cell_type"]),
    "no such kind": (["--condition", "composition"], ["--condition composition", "class, property"]),
    "no column": (["--condition", "class"], ["--condition class", "name the column, as in class:cell_type"]),
    "text as a number": (["--condition", "property:cell_type"], ["--condition property:cell_type", "use class:cell_type"]),
    "one value": (["--condition", "class:flat"], ["--condition class:flat", "1 different values"]),
    "named twice": (["--condition", "class:age", "property:age"], ["age is named twice"]),
    "steps": (["--validation_inference_steps", 2000], ["--validation_inference_steps 2000"]),
    "no cache": (["--latents_dir", "nowhere"], ["--latents_dir", "does not exist"]),
    "the training cache to evaluate": (["--eval_steps", 2, "--validation_latents_dir", "train"], ["--validation_latents_dir: this is the cache"]),
    "batches of that name": (["--condition", "property:library_size", "--joint_vae", "--dataset_name", "few"], ["--condition library_size with --joint_vae", "rename"]),
    "no file": (["--joint_vae", "--dataset_name", "nowhere.h5ad"], ["--dataset_name", "nowhere.h5ad does not exist"]),
    "other genes": (["--joint_vae", "--dataset_name", "other genes"], ["--dataset_name", "5 of 40 genes are not in"]),
    "other cells": (["--joint_vae", "--dataset_name", "other cells"], ["--dataset_name", "490 of 490 cells of the latent cache"]),
    "no run to start from": ([BASE, "nowhere"], [BASE, "is no run"]),
    "a run of images": ([BASE, "images"], [BASE, "images is no run of cells"]),
}
# fmt: on


@pytest.mark.parametrize("name", BAD_DENOISERS)
def test_bad_denoisers(ldm_flags, caches, bad_cells, unconditional, tiny_vae, data, tmp_path, name):
    flags, words = BAD_DENOISERS[name]
    values = {"train": caches["train"], "few": data.few}
    values |= {each: bad_cells / f"{each}.h5ad" for each in ("other genes", "other cells")}
    if "images" in flags:
        values["images"] = images = tmp_path / "images"
        for part in ("conditions", "scheduler"):
            shutil.copytree(unconditional / part, images / part)
        shutil.copytree(tiny_vae, images / "vae")
        DiT(**DIT_CONFIG, sample_size=4).save_pretrained(images / "transformer")
        (images / "model_index.json").write_text("{}")
    flags = [values.get(each, each) for each in flags]
    common = without(ldm_flags, "--architecture", "--model_config") if BASE in flags else ldm_flags
    message = refused(run(LDM, *common, *flags, "--output_dir", tmp_path / "run", check=False))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("mlp", {"patch_size": 2}, ["--model_config", "VectorMLP has no argument patch_size"]),
        ("dit", {"latent_kind": "grid"}, ["--model_config", "latent_kind"]),
        ("dit", {"in_channels": 7}, ["--model_config", "in_channels is 7"]),
        ("dit", {"hidden_size": 30}, ["--model_config", "hidden_size 30"]),
    ],
)
def test_an_impossible_model_is_refused(ldm_flags, tmp_path, architecture, config, words):
    (tmp_path / "model.json").write_text(json.dumps(config))
    flags = [*ldm_flags, "--architecture", architecture, "--model_config", tmp_path / "model.json"]
    message = refused(run(LDM, *flags, "--output_dir", tmp_path / "run", check=False))
    assert all(word in message for word in words), message


def test_a_run_to_start_from_says_what_its_model_is(ldm_flags, unconditional, tmp_path):
    flags = [*without(ldm_flags, "--architecture", "--model_config"), BASE, unconditional]
    flags += ["--output_dir", tmp_path / "run"]
    for name, value in (("model_size", "S"), ("model_config", "x.json"), ("architecture", "mlp")):
        message = refused(run(LDM, *flags, f"--{name}", value, check=False))
        assert f"--{name} with {BASE}: the run says what its model is" in message
    message = refused(run(LDM, *flags, "--prediction_type", "epsilon", check=False))
    assert "was trained with flow; leave it out" in message


@pytest.mark.parametrize("script", ["train_crystal_ldm.py", "train_class_cond_ldm.py"])
def test_a_cache_of_cells_is_no_other(script, caches, model_flags, tmp_path):
    flags = ["--latents_dir", caches["train"], "--output_dir", tmp_path / "run", "--max_train_steps", 1]
    flags += [*model_flags["dit"], "--unconditional"] if script.startswith("train_class") else []
    message = refused(run(script, *flags, check=False))
    assert "--latents_dir" in message
    assert "holds vector latents" in message or "cells are for train_expression_ldm.py" in message


def test_an_autoencoder_that_changed_is_noticed(data, vae_run, ldm_flags, tmp_path):
    """Training says so before it writes anything."""
    shutil.copytree(vae_run / "vae", tmp_path / "own" / "vae")
    run(CACHE, *cache_flags(data.few, tmp_path / "own"), "--latents_dir", tmp_path / "cache")
    file = tmp_path / "own" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["to_moments.bias"][0] += 0.01
    save_file(weights, file, metadata={"format": "pt"})
    flags = [*ldm_flags, "--latents_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"]
    assert "has other weights than when the latents were computed" in refused(run(LDM, *flags, check=False))
    assert not (tmp_path / "run").exists()


def test_going_on_as_another_run_is_refused(data, vae_run, ldm_flags, evaluated, conditional, joint_flags):
    before = snapshot(conditional[0], vae_run)
    flags = [*ldm_flags, *evaluated, "--output_dir", conditional[0], *LATEST]
    message = refused(run(LDM, *flags, "--condition", "class:cell_type", check=False))
    assert "was trained with" in message
    message = refused(run(LDM, *joint_flags, *CONDITIONS, "--output_dir", conditional[0], *LATEST, check=False))
    assert "was trained with" in message
    flags = ["--dataset_name", data.few, *TRAIN_VAE, "--output_dir", vae_run, *LATEST]
    for extra, key in ((["--likelihood", "gaussian"], "likelihood = nb"), (["--split_seed", 1], "data = ")):
        assert f"was trained with {key}" in refused(run(VAE, *flags, *extra, check=False))
    assert snapshot(conditional[0], vae_run) == before


# fmt: off
BAD_SAMPLES = [
    ("asked", ["--class_label", "Martian"], "--class_label Martian: the run knows these: CD14+ Monocyte, "),
    ("asked", ["--class_label", "CD34+", "CD34+"], "--class_label CD34+: named twice; --num_samples says how many"),
    ("asked", ["--class_label", "CD34+", "--property", "cell_type=CD34+"], "--class_label with --property cell_type=CD34+"),
    ("asked", ["--property", "height=3"], "--property height=3: "),
    ("asked", ["--property", "age"], "--property age: write NAME=VALUE"),
    ("asked", ["--property", "age=old"], "--property age=old: old is not a number"),
    ("asked", ["--property", "age=1e39"], "--property age=1e39: too large for single precision"),
    ("asked", ["--property", "age=1", "age=2"], "--property age=2: age is asked for twice"),
    ("asked", ["--property", "cell_type=Martian"], "--property cell_type=Martian: the run knows these"),
    ("asked", ["--num_samples", 0], "--num_samples: 0 is not a whole number of at least 1"),
    ("plain", ["--class_label", "CD34+"], "--class_label: "),
    ("plain", ["--property", "age=1"], "--property age=1: "),
    ("plain", ["--guidance_scale", 2], "--guidance_scale 2: no condition is asked for"),
    ("asked", ["--guidance_interval", 0, 0.5], "--guidance_interval: guidance is off"),
    ("asked", ["--scheduler", "flow_euler"], "--scheduler flow_euler: this run was trained for ddpm"),
    ("plain", ["--scheduler", "ddim"], "--scheduler ddim: this run was trained for flow_euler"),
    ("asked", ["--num_inference_steps", 2000], "--num_inference_steps 2000"),
    ("asked", ["--prompt", "a cell"], "--prompt: {run} makes cells; leave it out"),
    ("asked", ["--class_labels", 1], "--class_labels: {run} makes cells; leave it out"),
    ("asked", ["--num_images_per_prompt", 2], "--num_images_per_prompt: {run} makes cells; leave it out"),
    ("asked", ["--composition", "NaCl"], "--composition: {run} makes cells; leave it out"),
    ("asked", ["--num_atoms", 3], "--num_atoms: {run} makes cells; leave it out"),
    ("asked", ["--clamp_composition"], "--clamp_composition: {run} makes cells; leave it out"),
    ("images", ["--class_label", "CD34+"], "--class_label: {run} makes images; leave it out"),
    ("vae", [], "--model: {run} is no run"),
    ("asked", ["--guide_model", "asked"], "--guide_model: {run} has the weights of --model"),
    ("asked", ["--guide_model", "plain"], "--guide_model: {plain} has other conditions"),
    ("asked", ["--guide_model", "images"], "--guide_model: {images} is no run of cells"),
    ("asked", ["--lora", "plain"], "--lora: {plain} holds no adapter_model.safetensors"),
    ("asked", ["--ema_sigma_rel", 0.1], "--ema_sigma_rel: {run} has no snapshots"),
]
# fmt: on


@pytest.mark.parametrize(("model", "flags", "expected"), BAD_SAMPLES, ids=names_of_flags)
def test_bad_requests(sample, conditional, unconditional, vae_run, tmp_path, model, flags, expected):
    images = tmp_path / "images"
    for name in ("unet", "vae", "scheduler"):
        (images / name).mkdir(parents=True)
        (images / name / "config.json").write_text("{}")
    runs = {"asked": conditional[0], "plain": unconditional, "vae": vae_run, "images": images}
    with pytest.raises(UserError) as raised:
        sample(runs[model], *(runs.get(each, each) for each in flags))
    message = str(raised.value)
    assert message.startswith(expected.format(run=runs[model], **runs)), message
    assert "\n" not in message
    assert not list(tmp_path.glob("sampled*"))


def test_bad_requests_in_one_line(conditional, tmp_path):
    flags = ["--model", conditional[0], "--output_dir", tmp_path / "out", "--num_samples", 2]
    assert "--class_label Martian" in refused(run(SAMPLE, *flags, "--class_label", "Martian", check=False))


HELP = {
    (VAE,): ["--dataset_name", "--library", "--likelihood", "--batch_column", "--kl_weight", "--low_memory"],
    (CACHE, "--modality", "expression"): ["--split", "--counts_layer", "--encode_batch_size", "--latents_dir"],
    (LDM,): ["--condition", "--joint_vae", "--joint_latents", "--architecture", "--prediction_type", BASE],
}


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_lists_the_flags(command):
    text = run(*command, "--help").stdout
    assert all(flag in text for flag in (*HELP[command], "--config", "--seed")), text


def test_names_of_numbers():
    """Lanes 1 and 2 of a file are the categories 1 and 2 of a run."""
    assert [category_name(each) for each in (1.0, 2, "2", math.nan)] == ["1", "2", "2", None]
