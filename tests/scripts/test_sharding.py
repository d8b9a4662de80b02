"""Weights divided between two processes (FSDP2): the same training, the same files."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.models import FSDP
from tests.support.processes import ENVIRONMENT, ROOT, SignalAt, contents, refused, run, scalars, start
from tests.support.runs import unpack_old_run
from utils.files import fsync_path
from utils.training import checkpoints
from utils.training.step_log import StepLog

SCRIPT = "train_class_cond_ldm.py"
WEIGHTS = "diffusion_pytorch_model.safetensors"

CONFIG = ROOT / "configs" / "accelerate" / "cpu_fsdp2.yaml"

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def flags(cache, model_flags):
    # Adam's epsilon is large, for the update of a weight with next to no gradient is the sign of its rounding error.
    return [
        *("--latents_dir", cache, *model_flags["dit"], "--prediction_type", "flow", "--max_train_steps", 8),
        *("--train_batch_size", 4, "--learning_rate", 1e-3, "--lr_warmup_steps", 2, "--checkpointing_steps", 4),
        *("--logging_steps", 1, "--adam_epsilon", 1e-4, "--ema_sigma_rels", 0.1, "--ema_snapshot_steps", 4),
        *("--num_validation_images", 1, "--validation_inference_steps", 2, "--gradient_accumulation_steps", 2),
    ]


def launch(config, flags, folder) -> None:
    """A run of two processes under `accelerate launch` with a configuration."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, ROOT / SCRIPT]
    environment = {name: value for name, value in (os.environ | ENVIRONMENT).items() if name != "ACCELERATE_USE_CPU"}
    command = list(map(str, [*command, *flags, "--output_dir", folder]))
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "2 process(es)" in result.stderr


@pytest.fixture(scope="module")
def divided(flags, tmp_path_factory):
    """A run with the configuration in the repository."""
    folder = tmp_path_factory.mktemp("divided") / "run"
    launch(CONFIG, flags, folder)
    return folder


def test_trains_what_whole_weights_train(divided, flags, tmp_path):
    """Losses, weights, averages, snapshots and export: the same names, and the same numbers to rounding."""
    manifest = json.loads((divided / "checkpoint-8" / "manifest.json").read_text())
    assert manifest["is_sharded"]
    assert manifest["num_processes"] == 2
    whole = tmp_path / "whole"
    run(SCRIPT, *flags, "--output_dir", whole, processes=2)
    for tag in ("train/loss", "train/grad_norm"):
        assert list(scalars(divided, tag).values()) == pytest.approx(list(scalars(whole, tag).values()), rel=1e-4)
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*.safetensors"))]
    assert files == [path.relative_to(divided) for path in sorted(divided.rglob("*.safetensors"))]
    for file in files:
        ours, theirs = load_file(divided / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            rounding = {"rtol": 1e-3, "atol": 1e-3} if tensor.dtype == torch.float16 else TOLERANCE
            torch.testing.assert_close(tensor, theirs[name], **rounding)
    ours, theirs = ({name for name in contents(folder) if not name.startswith("logs")} for folder in (divided, whole))
    assert theirs - ours == {f"checkpoint-{step}/random_states_{rank}.pkl" for step in (4, 8) for rank in (0, 1)}
    assert ours <= theirs


def test_killed_and_resumed_is_bit_identical(divided, flags, tmp_path):
    folder = tmp_path / "run"
    flags = [*flags, "--output_dir", folder, "--resume_from_checkpoint", "latest"]
    for fault in (
        SignalAt(StepLog.step_done, 6, rank=1),
        SignalAt(fsync_path, 2, within=checkpoints),
    ):
        running = start(SCRIPT, *flags, processes=2, fault=fault, environment=FSDP)
        assert running.wait_for_kill(), running.wait().stderr
    run(SCRIPT, *flags, processes=2, environment=FSDP)
    for path in sorted(divided.rglob("*.safetensors")):
        ours, theirs = load_file(folder / path.relative_to(divided)), load_file(path)
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_zero2_trains_the_same(divided, flags, tmp_path):
    """Weights that stay whole from forward to backward are the same weights: configs/accelerate/zero2.yaml with no more
    changed than two processes without a GPU need."""
    config, zero2, on_cpu = (
        yaml.safe_load((CONFIG.parent / name).read_text()) for name in ("fsdp2.yaml", "zero2.yaml", "cpu_fsdp2.yaml")
    )
    needed = {name: on_cpu[name] for name in ("num_processes", "mixed_precision", "use_cpu")}
    (tmp_path / "zero2.yaml").write_text(yaml.safe_dump(zero2 | needed))
    launch(tmp_path / "zero2.yaml", flags, tmp_path / "run")
    for tag in ("train/loss", "train/grad_norm"):
        expected = list(scalars(divided, tag).values())
        assert list(scalars(tmp_path / "run", tag).values()) == pytest.approx(expected, rel=1e-5)
    assert config["fsdp_config"].pop("fsdp_reshard_after_forward") is True
    assert zero2["fsdp_config"].pop("fsdp_reshard_after_forward") is False
    assert zero2 == config


def test_samples_come_from_it(divided, tmp_path):
    for model in (divided, divided / "checkpoint-4"):
        flags = ["--model", model, "--num_inference_steps", 2, "--output_dir", tmp_path / model.name]
        run("sample.py", *flags, "--num_images_per_prompt", 1)
        assert (tmp_path / model.name / "grid.png").is_file()


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--optimizer", "muon"], ["--optimizer muon", "FSDP"]),
        (["--use_8bit_adam"], ["adamw_8bit", "FSDP"]),
        (["--mixed_precision", "fp16"], ["--mixed_precision fp16", "bf16"]),
    ],
)
def test_refusals(flags, tmp_path, extra, parts):
    arguments = [*flags, "--output_dir", tmp_path / "run", *extra]
    line = refused(run(SCRIPT, *arguments, processes=2, environment=FSDP, check=False))
    assert all(part in line for part in parts)
    assert not (tmp_path / "run").exists()


def test_engines_do_not_go_on_with_each_other(divided, flags):
    """The optimizer's file of one is not that of the other."""
    arguments = [*flags, "--output_dir", divided, "--resume_from_checkpoint", "latest"]
    line = refused(run(SCRIPT, *arguments, processes=2, check=False))
    assert "FSDP = True" in line


@pytest.mark.parametrize(
    ("modality", "condition", "shown"),
    [
        ("crystal", "composition", ["--num_validation_crystals", 1]),
        ("expression", "class:cell_type", ["--num_validation_cells", 4]),
    ],
)
def test_other_modalities_train_divided_as_they_do_whole(modality, condition, shown, tmp_path):
    """Crystals by a DiT, cells by blocks of another name than the configuration's: the losses of DDP, and a model that
    is sampled."""
    pytest.importorskip({"crystal": "pymatgen.core", "expression": "anndata"}[modality])
    cache = unpack_old_run(modality, tmp_path) / "cache"
    heads = {"num_attention_heads": 2} if modality == "crystal" else {}
    (tmp_path / "model.json").write_text(json.dumps({"num_layers": 2, "hidden_size": 16} | heads))
    flags = [
        *("--latents_dir", cache, "--condition", condition, "--model_config", tmp_path / "model.json", *shown),
        *("--max_train_steps", 4, "--train_batch_size", 4, "--learning_rate", 1e-3, "--lr_warmup_steps", 2),
        *("--logging_steps", 1, "--adam_epsilon", 1e-4, "--validation_inference_steps", 1),
    ]
    losses = {}
    for name, environment in (("whole", {}), ("divided", FSDP)):
        run(f"train_{modality}_ldm.py", *flags, "--output_dir", tmp_path / name, processes=2, environment=environment)
        losses[name] = list(scalars(tmp_path / name, "train/loss").values())
    assert len(losses["divided"]) == 4
    assert losses["divided"] == pytest.approx(losses["whole"], rel=1e-4)
    ours, theirs = (load_file(tmp_path / name / "transformer" / WEIGHTS) for name in ("divided", "whole"))
    assert ours.keys() == theirs.keys()
    run("sample.py", "--model", tmp_path / "divided", "--num_inference_steps", 2, "--num_samples", 1,
        "--output_dir", tmp_path / "samples")  # fmt: skip
    assert list((tmp_path / "samples").iterdir())


def test_a_joint_run_is_not_divided(tmp_path):
    pytest.importorskip("anndata")
    flags = ["--latents_dir", tmp_path, "--joint_vae", "--dataset_name", "x.h5ad", "--output_dir", tmp_path / "run"]
    assert "--joint_vae under FSDP" in refused(run("train_expression_ldm.py", *flags, check=False, environment=FSDP))
