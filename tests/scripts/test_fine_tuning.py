"""Fine-tuning in the scripts: runs that start from a base, by adapters or in full."""

import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.models import TRAIN_FLAGS
from tests.support.processes import SignalAt, contents, refused, run, start
from utils.args.checks import check_lora_args
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.objectives import OBJECTIVES, training_scheduler
from utils.errors import UserError
from utils.image import networks as build
from utils.image.cache import ImageCache
from utils.image.pipeline import load_run
from utils.training import lora
from utils.training.held_out import hold_out, validation_losses
from utils.training.step_log import StepLog

TEXT, CLASS = "train_text_to_image_ldm.py", "train_class_cond_ldm.py"

FLAG = "--pretrained_model_name_or_path"


# ---- flags -----------------------------------------------------------------------------------------------------------


def test_sharded_training_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = Namespace(
        lora_rank=4, pretrained_model_name_or_path="x", optimizer="adamw", ema_sigma_rels=None, given=set()
    )
    with pytest.raises(UserError, match="--lora_rank under FSDP"):
        check_lora_args(args)


# ---- the scripts -----------------------------------------------------------------------------------------------------


TUNE = ["--max_train_steps", 8, "--checkpointing_steps", 4, "--train_batch_size", 4, "--learning_rate", 1e-2]
TUNE += ["--lr_warmup_steps", 0, "--num_validation_images", 1, "--validation_inference_steps", 2, "--ema_decay", 0.5]

STEPS_OF_BASE = 60

LATEST = ["--resume_from_checkpoint", "latest"]

SAMPLE = ["--num_images_per_prompt", 1, "--num_inference_steps", 3, "--guidance_scale", 2]


@pytest.fixture(scope="module")
def bases(cache, model_flags, tmp_path_factory):
    """Trained runs to start from: an unconditional DiT of flow, a class-conditional one, and a text U-Net."""
    folder = tmp_path_factory.mktemp("bases")
    shared = ["--latents_dir", cache, *TRAIN_FLAGS, "--learning_rate", 5e-3, "--ema_decay", 0.8]
    shared += ["--max_train_steps", STEPS_OF_BASE, "--checkpointing_steps", STEPS_OF_BASE // 2]
    grids = ["--num_validation_images", 1, "--validation_inference_steps", 2]
    flow = [*model_flags["dit"], "--prediction_type", "flow", *grids]
    run(CLASS, *shared, *flow, "--unconditional", "--output_dir", folder / "none")
    run(CLASS, *shared, *flow, "--output_dir", folder / "class")
    text = [*model_flags["unet"], "--prediction_type", "epsilon", "--max_train_steps", 16, "--checkpointing_steps", 16]
    run(TEXT, *shared, *text, "--output_dir", folder / "text")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tuned(cache, bases, tmp_path_factory):
    """Fine-tuned runs of all three, the unconditional one with classes."""
    folder = tmp_path_factory.mktemp("tuned")
    flags = ["--latents_dir", cache, *TUNE, "--lora_rank", 4, "--lora_alpha", 8]
    held_out = ["--eval_steps", 4, "--num_validation_samples", 12]
    run(CLASS, *flags, *held_out, FLAG, bases["none"], "--output_dir", folder / "none")
    run(CLASS, *flags, FLAG, bases["class"], "--output_dir", folder / "class")
    run(TEXT, *flags, "--validation_prompts", "red", FLAG, bases["text"], "--output_dir", folder / "text")
    return {path.name: path for path in folder.iterdir()}


def denoiser_of(path) -> ConditionalDenoiser:
    pipeline = load_run(path)
    return ConditionalDenoiser(pipeline.denoiser, pipeline.conditions)


@pytest.mark.parametrize("name", ["none", "class", "text"])
def test_a_fine_tuned_run_is_a_run(bases, tuned, name, tmp_path):
    """Its weights are the base's with the adapters merged into them, and sample.py makes the same picture of the run, of
    its last checkpoint and, where the base has all that is needed, of the base with the adapters."""
    component = "unet" if name == "text" else "transformer"
    folder, base = tuned[name], bases[name]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (folder / "lora").iterdir()}
    exported = load_file(folder / component / "diffusion_pytorch_model.safetensors")
    start = load_file(base / component / "diffusion_pytorch_model.safetensors")
    assert not any("lora" in key or "base_layer" in key for key in exported)
    assert exported.keys() - start.keys() == (
        {"pooled_embed.weight", "pooled_embed.bias"} if name == "none" else set()
    )
    changed = {key for key in start if not torch.equal(exported[key], start[key])}
    adapted = {key for key in load_file(folder / "lora" / "adapter_model.safetensors") if "lora_A" in key}
    assert changed == {key.removeprefix("base_model.model.").replace(".lora_A", "") for key in adapted}
    frozen = load_file(folder / "checkpoint-8" / "model.safetensors")
    for key, tensor in start.items():  # the base itself, to the last bit
        layer, _, kind = f"model.{key}".rpartition(".")
        assert torch.equal(tensor, frozen.get(f"{layer}.{kind}", frozen.get(f"{layer}.base_layer.{kind}")))
    average = load_file(folder / "checkpoint-8" / "ema.safetensors")
    assert all(".lora_" in key or "conditions." in key or "pooled_embed" in key for key in average)
    assert (folder / "samples" / "step-0000008.png").is_file()
    assert "Fine-tuned from" in (folder / "README.md").read_text()
    loss = yaml.safe_load((folder / "args.yaml").read_text())
    assert (loss["model"], loss["prediction_type"]) == (("unet", "epsilon") if name == "text" else ("dit", "flow"))

    asked = ["--prompt", "red"] if name == "text" else ["--class_labels", 2]
    sources = {"run": ["--model", folder], "checkpoint": ["--model", folder / "checkpoint-8"]}
    sources |= {"adapters": ["--model", base, "--lora", folder / "lora"]}
    sources |= {"earlier": ["--model", folder / "checkpoint-4"]} | (
        {} if name == "none" else {"base": ["--model", base]}
    )
    for source, flags in sources.items():
        run("sample.py", *flags, *asked, *SAMPLE, "--output_dir", tmp_path / source)
    pictures = {source: np.asarray(Image.open(tmp_path / source / "00000.png"), dtype=int) for source in sources}
    assert np.abs(pictures["run"] - pictures["checkpoint"]).max() <= 1
    assert np.abs(pictures["run"] - pictures["adapters"]).max() <= 1
    for other in pictures.keys() & {"base", "earlier"}:
        assert np.abs(pictures["run"] - pictures[other]).max() > 1, other


def test_the_best_of_a_fine_tuned_run_is_merged_too(tuned):
    best = load_file(tuned["none"] / "best" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert best.keys() == load_file(tuned["none"] / "transformer" / "diffusion_pytorch_model.safetensors").keys()
    assert (tuned["none"] / "best" / "lora" / "adapter_model.safetensors").is_file()
    load_run(tuned["none"] / "best")


def test_a_fine_tuned_text_unet_is_a_stock_pipeline(tuned):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tuned["text"])
    assert not lora.is_adapted(pipeline.unet)
    ours = denoiser_of(tuned["text"]).model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in pipeline.unet.state_dict().items())


def test_fine_tuning_lowers_the_validation_loss(cache, bases, tuned):
    """Of the same held-out latents, noise and timesteps, in the unconditional run that was fine-tuned with labels."""
    held_out = hold_out(ImageCache(cache), 12)
    objective = OBJECTIVES["flow"](training_scheduler("flow"))
    losses = {
        name: sum(validation_losses(Accelerator(cpu=True), denoiser_of(path), held_out, objective, batch_size=12))
        for name, path in {"base": bases["none"], "tuned": tuned["none"]}.items()
    }
    assert losses["tuned"] < losses["base"], losses


@pytest.mark.parametrize("name", ["none", "text"])
def test_killed_and_resumed_is_bit_identical(cache, bases, tuned, tmp_path, name):
    script = TEXT if name == "text" else CLASS
    flags = ["--latents_dir", cache, *TUNE, "--lora_rank", 4, "--lora_alpha", 8, FLAG, bases[name], *LATEST]
    flags += ["--validation_prompts", "red"] if name == "text" else ["--eval_steps", 4, "--num_validation_samples", 12]
    flags += ["--output_dir", tmp_path / "run"]
    assert start(script, *flags, fault=SignalAt(StepLog.step_done, 6)).wait_for_kill()
    assert not (tmp_path / "run" / "lora" / "adapter_model.safetensors").exists()
    load_run(tmp_path / "run")  # its checkpoint: adapters and all
    run(script, *flags)
    ours, theirs = contents(tmp_path / "run"), contents(tuned[name])
    same = [key for key in theirs if key.endswith((".safetensors", ".bin")) and "/vae/" not in key]
    assert len(same) >= 8
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    message = refused(run(script, *flags, "--lora_alpha", 4, check=False))
    assert "LoRA = rank 4, alpha 8" in message
    assert "this run has rank 4, alpha 4" in message


def test_two_processes_train_what_one_trains(cache, bases, tuned, tmp_path):
    flags = ["--latents_dir", cache, *TUNE, "--lora_rank", 4, "--lora_alpha", 8, FLAG, bases["class"]]
    run(CLASS, *flags, "--train_batch_size", 2, "--output_dir", tmp_path / "run", processes=2)
    ours, theirs = (
        load_file(path / "lora" / "adapter_model.safetensors") for path in (tmp_path / "run", tuned["class"])
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("source", [".", f"checkpoint-{STEPS_OF_BASE // 2}"])
def test_full_fine_tuning(cache, bases, tmp_path, source):
    """Without a rank every weight, the labels' too, moves from where the base's was: nowhere, at this rate."""
    flags = ["--latents_dir", cache, *TUNE, FLAG, bases["class"] / source, "--learning_rate", 1e-9]
    result = run(CLASS, *flags, "--output_dir", tmp_path / "run", "--adam_weight_decay", 0)
    assert "another VAE" not in result.stderr
    assert not (tmp_path / "run" / "lora").exists()
    start, end = (denoiser_of(path).state_dict() for path in (bases["class"] / source, tmp_path / "run"))
    for name, tensor in end.items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=1e-6)


def test_an_unconditional_run_learns_text(cache, bases, tmp_path):
    """In bf16 and with gradient checkpointing; the adapters alone do not make the base a model of text."""
    flags = ["--latents_dir", cache, *TUNE, "--validation_prompts", "red", FLAG, bases["none"], "--lora_rank", 2]
    run(TEXT, *flags, "--output_dir", tmp_path / "run", "--mixed_precision", "bf16", "--gradient_checkpointing")
    run("sample.py", "--model", tmp_path / "run", "--prompt", "red", *SAMPLE)
    asked = ["--model", bases["none"], "--lora", tmp_path / "run" / "lora", "--prompt", "red"]
    assert "needs a text encoder" in refused(run("sample.py", *asked, *SAMPLE, check=False))


def test_latents_of_another_vae_are_noticed(cache, bases, tmp_path, caplog):
    """With other weights in its decoder; those next to the latents change when a normalisation is folded into them."""
    spec = ImageCache(cache).spec
    shutil.copytree(bases["none"], tmp_path / "run")
    file = tmp_path / "run" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for key, is_noticed in {"post_quant_conv.weight": False, "decoder.conv_in.weight": True}.items():
        save_file(weights | {key: 2 * weights[key]}, file)
        build.check_latents(denoiser_of(bases["none"]), tmp_path / "run", spec)
        assert ("another VAE" in caplog.text) == is_noticed


def test_a_run_goes_on_in_the_latents_of_its_base(cache, model_flags, tmp_path):
    """Whatever mean and std they have by default: the base was trained in others. The VAE into which they are folded
    is the base's then.
    """
    flags = ["--latents_dir", cache, *TUNE, "--prediction_type", "flow", "--max_train_steps", 2]
    run(CLASS, *flags, *model_flags["dit"], "--latent_normalisation", "measured", "--output_dir", tmp_path / "base")
    flags += [FLAG, tmp_path / "base"]
    result = run(CLASS, *flags, "--output_dir", tmp_path / "run")
    assert "latents are normalised as those of" in result.stderr
    file = "vae/diffusion_pytorch_model.safetensors"
    ours, theirs = (load_file(tmp_path / name / file) for name in ("run", "base"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)
    again = [*flags, "--latent_normalisation"]
    run(CLASS, *again, "measured", "--output_dir", tmp_path / "the same")
    refusal = refused(run(CLASS, *again, "vae", "--output_dir", tmp_path / "others", check=False))
    assert "--latent_normalisation vae: " in refusal


@pytest.mark.parametrize(("base", "script", "flags", "message"), [
    ("class", CLASS, ["--model", "dit", "--model_size", "B/2"], "--model_size: num_layers 12, but the run to start from has 2"),
    ("text", TEXT, ["--model", "dit"], "--model dit: .* was trained with unet; leave it out"),
    ("class", CLASS, ["--prediction_type", "epsilon"], "--prediction_type epsilon: .* was trained with flow"),
    ("class", CLASS, ["--unconditional"], "trained with ClassCondition, this run with NoCondition"),
    ("class", TEXT, ["--validation_prompts", "red"], "trained with ClassCondition, this run with TextCondition"),
    ("class", CLASS, ["--lora_target_modules", "to_k"], "no layer of this DiT ends with to_k"),
])  # fmt: skip
def test_what_the_base_decides_is_not_asked_otherwise(cache, bases, tmp_path, base, script, flags, message):
    flags = ["--latents_dir", cache, *TUNE, "--lora_rank", 4, FLAG, bases[base], *flags]
    assert re.search(message, refused(run(script, *flags, "--output_dir", tmp_path / "run", check=False)))
    assert not (tmp_path / "run" / "args.yaml").exists()
