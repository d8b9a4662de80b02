"""Optimizers in the trainers: killed, resumed, and refused as another."""

import json
import random

import pytest

from tests.support.processes import SignalAt, refused, run, start
from tests.support.runs import LATEST, assert_identical, trained
from utils.training.step_log import StepLog

CLASS = "train_class_cond_ldm.py"


@pytest.fixture(scope="module")
def flags(cache, tmp_path_factory):
    """A class-conditional DiT of 6 blocks, so that there are some to route past."""
    config = tmp_path_factory.mktemp("models") / "deep.json"
    config.write_text(json.dumps({"num_layers": 6, "hidden_size": 32, "num_attention_heads": 2}))
    return [
        *("--latents_dir", cache, "--model", "dit", "--model_size", "S/1", "--model_config", config),
        *("--max_train_steps", 24, "--checkpointing_steps", 4, "--train_batch_size", 4, "--learning_rate", 1e-3),
        *("--lr_warmup_steps", 6, "--lr_scheduler", "cosine", "--validation_labels", 0, "--num_validation_images", 1),
        *("--validation_inference_steps", 1, "--prediction_type", "flow"),
    ]


KINDS = {
    "muon": ["--optimizer", "muon", "--gradient_accumulation_steps", 2],
    "routed": ["--tread_ratio", 0.5],
    "muon, routed": ["--optimizer", "muon", "--tread_ratio", 0.25],
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_bit_identical(flags, tmp_path, kind):
    """SIGKILL at two moments; what is resumed ends with the weights, average and optimizer state of a run that nobody killed."""
    flags = [*flags, *KINDS[kind]]
    run(CLASS, *flags, "--output_dir", tmp_path / "whole")
    chance = random.Random(kind)
    for count in (chance.randint(5, 11), chance.randint(5, 9)):
        fault = SignalAt(StepLog.step_done, count)
        running = start(CLASS, *flags, "--output_dir", tmp_path / "run", *LATEST, fault=fault)
        assert running.wait_for_kill(), running.wait().stderr
    run(CLASS, *flags, "--output_dir", tmp_path / "run", *LATEST)
    assert_identical(tmp_path / "run", tmp_path / "whole")
    momenta = [name for name in trained(tmp_path / "run") if name.endswith("momentum_buffer")]
    assert len(momenta) == (6 * 5 if "muon" in kind else 0)  # q, kv, out and two of the feed-forward


def test_another_optimizer_is_refused(flags, tmp_path):
    """A state of one optimizer is no state of another."""
    flags = [*flags, "--max_train_steps", 4, "--output_dir", tmp_path / "run"]
    run(CLASS, *flags, "--optimizer", "muon")
    line = refused(run(CLASS, *flags, *LATEST, check=False))
    assert "optimizer = muon, this run has adamw" in line
