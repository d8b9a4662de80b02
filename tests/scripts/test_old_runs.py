"""A run, a cache and a checkpoint of each modality, made at commit 70af99e, before `utils` became a trunk and branches:
they are sampled, and training resumes from them.

tests/support/old_runs/NAME.tar.xz holds NAME/cache and NAME/run: 4 steps, of which the checkpoint has 2.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run
from tests.support.runs import unpack_old_run

CONDITIONS = {"crystal": ["--condition", "composition"], "expression": ["--condition", "class:cell_type"]}
TRAINERS = {
    "image": "train_class_cond_ldm.py",
    "crystal": "train_crystal_ldm.py",
    "expression": "train_expression_ldm.py",
}
MODELS = {
    "image": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
    "crystal": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
    "expression": {"num_layers": 1, "hidden_size": 16},
}
# fmt: off
FLAGS = {
    "image": ["--model", "dit", "--model_size", "S/2", "--num_validation_images", 1, "--ema_sigma_rels", 0.1,
              "--ema_snapshot_steps", 2],
    "crystal": ["--num_validation_crystals", 1],
    "expression": ["--num_validation_cells", 4],
}
REQUESTS = {
    "image": ["--class_labels", 1, "--num_images_per_prompt", 1], "crystal": ["--num_samples", 2],
    "expression": ["--num_samples", 3],
}
MADE = {"image": "00000.png", "crystal": "samples.parquet", "expression": "cells.h5ad"}
# fmt: on


@pytest.fixture(params=list(TRAINERS))
def old(request, tmp_path) -> tuple[str, Path]:
    """The modality, and the folder with its cache and run; the VAE of the cache is that of the run."""
    if request.param == "crystal":
        pytest.importorskip("pymatgen.core")
    if request.param == "expression":
        pytest.importorskip("anndata")
    return request.param, unpack_old_run(request.param, tmp_path)


def test_an_old_run_is_sampled_and_resumed(old, tmp_path):
    modality, folder = old
    output = ["--num_inference_steps", 2, "--output_dir"]
    for model in (folder / "run", folder / "run" / "checkpoint-2"):
        run("sample.py", "--model", model, *REQUESTS[modality], *output, tmp_path / model.name)
        assert (tmp_path / model.name / MADE[modality]).is_file()
    weights = folder / "run" / "transformer" / "diffusion_pytorch_model.safetensors"
    expected = load_file(weights)
    weights.unlink()
    (tmp_path / "model.json").write_text(json.dumps(MODELS[modality]))
    run(
        TRAINERS[modality],
        *("--latents_dir", folder / "cache", "--output_dir", folder / "run", *CONDITIONS.get(modality, [])),
        *("--model_config", tmp_path / "model.json", *FLAGS[modality], "--resume_from_checkpoint", "latest"),
        *("--max_train_steps", 4, "--train_batch_size", 4, "--lr_warmup_steps", 1, "--checkpointing_steps", 2),
        *("--report_to", "none", "--validation_inference_steps", 1),
    )
    found = load_file(weights)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # another processor rounds otherwise
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
