"""train_expression_ldm.py: runs with conditions, kills, objectives, and fine-tuning."""

from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.cells.runs import BASE, CONDITIONS, GENES, LATEST, LDM, NUM_TRAIN, check_killed, without
from tests.support.processes import checkpoint_tensors, contents, differing, refused, run, scalars, snapshot
from utils.draws import SampleDraws, StreamOrder
from utils.expression.cache import VectorCache
from utils.expression.pipeline import load_columns, load_run
from utils.models.dit import DiT
from utils.models.vector_mlp import VectorMLP
from utils.training.lora import is_adapted

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")


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
    exported = load_run(folder).denoiser.state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in average.items())
    columns = load_columns(folder / "training_columns.parquet")
    assert Counter(columns["cell_type"]) == Counter(VectorCache(caches["train"]).column("cell_type", "class"))
    for each in (folder, folder / "best", folder / "checkpoint-4"):
        pipeline = load_run(each)
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


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_other_objectives(ldm_flags, models, tmp_path, kind, sample):
    """Unconditional, and with rows held out; of a transformer, with snapshots, in bf16."""
    extra = {"epsilon": [*models["dit"], "--snr_gamma", 5, "--ema_sigma_rels", 0.1, "--ema_snapshot_steps", 1,
                         "--mixed_precision", "bf16", "--gradient_checkpointing"],
             "sample": ["--latent_normalisation", "measured", "--num_validation_cells", 1]}[kind]  # fmt: skip
    flags = [*ldm_flags, "--max_train_steps", 2, "--eval_steps", 1, "--num_validation_samples", 6, *extra]
    log = run(LDM, *flags, "--prediction_type", kind, "--output_dir", tmp_path / "run").stderr
    assert f"{NUM_TRAIN - 6} samples in the data" in log
    pipeline = load_run(tmp_path / "run")
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


# ---- adapters


def test_adapters_of_an_unconditional_run_learn_a_condition(sample, ldm_flags, unconditional, data, tmp_path):
    flags = [*without(ldm_flags, "--architecture", "--model_config"), "--learning_rate", 1e-2]
    flags += ["--condition", "class:cell_type", BASE, unconditional, "--lora_rank", 4]
    flags += ["--eval_steps", 4, "--num_validation_samples", 6]
    before = snapshot(unconditional)
    run(LDM, *flags, "--output_dir", tmp_path / "run")
    assert snapshot(unconditional) == before
    weights = checkpoint_tensors(tmp_path / "run", 8)
    base = load_run(unconditional).denoiser.model.state_dict()
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
        assert not is_adapted(load_run(folder).denoiser.model)
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
    first, last = (load_run(each) for each in (conditional[0], tmp_path / "run"))
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
