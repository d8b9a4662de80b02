"""precompute_latents.py on cells: what a cache holds, and a cache that was killed."""

import numpy as np
import pytest
import torch

from tests.support.cells.runs import CACHE, NUM_TRAIN, NUM_VAL, cache_flags, split_of
from tests.support.processes import SignalAt, contents, refused, run, snapshot, start
from utils.draws import SampleDraws
from utils.expression import precompute
from utils.expression.cache import VectorCache
from utils.expression.codec import encode_cells, load_expression_vae
from utils.files import replace_durably

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")


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
    assert start(CACHE, *flags, fault=SignalAt(replace_durably, 1)).wait_for_kill()  # with no plan.json
    assert start(CACHE, *flags, fault=SignalAt(encode_cells, 4, within=precompute)).wait_for_kill()
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
