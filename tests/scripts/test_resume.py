"""Killed and resumed, divided over processes, damaged, or asked to go on as something else."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import cache_flags
from tests.support.processes import (
    ENVIRONMENT,
    ROOT,
    SignalAt,
    contents,
    refused,
    run,
    run_script,
    scalars,
    snapshot,
    start,
)
from tests.support.runs import LATEST, STEPS, assert_identical, trained
from utils import files
from utils.diffusion.objectives import Objective
from utils.files import fsync_path, replace_durably, write_text
from utils.image.pipeline import index_of
from utils.runs import save
from utils.runs.load import RunFolder
from utils.training import checkpoints, ema
from utils.training.checkpoints import prune
from utils.training.ema import SNAPSHOTS
from utils.training.optimizers import LearningRate
from utils.training.step_log import StepLog

TEXT, CLASS = "train_text_to_image_ldm.py", "train_class_cond_ldm.py"

TRAIN = [
    *("--max_train_steps", STEPS, "--checkpointing_steps", 4, "--logging_steps", 1, "--train_batch_size", 4),
    *("--learning_rate", 1e-3, "--lr_warmup_steps", 6, "--lr_scheduler", "cosine"),
]


# A model with tensors of 4,096 numbers: bitsandbytes keeps the states of smaller ones in 32 bits.
WIDE = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def common(cache, model_flags, tmp_path_factory):
    """Flags of each kind of run that is tested, without the folder."""
    config = tmp_path_factory.mktemp("wide") / "wide.json"
    config.write_text(json.dumps(WIDE))
    shared = ["--latents_dir", cache, *TRAIN]
    return {
        "text unet": (TEXT, 1, [*shared, *model_flags["unet"], "--checkpoints_total_limit", 1]),
        "class dit, accumulated, 8 bit": (
            CLASS,
            1,
            [
                *(
                    *shared,
                    "--model",
                    "dit",
                    "--model_size",
                    "S/2",
                    "--model_config",
                    config,
                    "--prediction_type",
                    "flow",
                ),
                *("--gradient_accumulation_steps", 4, "--use_8bit_adam", "--checkpoints_total_limit", 4),
            ],
        ),
        "text dit, two processes": (TEXT, 2, [*shared, *model_flags["dit"], "--no-use_ema"]),
        "class unet, two processes, accumulated, 8 bit": (
            CLASS,
            2,
            [
                *(*shared, *model_flags["unet"], "--train_batch_size", 2, "--ema_sigma_rels", 0.1),
                *("--gradient_accumulation_steps", 4, "--use_8bit_adam"),
            ],
        ),
    }


@pytest.fixture(scope="module")
def uninterrupted(common, tmp_path_factory):
    """name -> the folder of a run that nothing interrupted, made when first asked for."""
    runs = {}

    def folder_of(name):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("uninterrupted") / "run"
            script, processes, flags = common[name]
            run(script, *flags, "--output_dir", runs[name], processes=processes)
        return runs[name]

    return folder_of


KINDS = ("text unet", "class dit, accumulated, 8 bit", "text dit, two processes")

KILLED = (*KINDS, "class unet, two processes, accumulated, 8 bit")


def steps_of(folder) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


# ---- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed_is_bit_identical(common, uninterrupted, tmp_path, name):
    """SIGKILL at a random step; twice while a checkpoint is written: before its files are on the disk, and before old ones
    are deleted; and, from outside, at a random moment, which may be after the end."""
    script, processes, flags = common[name]
    expected = uninterrupted(name)
    folder = tmp_path / "run"
    chance = random.Random(name)
    kills = [
        (SignalAt(StepLog.step_done, chance.randint(5, 7)), 4),
        (SignalAt(fsync_path, 2, within=checkpoints), 4),  # steps 5 to 8, and one file of checkpoint-8
        (SignalAt(prune, 2), 12),  # steps 5 to 8, and 9 to 12
        (SignalAt(StepLog.step_done, chance.randint(1, 3)), 12),
    ]
    for fault, last_checkpoint in kills:
        if "StepLog" in fault.function:
            fault = replace(fault, rank=chance.randrange(processes))
        running = start(script, *flags, "--output_dir", folder, *LATEST, processes=processes, fault=fault)
        assert running.wait_for_kill(), running.wait().stderr
        assert max(steps_of(folder)) == last_checkpoint
    running = start(script, *flags, "--output_dir", folder, *LATEST, processes=processes)
    running.kill_when(lambda: (folder / "checkpoint-16").exists(), delay=chance.uniform(0, 0.2))
    result = run(script, *flags, "--output_dir", folder, *LATEST, processes=processes)
    assert f"resuming from {folder}/checkpoint-" in result.stderr
    assert_identical(folder, expected)
    assert not list(folder.glob(".tmp*"))
    manifest = json.loads((folder / f"checkpoint-{STEPS}" / "manifest.json").read_text())
    assert manifest["num_processes"] == processes
    for tag in ("train/loss", "train/grad_norm", "train/learning_rate"):
        assert scalars(folder, tag) == scalars(expected, tag)
        assert list(scalars(folder, tag)) == list(range(1, STEPS + 1))
    assert (folder / "args.yaml").is_file()
    assert (folder / "model_index.json").is_file()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_exits_0(common, uninterrupted, tmp_path, name, number):
    """Of two processes one alone gets it; the other stops at the same step."""
    script, processes, flags = common[name]
    folder = tmp_path / "run"
    flags = [*flags, "--output_dir", folder, *LATEST]
    fault = SignalAt(Objective.loss, 7, rank=processes - 1, signal=number)
    result = run(script, *flags, processes=processes, fault=fault)
    step = 2 if "accumulated" in name else 7  # the seventh of its micro-steps belongs to the second step
    assert steps_of(folder)[-1] == step
    assert f"stopped by a signal after step {step}" in result.stderr
    assert "--resume_from_checkpoint latest" in result.stderr
    assert not (folder / "model_index.json").exists()
    run(script, *flags, processes=processes)
    assert_identical(folder, uninterrupted(name))


def test_learning_rate_is_that_of_the_step(uninterrupted):
    """Warm-up and cosine count optimizer steps: neither micro-steps nor processes."""
    for name in KINDS:
        curve = scalars(uninterrupted(name), "train/learning_rate")
        assert list(curve) == list(range(1, STEPS + 1))
        expected = [LearningRate(1e-3, "cosine", 6, STEPS).at(step) for step in range(STEPS)]
        assert list(curve.values()) == pytest.approx(expected)
        assert curve[6] == pytest.approx(1e-3)


@pytest.mark.parametrize("name", [name for name in KILLED if "8 bit" in name])
def test_adam_has_8_bit_states(uninterrupted, name):
    state = trained(uninterrupted(name))
    assert any(tensor.dtype == torch.uint8 and tensor.numel() >= 4096 for tensor in state.values())


def test_checkpoints_total_limit(uninterrupted):
    """The newest N stay, and at least two."""
    assert steps_of(uninterrupted("text unet")) == [20, 24]  # limit 1
    assert steps_of(uninterrupted("class dit, accumulated, 8 bit")) == [12, 16, 20, 24]  # limit 4
    assert steps_of(uninterrupted("text dit, two processes")) == [16, 20, 24]  # the default, 3


def test_a_finished_run_goes_on(common, uninterrupted, tmp_path):
    """With more steps; a second time with the same number of steps it has nothing left to do."""
    script, _, flags = common["text unet"]
    shutil.copytree(uninterrupted("text unet"), tmp_path / "run")
    flags = [*flags, "--lr_scheduler", "constant", "--output_dir", tmp_path / "run", *LATEST]
    run(script, *flags, "--max_train_steps", 28)
    assert steps_of(tmp_path / "run") == [24, 28]
    name = "unet/diffusion_pytorch_model.safetensors"
    weights = (tmp_path / "run" / name).read_bytes()
    assert weights != (uninterrupted("text unet") / name).read_bytes()
    run(script, *flags, "--max_train_steps", 28)
    assert (tmp_path / "run" / name).read_bytes() == weights


def test_latest_without_a_checkpoint_starts(common, uninterrupted, tmp_path):
    """In a folder that is not there yet, and in one whose only checkpoint was never completed."""
    script, _, flags = common["text unet"]
    folder = tmp_path / "run"
    fault = SignalAt(StepLog.step_done, 1)
    assert start(script, *flags, "--output_dir", folder, *LATEST, fault=fault).wait_for_kill()
    assert steps_of(folder) == []
    half = folder / ".tmp-checkpoint-4"
    half.mkdir(exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half of")
    result = run(script, *flags, "--output_dir", folder, *LATEST)
    assert "starting from the beginning" in result.stderr
    assert_identical(folder, uninterrupted("text unet"))
    assert not half.exists()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "ema.safetensors"])
def test_a_damaged_checkpoint_is_refused_and_an_earlier_one_offered(common, uninterrupted, tmp_path, file):
    script, _, flags = common["text unet"]
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted("text unet"), folder)
    damaged = folder / "checkpoint-24" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    before = snapshot(folder)
    line = refused(run(script, *flags, "--output_dir", folder, *LATEST, check=False))
    for part in (
        "--resume_from_checkpoint",
        "checkpoint-24",
        file,
        "damaged",
        "--resume_from_checkpoint checkpoint-20",
    ):
        assert part in line
    assert snapshot(folder) == before
    if file == "model.safetensors":  # what was offered works
        run(script, *flags, "--output_dir", folder, "--resume_from_checkpoint", "checkpoint-20")
        assert_identical(folder, uninterrupted("text unet"))


@pytest.fixture(scope="module")
def other_cache(tmp_path_factory, image_folder, tiny_vae, tiny_text_encoder):
    folder = tmp_path_factory.mktemp("other_cache") / "latents"
    flags = [*cache_flags(image_folder, tiny_vae, tiny_text_encoder), "--max_samples", 40, "--latents_dir", folder]
    run("precompute_latents.py", *flags)
    return folder


OTHERS = {
    "seed": (["--seed", 1], "seed = 0", "1"),
    "batch": (["--train_batch_size", 8], "samples per step = 4", "8"),
    "accumulation": (["--gradient_accumulation_steps", 2], "samples per step = 4", "8"),
    "objective": (["--prediction_type", "epsilon"], "prediction_type = v_prediction", "epsilon"),
    "no average": (["--no-use_ema"], "use_ema = True", "False"),
    "8 bit": (["--use_8bit_adam"], "optimizer = adamw", "adamw_8bit"),
    "normalisation": (["--latent_normalisation", "measured"], "latent_normalisation = vae", "measured"),
    "model": (["--model", "dit", "--model_size", "S/2", "--model_config", None], "model = unet", "dit"),
    "width": (["--model_config", {"block_out_channels": [8, 24], "norm_num_groups": 4}], "parameters = ", "0."),
    "cache": (["--latents_dir", "other"], "data = ", ""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_going_on_as_another_run_is_refused(common, uninterrupted, other_cache, model_flags, tmp_path, name):
    script, _, flags = common["text unet"]
    extra, had, asked = OTHERS[name]
    config = tmp_path / "other.json"
    config.write_text(json.dumps(next((value for value in extra if isinstance(value, dict)), {})))
    values = {None: model_flags["dit"][-1], "other": other_cache}
    extra = [config if isinstance(value, dict) else values.get(value, value) for value in extra]
    folder = uninterrupted("text unet")
    before = snapshot(folder)
    line = refused(run(script, *flags, "--output_dir", folder, *LATEST, *extra, check=False))
    assert "--resume_from_checkpoint" in line
    assert "checkpoint-24" in line
    assert had in line
    was, now = line.split(had.split(" = ")[0] + " = ")[1].split(", this run has ")
    assert now.split(";")[0].startswith(asked)
    assert was != now.split(";")[0]
    assert snapshot(folder) == before


# ---- processes and launchers ----------------------------------------------------------------------------------------


def test_processes_and_accumulation_are_one_batch(cache, model_flags, tmp_path):
    """8 samples a step as 1 process x 8, as 2 x 4 (under torch's launcher) and as 4 x 2 accumulated: the same losses, and after
    8 steps the same weights to 1e-5 of the largest of each tensor. Adam's epsilon is large, for the update of a weight with
    next to no gradient is the sign of its rounding error."""
    flags = ["--latents_dir", cache, *model_flags["dit"], *TRAIN, "--max_train_steps", 8, "--adam_epsilon", 1e-4]
    run(TEXT, *flags, "--train_batch_size", 8, "--output_dir", tmp_path / "one")
    run(
        TEXT,
        *flags,
        "--train_batch_size",
        4,
        "--gradient_accumulation_steps",
        2,
        "--output_dir",
        tmp_path / "accumulated",
    )
    run_script(TEXT, *flags, "--train_batch_size", 4, "--output_dir", tmp_path / "two", processes=2)
    manifest = json.loads((tmp_path / "two" / "checkpoint-8" / "manifest.json").read_text())
    assert manifest["num_processes"] == 2
    one = load_file(tmp_path / "one" / "checkpoint-8" / "model.safetensors")
    start_weights = load_file(tmp_path / "one" / "checkpoint-4" / "model.safetensors")
    losses = scalars(tmp_path / "one", "train/loss")
    for name in ("two", "accumulated"):
        other = load_file(tmp_path / name / "checkpoint-8" / "model.safetensors")
        assert list(scalars(tmp_path / name, "train/loss").values()) == pytest.approx(list(losses.values()), rel=1e-5)
        differences = {
            key: ((one[key] - other[key]).abs().max() / one[key].abs().max().clamp(min=1e-3)).item() for key in one
        }
        assert max(differences.values()) < 1e-5
    moved = max(
        ((one[key] - start_weights[key]).abs().max() / one[key].abs().max()).item() for key in one if "weight" in key
    )
    assert moved > 1e-2  # the tolerance is small beside what was learnt


def test_resuming_on_two_processes_what_one_began(cache, model_flags, tmp_path):
    """The same samples a step on another number of processes: the same curve of learning rates and losses goes on."""
    flags = ["--latents_dir", cache, *model_flags["dit"], *TRAIN, "--adam_epsilon", 1e-4, "--max_train_steps", 12]
    run(TEXT, *flags, "--train_batch_size", 8, "--output_dir", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoint-12", "logs"))
    flags = [*flags, "--train_batch_size", 4, "--output_dir", tmp_path / "moved"]
    run(TEXT, *flags, *LATEST, processes=2)
    for tag in ("train/learning_rate", "train/loss"):
        expected, found = scalars(tmp_path / "one", tag), scalars(tmp_path / "moved", tag)
        assert list(found) == [9, 10, 11, 12]
        assert list(found.values()) == pytest.approx([expected[step] for step in found], rel=1e-5)


def test_accelerate_launch_of_two_processes(common, uninterrupted, tmp_path):
    """The configuration for two processes without a GPU, as documented; nothing in the environment says CPU."""
    config = ROOT / "configs" / "accelerate" / "cpu_ddp.yaml"
    script, _, flags = common["text dit, two processes"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(ROOT / script), *map(str, flags), "--output_dir", str(tmp_path / "run")]
    environment = {name: value for name, value in (os.environ | ENVIRONMENT).items() if name != "ACCELERATE_USE_CPU"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "2 process(es)" in result.stderr
    assert_identical(tmp_path / "run", uninterrupted("text dit, two processes"))


def test_accelerate_launch(common, uninterrupted, tmp_path):
    """`accelerate launch`, with the configuration in the repository, trains what plain python trains; the configuration's
    precision gives way to the flag."""
    config = ROOT / "accelerate_config.yaml"
    script, _, flags = common["text unet"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--config_file", str(config)] if config.is_file() else []
    command += [str(ROOT / script), *map(str, flags), "--output_dir", str(tmp_path / "run"), "--mixed_precision", "no"]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert_identical(tmp_path / "run", uninterrupted("text unet"))
    assert set(contents(tmp_path / "run" / "unet")) == set(contents(uninterrupted("text unet") / "unet"))


def test_killed_before_it_is_a_run(common, tmp_path):
    """While it wrote args.yaml, by which a folder is known as a run's: the same command begins."""
    script, _, flags = common["text unet"]
    flags = [*flags, "--output_dir", tmp_path / "run", *LATEST]
    assert start(script, *flags, fault=SignalAt(replace_durably, 1)).wait_for_kill()
    assert [path.name[:5] for path in (tmp_path / "run").iterdir()] == [".tmp-"]
    assert start(script, *flags, fault=SignalAt(StepLog.step_done, 1)).wait_for_kill()
    assert (tmp_path / "run" / "args.yaml").is_file()
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_killed_before_snapshots_are_whole(common, tmp_path):
    """A run goes on after its last checkpoint: what belongs to that step must be there before it."""
    script, _, flags = common["text unet"]
    flags = [*flags, "--max_train_steps", 8, "--ema_sigma_rels", 0.1, "--ema_snapshot_steps", 4, *LATEST]
    run(script, *flags, "--output_dir", tmp_path / "whole")
    for count in (1, 2):
        fault = SignalAt(replace_durably, count, within=ema)
        assert start(script, *flags, "--output_dir", tmp_path / "run", fault=fault).wait_for_kill()
    run(script, *flags, "--output_dir", tmp_path / "run")
    snapshots = contents(tmp_path / "whole" / SNAPSHOTS)
    assert len(snapshots) == 1 + 2
    assert contents(tmp_path / "run" / SNAPSHOTS) == snapshots


def test_killed_while_a_finished_run_is_exported_anew(common, tmp_path):
    """It counts as unfinished then: its last checkpoint is sampled, and not weights that may be halves."""
    script, _, flags = common["text unet"]
    flags = [*flags, "--output_dir", tmp_path, *LATEST]
    run(script, *flags, "--max_train_steps", 4)
    assert RunFolder.find(tmp_path).checkpoint is None
    flags += ["--max_train_steps", 8]
    for fault in (SignalAt(write_text, 1, within=save), SignalAt(index_of, 1)):
        assert start(script, *flags, fault=fault).wait_for_kill()
        assert RunFolder.find(tmp_path).checkpoint == tmp_path / "checkpoint-8"
    run(script, *flags)
    assert RunFolder.find(tmp_path).checkpoint is None


def test_killed_while_a_checkpoint_is_deleted(tmp_path, monkeypatch):
    """No half of one is left under its name, to be taken for a whole one or for nobody's."""
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "manifest.json").write_text("{}")

    def killed_within(path, **_):
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", killed_within)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 2)
    monkeypatch.undo()
    assert steps_of(tmp_path) == [8, 12]
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-8"]


def test_what_a_killed_process_was_writing_goes(tmp_path):
    """A half-written text in a run's folder, but not a folder that an evaluation has in work."""
    (tmp_path / ".tmp-123-elapsed.json").write_text("{")
    (tmp_path / ".tmp-checkpoint-8").mkdir()
    (tmp_path / ".tmp-best").mkdir()
    prune(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-best"]
