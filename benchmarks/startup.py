"""How long a script takes until `--help` and until the first step, and what the time goes into.

    python benchmarks/startup.py

Each row is a process of its own, so imports and all that they do are in it.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import benchmark_parser, report, run_python, seconds
from random_data import save_text_encoder, save_vae, write_random_cache

SCRIPTS = ("train_text_to_image_ldm.py", "train_class_cond_ldm.py", "precompute_latents.py", "sample.py")
IMPORTS = {  # each row imports what the rows above it import, and more
    "python": "pass",
    "torch": "import torch",
    "accelerate": "import torch, accelerate",
    "diffusers": "import torch, accelerate; from diffusers import AutoencoderKL, UNet2DConditionModel",
    "transformers": "import torch, accelerate; from diffusers import AutoencoderKL, UNet2DConditionModel; "
    "from transformers import CLIPTextModel",
    "datasets": "import torch, accelerate; from diffusers import AutoencoderKL, UNet2DConditionModel; "
    "from transformers import CLIPTextModel; import datasets",
}
# Runs a trainer up to the end of its first step, and says when what was done.
FIRST_STEP = """
import sys, time
import psutil
sys.argv = sys.argv[1:]
born = psutil.Process().create_time()
import train_text_to_image_ldm as trainer
args = trainer.parse_args()
from utils.image import networks as build, pipeline, setup as image
from utils.training import setup as run
from utils.training.control import RunControl
print("imports", time.time() - born)
def say_after(module, name, what):
    call = getattr(module, name)
    def and_say(*inputs, **named):
        result = call(*inputs, **named)
        print(what, time.time() - born, flush=True)
        return result
    setattr(module, name, and_say)
say_after(image, "open_cache", "cache opened")
say_after(image, "make_exporter", "frozen models loaded")
say_after(build, "build_denoiser", "denoiser built")
say_after(pipeline.Exporter, "save_frozen", "frozen models saved")
say_after(run, "announce", "trackers started")
say_after(RunControl, "may_step", "first gradient")
steps = RunControl.steps
def one_step(control):
    for step in steps(control):
        yield step
        print("first step", time.time() - born, flush=True)
        sys.exit()
RunControl.steps = one_step
trainer.main(args)
"""


def median_seconds(rounds: int, *command: Any) -> float:
    return float(np.median([seconds(partial(run_python, *command)) for _ in range(rounds)]))


def first_step(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """The stages of a cached run of a U-Net of 29M parameters, with the encoders' real shapes."""
    vae = save_vae(folder / "vae", (128, 256, 512, 512), 2)
    text_encoder = save_text_encoder(folder / "text", num_layers=12)
    write_random_cache(folder / "cache", 2000, (4, 32, 32), vae=vae, text_encoder=text_encoder)
    flags = ["--latents_dir", folder / "cache", "--model_size", "cifar10", "--train_batch_size", 1]
    stamps: dict[str, list[float]] = {}
    for i in range(rounds):
        flags_of_round = [*flags, "--output_dir", folder / str(i), "--max_train_steps", 10]
        for line in run_python("-c", FIRST_STEP, "train_text_to_image_ldm.py", *flags_of_round).splitlines():
            stage, stamp = line.rsplit(maxsplit=1)
            stamps.setdefault(stage, []).append(float(stamp))
    medians = {stage: float(np.median(values)) for stage, values in stamps.items()}
    before = [0.0, *medians.values()]
    return [
        {"stage": stage, "ends after, s": end, "takes, s": end - start}
        for start, (stage, end) in zip(before, medians.items())
    ]


def main() -> None:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=3, help="Processes of each kind.")
    args = parser.parse_args()
    helps = [{"command": f"{each} --help", "s": median_seconds(args.rounds, each, "--help")} for each in SCRIPTS]
    imports = [{"imports up to": name, "s": median_seconds(args.rounds, "-c", code)} for name, code in IMPORTS.items()]
    with tempfile.TemporaryDirectory() as scratch:
        report(args, helps, imports, first_step(Path(scratch), args.rounds))


if __name__ == "__main__":
    main()
