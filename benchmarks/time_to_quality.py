"""Which choices of the recipe give the better samples after the same wall-clock time.

    python benchmarks/time_to_quality.py --latents_dir runs/cifar10/latents --reference cifar10 \\
        --classifier runs/classifier --minutes 2 --seeds 0 1 2

Each recipe differs from the first in what its name says, and trains a class-conditional model for so many minutes of
its process, imports and all; the learning rate falls to zero over the last fifth of them. Then `evaluate.py` judges
its samples by the distances of a classifier's features. `--jobs` processes run at once, with one thread each.
"""

import json
import statistics
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from common import ROOT, benchmark_parser, report, run_python

RECIPES: dict[str, list[str]] = {
    "flow, logit-normal timesteps, modern blocks, AdamW, batch 64": [],
    "uniform timesteps": ["--timestep_density", "uniform"],
    "epsilon": ["--prediction_type", "epsilon"],
    "epsilon, Min-SNR 5": ["--prediction_type", "epsilon", "--snr_gamma", "5"],
    "v": ["--prediction_type", "v_prediction"],
    "v, Min-SNR 5": ["--prediction_type", "v_prediction", "--snr_gamma", "5"],
    "rotary positions only": [],
    "plain blocks": ["--model_size", "plain-S/2"],
    "patches of one latent": [],
    "Muon": ["--optimizer", "muon"],
    "batch 32": ["--train_batch_size", "32"],
    "batch 128": ["--train_batch_size", "128"],
    "learning rate 5e-4": ["--learning_rate", "5e-4"],
    "learning rate 2e-3": ["--learning_rate", "2e-3"],
}
# What a recipe changes in --model_config.
MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "rotary positions only": {"positions": "rotary"},
    "patches of one latent": {"patch_size": 1},
}
BASE = {
    "model": "dit",
    "model_size": "S/2",
    "prediction_type": "flow",
    "latent_normalisation": "measured",
    "learning_rate": "1e-3",
    "lr_scheduler": "constant_with_decay",
    "lr_warmup_steps": "100",
    "ema_decay": "0.995",
    "train_batch_size": "64",
    "checkpointing_steps": "1000000",
}


def train_and_judge(job: tuple[str, int], args: Namespace) -> dict[str, Any]:
    """The figures of one training."""
    recipe, seed = job
    folder = args.output_dir / f"{list(RECIPES).index(recipe)}-{seed}"
    folder.mkdir()
    model_config = yaml.safe_load(args.model_config.read_text()) | MODEL_CONFIGS.get(recipe, {})
    (folder / "model.yaml").write_text(yaml.safe_dump(model_config))
    flags = [f"--{name}={value}" for name, value in BASE.items()]
    flags += [f"--model_config={folder / 'model.yaml'}", f"--latents_dir={args.latents_dir}", f"--seed={seed}"]
    flags += [f"--max_train_hours={args.minutes / 60}", f"--output_dir={folder / 'run'}", *RECIPES[recipe]]
    run_python(ROOT / "train_class_cond_ldm.py", *flags, threads=1, log=folder / "train.log")
    judged = ["--model", folder / "run", "--reference", args.reference, "--reference_split", args.reference_split]
    judged += ["--num_reference", args.num_reference, "--num_samples", args.num_samples, "--metrics", "fid", "kid"]
    judged += ["--features", f"classifier:{args.classifier}", "--classifier", args.classifier]
    judged += ["--guidance_scale", args.guidance_scale, "--num_inference_steps", 25, "--batch_size", 100]
    judged += ["--output_dir", folder / "evaluated"]
    run_python(ROOT / "evaluate.py", *judged, threads=1, log=folder / "evaluate.log")
    point = json.loads((folder / "evaluated" / "metrics.json").read_text())["points"][0]
    figures = {name: figure["value"] for group in point["groups"] for name, figure in group["figures"].items()}
    steps = max(int(path.name.partition("-")[2]) for path in (folder / "run").glob("checkpoint-*"))
    print(f"{recipe}, seed {seed}: {steps} steps, {figures}", flush=True)
    return {"recipe": recipe, "seed": seed, "steps": steps, **figures}


def spread(values: list[float]) -> str:
    """Mean and range."""
    return f"{statistics.mean(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def main() -> None:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--latents_dir", type=Path, required=True, help="Latent cache with labels.")
    parser.add_argument("--reference", required=True, help="Real images: those that the cache was not made of.")
    parser.add_argument("--reference_split", default="test", help="Split of --reference.")
    parser.add_argument(
        "--classifier", type=Path, required=True, help="Folder made by benchmarks/train_classifier.py."
    )
    parser.add_argument(
        "--model_config",
        type=Path,
        default=ROOT / "configs" / "demo" / "dit.yaml",
        help="Arguments of the model that override DiT-S/2.",
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="Minutes of each training.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Trainings of each recipe.")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="Recipes to train.")
    parser.add_argument("--num_samples", type=int, default=1000, help="Number of samples to evaluate.")
    parser.add_argument("--num_reference", type=int, default=10_000, help="Real images.")
    parser.add_argument(
        "--guidance_scale", type=float, default=2.0, help="Guidance scale of the samples, for all recipes."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/time_to_quality"), help="New: runs and logs.")
    parser.add_argument("--jobs", type=int, default=1, help="Trainings at once.")
    args = parser.parse_args()
    jobs = [(recipe, seed) for seed in args.seeds for recipe in args.recipes]
    args.output_dir.mkdir(parents=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(partial(train_and_judge, args=args), jobs))
    figures = [name for name in done[0] if name not in ("recipe", "seed")]
    means = []
    for recipe in args.recipes:
        mine = [each for each in done if each["recipe"] == recipe]
        means.append({"recipe": recipe} | {name: spread([each[name] for each in mine]) for name in figures})
    report(args, means, done)


if __name__ == "__main__":
    main()
