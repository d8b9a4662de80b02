"""precompute_latents.py on crystals: what a cache holds, when it is refused or found, kills, and columns as conditions."""

import shutil
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
from accelerate import Accelerator

from tests.support.crystals.runs import CACHE, MAX_ATOMS, NUM_TRAIN, cache_args, encoded, other_vae, rows_of_crystals
from tests.support.processes import SignalAt, contents, refused, run, snapshot, start
from utils.crystal.cache import SetCache, describe_condition
from utils.crystal.codec import load_crystal_vae
from utils.crystal.data.table import load_crystals
from utils.crystal.precompute import build_cache, encode_rows
from utils.draws import SampleDraws
from utils.errors import UserError
from utils.latents.spec import LatentSpec
from utils.latents.writer import found_or_made

# ---- the cache -------------------------------------------------------------------------------------------------------


def translated(cache, rows, share):
    """The latents of the one among the stored translations of each row in whose part of [0, 1) `share` lies."""
    return cache.gather(rows, {"flip": np.full(len(rows), 1 - share)}.__getitem__)["latents"]


def check_cache(folder, vae, table, seed, num_translations):
    """Each row of a cache against the autoencoder, one crystal at a time and without padding."""
    cache = SetCache(folder)
    assert len(cache) == len(table)
    rows = np.arange(len(table))
    for number in range(num_translations):
        moments = translated(cache, rows, (number + 0.5) / num_translations)
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
    variants = [translated(cache, np.arange(5), x) for x in (0.1, 0.5, 0.9)]
    assert not torch.allclose(variants[0], variants[1], atol=1e-4)
    assert not torch.allclose(variants[1], variants[2], atol=1e-4)
    assert cache.normalisation.mean == tuple(torch.tensor(vae.config.latents_mean).tolist())
    batch = cache.gather(np.arange(len(cache)))
    assert batch["attention_mask"].sum(dim=1).tolist() == table.num_atoms.tolist()
    measured = SetCache(caches["train"], "measured").normalisation
    moments = torch.cat([translated(cache, np.arange(len(cache)), x) for x in (0.1, 0.5, 0.9)])
    atoms = moments.transpose(1, 2)[batch["attention_mask"].repeat(3, 1)].double()  # (atoms, 2, D)
    np.testing.assert_allclose(measured.mean, atoms[:, 0].mean(dim=0), atol=1e-5)
    expected = (atoms[:, 0].var(dim=0, correction=0) + atoms[:, 1].square().mean(dim=0)).sqrt()
    np.testing.assert_allclose(measured.std, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def small_cache(dataset, vae_run, tmp_path_factory):
    """Of ten crystals that are not moved."""
    folder = tmp_path_factory.mktemp("small") / "cache"
    build_cache(cache_args(dataset, vae_run), Accelerator(cpu=True), folder)
    return folder


def test_one_translation_is_none(small_cache, dataset, vae_run):
    table = load_crystals(str(dataset), "train", MAX_ATOMS, max_samples=10)
    check_cache(small_cache, load_crystal_vae(str(vae_run)), table, 0, 1)
    assert LatentSpec.read(small_cache).variants() == ["latents"]


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
        build_cache(args, Accelerator(cpu=True), small_cache)
    assert snapshot(small_cache) == before
    identity = build_cache(args, Accelerator(cpu=True), tmp_path / "cache").identity()
    assert identity != LatentSpec.read(small_cache).identity()


def test_a_finished_cache_is_found(small_cache, dataset, vae_run, tmp_path):
    """By the same weights under another path; and a cache begun with the data changed under it is another one."""
    shutil.copytree(vae_run, tmp_path / "moved")
    args = cache_args(dataset, tmp_path / "moved")
    spec = build_cache(args, Accelerator(cpu=True), small_cache)
    assert spec.identity() == LatentSpec.read(small_cache).identity()
    rows = pq.read_table(dataset).to_pydict()
    rows["band_gap"][1] += 0.5
    pq.write_table(pa.table(rows), tmp_path / "changed.parquet")
    changed = build_cache(cache_args(tmp_path / "changed.parquet", vae_run), Accelerator(cpu=True), tmp_path / "cache")
    assert changed.fingerprint["dataset"]["sha256"] != spec.fingerprint["dataset"]["sha256"]


def test_killed_and_started_again(cache_flags, caches, tmp_path):
    """While the second shard is made; not with other flags."""
    flags = [*cache_flags, "--latents_dir", tmp_path / "cache"]
    assert start(CACHE, *flags, fault=SignalAt(encode_rows, 4)).wait_for_kill()
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
