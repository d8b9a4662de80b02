"""How training grows: with processes, with the batch and with the resolution; and whether plan_budget.py knows it.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --num_processes 1 --batch_sizes 64 128 256 --sides 32 --memory_cap_gb 32 \\
        -- --config configs/image/text_to_image_32gb.yaml

What stands behind `--` goes to `train_text_to_image_ldm.py`. Each figure is of a process of its own, from a cache of
random numbers with captions of CLIP-L's shape; several processes have a batch each.
"""

import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml
from common import ROOT, benchmark_parser, report, run_python
from random_data import save_text_encoder, save_vae, write_random_cache

NUM_ROWS = 2048  # of a cache
SMALL = ["--model", "dit", "--model_size", "S/2", "--mixed_precision", "bf16"]


class Bench:
    """Runs scripts with what all figures share."""

    def __init__(self, args: Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.flags = args.flags or SMALL

    def data(self, side: int) -> list[Any]:
        """The flags of a latent cache, made once for each size."""
        folder = self.folder / f"cache-{side}"
        if not folder.exists():
            vae, text_encoder = self.folder / "vae", self.folder / "text"
            if not vae.exists():
                save_vae(vae, (8, 8, 8, 8), 1)
                save_text_encoder(text_encoder, num_layers=1)
            write_random_cache(folder, NUM_ROWS, (4, side, side), vae=vae, text_encoder=text_encoder)
        return ["--latents_dir", folder, "--resolution", 8 * side]

    def steps(self, flags: list[Any], num_processes: int = 1) -> dict[str, float]:
        """The figures of benchmarks/train_steps.py."""
        output = self.folder / "steps.json"
        launch: list[Any] = []
        if num_processes > 1:
            launch = ["-m", "accelerate.commands.launch", "--config_file", self.args.accelerate_config]
            launch += ["--num_processes", num_processes]
        settings = ["--num_steps", self.args.num_steps, "--output", output]
        if self.args.memory_cap_gb:
            settings += ["--memory_cap_gb", self.args.memory_cap_gb]
        run_python(*launch, ROOT / "benchmarks" / "train_steps.py", *settings, "--", *flags, threads=self.args.threads)
        return json.loads(output.read_text())["tables"][0][0]

    def plan(self, side: int, samples: int) -> tuple[dict[str, float], dict[str, float]]:
        """What plan_budget.py says of so many samples a step, and what a training by its plan takes."""
        config = self.folder / "plan.yaml"
        config.unlink(missing_ok=True)
        settings = ["--trainer", "text", "--hours", 168, "--effective_batch_size", samples, "--output_config", config]
        if self.args.memory_cap_gb:
            settings += ["--memory_gb", self.args.memory_cap_gb]
        script = ROOT / "plan_budget.py"
        said = run_python(script, *self.flags, *self.data(side), *settings, threads=self.args.threads)
        speed = float(said.partition("speed: ")[2].split()[0])
        memory, unit = said.partition("memory: ")[2].split()[:2]
        plan = yaml.safe_load(config.read_text())
        # The hours would end the schedule, not the steps that are measured.
        config.write_text(yaml.safe_dump({name: value for name, value in plan.items() if name != "max_train_hours"}))
        planned = {"samples/s": speed, "memory, GB": float(memory) * {"MB": 1e-3, "GB": 1.0}[unit]}
        return planned, self.steps(["--config", config])


def processes_table(bench: Bench, counts: list[int], side: int, batch_size: int) -> list[dict[str, Any]]:
    """The same batch in each process. "of ideal" is the speed in units of the first row's, a process."""
    flags = [*bench.flags, *bench.data(side), "--train_batch_size", batch_size]
    rows = [bench.steps(flags, count) for count in counts]
    ideal = rows[0]["samples/s"] / counts[0]
    return [row | {"of ideal": row["samples/s"] / (count * ideal)} for count, row in zip(counts, rows, strict=True)]


def sizes_table(bench: Bench, sides: list[int], batch_sizes: list[int]) -> list[dict[str, Any]]:
    """One process, by latents and batch."""
    rows = []
    for side in sides:
        for batch_size in batch_sizes:
            flags = [*bench.flags, *bench.data(side), "--train_batch_size", batch_size]
            rows.append({"latents": f"{side} x {side}", **bench.steps(flags)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def plans_table(bench: Bench, sides: list[int], samples: int) -> list[dict[str, Any]]:
    """What was planned, and what it took."""
    rows = []
    for side in sides:
        planned, measured = bench.plan(side, samples)
        row: dict[str, Any] = {"latents": f"{side} x {side}", "samples a step": samples}
        for name in planned:
            row |= {f"{name}, planned": planned[name], f"{name}, measured": measured[name]}
            row[f"{name}, ratio"] = planned[name] / measured[name]
        rows.append(row)
    return rows


def main() -> None:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--num_processes", type=int, nargs="+", default=[1, 2], help="Counts of them.")
    parser.add_argument(
        "--accelerate_config",
        type=Path,
        default=ROOT / "configs" / "accelerate" / "cpu_ddp.yaml",
        help="Configuration of accelerate for several processes.",
    )
    parser.add_argument("--threads", type=int, default=None, help="Threads of each process, on a CPU.")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[4, 8, 16, 32], help="Batch sizes of one process."
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 16, 32], help="Height and width of the latents.")
    parser.add_argument("--num_steps", type=int, default=10, help="Steps to measure for each figure.")
    parser.add_argument("--memory_cap_gb", type=float, default=None, help="GPU memory to use at most.")
    parser.add_argument(
        "flags", nargs="*", metavar="-- FLAGS", help=f"Flags of the trainer. Default: {' '.join(SMALL)}"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        batch_size = max(args.batch_sizes)
        tables = [
            processes_table(bench, args.num_processes, args.sides[0], batch_size),
            sizes_table(bench, args.sides, args.batch_sizes),
            plans_table(bench, args.sides, batch_size),
        ]
        report(args, *tables)


if __name__ == "__main__":
    main()
