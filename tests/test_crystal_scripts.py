"""The scripts of crystals as a user runs them: autoencoder, latent cache, denoiser, adapters; killed, divided, refused."""

import argparse
import importlib
import json
import random
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from tests.support.models import DIT_CONFIG
from tests.support.processes import (
    ROOT,
    SignalAt,
    checkpoint_tensors,
    contents,
    differing,
    refused,
    run,
    scalars,
    snapshot,
    start,
)
from utils.crystal.cache import SetCache, describe_condition
from utils.crystal.codec import load_crystal_vae
from utils.crystal.data.table import load_crystals
from utils.crystal.pipeline import load_crystal_run
from utils.crystal.precompute import build_crystal_cache
from utils.draws import SampleDraws, StreamOrder, uniform_draws
from utils.errors import UserError
from utils.latents.columns import category_name, category_numbers
from utils.latents.spec import LatentSpec
from utils.latents.writer import found_or_made
from utils.models.dit import DiT
from utils.training.lora import is_adapted

for package in ("pymatgen", "spglib"):
    pytest.importorskip(package)

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


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("crystals") / "crystals.parquet"
    rows = rows_of_crystals()
    types = {"nothing": pa.float64()}
    pq.write_table(pa.table({name: pa.array(values, type=types.get(name)) for name, values in rows.items()}), path)
    return path


@pytest.fixture(scope="module")
def vae_run(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "run"
    run(VAE, "--dataset_name", dataset, *TRAIN_VAE, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def cache_flags(dataset, vae_run):
    return [
        *("--modality", "crystal", "--dataset_name", dataset, "--pretrained_vae_model_name_or_path", vae_run),
        *("--max_atoms", MAX_ATOMS, "--num_translations", 3, "--rows_per_shard", 16, "--encode_batch_size", 8),
    ]


@pytest.fixture(scope="module")
def caches(cache_flags, tmp_path_factory):
    """Of the splits train and val."""
    folder = tmp_path_factory.mktemp("caches")
    for split in ("train", "val"):
        run(CACHE, *cache_flags, "--dataset_split", split, "--latents_dir", folder / split)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def ldm_flags(caches, tmp_path_factory):
    """Of a tiny denoiser, without --output_dir."""
    config = tmp_path_factory.mktemp("model") / "dit.json"
    config.write_text(json.dumps(DIT_CONFIG))
    return ["--latents_dir", caches["train"], *TRAIN_LDM, "--model_config", config]


@pytest.fixture(scope="module")
def evaluated(caches):
    return ["--eval_steps", 4, "--validation_latents_dir", caches["val"]]


@pytest.fixture(scope="module")
def conditional(ldm_flags, evaluated, tmp_path_factory):
    """A finished run of v-prediction with three conditions; and what it said."""
    folder = tmp_path_factory.mktemp("conditional") / "run"
    return folder, run(LDM, *ldm_flags, *CONDITIONS, *evaluated, "--output_dir", folder).stderr


@pytest.fixture(scope="module")
def unconditional(ldm_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unconditional") / "run"
    run(LDM, *ldm_flags, "--prediction_type", "flow", "--max_train_steps", 30, "--output_dir", folder)
    return folder


def sampled(folder, values, **settings):
    pipeline = load_crystal_run(folder)
    num_atoms = torch.tensor([5, 8])
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    latents = pipeline.latents(num_atoms, values, 3, generator=generators, **settings)
    found = pipeline.decode(latents, num_atoms)
    assert [len(crystal.atomic_numbers) for crystal in found] == [5, 8]
    assert all(np.isfinite(crystal.frac_coords).all() and np.isfinite(crystal.lattice).all() for crystal in found)
    return latents


# ---- the autoencoder -------------------------------------------------------------------------------------------------


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


def test_killed_and_resumed_autoencoder_is_bit_identical(dataset, vae_run, tmp_path):
    """After a step, while a checkpoint is written, after another step; and when all that is left is to export."""
    flags = ["--dataset_name", dataset, *TRAIN_VAE, "--output_dir", tmp_path / "run", *LATEST]
    kills = [
        ("utils.training.step_log:StepLog.step_done", 3),
        ("utils.training.checkpoints:fsync_path", 2),
        ("utils.training.step_log:StepLog.step_done", 2),
        ("utils.crystal.vae.training:measure_latents", 1),
    ]
    for function, count in kills:
        running = start(VAE, *flags, fault=SignalAt(function, count))
        assert running.wait_for_kill(), running.wait().stderr
        assert not (tmp_path / "run" / "vae").exists()
    assert "going on from" in run(VAE, *flags).stderr
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


# ---- the cache -------------------------------------------------------------------------------------------------------


def check_cache(folder, vae, table, seed, num_translations):
    """Each row of a cache against the autoencoder, one crystal at a time and without padding."""
    cache = SetCache(folder)
    assert len(cache) == len(table)
    rows = np.arange(len(table))
    for number in range(num_translations):
        moments = cache.gather(rows, np.full(len(rows), (number + 0.5) / num_translations))["latents"]
        draws = SampleDraws(seed, torch.from_numpy(rows * num_translations + number))
        shift = torch.stack([draws.uniform(f"translation_{axis}") for axis in "abc"], dim=1)
        if num_translations == 1:
            shift = torch.zeros_like(shift)
        for row in rows:
            one, count = table.take(rows[row : row + 1]), table.num_atoms[row]
            posterior = encoded(vae, one, (torch.from_numpy(one.frac_coords) + shift[row]) % 1.0)
            torch.testing.assert_close(moments[row, 0, :count], posterior.mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(moments[row, 1, :count], posterior.std[0], rtol=1e-4, atol=1e-5)
            assert not moments[row, :, count:].any()
    return cache


def test_the_cache_holds_what_the_autoencoder_gives(caches, dataset, vae_run):
    vae, table = load_crystal_vae(str(vae_run)), load_crystals(str(dataset), "train", MAX_ATOMS)
    cache = check_cache(caches["train"], vae, table, 0, 3)
    assert cache.spec.num_items == {"2": 15, "5": 14, "8": 15}
    variants = [cache.gather(np.arange(5), np.full(5, x))["latents"] for x in (0.1, 0.5, 0.9)]
    assert not torch.allclose(variants[0], variants[1], atol=1e-4)
    assert not torch.allclose(variants[1], variants[2], atol=1e-4)
    assert cache.normalisation.mean == tuple(torch.tensor(vae.config.latents_mean).tolist())
    batch = cache.gather(np.arange(len(cache)))
    assert batch["attention_mask"].sum(dim=1).tolist() == table.num_atoms.tolist()
    measured = SetCache(caches["train"], "measured").normalisation
    moments = torch.cat(
        [cache.gather(np.arange(len(cache)), np.full(len(cache), x))["latents"] for x in (0.1, 0.5, 0.9)]
    )
    atoms = moments.transpose(1, 2)[batch["attention_mask"].repeat(3, 1)].double()  # (atoms, 2, D)
    np.testing.assert_allclose(measured.mean, atoms[:, 0].mean(dim=0), atol=1e-5)
    expected = (atoms[:, 0].var(dim=0, correction=0) + atoms[:, 1].square().mean(dim=0)).sqrt()
    np.testing.assert_allclose(measured.std, expected, rtol=1e-4)


def cache_args(dataset, vae, **settings):
    """What precompute_latents.py parses."""
    defaults = {
        "dataset_name": str(dataset), "dataset_split": "train", "max_atoms": MAX_ATOMS, "max_samples": 10, "seed": 0,
        "max_skipped_fraction": 0.05, "pretrained_vae_model_name_or_path": str(vae), "num_translations": 1,
        "encode_batch_size": 4, "rows_per_shard": 100,
    }  # fmt: skip
    return argparse.Namespace(**defaults | settings)


@pytest.fixture(scope="module")
def small_cache(dataset, vae_run, tmp_path_factory):
    """Of ten crystals that are not moved."""
    folder = tmp_path_factory.mktemp("small") / "cache"
    build_crystal_cache(cache_args(dataset, vae_run), Accelerator(cpu=True), folder)
    return folder


def test_one_translation_is_none(small_cache, dataset, vae_run):
    table = load_crystals(str(dataset), "train", MAX_ATOMS, max_samples=10)
    check_cache(small_cache, load_crystal_vae(str(vae_run)), table, 0, 1)
    assert LatentSpec.read(small_cache).variants() == ["latents"]


def other_vae(vae_run, folder):
    """The same autoencoder but for one number."""
    shutil.copytree(vae_run / "vae", folder / "vae")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["to_moments.bias"][0] += 0.01
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"num_translations": 2}, "num_translations = 1"),
        ({"seed": 1}, "seed = 0"),
        ({"max_samples": 9}, "dataset = "),
        ({"dataset_split": "val"}, "dataset = "),
        ({"pretrained_vae_model_name_or_path": "other"}, "vae = "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_finished_cache_with_other_flags_is_refused(small_cache, dataset, vae_run, tmp_path, settings, key):
    if "pretrained_vae_model_name_or_path" in settings:
        settings = {"pretrained_vae_model_name_or_path": str(other_vae(vae_run, tmp_path / "other"))}
    args, before = cache_args(dataset, vae_run, **settings), snapshot(small_cache)
    with pytest.raises(UserError, match=f"was made with {key}"):
        build_crystal_cache(args, Accelerator(cpu=True), small_cache)
    assert snapshot(small_cache) == before
    identity = build_crystal_cache(args, Accelerator(cpu=True), tmp_path / "cache").identity()
    assert identity != LatentSpec.read(small_cache).identity()


def test_a_finished_cache_is_found(small_cache, dataset, vae_run, tmp_path):
    """By the same weights under another path; and a cache begun with the data changed under it is another one."""
    shutil.copytree(vae_run, tmp_path / "moved")
    args = cache_args(dataset, tmp_path / "moved")
    spec = build_crystal_cache(args, Accelerator(cpu=True), small_cache)
    assert spec.identity() == LatentSpec.read(small_cache).identity()
    rows = pq.read_table(dataset).to_pydict()
    rows["band_gap"][1] += 0.5
    pq.write_table(pa.table(rows), tmp_path / "changed.parquet")
    changed = build_crystal_cache(
        cache_args(tmp_path / "changed.parquet", vae_run), Accelerator(cpu=True), tmp_path / "cache"
    )
    assert changed.fingerprint["dataset"]["sha256"] != spec.fingerprint["dataset"]["sha256"]


def test_killed_and_started_again(cache_flags, caches, tmp_path):
    """While the second shard is made; not with other flags."""
    flags = [*cache_flags, "--latents_dir", tmp_path / "cache"]
    assert start(CACHE, *flags, fault=SignalAt("utils.crystal.precompute:encode_rows", 4)).wait_for_kill()
    assert not (tmp_path / "cache" / "latent_spec.json").exists()
    assert "num_translations = 3" in refused(run(CACHE, *flags, "--num_translations", 4, check=False))
    run(CACHE, *flags)
    assert contents(tmp_path / "cache") == contents(caches["train"])


def test_two_processes_make_the_cache_of_one(cache_flags, caches, tmp_path):
    run(CACHE, *cache_flags, "--latents_dir", tmp_path / "cache", processes=2)
    assert contents(tmp_path / "cache") == contents(caches["train"])


def test_a_process_that_comes_late_does_not_leave_the_others_waiting(caches, tmp_path):
    """Process 1 looks for the cache when process 0 could have finished it: both meet as often, and both are given it."""
    spec = LatentSpec.read(caches["train"])
    barrier = threading.Barrier(2)
    meetings = {0: 0, 1: 0}

    def build(rank):
        def meet():
            meetings[rank] += 1
            barrier.wait(timeout=10)

        time.sleep(rank * 0.3)
        process = SimpleNamespace(is_main_process=rank == 0, wait_for_everyone=meet)
        copy = partial(shutil.copytree, caches["train"], tmp_path / "cache", dirs_exist_ok=True)
        return found_or_made(process, tmp_path / "cache", spec.fingerprint, 16, copy)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(build, range(2))) == [spec, spec]
    assert meetings[0] == meetings[1] > 0


# ---- columns as conditions -------------------------------------------------------------------------------------------


def test_conditions_are_measured_on_the_training_set(caches):
    cache = SetCache(caches["train"])
    rows = rows_of_crystals()
    known = [gap for gap in rows["band_gap"][:NUM_TRAIN] if gap is not None and np.isfinite(gap)]
    asked = {name: describe_condition(cache, kind, name) for name, kind in {
        "band_gap": "property", "spacegroup": "class", "prototype": "class", "composition": "composition",
        "chemical_system": "chemical_system",
    }.items()}  # fmt: skip
    assert asked["band_gap"]["mean"] == pytest.approx(np.mean(known))
    assert asked["band_gap"]["std"] == pytest.approx(np.std(known))
    assert asked["spacegroup"]["names"] == ["221", "225"]
    assert asked["prototype"]["names"] == ["CsCl", "perovskite", "rocksalt"]
    cache.use_conditions(asked)
    for each in (cache, cache.like(caches["val"])):
        first = 0 if each is cache else NUM_TRAIN
        batch = each.gather(np.arange(len(each)))
        for row in range(len(each)):
            gap, prototype = rows["band_gap"][first + row], rows["prototype"][first + row]
            if gap is None or not np.isfinite(gap):
                assert not np.isfinite(batch["band_gap"][row])
            else:
                assert batch["band_gap"][row].item() == pytest.approx(gap)
            assert asked["spacegroup"]["names"][batch["spacegroup"][row]] == str(rows["spacegroup"][first + row])
            names = [*asked["prototype"]["names"], None]
            assert names[batch["prototype"][row]] == (prototype or None)
            numbers = rows["atomic_numbers"][first + row]
            shares = {number: numbers.count(number) / len(numbers) for number in numbers}
            found = batch["composition"][row]
            assert {int(i) + 1: found[i].item() for i in found.nonzero()[:, 0]} == pytest.approx(shares)
            assert (batch["chemical_system"][row] > 0).equal(found > 0)
            assert set(batch["chemical_system"][row].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("value", "name"),
    [(225.0, "225"), (225, "225"), ("225", "225"), (1.5, "1.5"), (True, "True"), (None, None), (float("nan"), None),
     (float("inf"), None), ("", None), (np.float64(2), "2"), ("P 1", "P 1")],
)  # fmt: skip
def test_names_of_categories(value, name):
    assert category_name(value) == name
    column = np.array([value, "other"], dtype=object)
    assert category_numbers(column, ["other", "225", "2"])[0] == {"225": 1, "2": 2}.get(name, -1)


# ---- the denoiser ----------------------------------------------------------------------------------------------------


def test_a_conditional_run(conditional, caches):
    folder, log = conditional
    missing = len([i for i in GAPS if i < NUM_TRAIN]) + 1  # and the infinite one
    assert f"band_gap is not known of {missing} of {NUM_TRAIN} crystals" in log
    assert f"spacegroup is not known of 0 of {NUM_TRAIN}" not in log
    assert f"{NUM_TRAIN} samples in the data" in log
    losses = scalars(folder, "train/loss")
    assert list(losses) == list(range(1, 9))
    assert np.isfinite(list(losses.values())).all()
    assert list(scalars(folder, "validation/loss")) == [4, 8]
    assert 0 <= scalars(folder, "validation/structurally_valid")[8] <= 1
    assert (folder / "samples" / "step-0000008.png").is_file()
    for each in (folder, folder / "best", folder / "checkpoint-4"):
        pipeline = load_crystal_run(each)
        assert list(pipeline.columns) == ["band_gap", "composition", "spacegroup"]
        assert pipeline.num_items == {2: 15, 5: 14, 8: 15}
    values = {"band_gap": torch.tensor([1.0, 2.0]), "spacegroup": torch.tensor([0, 1])}
    both = sampled(folder, values, guidance_scale=2.0)
    assert not torch.equal(both, sampled(folder, {}))
    assert not torch.equal(both, sampled(folder, {"band_gap": values["band_gap"]}, guidance_scale=2.0))


def test_the_exported_weights_are_the_average(conditional):
    folder, _ = conditional
    average = load_file(folder / "checkpoint-8" / "ema.safetensors")
    exported = load_crystal_run(folder).denoiser.state_dict()
    for name, tensor in average.items():
        assert torch.equal(exported[name], tensor), name


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
def test_an_unconditional_run(ldm_flags, tmp_path, kind):
    """Of each objective but flow, which `unconditional` has; with rows held out, in bf16 and other small print."""
    extra = {"v_prediction": ["--rescale_betas_zero_snr", "--gradient_checkpointing"],
             "epsilon": ["--snr_gamma", 5, "--ema_sigma_rels", 0.1, "--ema_snapshot_steps", 1, "--mixed_precision", "bf16"],
             "sample": ["--latent_normalisation", "measured"]}[kind]  # fmt: skip
    flags = [*ldm_flags, "--max_train_steps", 2, "--eval_steps", 1, "--num_validation_samples", 6, *extra]
    log = run(LDM, *flags, "--prediction_type", kind, "--output_dir", tmp_path / "run").stderr
    assert f"{NUM_TRAIN - 6} samples in the data" in log
    assert not load_crystal_run(tmp_path / "run").columns
    sampled(tmp_path / "run", {})
    if kind == "epsilon":
        load_crystal_run(tmp_path / "run", ema_sigma_rel=0.1)


def test_flow_trains_and_samples(unconditional):
    losses = list(scalars(unconditional, "train/loss").values())
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    sampled(unconditional, {})


def test_the_first_loss(unconditional, caches):
    """A new model predicts zero: the mean over the real atoms of each crystal of what it should predict, noise minus
    latents; padding has no part in it."""
    cache, positions = SetCache(caches["train"]), np.arange(8)
    rows = StreamOrder(0, NUM_TRAIN).rows(positions)
    batch = cache.gather(rows, 1 - 2.0**-53 - uniform_draws(0, "flip", positions))
    draws = SampleDraws(0, torch.from_numpy(positions))
    latents = cache.normalise(batch, draws)
    target = draws.normal("noise", latents.shape) - latents
    sizes = load_crystals(str(cache.spec.fingerprint["dataset"]["name"]), "train", MAX_ATOMS).num_atoms[rows]
    assert len(set(sizes)) == 3
    expected = np.mean([target[i, :size].square().mean().item() for i, size in enumerate(sizes)])
    assert scalars(unconditional, "train/loss")[1] == pytest.approx(expected, rel=1e-5)


def encoder_tensors(folder, step):
    """Weights of the encoders of a run's conditions."""
    prefix = "model.safetensors/conditions."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint_tensors(folder, step).items()
        if name.startswith(prefix)
    }


def test_what_is_dropped_is_not_learnt(ldm_flags, conditional, tmp_path):
    """With all hidden the nulls alone move; by default everything does."""
    folder, _ = conditional
    first, last = (encoder_tensors(folder, step) for step in (4, 8))
    assert len(differing(first, last)) == len(first) == 12
    run(
        LDM, *ldm_flags, *CONDITIONS, "--cond_drop_prob", 1, "--adam_weight_decay", 0, "--output_dir", tmp_path / "run"
    )
    moved = differing(*(encoder_tensors(tmp_path / "run", step) for step in (4, 8)))
    assert sorted(moved) == [f"encoders.{i}.null_embedding" for i in range(3)]


def test_early_stopping(ldm_flags, caches, tmp_path):
    """At a learning rate at which nothing is learnt the first evaluation stays the best, and the second after it ends
    the run, which is exported."""
    flags = [*ldm_flags, "--max_train_steps", 40, "--learning_rate", 1e-12, "--eval_steps", 2, "--train_batch_size", 2]
    flags += ["--validation_latents_dir", caches["val"], "--early_stopping_patience", 2]
    flags += ["--early_stopping_min_delta", 1e-4, "--output_dir", tmp_path / "run"]
    log = run(LDM, *flags).stderr
    assert "--early_stopping_patience 2: validation/loss has not fallen in as many evaluations" in log
    history = json.loads((tmp_path / "run" / "evaluations.json").read_text())["evaluations"]
    assert [each["global_step"] for each in history] == [2, 4, 6]
    assert list(scalars(tmp_path / "run", "train/loss")) == list(range(1, 7))
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    for folder in (tmp_path / "run", tmp_path / "run" / "best"):
        load_crystal_run(folder)
    before = contents(tmp_path / "run" / "transformer")
    again = run(LDM, *flags, *LATEST).stderr  # the end stays the end
    assert list(scalars(tmp_path / "run", "train/loss")) == list(range(1, 7)), again
    assert contents(tmp_path / "run" / "transformer") == before


def test_killed_and_resumed_denoiser_is_bit_identical(ldm_flags, evaluated, conditional, tmp_path):
    """After a step, while a checkpoint is written, while the best is kept, and before the export."""
    expected, _ = conditional
    folder = tmp_path / "run"
    flags = [*ldm_flags, *CONDITIONS, *evaluated, "--output_dir", folder, *LATEST]
    chance = random.Random(0)
    kills = [
        ("utils.training.step_log:StepLog.step_done", chance.randint(1, 3)),
        ("utils.training.checkpoints:fsync_path", 2),
        ("utils.training.evaluator:Evaluator._keep", 1),
        ("utils.training.step_log:StepLog.step_done", 6),
        ("utils.crystal.validation:CrystalSamples.save", 1),
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
    same = [
        name
        for name in theirs
        if name.endswith((".safetensors", ".bin", ".png", "evaluations.json", "num_items.json"))
    ]
    assert len(same) >= 12
    assert {name: ours.get(name) for name in same if not name.startswith("samples")} == {
        name: theirs[name] for name in same if not name.startswith("samples")
    }
    assert scalars(folder, "train/loss") == scalars(expected, "train/loss")


def test_two_processes_are_one_batch(ldm_flags, evaluated, tmp_path):
    """The same losses, and weights to 1e-5 of the largest of each tensor; as for images."""
    flags = [*ldm_flags, *CONDITIONS, *evaluated, "--adam_epsilon", 1e-4]
    run(LDM, *flags, "--output_dir", tmp_path / "one")
    run(LDM, *flags, "--train_batch_size", 4, "--output_dir", tmp_path / "two", processes=2)
    one, two = (load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("one", "two"))
    for tag in ("train/loss", "validation/loss"):
        first, second = (scalars(tmp_path / name, tag) for name in ("one", "two"))
        assert list(second.values()) == pytest.approx(list(first.values()), rel=1e-5)
    worst = max(((one[key] - two[key]).abs().max() / one[key].abs().max().clamp(min=1e-3)).item() for key in one)
    assert worst < 1e-5


def test_two_processes_train_one_autoencoder(dataset, vae_run, tmp_path):
    """Weights to a fiftieth of one step's learning rate, as for images."""
    flags = ["--dataset_name", dataset, *TRAIN_VAE, "--max_train_steps", 4, "--adam_epsilon", 1e-3, "--no-use_ema"]
    run(VAE, *flags, "--output_dir", tmp_path / "one")
    run(VAE, *flags, "--train_batch_size", 4, "--output_dir", tmp_path / "two", processes=2)
    one, two = (load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("one", "two"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 2e-5


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_of_an_unconditional_run_learn_a_condition(ldm_flags, unconditional, tmp_path):
    flags = [*ldm_flags[:-2]]  # the run says what its model is
    flags += ["--condition", "property:band_gap", BASE, unconditional, "--lora_rank", 4, "--learning_rate", 1e-2]
    before = snapshot(unconditional)
    run(LDM, *flags, "--eval_steps", 4, "--num_validation_samples", 6, "--output_dir", tmp_path / "run")
    assert snapshot(unconditional) == before
    weights = checkpoint_tensors(tmp_path / "run", 8)
    base = load_crystal_run(unconditional).denoiser.model.state_dict()
    frozen = {name.removeprefix("model.safetensors/model."): tensor for name, tensor in weights.items()
              if name.startswith("model.safetensors/model.") and "lora_" not in name and "pooled" not in name}  # fmt: skip
    assert len(frozen) == len(base)
    for name, tensor in frozen.items():
        assert torch.equal(tensor, base[name.replace(".base_layer", "")]), name
    moved = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    up = [tensor for name, tensor in moved.items() if "lora_B" in name]  # which start at zero
    assert len(up) >= 10
    assert all(tensor.any() for tensor in up)
    for folder in (tmp_path / "run", tmp_path / "run" / "best", tmp_path / "run" / "checkpoint-4"):
        assert not is_adapted(load_crystal_run(folder).denoiser.model)
    values = {"band_gap": torch.tensor([0.5, 3.0])}
    tuned = sampled(tmp_path / "run", values, guidance_scale=2.0)
    assert not torch.equal(tuned, sampled(tmp_path / "run", {}))
    pipeline = load_crystal_run(unconditional, lora_dir=str(tmp_path / "run" / "lora"))
    assert list(pipeline.columns) == ["band_gap"]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    again = pipeline.latents(torch.tensor([5, 8]), values, 3, 2.0, generator=generators)
    # the exported weights are averaged after merging, the adapters before: close, not equal
    assert (again - tuned).abs().max() < 0.1 * tuned.abs().max()


def test_full_fine_tuning_starts_from_the_run(ldm_flags, conditional, tmp_path):
    folder, _ = conditional
    flags = [*ldm_flags[:-2], *CONDITIONS, BASE, folder, "--learning_rate", 1e-9, "--adam_weight_decay", 0]
    run(LDM, *flags, "--max_train_steps", 2, "--output_dir", tmp_path / "run")
    first, last = (load_crystal_run(each).denoiser.state_dict() for each in (folder, tmp_path / "run"))
    assert first.keys() == last.keys()
    for name, tensor in last.items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-6)


def test_fine_tuning_goes_on_in_the_latents_of_its_base(ldm_flags, tmp_path):
    """Whatever mean and std this run would give them by default."""
    others = [*ldm_flags, "--latent_normalisation", "measured"]
    run(LDM, *others, "--max_train_steps", 1, "--output_dir", tmp_path / "base")
    flags = [*ldm_flags[:-2], "--max_train_steps", 1, BASE, tmp_path / "base"]
    assert "latents are normalised as those of" in run(LDM, *flags, "--output_dir", tmp_path / "run").stderr
    base, tuned = (contents(tmp_path / name)["latent_normalisation.json"] for name in ("base", "run"))
    assert tuned == base
    flags += ["--latent_normalisation", "vae", "--output_dir", tmp_path / "others"]
    assert "--latent_normalisation vae: " in refused(run(LDM, *flags, check=False))


def test_a_conditional_run_is_fine_tuned_on_other_data(ldm_flags, caches, conditional, tmp_path):
    """Its conditions keep the mean, the std and the categories that it knows; of other columns it knows nothing."""
    folder, _ = conditional
    flags = [*ldm_flags[2:-2], "--latents_dir", caches["val"], BASE, folder, "--learning_rate", 1e-9]
    flags += [
        "--adam_weight_decay",
        0,
        "--max_train_steps",
        1,
        "--train_batch_size",
        4,
        "--output_dir",
        tmp_path / "run",
    ]
    for asked in (["composition"], ["composition", "property:band_gap", "property:spacegroup"]):
        message = refused(run(LDM, *flags, "--condition", *asked, check=False))
        assert "was trained with band_gap (property), composition (composition), spacegroup (class)" in message
    run(LDM, *flags, *CONDITIONS)
    first, last = (load_crystal_run(each) for each in (folder, tmp_path / "run"))
    assert last.columns == first.columns
    ours, theirs = last.denoiser.state_dict(), first.denoiser.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--condition", "colour:band_gap"], ["--condition colour:band_gap", "property, composition, chemical_system, class"]),
        (["--condition", "property:bandgap"], ["--condition", "no column bandgap", "band_gap"]),
        (["--condition", "property"], ["--condition property", "name the column"]),
        (["--condition", "composition:formula"], ["--condition composition:formula", "write composition alone"]),
        (["--condition", "property:constant"], ["--condition property:constant", "the same everywhere"]),
        (["--condition", "property:nothing"], ["--condition property:nothing", "holds no number"]),
        (["--condition", "class:constant"], ["--condition class:constant", "1 different values"]),
        (["--condition", "property:prototype"], ["--condition property:prototype", "it holds text; use class:prototype"]),
        (["--condition", "property:positions"], ["--condition property:positions", "rename the column"]),
        (["--condition", "composition", "composition"], ["--condition composition", "named twice"]),
        (["--condition", "property:band_gap", "class:band_gap"], ["band_gap is named twice"]),
        (["--validation_inference_steps", 2000], ["--validation_inference_steps 2000"]),
        (["--eval_steps", 2], ["--eval_steps without latents to evaluate on"]),
        (["--early_stopping_patience", 2], ["--early_stopping_patience without --eval_steps"]),
        (["--eval_steps", 2, "--num_validation_samples", NUM_TRAIN], ["--num_validation_samples", "leave some"]),
        (["--lora_rank", 4], ["--lora_rank without --pretrained_model_name_or_path"]),
        (["--model_config", "nowhere.json"], ["--model_config", "nowhere.json does not exist"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)  # fmt: skip
def test_a_denoiser_is_refused(ldm_flags, tmp_path, flags, words):
    message = refused(run(LDM, *ldm_flags, *flags, "--output_dir", tmp_path / "run", check=False))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"patch_size": 2}, ["--model_config", "patch_size 2"]),
        ({"latent_kind": "grid"}, ["--model_config", "latent_kind"]),
        ({"in_channels": 7}, ["--model_config", "in_channels is 7"]),
        ({"hidden_size": 30}, ["--model_config", "hidden_size 30"]),
    ],
    ids=str,
)
def test_an_impossible_model_is_refused(ldm_flags, tmp_path, config, words):
    (tmp_path / "model.json").write_text(json.dumps(DIT_CONFIG | config))
    flags = [*ldm_flags, "--model_config", tmp_path / "model.json", "--output_dir", tmp_path / "run"]
    message = refused(run(LDM, *flags, check=False))
    assert all(word in message for word in words), message


def test_caches_that_are_none(image_folder, tiny_vae, ldm_flags, tmp_path):
    """No --latents_dir, one that does not exist, one of images, for training and as held-out latents; and itself."""
    end, cache = ["--output_dir", tmp_path / "run"], tmp_path / "images"
    images = ["--train_data_dir", image_folder, "--resolution", 16, "--pretrained_vae_model_name_or_path", tiny_vae]
    run(CACHE, *images, "--max_samples", 4, "--latents_dir", cache)
    assert "--latents_dir is required" in refused(run(LDM, *ldm_flags[2:], *end, check=False))
    message = refused(run(LDM, *ldm_flags, "--latents_dir", tmp_path / "nowhere", *end, check=False))
    assert f"--latents_dir: the latent cache {tmp_path / 'nowhere'} does not exist" in message
    message = refused(run(LDM, *ldm_flags, "--latents_dir", cache, *end, check=False))
    assert "--latents_dir" in message
    assert "holds image latents; give a cache of crystals" in message
    flags = [*ldm_flags, "--eval_steps", 2, "--validation_latents_dir"]
    message = refused(run(LDM, *flags, cache, *end, check=False))
    assert "--validation_latents_dir: made with" in message
    message = refused(run(LDM, *flags, ldm_flags[1], *end, check=False))
    assert "this is the cache that is trained on" in message


@pytest.mark.parametrize("script", ["train_class_cond_ldm.py", "train_text_to_image_ldm.py"])
def test_a_cache_of_crystals_is_no_cache_of_images(script, caches, model_flags, tmp_path):
    flags = ["--latents_dir", caches["train"], *model_flags["dit"], "--output_dir", tmp_path / "run"]
    flags += ["--unconditional"] if script.startswith("train_class") else ["--validation_prompts", "red"]
    message = refused(run(script, *flags, "--max_train_steps", 1, check=False))
    assert "--latents_dir" in message
    assert "set" in message or "crystals" in message


def test_a_run_to_start_from_says_what_its_model_is(ldm_flags, unconditional, tmp_path):
    flags = [*ldm_flags[:-2], BASE, unconditional, "--output_dir", tmp_path / "run"]
    for name, value in (("model_size", "S"), ("model_config", ldm_flags[-1])):
        message = refused(run(LDM, *flags, f"--{name}", value, check=False))
        assert f"--{name} with {BASE}: the run says what its model is" in message
    message = refused(run(LDM, *flags, "--prediction_type", "epsilon", check=False))
    assert "was trained with flow; leave it out" in message


def test_a_run_of_other_latents_is_no_start(dataset, vae_run, ldm_flags, unconditional, tiny_vae, tmp_path):
    """Of another autoencoder of crystals, or of images."""
    flags = [*ldm_flags[:-2], "--output_dir", tmp_path / "run", BASE]
    args = cache_args(dataset, other_vae(vae_run, tmp_path / "other"))
    build_crystal_cache(args, Accelerator(cpu=True), tmp_path / "cache")
    message = refused(run(LDM, *flags, unconditional, "--latents_dir", tmp_path / "cache", check=False))
    assert f"{BASE}: {unconditional} knows latents of another VAE" in message
    images = tmp_path / "images"
    shutil.copytree(unconditional / "conditions", images / "conditions")
    shutil.copytree(unconditional / "scheduler", images / "scheduler")
    shutil.copytree(tiny_vae, images / "vae")
    DiT(**DIT_CONFIG, sample_size=4).save_pretrained(images / "transformer")
    (images / "model_index.json").write_text("{}")
    message = refused(run(LDM, *flags, images, check=False))
    assert "knows grid latents of 4 channels, and --latents_dir has sets of 4" in message


def test_an_autoencoder_that_changed_is_noticed(dataset, vae_run, ldm_flags, tmp_path):
    """Where its folder holds other weights, or is gone; training says so before it writes anything."""
    shutil.copytree(vae_run / "vae", tmp_path / "own" / "vae")
    args = cache_args(dataset, tmp_path / "own")
    build_crystal_cache(args, Accelerator(cpu=True), tmp_path / "cache")
    flags = [*ldm_flags, "--latents_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"]
    shutil.rmtree(tmp_path / "own")
    other_vae(vae_run, tmp_path / "own")
    assert "has other weights than when the latents were computed" in refused(run(LDM, *flags, check=False))
    shutil.rmtree(tmp_path / "own")
    message = refused(run(LDM, *flags, check=False))
    assert "--latents_dir" in message  # for this script has no flag for an autoencoder
    assert str(tmp_path / "own") in message
    assert not (tmp_path / "run").exists()


def test_a_cache_is_refused(cache_flags, dataset, vae_run, tiny_vae, tmp_path):
    end = ["--latents_dir", tmp_path / "cache"]
    cases = {
        ("--max_atoms", 9): [f"--max_atoms 9: the VAE was trained with up to {MAX_ATOMS} atoms"],
        ("--max_atoms", 1): ["--dataset_name", "cannot be used", "--max_atoms"],
        ("--dataset_name", tmp_path / "nowhere.parquet"): ["--dataset_name", "nowhere.parquet does not exist"],
        ("--dataset_split", "other"): ["--dataset_name", "no rows of split other", "test, train, val"],
        ("--pretrained_vae_model_name_or_path", tiny_vae): ["--pretrained_vae_model_name_or_path", "no CrystalVAE"],
        ("--pretrained_vae_model_name_or_path", tmp_path / "no" / "vae"): ["--pretrained_vae_model_name_or_path", "exist"],
        ("--num_translations", 0): ["--num_translations", "at least 1"],
    }  # fmt: skip
    for flags, words in cases.items():
        message = refused(run(CACHE, *cache_flags, *flags, *end, check=False))
        assert all(word in message for word in words), message
    assert "--latents_dir is required" in refused(run(CACHE, *cache_flags, check=False))
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "letter.txt").write_text("dear")
    assert "is not empty and holds no latent cache" in refused(run(CACHE, *cache_flags, *end, check=False))


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


def test_going_on_as_another_run_is_refused(ldm_flags, evaluated, conditional, tmp_path):
    folder, _ = conditional
    before = snapshot(folder)
    flags = [*ldm_flags, *evaluated, "--output_dir", folder, *LATEST]
    message = refused(run(LDM, *flags, "--condition", "composition", "property:band_gap", check=False))
    assert "was trained with" in message
    message = refused(run(LDM, *flags, *CONDITIONS, "--prediction_type", "epsilon", check=False))
    assert "prediction_type = v_prediction" in message
    assert snapshot(folder) == before


HELP = {
    (VAE,): ["--dataset_name", "--max_atoms", "--latent_channels", "--kl_weight", "--random_translation", "--use_ema"],
    (CACHE, "--modality", "crystal"): ["--num_translations", "--max_atoms", "--encode_batch_size", "--latents_dir"],
    (LDM,): ["--condition", "--cond_drop_prob", "--early_stopping_patience", "--lora_rank", "--prediction_type",
             "--validation_guidance_scale", "--model_size", BASE],
}  # fmt: skip


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_lists_the_flags(command):
    text = run(*command, "--help").stdout
    assert all(flag in text for flag in (*HELP[command], "--config", "--seed")), text


RECIPES = {path.stem: path for path in sorted((ROOT / "configs").glob("crystal/*.yaml"))}


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("_model")])
def test_recipes_are_accepted(monkeypatch, name):
    """By the script that their name says; a model's own file by the model."""
    script = importlib.import_module("train_crystal_vae" if name.endswith("_vae") else "train_crystal_ldm")
    flags = ["--config", str(RECIPES[name]), "--output_dir", "o"]
    flags += (
        ["--dataset_name", "d"] if name.endswith("_vae") else ["--latents_dir", "l", "--validation_latents_dir", "v"]
    )
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    args = script.parse_args()
    if not name.endswith("_vae"):
        config = yaml.safe_load((ROOT / args.model_config).read_text())
        assert DiT(latent_kind="set", patch_size=1, **config).config.hidden_size == config["hidden_size"]
