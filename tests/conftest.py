"""What tests share: tiny models in the real formats, tiny data sets, and scripts run as a user runs them."""

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from tests.support.data import COLOURS
from tests.support.models import DIT_CONFIG, GRID_FLAGS, TRAIN_FLAGS, UNET_CONFIG, cache_flags
from tests.support.processes import run, run_script
from utils.diffusion.objectives import OBJECTIVES, training_scheduler
from utils.image.cache import ImageCache


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory) -> Path:
    """An AutoencoderKL with random weights: 16 x 16 images, 4 x 4 x 4 latents, a scaling and a shift."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text_encoder(tmp_path_factory) -> Path:
    """A folder with `text_encoder/` (a CLIPTextModel with random weights, width 16) and `tokenizer/` (CLIP's own)."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from utils.image.text import build_clip_tokenizer

    torch.manual_seed(0)
    tokenizer = build_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("text")
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A CLIPModel of 32 x 32 images with random weights, its tokenizer and its preprocessor."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from utils.image.text import build_clip_tokenizer

    torch.manual_seed(0)
    tokenizer = build_clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = sizes | {"image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size, image_mean=[0.4] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """48 noisy 20 x 24 images of three colours, with captions and labels in `metadata.jsonl`."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    lines = []
    for i in range(48):
        label = i % 3
        name = list(COLOURS)[label]
        pixels = np.clip(np.array(COLOURS[name]) + generator.normal(0, 20, (24, 20, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": [f"a {name} square", name], "label": label}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory, image_folder, tiny_vae, tiny_text_encoder) -> Path:
    """A latent cache of `image_folder` with captions, labels and flips, in several shards."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    run_script(
        "precompute_latents.py", *cache_flags(image_folder, tiny_vae, tiny_text_encoder), "--latents_dir", folder
    )
    return folder


@pytest.fixture(scope="session")
def model_flags(tmp_path_factory) -> dict[str, list[str]]:
    """Flags of a tiny model of each kind: `model_flags["dit"]`, `model_flags["unet"]`."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "dit.json").write_text(json.dumps(DIT_CONFIG))
    (folder / "unet.json").write_text(json.dumps(UNET_CONFIG))
    return {
        "dit": ["--model", "dit", "--model_size", "S/2", "--model_config", str(folder / "dit.json")],
        "unet": ["--model", "unet", "--model_size", "tiny", "--model_config", str(folder / "unet.json")],
    }


@pytest.fixture(scope="session")
def text_run(tmp_path_factory, cache, model_flags) -> Path:
    """A finished text-to-image U-Net run: v-prediction, a StableDiffusionPipeline."""
    folder = tmp_path_factory.mktemp("text_run") / "run"
    flags = [*model_flags["unet"], *TRAIN_FLAGS, *GRID_FLAGS, "--validation_prompts", "a red square", "blue"]
    run_script("train_text_to_image_ldm.py", "--latents_dir", cache, "--output_dir", folder, *flags)
    return folder


@pytest.fixture(scope="session")
def class_run(tmp_path_factory, cache, model_flags) -> Path:
    """A finished class-conditional DiT run: flow."""
    folder = tmp_path_factory.mktemp("class_run") / "run"
    flags = [*model_flags["dit"], *TRAIN_FLAGS, *GRID_FLAGS, "--prediction_type", "flow", "--validation_labels", 0, 2]
    run_script("train_class_cond_ldm.py", "--latents_dir", cache, "--output_dir", folder, *flags)
    return folder


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="session")
def opened(cache):
    return ImageCache(cache)


@pytest.fixture(scope="session")
def flow():
    return OBJECTIVES["flow"](training_scheduler("flow"))


@pytest.fixture(scope="session")
def other_split(tmp_path_factory, tiny_vae, tiny_text_encoder):
    """A cache made like `cache`, of other images."""
    images = tmp_path_factory.mktemp("split")
    lines, generator = [], np.random.default_rng(1)
    for i in range(15):
        Image.fromarray(generator.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(images / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": ["noise"], "label": i % 3}))
    (images / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    folder = tmp_path_factory.mktemp("other") / "latents"
    run("precompute_latents.py", *cache_flags(images, tiny_vae, tiny_text_encoder), "--latents_dir", folder)
    return folder
