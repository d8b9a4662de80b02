"""Steps per second against those of diffusers' `train_text_to_image.py`: the same U-Net, data, batch and precision.

    python benchmarks/against_diffusers.py                  # a U-Net of 12M parameters, small encoders, 64 px
    python benchmarks/against_diffusers.py --encoders real  # encoders of the real shapes, 256 px

`DiffusersLoop` makes in each step the calls that script makes (with `--use_ema`, without validation): it decodes and
crops the images, encodes them and their captions, reads the loss back twice, and leaves optimizer and averages as the
libraries have them by default. Ours is `train_text_to_image_ldm.py` from a cache that was made before; what making it
takes is in the table. They take turns in one process.
"""

import json
import logging
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from common import ROOT, benchmark_parser, median_ratio, report, run_python, run_trainer, seconds
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from random_data import save_text_encoder, save_vae, write_images
from torchvision import transforms
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

SMALL_UNET = {"block_out_channels": [96, 160, 160]}  # over preset "cifar10": 12M parameters
# Blocks of the VAE, layers in each, layers of the text tower, resolution.
ENCODERS: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    "small": ((16, 32, 32, 32), 1, 1, 64),
    "real": ((128, 256, 512, 512), 2, 12, 256),  # sd-vae-ft-mse and CLIP-L
}


class DiffusersLoop:
    """The work of a step of diffusers' script, call by call; `args` are those of our trainer, for what both share."""

    def __init__(self, folder: Path, args: Namespace, unet_config: dict[str, Any], resolution: int):
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        half = self.accelerator.mixed_precision == "bf16"
        self.weight_dtype = torch.bfloat16 if half else torch.float32
        device = self.accelerator.device
        self.noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        tokenizer = CLIPTokenizer.from_pretrained(folder / "text" / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(folder / "text" / "text_encoder")
        self.text_encoder = text_encoder.requires_grad_(False).to(device, dtype=self.weight_dtype)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
        self.vae.to(device, dtype=self.weight_dtype)
        unet = UNet2DConditionModel.from_config(unet_config).train()
        self.ema_unet = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
        data = load_dataset("imagefolder", data_dir=str(folder / "images"), split="train")
        augment = transforms.Compose(
            [
                transforms.Resize(resolution, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.RandomCrop(resolution),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

        def preprocess(examples):
            pixels = [augment(image.convert("RGB")) for image in examples["image"]]
            length = tokenizer.model_max_length
            tokens = tokenizer(
                examples["text"], max_length=length, padding="max_length", truncation=True, return_tensors="pt"
            )
            return {"pixel_values": pixels, "input_ids": tokens.input_ids}

        loader = torch.utils.data.DataLoader(
            data.with_transform(preprocess), shuffle=True, batch_size=args.train_batch_size, drop_last=True
        )
        lr_scheduler = get_scheduler("constant", optimizer=optimizer)
        prepared = self.accelerator.prepare(unet, optimizer, loader, lr_scheduler)
        self.unet, self.optimizer, self.loader, self.lr_scheduler = prepared
        self.ema_unet.to(device)
        self.batches = iter(self.loader)
        self.progress_bar = tqdm(desc="diffusers")

    def next_batch(self) -> dict[str, torch.Tensor]:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch

    def step(self) -> None:
        accelerator, unet = self.accelerator, self.unet
        batch = self.next_batch()
        with accelerator.accumulate(unet):
            latents = self.vae.encode(batch["pixel_values"].to(self.weight_dtype)).latent_dist.sample()
            latents = latents * self.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
            noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
            encoder_hidden_states = self.text_encoder(batch["input_ids"])[0]
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
            loss = F.mse_loss(model_pred.float(), noise.float())
            train_loss = accelerator.gather(loss.repeat(len(latents))).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
        self.ema_unet.step(unet.parameters())
        self.progress_bar.update(1)
        accelerator.log({"train_loss": train_loss})
        self.progress_bar.set_postfix(step_loss=loss.detach().item(), lr=self.lr_scheduler.get_last_lr()[0])


def measure(args: Namespace, folder: Path) -> list[dict[str, Any]]:
    """Both loops in turn, a block of steps each."""
    blocks, layers, text_layers, resolution = ENCODERS[args.encoders]
    vae = save_vae(folder / "vae", blocks, layers)
    save_text_encoder(folder / "text", text_layers)
    write_images(folder / "images", args.num_images, resolution)
    (folder / "unet.json").write_text(json.dumps({} if args.unet != "cifar10" else SMALL_UNET))
    started = time.perf_counter()
    made = ["--train_data_dir", folder / "images", "--caption_column", "text", "--resolution", resolution]
    made += ["--pretrained_vae_model_name_or_path", vae, "--pretrained_text_encoder_name_or_path", folder / "text"]
    run_python(ROOT / "precompute_latents.py", *made, "--latents_dir", folder / "cache")
    cache_seconds = time.perf_counter() - started

    theirs: list[DiffusersLoop] = []
    our_steps: list[float] = []
    blocks_of: dict[str, list[float]] = {"diffusers": [], "this suite": []}

    def after_step(trained: Namespace, step: int, step_seconds: float) -> None:
        our_steps.append(step_seconds)
        if len(our_steps) % args.block:
            return
        if not theirs:
            unet_config = json.loads((folder / "run" / "unet" / "config.json").read_text())
            theirs.append(DiffusersLoop(folder, trained, unet_config, resolution))
        blocks_of["this suite"].append(float(np.mean(our_steps[-args.block :])))
        blocks_of["diffusers"].append(float(np.mean([seconds(theirs[0].step) for _ in range(args.block)])))

    flags = ["--latents_dir", folder / "cache", "--output_dir", folder / "run", "--model", "unet"]
    flags += ["--model_size", args.unet, "--model_config", folder / "unet.json", "--prediction_type", "epsilon"]
    flags += ["--train_batch_size", args.batch_size, "--mixed_precision", args.mixed_precision]
    run_trainer("train_text_to_image_ldm", flags, args.block * (1 + args.rounds), after_step)
    diffusers, ours = (values[1:] for values in blocks_of.values())  # the first block warms up
    return [
        {
            "encoders": args.encoders,
            "precision": args.mixed_precision,
            "batch": args.batch_size,
            "diffusers, ms a step": 1000 * float(np.median(diffusers)),
            "this suite, ms a step": 1000 * float(np.median(ours)),
            "times as fast": median_ratio(diffusers, ours),
            "cache, s": cache_seconds,
            "cache, images": args.num_images,
        }
    ]


def main() -> None:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument(
        "--encoders", choices=list(ENCODERS), default="small", help="Size of the encoders of images and captions."
    )
    parser.add_argument("--unet", default="cifar10", help="--model_size of the U-Net; cifar10 is made narrower.")
    parser.add_argument("--batch_size", type=int, default=16, help="Samples a step.")
    parser.add_argument(
        "--mixed_precision", choices=["no", "bf16"], default="no", help="Autocast precision of both trainers."
    )
    parser.add_argument("--num_images", type=int, default=128, help="Images of the data set.")
    parser.add_argument("--block", type=int, default=12, help="Steps of a turn.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns of each.")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as scratch:
        report(args, measure(args, Path(scratch)))


if __name__ == "__main__":
    main()
