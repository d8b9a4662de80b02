"""`--codec pixels`: the images themselves are the latents, through the cache, training, sampling and diffusers."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support.models import TRAIN_FLAGS
from tests.support.processes import refused, run
from utils.image.cache import ImageCache
from utils.image.data.pixels import BACKGROUNDS, Framing


@pytest.fixture(scope="module")
def pixel_flags(image_folder):
    return ["--train_data_dir", image_folder, "--label_column", "label", "--resolution", 16, "--codec", "pixels"]


@pytest.fixture(scope="module")
def pixel_run(pixel_flags, model_flags, tmp_path_factory):
    """A class-conditional run on pixels, and its cache in `latents/`."""
    folder = tmp_path_factory.mktemp("pixels") / "run"
    flags = [*model_flags["dit"], *TRAIN_FLAGS, "--center_crop", "--latent_normalisation", "measured"]
    run("train_class_cond_ldm.py", *pixel_flags, *flags, "--output_dir", folder)
    return folder


def test_the_cache_holds_the_pixels(pixel_run, image_folder):
    """To the half of a grey level: float16 loses nothing that 8 bits have."""
    cache = ImageCache(pixel_run / "latents")
    assert cache.spec.shape == (3, 16, 16)
    stored = cache.gather(np.arange(48))["latents"][:, 0].float()  # (48, 3, 16, 16)
    framing = Framing(16, True, BACKGROUNDS["white"])
    images = [framing(Image.open(image_folder / f"{i:03d}.png"), np.random.default_rng(0)) for i in range(48)]
    pixels = stored.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, np.stack(images))


def test_a_run_on_pixels_is_sampled_by_us_and_by_diffusers(pixel_run, tmp_path):
    flags = ["--class_labels", 1, "--num_images_per_prompt", 1, "--num_inference_steps", 3, "--guidance_scale", 2]
    run("sample.py", "--model", pixel_run, *flags, "--seed", 5, "--output_dir", tmp_path / "s")
    code = f"""
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(pixel_run)!r}, custom_pipeline={str(pixel_run)!r}, trust_remote_code=True)
image = pipeline(class_labels=[1], num_inference_steps=3, guidance_scale=2, generator=[torch.Generator().manual_seed(5)]).images[0]
image.save({str(tmp_path / "stock.png")!r})
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ours, stock = (
        np.asarray(Image.open(path), int) for path in (tmp_path / "s" / "00000.png", tmp_path / "stock.png")
    )
    assert ours.shape == (16, 16, 3)
    assert np.abs(ours - stock).max() <= 1
    index = json.loads((pixel_run / "model_index.json").read_text())
    assert index["vae"] == ["pixel_codec", "PixelCodec"]


def test_pixels_and_a_vae_contradict(pixel_flags, tiny_vae, cache, model_flags, tmp_path):
    flags = [*pixel_flags, "--pretrained_vae_model_name_or_path", tiny_vae, "--latents_dir", tmp_path / "latents"]
    assert "--codec pixels with --pretrained_vae_model_name_or_path" in refused(
        run("precompute_latents.py", *flags, check=False)
    )
    flags = ["--latents_dir", cache, "--codec", "pixels", *model_flags["dit"], "--output_dir", tmp_path / "run"]
    assert "was made with vae = " in refused(run("train_class_cond_ldm.py", *flags, check=False))


def test_moments_of_pixels_are_refused(pixel_flags, tmp_path):
    flags = [*pixel_flags, "--latent_content", "moments", "--latents_dir", tmp_path / "latents"]
    assert "PixelCodec has no posterior" in refused(run("precompute_latents.py", *flags, check=False))
