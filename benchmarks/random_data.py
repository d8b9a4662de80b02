"""Models of the real formats with random weights, pictures and latent caches of random numbers, for benchmarks."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import frozen
from utils.files import write_json
from utils.image import codec as codecs
from utils.image.text import build_clip_tokenizer, load_text_encoder
from utils.latents.spec import SPEC_FILE, LatentSpec
from utils.latents.writer import ShardFolder, caption_features, caption_id, latent_features

STATES = (77, 768)  # of a caption in CLIP-L


def save_vae(folder: Path, block_out_channels: tuple[int, ...], layers_per_block: int) -> Path:
    """An AutoencoderKL with random weights; (128, 256, 512, 512) with 2 layers has the shape of sd-vae-ft-mse."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
        norm_num_groups=min(32, block_out_channels[0]),
    )
    vae.save_pretrained(folder)
    return folder


def save_text_encoder(folder: Path, num_layers: int) -> Path:
    """A CLIP text tower with random weights of CLIP-L's width, beside its tokenizer; 12 layers are all of CLIP-L."""
    torch.manual_seed(0)
    tokenizer = build_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=STATES[1],
        intermediate_size=4 * STATES[1],
        num_hidden_layers=num_layers,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def write_images(folder: Path, count: int, resolution: int) -> None:
    """Smooth random pictures, a quarter larger than `resolution`, with captions."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    side = resolution * 5 // 4
    lines = []
    for i in range(count):
        pixels = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
        pixels.resize((side * 5 // 4, side), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg", quality=90)
        lines.append(json.dumps({"file_name": f"{i:04d}.jpg", "text": f"picture number {i} of smooth colours"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_random_cache(
    folder: Path,
    num_rows: int,
    latent_shape: tuple[int, int, int],
    *,
    rows_per_shard: int = 512,
    vae: Path | None = None,
    text_encoder: Path | None = None,
) -> None:
    """A latent cache of random numbers: each row has a caption of its own, and caption row 0 is the empty one."""
    rng = np.random.default_rng(0)
    captions = ["", *(f"caption {i}" for i in range(num_rows))]
    ids = list(map(caption_id, captions))
    latents = ShardFolder(folder / "latents", latent_features(int(np.prod(latent_shape)), False, True, True))
    states = ShardFolder(folder / "captions", caption_features("hidden_states", int(np.prod(STATES))))
    for index, first in enumerate(range(0, num_rows, rows_per_shard)):
        some = range(first, min(first + rows_per_shard, num_rows))
        columns = {
            "row": list(some),
            "latents": rng.standard_normal((len(some), *latent_shape), dtype=np.float32).astype(np.float16),
            "label": [row % 10 for row in some],
            "caption": [[captions[row + 1]] for row in some],
            "caption_id": [[ids[row + 1]] for row in some],
        }
        latents.write(index, columns, {})
    for index, first in enumerate(range(0, len(captions), rows_per_shard)):
        some = range(first, min(first + rows_per_shard, len(captions)))
        columns = {
            "caption_id": [ids[row] for row in some],
            "caption": [captions[row] for row in some],
            "num_tokens": [2 + row % 75 for row in some],
            "hidden_states": rng.standard_normal((len(some), *STATES), dtype=np.float32).astype(np.float16),
        }
        states.write(index, columns, {})
    latents.finish()
    states.finish()
    plain = {"mean": [0.0] * latent_shape[0], "std": [1.0] * latent_shape[0]}
    encoder = text_encoder and {"name": str(text_encoder), "library": "transformers", "tokenizer": None}
    fingerprint = {
        "dataset": {"name": "random numbers"},
        "columns": {"image": "image", "caption": "text", "label": "label"},
        "resolution": 8 * latent_shape[1],
        "crop": "center",
        "random_flip": False,
    }
    if vae is not None:
        fingerprint["vae"] = frozen.describe(codecs.load_vae(str(vae)), str(vae))
    if text_encoder is not None:
        fingerprint["text_encoder"] = frozen.describe(load_text_encoder(str(text_encoder))[1], str(text_encoder))
    spec = LatentSpec(
        kind="image",
        shape=latent_shape,
        dtype="float16",
        content="mean",
        flips=False,
        num_rows=num_rows,
        num_skipped=0,
        normalisation={"vae": plain, "measured": plain},
        captions={"content": "hidden_states", "shape": STATES, "count": len(captions), "hidden_size": STATES[1]},
        labels={"num_classes": 10, "names": None},
        vae=str(vae or "none"),
        text_encoder=encoder,
        fingerprint=fingerprint,
    )
    write_json(folder / SPEC_FILE, asdict(spec))
