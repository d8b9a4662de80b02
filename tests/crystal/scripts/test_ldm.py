"""train_crystal_ldm.py: runs with and without conditions, kills, two processes, adapters, and what is refused."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.support.crystals.runs import (
    BASE,
    CACHE,
    CONDITIONS,
    GAPS,
    LATEST,
    LDM,
    MAX_ATOMS,
    NUM_TRAIN,
    cache_args,
    other_vae,
    sampled,
)
from tests.support.models import DIT_CONFIG
from tests.support.processes import (
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
from utils.crystal.cache import SetCache
from utils.crystal.data.table import load_crystals
from utils.crystal.pipeline import load_run
from utils.crystal.precompute import build_cache
from utils.crystal.validation import CrystalSamples
from utils.diffusion.guidance import Guidance
from utils.draws import SampleDraws, StreamOrder, uniform_draws
from utils.files import fsync_path
from utils.models.dit import DiT
from utils.training import checkpoints
from utils.training.evaluator import Evaluator
from utils.training.lora import is_adapted
from utils.training.step_log import StepLog

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
        pipeline = load_run(each)
        assert list(pipeline.columns) == ["band_gap", "composition", "spacegroup"]
        assert pipeline.num_items == {2: 15, 5: 14, 8: 15}
    values = {"band_gap": torch.tensor([1.0, 2.0]), "spacegroup": torch.tensor([0, 1])}
    both = sampled(folder, values, guidance_scale=2.0)
    assert not torch.equal(both, sampled(folder, {}))
    assert not torch.equal(both, sampled(folder, {"band_gap": values["band_gap"]}, guidance_scale=2.0))


def test_the_exported_weights_are_the_average(conditional):
    folder, _ = conditional
    average = load_file(folder / "checkpoint-8" / "ema.safetensors")
    exported = load_run(folder).denoiser.state_dict()
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
    assert not load_run(tmp_path / "run").columns
    sampled(tmp_path / "run", {})
    if kind == "epsilon":
        load_run(tmp_path / "run", ema_sigma_rel=0.1)


def test_flow_trains_and_samples(unconditional):
    losses = list(scalars(unconditional, "train/loss").values())
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    sampled(unconditional, {})


def test_the_first_loss(unconditional, caches):
    """A new model predicts zero: the mean over the real atoms of each crystal of what it should predict, noise minus
    latents; padding has no part in it."""
    cache, positions = SetCache(caches["train"]), np.arange(8)
    rows = StreamOrder(0, NUM_TRAIN).rows(positions)
    batch = cache.gather(rows, lambda name: uniform_draws(0, name, positions))
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
        load_run(folder)
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
        SignalAt(StepLog.step_done, chance.randint(1, 3)),
        SignalAt(fsync_path, 2, within=checkpoints),
        SignalAt(Evaluator._keep, 1),
        SignalAt(StepLog.step_done, 6),
        SignalAt(CrystalSamples.save, 1),
    ]
    for fault in kills:
        running = start(LDM, *flags, fault=fault)
        assert running.wait_for_kill(), (fault, running.wait().stderr)
        assert not (folder / "model_index.json").exists()
    assert "resuming from" in run(LDM, *flags).stderr
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


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_of_an_unconditional_run_learn_a_condition(ldm_flags, unconditional, tmp_path):
    flags = [*ldm_flags[:-2]]  # the run says what its model is
    flags += ["--condition", "property:band_gap", BASE, unconditional, "--lora_rank", 4, "--learning_rate", 1e-2]
    before = snapshot(unconditional)
    run(LDM, *flags, "--eval_steps", 4, "--num_validation_samples", 6, "--output_dir", tmp_path / "run")
    assert snapshot(unconditional) == before
    weights = checkpoint_tensors(tmp_path / "run", 8)
    base = load_run(unconditional).denoiser.model.state_dict()
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
        assert not is_adapted(load_run(folder).denoiser.model)
    values = {"band_gap": torch.tensor([0.5, 3.0])}
    tuned = sampled(tmp_path / "run", values, guidance_scale=2.0)
    assert not torch.equal(tuned, sampled(tmp_path / "run", {}))
    pipeline = load_run(unconditional, lora_dir=str(tmp_path / "run" / "lora"))
    assert list(pipeline.columns) == ["band_gap"]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    guidance = Guidance(2.0, num_inference_steps=3)
    again = pipeline.latents(torch.tensor([5, 8]), values, guidance, generator=generators)
    # the exported weights are averaged after merging, the adapters before: close, not equal
    assert (again - tuned).abs().max() < 0.1 * tuned.abs().max()


def test_full_fine_tuning_starts_from_the_run(ldm_flags, conditional, tmp_path):
    folder, _ = conditional
    flags = [*ldm_flags[:-2], *CONDITIONS, BASE, folder, "--learning_rate", 1e-9, "--adam_weight_decay", 0]
    run(LDM, *flags, "--max_train_steps", 2, "--output_dir", tmp_path / "run")
    first, last = (load_run(each).denoiser.state_dict() for each in (folder, tmp_path / "run"))
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
    first, last = (load_run(each) for each in (folder, tmp_path / "run"))
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
    build_cache(args, Accelerator(cpu=True), tmp_path / "cache")
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
    build_cache(args, Accelerator(cpu=True), tmp_path / "cache")
    flags = [*ldm_flags, "--latents_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"]
    shutil.rmtree(tmp_path / "own")
    other_vae(vae_run, tmp_path / "own")
    assert "has other weights than when the latents were computed" in refused(run(LDM, *flags, check=False))
    shutil.rmtree(tmp_path / "own")
    message = refused(run(LDM, *flags, check=False))
    assert "--latents_dir" in message  # for this script has no flag for an autoencoder
    assert str(tmp_path / "own") in message
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
