"""The scripts run as a user runs them, on tiny models: what they leave behind, and that it loads."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.support.models import GRID_FLAGS, TRAIN_FLAGS
from tests.support.processes import dropout_seeds, run, run_script
from utils.draws import keys


def test_run_folder_is_complete(text_run):
    names = {path.name for path in text_run.iterdir()}
    assert {
        "args.yaml",
        "logs",
        "samples",
        "model_index.json",
        "unet",
        "vae",
        "scheduler",
        "text_encoder",
        "README.md",
    } <= names
    assert (text_run / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert sorted(path.name for path in text_run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert not list(text_run.glob(".tmp*"))
    assert Image.open(text_run / "samples" / "step-0000008.png").size[1] >= 128
    assert list(text_run.glob("logs/**/events.out.tfevents*"))


def test_exported_weights_are_the_average(text_run):
    averaged = load_file(text_run / "checkpoint-8" / "ema.safetensors")
    exported = load_file(text_run / "unet" / "diffusion_pytorch_model.safetensors")
    last = load_file(text_run / "checkpoint-8" / "model.safetensors")
    for name, weight in exported.items():
        assert torch.equal(weight, averaged[f"model.{name}"])
    assert any(not torch.equal(weight, last[f"model.{name}"]) for name, weight in exported.items())


def test_args_yaml_repeats_the_run(text_run, tmp_path):
    """The written arguments, as a config file, give the same weights bit for bit."""
    again = tmp_path / "again"
    run_script("train_text_to_image_ldm.py", "--config", text_run / "args.yaml", "--output_dir", again)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (again / name).read_bytes() == (text_run / name).read_bytes()


def test_stable_diffusion_pipeline_gives_the_same_image(text_run, tmp_path):
    """A text-to-image U-Net loads with the stock pipeline, and its image is that of sample.py, shift of the VAE included."""
    from diffusers import StableDiffusionPipeline

    flags = ["--num_inference_steps", 5, "--guidance_scale", 3, "--seed", 7, "--num_images_per_prompt", 1]
    run("sample.py", "--model", text_run, "--prompt", "a red square", *flags, "--output_dir", tmp_path / "s")
    ours = np.asarray(Image.open(tmp_path / "s" / "00000.png"), dtype=int)
    pipeline = StableDiffusionPipeline.from_pretrained(text_run)
    stock = pipeline(
        "a red square",
        num_inference_steps=5,
        guidance_scale=3,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert np.abs(ours - np.asarray(stock, dtype=int)).max() <= 2
    assert ours.std() > 1  # not a blank image


def test_diffusion_pipeline_loads_a_dit_run(class_run, tmp_path):
    """A class-conditional DiT loads through the classes that travel with the run, in a process that cannot see ours."""
    import subprocess
    import sys

    run(
        "sample.py", "--model", class_run, "--class_labels", 2, "--num_inference_steps", 3, "--guidance_scale", 2,
        "--num_images_per_prompt", 1, "--seed", 5, "--output_dir", tmp_path / "s",
    )  # fmt: skip
    code = f"""
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(class_run)!r}, custom_pipeline={str(class_run)!r}, trust_remote_code=True)
image = pipeline(class_labels=[2], num_inference_steps=3, guidance_scale=2, generator=[torch.Generator().manual_seed(5)]).images[0]
image.save({str(tmp_path / "stock.png")!r})
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ours, stock = (
        np.asarray(Image.open(path), dtype=int) for path in (tmp_path / "s" / "00000.png", tmp_path / "stock.png")
    )
    assert np.abs(ours - stock).max() <= 1


def test_images_do_not_depend_on_the_batch_size(class_run, tmp_path):
    """The same seed gives the same image, to rounding, whatever batch it was made in."""
    for batch_size in (1, 5):
        run(
            "sample.py", "--model", class_run, "--class_labels", 0, 1, 2, "--num_images_per_prompt", 2,
            "--num_inference_steps", 3, "--batch_size", batch_size, "--output_dir", tmp_path / str(batch_size),
        )  # fmt: skip
    for i in range(6):
        one, five = (np.asarray(Image.open(tmp_path / size / f"{i:05d}.png"), dtype=int) for size in ("1", "5"))
        assert np.abs(one - five).max() <= 1
    first, second = (np.asarray(Image.open(tmp_path / "1" / f"{i:05d}.png"), dtype=int) for i in (0, 1))
    assert np.abs(first - second).max() > 1  # another seed is another image


def test_png_carries_its_parameters(text_run, tmp_path):
    run(
        "sample.py", "--model", text_run, "--prompt", "red", "--prompt", "blue", "--num_images_per_prompt", 2, "--seed", 3,
        "--num_inference_steps", 2, "--negative_prompt", "green", "--scheduler", "dpmsolver++", "--output_dir", tmp_path / "s",
    )  # fmt: skip
    parameters = json.loads(Image.open(tmp_path / "s" / "00002.png").info["parameters"])
    assert parameters["prompt"] == "blue"
    assert parameters["negative_prompt"] == "green"
    assert parameters["seed"] == 5
    assert parameters["guidance_scale"] == 7.5
    assert parameters["scheduler"] == "DPMSolverMultistepScheduler"
    lines = (tmp_path / "s" / "samples.jsonl").read_text().splitlines()
    assert json.loads(lines[2]) == {"file_name": "00002.png"} | parameters
    assert Image.open(tmp_path / "s" / "grid.png").size[1] >= 2 * 64


def test_a_checkpoint_can_be_sampled_before_the_run_ends(text_run, tmp_path):
    flags = ["--prompt", "red", "--num_images_per_prompt", 1, "--num_inference_steps", 2]
    run("sample.py", "--model", text_run, *flags, "--output_dir", tmp_path / "end")
    run("sample.py", "--model", text_run / "checkpoint-8", *flags, "--output_dir", tmp_path / "same")
    run("sample.py", "--model", text_run / "checkpoint-4", *flags, "--output_dir", tmp_path / "earlier")
    pixels = [np.asarray(Image.open(tmp_path / name / "00000.png")) for name in ("end", "same", "earlier")]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


@pytest.mark.parametrize("model", ["dit", "unet"])
def test_unconditional(cache, model_flags, model, tmp_path):
    run(
        "train_class_cond_ldm.py", "--unconditional", "--latents_dir", cache, "--output_dir", tmp_path / "run",
        *model_flags[model], *TRAIN_FLAGS, *GRID_FLAGS,
    )  # fmt: skip
    assert (tmp_path / "run" / "samples" / "step-0000008.png").is_file()
    run("sample.py", "--model", tmp_path / "run", "--num_images_per_prompt", 3, "--num_inference_steps", 2)
    assert len(list((tmp_path / "run" / "sampled" / "0000").glob("0*.png"))) == 3


def test_trainer_makes_the_cache_itself(image_folder, tiny_vae, tiny_text_encoder, model_flags, tmp_path):
    """Dataset flags instead of a cache: the same code makes the same cache first."""
    from tests.support.models import cache_flags

    flags = [*cache_flags(image_folder, tiny_vae, tiny_text_encoder), *model_flags["dit"], *TRAIN_FLAGS]
    run_script("train_text_to_image_ldm.py", *flags, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / "latents" / "latent_spec.json").is_file()
    assert (tmp_path / "run" / "model_index.json").is_file()


def test_image_vae_measures_its_latents(image_folder, tmp_path):
    """The stored scaling and shift make the latents of the training images have mean 0 and std 1."""
    from diffusers import AutoencoderKL

    run(
        "train_image_vae.py", "--train_data_dir", image_folder, "--resolution", 16, "--vae_size", "fast", "--center_crop",
        "--max_train_steps", 30, "--train_batch_size", 8, "--learning_rate", 2e-3, "--lr_warmup_steps", 5,
        "--validation_steps", 30, "--checkpointing_steps", 15, "--logging_steps", 5, "--output_dir", tmp_path / "vae",
    )  # fmt: skip
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae", subfolder="vae")
    from utils.image.data.pixels import resize_and_crop

    images = [np.asarray(Image.open(path)) for path in sorted(image_folder.glob("*.png"))]
    pixels = np.stack([resize_and_crop(Image.fromarray(image), 16, True, None) for image in images])
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    latents = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
    variance = (latents.square() + (posterior.std * vae.config.scaling_factor).square()).mean()
    assert abs(latents.mean()) < 1e-3
    assert abs(variance - 1) < 1e-3
    assert (tmp_path / "vae" / "samples" / "step-0000030.png").is_file()
    saved = yaml.safe_load((tmp_path / "vae" / "args.yaml").read_text())
    assert saved["vae_size"] == "fast"


@pytest.mark.parametrize(
    ("script", "processes", "rank", "first_samples"),
    [
        ("train_text_to_image_ldm.py", 1, 0, [0, 4, 8, 12]),
        ("train_class_cond_ldm.py", 1, 0, [0, 4, 8, 12]),
        ("train_class_cond_ldm.py", 2, 1, [4, 12, 20, 28]),
    ],
)
def test_each_batch_has_dropout_masks_of_its_own(cache, model_flags, tmp_path, script, processes, rank, first_samples):
    """Those of its first sample, as all draws are; so no two processes have the same."""
    flags = ["--latents_dir", cache, *model_flags["unet"], *TRAIN_FLAGS, "--output_dir", tmp_path / "run"]
    flags += ["--train_batch_size", 4, "--gradient_accumulation_steps", 2, "--max_train_steps", 2, "--seed", 5]
    seeds = dropout_seeds(script, *flags, path=tmp_path / "seeds", rank=rank, processes=processes)
    assert seeds == [int(key >> np.uint64(1)) for key in keys(5, "dropout", np.array(first_samples))]
