"""Real data sets become latent caches, where they are present."""

import io

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.support.data import DATA
from tests.support.processes import run
from utils.image.cache import ImageCache

PRECOMPUTE = "precompute_latents.py"


needs_cifar10 = pytest.mark.skipif(not list(DATA.glob("cifar10/train*.parquet")), reason="CIFAR-10 is not here")


needs_emoji = pytest.mark.skipif(not list(DATA.glob("emoji/train*.parquet")), reason="the emoji are not here")


def encoded(tiny_vae, images) -> torch.Tensor:
    """Means of RGB images by the VAE, at 16 x 16."""
    from diffusers import AutoencoderKL

    small = [np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS)) for image in images]
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return AutoencoderKL.from_pretrained(tiny_vae).eval().encode(pixels).latent_dist.mean


@needs_cifar10
def test_cifar10(tiny_vae, tmp_path):
    run(
        PRECOMPUTE, "--dataset_name", DATA / "cifar10", "--image_column", "img", "--label_column", "label", "--max_samples", 64,
        "--resolution", 16, "--pretrained_vae_model_name_or_path", tiny_vae, "--latents_dir", tmp_path / "cache",
    )  # fmt: skip
    cache = ImageCache(tmp_path / "cache")
    batch = cache.gather(np.arange(64))
    file = sorted(DATA.glob("cifar10/train*.parquet"))[0]
    rows = pq.ParquetFile(file).iter_batches(64).__next__().to_pydict()
    assert batch["class_labels"].tolist() == rows["label"]
    assert cache.spec.labels["num_classes"] == 10
    images = [Image.open(io.BytesIO(value["bytes"])).convert("RGB") for value in rows["img"]]
    torch.testing.assert_close(batch["latents"][:, 0].float(), encoded(tiny_vae, images), atol=2e-3, rtol=2e-3)


@needs_emoji
def test_emoji_are_laid_on_white(tiny_vae, tiny_text_encoder, tmp_path):
    run(
        PRECOMPUTE, "--dataset_name", DATA / "emoji", "--caption_column", "text", "--max_samples", 64, "--resolution", 16,
        "--pretrained_vae_model_name_or_path", tiny_vae, "--pretrained_text_encoder_name_or_path", tiny_text_encoder,
        "--latents_dir", tmp_path / "cache",
    )  # fmt: skip
    cache = ImageCache(tmp_path / "cache")
    assert len(cache) == 64
    file = sorted(DATA.glob("emoji/train*.parquet"))[0]
    rows = pq.ParquetFile(file).iter_batches(64).__next__().to_pydict()
    images = []
    for value in rows["image"]:
        rgba = np.asarray(Image.open(io.BytesIO(value["bytes"])).convert("RGBA")).astype(float)
        alpha = rgba[:, :, 3:] / 255
        images.append(Image.fromarray(np.rint(rgba[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)))
    assert np.asarray(images[0])[0, 0].tolist() == [255, 255, 255]
    latents = cache.gather(np.arange(64))["latents"][:, 0].float()
    torch.testing.assert_close(latents, encoded(tiny_vae, images), atol=0.02, rtol=0.02)  # a level of rounding in 255
    captions = datasets.load_from_disk(str(tmp_path / "cache" / "latents"))["caption"][:]
    assert captions == [[text] for text in rows["text"]]
