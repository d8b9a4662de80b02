"""The tables of docs/scale.md: disk, hours and cost of 100 thousand to a billion images.

    python benchmarks/scale.py --peak_tflops 209.5 --utilisation 0.35 --price_per_hour 1
    python benchmarks/scale.py --measure

FLOPs are counted from the layers, bytes from the columns of the cache; peak, utilisation and price are the reader's.
With --measure: what this machine takes for the parts of a run that grow with the number of images.
"""

import argparse
import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.draws import StreamOrder
from utils.models.dit import DIT_SIZES, DiT
from utils.models.unet import build_unet, unet_config
from utils.plan.arithmetic import cache_bytes, readable
from utils.training import flops as budget

RESOLUTION, LATENT, STATES = 256, (4, 32, 32), (77, 768)
MAX_CACHED_CAPTIONS = 200_000  # the default of --max_cached_captions
IMAGES = (10**5, 10**6, 10**7, 10**8, 10**9)


def counted(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """FLOPs of a forward pass on the meta device, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


def encoder_flops() -> tuple[int, int]:
    """Of one image through the encoder of Stable Diffusion's VAE, and of one caption through CLIP-L's text tower."""
    blocks = (128, 256, 512, 512)
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=blocks,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * len(blocks),
            up_block_types=("UpDecoderBlock2D",) * len(blocks),
        )
        # The text tower of CLIP-L is what CLIPTextConfig calls its default, but for these.
        clip = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        image, caption = torch.zeros(1, 3, RESOLUTION, RESOLUTION), torch.zeros(1, STATES[0], dtype=torch.int64)
    encode = torch.nn.Sequential(vae.encoder, vae.quant_conv)
    return counted(encode, image), counted(clip, caption)


def training_flops() -> dict[str, int]:
    """Of one sample with text, for some denoisers."""
    models: dict[str, torch.nn.Module] = {}
    with torch.device("meta"):
        for preset in ("base", "sd-v1"):
            models[f"unet {preset}"] = build_unet(unet_config(preset, LATENT[1], LATENT[0], STATES[1], False))
        for size in ("B", "XL"):
            num_layers, hidden_size, heads = DIT_SIZES[size]
            text = {"cross_attention_dim": STATES[1], "projection_class_embeddings_input_dim": STATES[1]}
            models[f"dit {size}/2"] = DiT(
                num_layers=num_layers, hidden_size=hidden_size, num_attention_heads=heads, **text
            )
    return {name: budget.training_flops(model, LATENT, STATES[0]) for name, model in models.items()}


@dataclass(frozen=True)
class Gpu:
    """What the reader supplies."""

    peak_tflops: float
    utilisation: float
    price_per_hour: float

    def hours(self, flops: float) -> float:
        return flops / (self.peak_tflops * 1e12 * self.utilisation) / 3600


def number(value: float) -> str:
    """Three figures: 0.0123, 1.23, 12,300."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def work_table() -> str:
    """FLOPs of each part, and what a sample costs where the text encoder runs in the loop."""
    image, caption = encoder_flops()
    rows = [["VAE encoder, an image of 256 x 256", number(image / 1e9)], ["CLIP-L, a caption", number(caption / 1e9)]]
    rows += [[f"training {name}, a sample", number(flops / 1e9)] for name, flops in training_flops().items()]
    return table(["work", "GFLOP"], rows)


def images_table(gpu: Gpu, model: str = "unet base") -> str:
    """Disk, GPU-hours and cost by the number of images, each with one caption of its own."""
    image, caption = encoder_flops()
    rows = []
    for count in IMAGES:
        in_loop = count > MAX_CACHED_CAPTIONS
        latents = cache_bytes(count, LATENT)
        cached_states = cache_bytes(count, LATENT, num_captions=count, states_shape=STATES) - latents
        ids = cache_bytes(count, LATENT, num_captions=count) - latents
        encode = gpu.hours(count * (image + (0 if in_loop else caption)))
        one_pass = gpu.hours(count * (training_flops()[model] + (caption if in_loop else 0)))
        sizes = map(readable, (latents, cached_states, ids))
        money = (encode + one_pass) * gpu.price_per_hour
        rows.append([f"{count:,}", *sizes, number(encode), number(one_pass), number(money)])
    head = ["images", "latents", "captions as states", "captions as ids", "encoding, h", "one epoch, h", "both, cost"]
    return table(head, rows)


def week_table(gpu: Gpu, hours: float = 168) -> str:
    """What a week of one GPU trains, text encoder in the loop or not, and how often that sees the images."""
    _, caption = encoder_flops()
    rows = []
    for name, flops in training_flops().items():
        speed = 1 / (3600 * gpu.hours(flops))
        samples = hours / gpu.hours(flops + caption)
        epochs = [number(samples / count) for count in IMAGES]
        rows.append([name, number(speed), number(samples / hours / 3600), number(samples / 1e6), *epochs])
    head = ["model", "samples/s", "with CLIP-L in the loop", "million samples a week"]
    return table(head + [f"epochs of {count:,}" for count in IMAGES], rows)


def measured_table() -> str:
    """Seconds here, on one thread, for what a start and an epoch do with all rows."""
    data = bytes(10**9)
    started = time.perf_counter()
    hashlib.sha256(data).hexdigest()
    hashing = time.perf_counter() - started
    started = time.perf_counter()
    StreamOrder(0, 10**7).permutation(0)
    shuffling = time.perf_counter() - started
    ids = np.random.default_rng(0).integers(1 << 62, size=10**7)
    started = time.perf_counter()
    known = np.sort(ids)
    np.searchsorted(known, ids)
    joining = time.perf_counter() - started
    rows = [
        ["sha256 of 1 GB of shards (each start reads all of them)", number(hashing)],
        ["the order of an epoch of 10,000,000 rows", number(shuffling)],
        ["finding the captions of 10,000,000 rows (each start)", number(joining)],
    ]
    return table(["here, one thread", "s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak_tflops", type=float, default=209.5, help="Dense bf16 peak of the GPU, TFLOP/s.")
    parser.add_argument(
        "--utilisation", type=float, default=0.35, help="Share of the peak that training reaches (MFU)."
    )
    parser.add_argument("--price_per_hour", type=float, default=1.0, help="Price of one GPU hour, in any currency.")
    parser.add_argument("--measure", action="store_true", help="Time what grows with the number of images, here.")
    args = parser.parse_args()
    if args.measure:
        print(measured_table())
        return
    gpu = Gpu(args.peak_tflops, args.utilisation, args.price_per_hour)
    print("\n\n".join([work_table(), images_table(gpu), week_table(gpu)]))


if __name__ == "__main__":
    main()
