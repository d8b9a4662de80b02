"""Runs of the plain DiT."""

import json

from tests.support.processes import refused, run

CLASS = "train_class_cond_ldm.py"


def test_a_plain_run_is_trained_exported_and_sampled(cache, tmp_path):
    """From the flag to images, by sample.py and by diffusers with the files of the run alone."""
    from diffusers import DiffusionPipeline

    (tmp_path / "dit.json").write_text(json.dumps({"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}))
    model = ["--model", "dit", "--model_size", "plain-S/2", "--model_config", tmp_path / "dit.json"]
    flags = ["--latents_dir", cache, "--max_train_steps", 2, "--train_batch_size", 4, "--prediction_type", "flow"]
    grids = ["--num_validation_images", 1, "--validation_inference_steps", 2, "--validation_labels", 0]
    run(CLASS, *flags, *model, *grids, "--output_dir", tmp_path / "run")
    run(
        "sample.py",
        "--model",
        tmp_path / "run",
        "--class_labels",
        1,
        "--num_inference_steps",
        2,
        "--output_dir",
        tmp_path / "out",
    )
    assert list((tmp_path / "out").glob("*.png"))
    config = json.loads((tmp_path / "run" / "transformer" / "config.json").read_text())
    assert (config["style"], config["class_embed_type"]) == ("plain", "identity")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert pipeline.transformer.config.style == "plain"
    assert pipeline.transformer.pooled_embed is not None


def test_an_unknown_style_is_refused(cache, tmp_path):
    (tmp_path / "dit.json").write_text(json.dumps({"style": "baroque"}))
    flags = [
        "--latents_dir",
        cache,
        "--model",
        "dit",
        "--model_config",
        tmp_path / "dit.json",
        "--output_dir",
        tmp_path / "run",
    ]
    line = refused(run(CLASS, *flags, check=False))
    assert "--model_config" in line
    assert "baroque" in line
    assert not (tmp_path / "run").exists()
