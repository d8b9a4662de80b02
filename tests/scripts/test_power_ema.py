"""Power-function averages in the scripts: trained with, sampled from, and refused."""

import torch
from safetensors.torch import load_file

from tests.support.processes import refused, run
from utils.training.ema import stored_snapshots


def test_scripts(cache, model_flags, tmp_path):
    """Averages survive a resume bit for bit, and images come from any of them."""
    flags = ["--latents_dir", cache, *model_flags["dit"], "--max_train_steps", 12, "--train_batch_size", 4]
    flags += ["--learning_rate", 1e-2, "--lr_warmup_steps", 1, "--checkpointing_steps", 6, "--validation_steps", 99]
    flags += ["--ema_sigma_rels", 0.05, 0.1, "--ema_snapshot_steps", 3, "--num_validation_images", 1]
    flags += ["--validation_inference_steps", 1, "--prediction_type", "flow", "--output_dir"]
    run("train_class_cond_ldm.py", *flags, tmp_path / "run")
    run("train_class_cond_ldm.py", *flags, tmp_path / "halves", "--max_train_steps", 6)
    run("train_class_cond_ldm.py", *flags, tmp_path / "halves", "--resume_from_checkpoint", "latest")
    files = [path.relative_to(tmp_path / "run") for _, _, path in stored_snapshots(tmp_path / "run")]
    assert len(files) == 8
    for file in files:
        one, two = load_file(tmp_path / "run" / file), load_file(tmp_path / "halves" / file)
        assert all(torch.equal(one[name], two[name]) for name in one)

    sampling = ["--model", tmp_path / "run", "--class_labels", 0, "--num_images_per_prompt", 1]
    sampling += ["--num_inference_steps", 2]
    images = {}
    for sigma_rel in (0.05, 0.1, 0.2):
        folder = tmp_path / f"sampled{sigma_rel}"
        run("sample.py", *sampling, "--ema_sigma_rel", sigma_rel, "--output_dir", folder)
        images[sigma_rel] = (folder / "00000.png").read_bytes()
        assert f'"ema_sigma_rel": {sigma_rel}' in (folder / "samples.jsonl").read_text()
    assert len(set(images.values())) == 3
    earlier = [*sampling, "--model", tmp_path / "run" / "checkpoint-6", "--output_dir", tmp_path / "earlier"]
    run("sample.py", *earlier, "--ema_sigma_rel", 0.1)
    assert (tmp_path / "earlier" / "00000.png").read_bytes() != images[0.1]
    line = refused(run("sample.py", *sampling, "--ema_sigma_rel", 0.5, check=False))
    assert "--ema_sigma_rel" in line
