"""When a trainer ends, and which steps reach the weights."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import ENVIRONMENT, ROOT, NotFinite, refused, run, scalars
from utils.diffusion.objectives import Objective
from utils.training.checkpoints import damage

TEXT, CLASS = "train_text_to_image_ldm.py", "train_class_cond_ldm.py"

EVERY_STEP = [
    *("--train_batch_size", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 99, "--logging_steps", 1),
    *("--lr_warmup_steps", 0, "--learning_rate", 1e-3),
]

LOSS = Objective.loss


def state_at(folder, step: int) -> dict[str, torch.Tensor]:
    """Weights, average and optimizer state of a checkpoint."""
    checkpoint = folder / f"checkpoint-{step}"
    state = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        state |= {f"{path.name}/{name}": tensor for name, tensor in load_file(path).items()}
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    for index, each in optimizer["state"].items():
        state |= {f"optimizer/{index}/{key}": value for key, value in each.items() if torch.is_tensor(value)}
    return state


def differing(folder, step: int, other: int) -> list[str]:
    one, two = state_at(folder, step), state_at(folder, other)
    return [name for name in one if not torch.equal(one[name], two[name])]


# ---- losses that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_gradient", [True, False], ids=["gradient", "loss alone"])
@pytest.mark.parametrize(
    ("script", "model", "extra", "processes"),
    [
        (TEXT, "unet", [], 1),
        (TEXT, "dit", ["--mixed_precision", "bf16"], 2),
        (CLASS, "dit", ["--use_8bit_adam", "--gradient_accumulation_steps", 2], 1),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(
    cache, model_flags, tmp_path, script, model, extra, processes, with_gradient
):
    """Neither weights nor average nor optimizer; of two processes one alone has the infinite loss."""
    accumulation = 2 if "--gradient_accumulation_steps" in extra else 1
    flags = ["--latents_dir", cache, *model_flags[model], *EVERY_STEP, *extra, "--max_train_steps", 5]
    fault = NotFinite(LOSS, 3 * accumulation, rank=processes - 1, with_gradient=with_gradient)
    run(script, *flags, "--output_dir", tmp_path / "run", processes=processes, fault=fault)
    assert differing(tmp_path / "run", 2, 3) == []
    assert len(differing(tmp_path / "run", 3, 4)) > 20
    assert all(torch.isfinite(tensor.float()).all() for tensor in state_at(tmp_path / "run", 5).values())
    assert list(scalars(tmp_path / "run", "train/skipped_steps").values()) == [0, 0, 1, 1, 1]
    losses = scalars(tmp_path / "run", "train/loss")
    assert [step for step, loss in losses.items() if not math.isfinite(loss)] == [3]


def test_a_run_that_stays_not_finite_stops(cache, model_flags, tmp_path):
    """After the steps allowed, with the last good checkpoint named; what it names can be gone on with."""
    flags = ["--latents_dir", cache, *model_flags["unet"], *EVERY_STEP, "--max_train_steps", 12]
    flags += ["--checkpointing_steps", 4, "--max_nonfinite_steps", 3, "--output_dir", tmp_path / "run"]
    line = refused(run(TEXT, *flags, fault=NotFinite(LOSS, 6, times=99), check=False))
    for part in ("--max_nonfinite_steps 3", "steps 6 to 8", "--resume_from_checkpoint checkpoint-4"):
        assert part in line
    run(TEXT, *flags, "--resume_from_checkpoint", "checkpoint-4")
    # Three steps with a finite one between them do not stop a run.
    run(TEXT, *flags, "--output_dir", tmp_path / "other", fault=NotFinite(LOSS, 6, times=2))


# ---- hours ----------------------------------------------------------------------------------------------------------


def test_hours_of_a_script(cache, model_flags, tmp_path):
    """It ends by itself, with a checkpoint of its last step and an export, and goes on only when given more."""
    flags = ["--latents_dir", cache, *model_flags["dit"], "--train_batch_size", 4, "--logging_steps", 1]
    flags += [
        "--checkpointing_steps",
        100_000,
        "--lr_warmup_steps",
        1,
        "--lr_scheduler",
        "constant_with_decay",
        "--output_dir",
        tmp_path / "run",
    ]
    result = run(CLASS, *flags, "--max_train_hours", 8 / 3600, "--validation_steps", 100_000)
    assert "--max_train_hours are used up" in result.stderr
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    rates = scalars(tmp_path / "run", "train/learning_rate")
    assert checkpoint.name == f"checkpoint-{max(rates)}"
    assert min(rates.values()) < 0.8 * max(rates.values())
    assert (tmp_path / "run" / "model_index.json").is_file()
    assert json.loads((tmp_path / "run" / "elapsed.json").read_text())["seconds"] >= 8
    again = run(CLASS, *flags, "--max_train_hours", 8 / 3600, "--resume_from_checkpoint", "latest")
    assert "--max_train_hours are used up" in again.stderr
    assert scalars(tmp_path / "run", "train/learning_rate").keys() == rates.keys()


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_launcher_and_all_its_processes(cache, model_flags, tmp_path, number):
    """As Ctrl-C in a terminal sends it: trainers get it twice, the second time from the launcher; loaders get it too."""
    config = ROOT / "configs" / "accelerate" / "cpu_ddp.yaml"
    flags = ["--latents_dir", cache, *model_flags["dit"], "--train_batch_size", 4, "--dataloader_num_workers", 1]
    flags += ["--checkpointing_steps", 100_000, "--output_dir", tmp_path / "run"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, ROOT / CLASS, *flags]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        environment = os.environ | ENVIRONMENT
        launcher = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stderr=stderr, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while "/100000 [" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(launcher.pid, number)
        launcher.wait(60)
    (checkpoint,) = (tmp_path / "run").glob("*checkpoint*")
    step = checkpoint.name.removeprefix("checkpoint-")
    assert f"stopped by a signal after step {step}" in log.read_text()
    assert damage(checkpoint) is None
