"""TREAD in the trainers: what is refused, and that routes depend on the sample alone."""

import json

import pytest

from tests.support.processes import contents, refused, run

TEXT, CLASS = "train_text_to_image_ldm.py", "train_class_cond_ldm.py"


@pytest.mark.parametrize(
    ("num_layers", "size", "ratio", "expected"),
    [(4, "S/1", 0.5, ["first 2", "last 2", "only 4"]), (5, "S/4", 0.5, ["0.5 of the 1 tokens", "larger share"])],
)
def test_routes_of_nothing_are_refused(cache, tmp_path, num_layers, size, ratio, expected):
    (tmp_path / "dit.json").write_text(
        json.dumps({"num_layers": num_layers, "hidden_size": 32, "num_attention_heads": 2})
    )
    flags = ["--model", "dit", "--model_size", size, "--model_config", tmp_path / "dit.json", "--tread_ratio", ratio]
    line = refused(run(TEXT, "--latents_dir", cache, "--output_dir", tmp_path / "run", *flags, check=False))
    assert "--tread_ratio" in line
    assert all(part in line for part in expected)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def flags(cache, tmp_path_factory):
    config = tmp_path_factory.mktemp("models") / "deep.json"
    config.write_text(json.dumps({"num_layers": 6, "hidden_size": 32, "num_attention_heads": 2}))
    return [
        *("--latents_dir", cache, "--model", "dit", "--model_size", "S/1", "--model_config", config),
        *("--max_train_steps", 4, "--train_batch_size", 4, "--learning_rate", 1e-3, "--lr_warmup_steps", 0),
        *("--prediction_type", "flow", "--report_to", "none"),
    ]


@pytest.mark.parametrize("script", [TEXT, CLASS])
def test_routing_trains_other_weights_and_none_the_same(flags, tmp_path, script):
    """A ratio of 0 leaves the weights of a run that has no such flag; 0.5 others; both are sampled with all tokens."""
    grids = ["--num_validation_images", 1, "--validation_inference_steps", 1]
    grids += ["--validation_prompts", "red"] if script == TEXT else ["--validation_labels", 0]
    weights = {}
    for name, extra in {"none": [], "zero": ["--tread_ratio", 0], "half": ["--tread_ratio", 0.5]}.items():
        run(script, *flags, *grids, *extra, "--output_dir", tmp_path / name)
        weights[name] = contents(tmp_path / name / "transformer")["diffusion_pytorch_model.safetensors"]
    assert weights["none"] == weights["zero"] != weights["half"]
    assert list((tmp_path / "half" / "samples").rglob("*.png"))


def test_routes_do_not_depend_on_processes_or_accumulation(flags, tmp_path):
    """8 samples a step at once, as 2 x 4 accumulated, and on 2 processes x 4: the same weights but for the rounding of sums."""
    from safetensors.torch import load_file

    flags = [*flags, "--tread_ratio", 0.5, "--adam_epsilon", 1e-4, "--num_validation_images", 1]
    flags += ["--validation_inference_steps", 1]
    ways = {
        "one": (["--train_batch_size", 8], 1),
        "accumulated": (["--train_batch_size", 4, "--gradient_accumulation_steps", 2], 1),
        "two": (["--train_batch_size", 4], 2),
    }
    weights = {}
    for name, (extra, processes) in ways.items():
        run(CLASS, *flags, *extra, "--output_dir", tmp_path / name, processes=processes)
        weights[name] = load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
    for name in ("accumulated", "two"):
        for key, value in weights["one"].items():
            assert (weights[name][key] - value).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-3), key
