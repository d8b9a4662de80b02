"""What a step of the trainer costs, in units of what the model itself costs.

    python benchmarks/step.py
    python benchmarks/step.py --cases dit-32-bf16 --torch_compile --batch_size 32 --dit_size L/2

The floor is forward, backward and a fused AdamW step on one batch that lies on the device: no loader, no random
draws, no clipping, no averages, no log. The trainer is `train_text_to_image_ldm.py` from a cache, with all of that.
They take turns in one process, block by block; each of the trainer's ends with a line to the log.
"""

import multiprocessing
import tempfile
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import benchmark_parser, median_ratio, report, run_trainer, seconds
from random_data import STATES, save_text_encoder, save_vae, write_random_cache

from utils.image import networks as build
from utils.image.cache import ImageCache

# Model, latents, precision -> samples a step: about half a second on two cores.
CASES = {
    ("unet", 8, "no"): 32,
    ("unet", 8, "bf16"): 32,
    ("unet", 32, "no"): 2,
    ("unet", 32, "bf16"): 4,
    ("dit", 8, "no"): 16,
    ("dit", 8, "bf16"): 32,
    ("dit", 32, "no"): 2,
    ("dit", 32, "bf16"): 4,
}
BY_NAME = {"-".join(map(str, case)): case for case in CASES}
UNET_CONFIG = '{"block_out_channels": [96, 160, 160]}'  # 12M parameters


class Floor:
    """The model that the trainer's arguments ask for, with a batch that is always the same."""

    def __init__(self, args: Namespace):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cache = ImageCache(args.latents_dir)
        self.denoiser: Any = build.build_denoiser(args, cache, "text").to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=args.learning_rate, fused=True)
        if args.torch_compile:
            self.denoiser = torch.compile(self.denoiser)
        shape = (args.train_batch_size, *cache.spec.shape)
        self.noisy_latents, self.target = torch.randn(2, *shape, device=self.device)
        self.timesteps = torch.linspace(0, 999, len(self.target), device=self.device)
        self.values = {
            "encoder_hidden_states": torch.randn(len(self.target), *STATES, device=self.device),
            "num_tokens": torch.full((len(self.target),), 20, device=self.device),
        }
        self.drop = torch.zeros(len(self.target), dtype=torch.bool, device=self.device)
        self.half = args.mixed_precision == "bf16"

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            model_pred = self.denoiser(self.noisy_latents, self.timesteps, self.values, self.drop)
        F.mse_loss(model_pred.float(), self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Turns:
    """Blocks of steps in turn, the trainer's and the floor's; the first block warms both up."""

    def __init__(self, block: int):
        self.block = block
        self.floor: Floor | None = None
        self.seconds: list[float] = []  # of the trainer's steps in this block
        self.trainer_blocks: list[float] = []
        self.floor_blocks: list[float] = []

    def after_step(self, args: Namespace, step: int, step_seconds: float) -> None:
        self.floor = self.floor or Floor(args)
        self.seconds.append(step_seconds)
        if len(self.seconds) == self.block:
            self.trainer_blocks.append(sum(self.seconds) / self.block)
            self.floor_blocks.append(sum(seconds(self.floor.step) for _ in range(self.block)) / self.block)
            self.seconds = []

    def row(self) -> dict[str, float]:
        """Medians of all blocks but the first."""
        trainer, floor = self.trainer_blocks[1:], self.floor_blocks[1:]
        middle = len(trainer) // 2
        return {
            "floor, ms": 1000 * sorted(floor)[middle],
            "trainer, ms": 1000 * sorted(trainer)[middle],
            "trainer / floor": median_ratio(trainer, floor),
        }


def measure(name: str, args: Namespace) -> dict[str, Any]:
    """One case, in a process of its own."""
    model, side, precision = BY_NAME[name]
    batch_size = args.batch_size or CASES[BY_NAME[name]]
    turns = Turns(args.block)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vae = save_vae(folder / "vae", (8, 8, 8, 8), 1)
        text_encoder = save_text_encoder(folder / "text", num_layers=1)
        write_random_cache(
            folder / "cache", max(256, 2 * batch_size), (4, side, side), vae=vae, text_encoder=text_encoder
        )
        (folder / "unet.json").write_text(UNET_CONFIG)
        flags = ["--latents_dir", folder / "cache", "--output_dir", folder / "run", "--model", model]
        small_unet = ["--model_size", "cifar10", "--model_config", folder / "unet.json"]
        flags += ["--model_size", args.dit_size] if model == "dit" else small_unet
        flags += ["--train_batch_size", batch_size, "--mixed_precision", precision, "--logging_steps", args.block]
        flags += ["--torch_compile"] if args.torch_compile else []
        run_trainer("train_text_to_image_ldm", flags, args.block * (1 + args.rounds), turns.after_step)
    return {"model": model, "latents": f"{side} x {side}", "precision": precision, "batch": batch_size, **turns.row()}


def main() -> None:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--cases", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), help="What is measured.")
    parser.add_argument("--batch_size", type=int, default=None, help="Samples a step. Default: some for a small CPU.")
    parser.add_argument("--dit_size", default="S/2", help="--model_size of the DiT.")
    parser.add_argument("--block", type=int, default=10, help="Steps of a turn.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns of each.")
    parser.add_argument("--torch_compile", action="store_true", help="Compile both.")
    args = parser.parse_args()
    rows = []
    for name in args.cases:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            rows.append(alone.submit(measure, name, args).result())
    report(args, rows)


if __name__ == "__main__":
    main()
