"""train_expression_ldm.py --joint_vae: both models learn together."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.cells.runs import (
    BASE,
    CACHE,
    CELLS,
    CHANNELS,
    GENES,
    LATEST,
    LDM,
    MLP_CONFIG,
    NUM_TRAIN,
    cache_flags,
    check_killed,
    table_of,
    without,
)
from tests.support.processes import SignalAt, contents, differing, refused, run, scalars, start
from utils.diffusion.denoiser import ConditionalDenoiser, JointDenoiser
from utils.draws import SampleDraws
from utils.errors import UserError
from utils.expression.cache import JointCache, VectorCache, encode_jointly
from utils.expression.codec import load_expression_vae
from utils.expression.data.h5ad import write_h5ad
from utils.expression.data.source import open_cells
from utils.expression.pipeline import load_run
from utils.latents.spec import LatentSpec
from utils.models.vector_mlp import VectorMLP
from utils.training.setup import announce

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")


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
    pipelines = [load_run(each) for each in (folder, folder / "checkpoint-8", folder / "checkpoint-4")]
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
    vae = load_expression_vae(str(vae_run)).requires_grad_(True)
    cache = JointCache(caches["train"], source=open_cells(str(data.few), None), vae=vae)
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


def test_cells_are_found_by_name(data, caches, tmp_path):
    """In whatever order a file has them; and another file, or other counts, are refused."""

    def opened(path, layer=None):
        return JointCache(caches["train"], source=open_cells(str(path), layer))

    rows, expected = np.arange(NUM_TRAIN), opened(data.few)
    ids = expected.cell_ids
    np.testing.assert_array_equal(expected.gather(rows)["counts"], data.adata[ids].X.toarray())
    write_h5ad(data.adata[np.random.default_rng(0).permutation(CELLS)].copy(), tmp_path / "moved.h5ad")
    moved = opened(tmp_path / "moved.h5ad")
    for name, values in expected.gather(rows).items():
        assert torch.equal(moved.gather(rows)[name], values), name
    write_h5ad(data.adata[200:].copy(), tmp_path / "part.h5ad")
    with pytest.raises(UserError, match=r"--dataset_name: \d+ of 490 cells of the latent cache are not in"):
        opened(tmp_path / "part.h5ad")
    other = data.adata.copy()
    other.layers["twice"] = other.X * 2
    write_h5ad(other, tmp_path / "other.h5ad")
    with pytest.raises(UserError, match=r"490 cells of .* have other counts than in the latent cache, .*--counts_"):
        opened(tmp_path / "other.h5ad", "twice")


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
    assert start(LDM, *flags, "--max_train_steps", 12, fault=SignalAt(announce, 1)).wait_for_kill()
    assert contents(tmp_path / "run" / "vae") == before
    run(LDM, *flags, "--max_train_steps", 12)
    assert contents(tmp_path / "run" / "vae") != before
