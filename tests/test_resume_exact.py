"""Killed and resumed, or divided over processes: the same training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from safetensors.torch import load_file

STEPS = 40
TRAIN = ["--max_train_steps", STEPS, "--checkpointing_steps", 5, "--lr_warmup_steps", 3, "--learning_rate", 1e-3]
TEXT, LABEL = "train_text_to_image_ldm.py", "train_class_cond_ldm.py"


def kill_after(checkpoint: Path, script: str, *flags, processes: int = 1) -> None:
    """Starts a training and sends SIGKILL to all of it a little after `checkpoint` has appeared."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [*launcher, str(ROOT / script), *map(str, flags)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.time() + 120
    while not checkpoint.is_dir():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    time.sleep(0.05)  # somewhere in a step, or in the next checkpoint
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def trained(run: Path) -> dict[str, bytes]:
    """The files of a finished run that hold what was trained."""
    files = [path for folder in ("unet", "transformer", "conditions") for path in (run / folder).glob("*.safetensors")]
    files += [run / f"checkpoint-{STEPS}" / name for name in ("model.safetensors", "ema.safetensors", "optimizer.bin")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("script", "model", "processes", "extra"),
    [
        (TEXT, "unet", 1, []),
        (LABEL, "dit", 1, ["--gradient_accumulation_steps", 2, "--use_8bit_adam", "--prediction_type", "flow"]),
        (TEXT, "dit", 2, []),
    ],
    ids=["unet", "accumulation-8bit", "two-processes"],
)
def test_killed_twice_ends_bit_for_bit_the_same(cache, model_flags, script, model, processes, extra, tmp_path):
    flags = ["--latents_dir", cache, *model_flags[model], *TRAIN, "--train_batch_size", 4, *extra]
    run_script(script, *flags, "--output_dir", tmp_path / "whole", processes=processes)
    killed = [*flags, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "latest"]
    kill_after(tmp_path / "killed" / "checkpoint-10", script, *killed, processes=processes)
    kill_after(tmp_path / "killed" / "checkpoint-25", script, *killed, processes=processes)
    result = run_script(script, *killed, processes=processes)
    assert "going on from" in result.stderr
    whole, resumed = trained(tmp_path / "whole"), trained(tmp_path / "killed")
    assert len(whole) >= 4
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if whole[name] != resumed[name]] == []
    assert not list((tmp_path / "killed").glob(".tmp-*"))


def test_processes_and_accumulation_are_one_batch(cache, model_flags, tmp_path):
    """8 samples a step as 1 x 8, as 2 processes x 4, and as 2 accumulated x 4: the same weights to rounding."""
    flags = ["--latents_dir", cache, *model_flags["dit"], *TRAIN, "--max_train_steps", 10, "--adam_epsilon", 1e-4]
    run_script(TEXT, *flags, "--train_batch_size", 8, "--output_dir", tmp_path / "one")
    two = run_script(TEXT, *flags, "--train_batch_size", 4, "--output_dir", tmp_path / "two", processes=2)
    assert "2 process(es) x 4" in two.stderr
    run_script(
        TEXT,
        *flags,
        "--train_batch_size",
        4,
        "--gradient_accumulation_steps",
        2,
        "--output_dir",
        tmp_path / "accumulated",
    )
    one, *others = (
        load_file(tmp_path / name / "checkpoint-10" / "model.safetensors") for name in ("one", "two", "accumulated")
    )
    for other in others:
        assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5
