"""Guidance of trained runs, and sample.py with every flag of it. Faults that trainers are known for are put back."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import Embedding

from tests.support.guidance import label_of_dropped, normal, told, zeros_for_dropped
from tests.support.models import TRAIN_FLAGS
from tests.support.processes import Fault, refused, run, snapshot
from utils.diffusion.conditions import ClassCondition, TextCondition, encode_text
from utils.diffusion.sampling import SAMPLERS, sampling_scheduler
from utils.errors import UserError
from utils.image.pipeline import load_guide, load_run


@pytest.fixture(scope="module")
def class_weights(class_run):
    return load_file(next((class_run / "conditions").glob("*.safetensors")))["embedding.weight"]


def assert_null_of_classes(pipeline, weights):
    """The unconditional half of the batch is told the row after the last class, as it was trained."""
    call = told(pipeline, class_labels=[0, 2], num_inference_steps=1)[0]
    assert torch.equal(call.class_labels, weights[[0, 2, 3, 3]])


def test_null_of_a_class_run_is_the_trained_one(class_run, class_weights):
    assert len(class_weights) == 4
    assert_null_of_classes(load_run(class_run), class_weights)


@pytest.mark.parametrize("forward", [zeros_for_dropped, label_of_dropped(0)], ids=["zeros", "class 0"])
def test_fault_wrong_null_of_a_class_run(monkeypatch, class_run, class_weights, forward):
    monkeypatch.setattr(ClassCondition, "forward", forward)
    with pytest.raises(AssertionError):
        assert_null_of_classes(load_run(class_run), class_weights)


def assert_null_of_text(pipeline, cache):
    """The unconditional half is told the states of the empty caption: those of the cache, which training dropped to, and
    those that the run's own text encoder gives."""
    null = told(pipeline, prompt="a red square", num_inference_steps=1)[0].encoder_hidden_states[1]
    row = datasets.load_from_disk(str(cache / "captions"))[0]
    assert row["num_tokens"] == 2
    trained = torch.tensor(row["hidden_states"]).view_as(null)
    torch.testing.assert_close(null, trained, rtol=0, atol=1e-6)
    encoded = encode_text(pipeline.tokenizer, pipeline.text_encoder, [""])["encoder_hidden_states"][0]
    torch.testing.assert_close(null, encoded, rtol=2e-3, atol=2e-3)


def test_null_of_a_text_run_is_the_empty_caption(text_run, cache):
    assert_null_of_text(load_run(text_run), cache)


@pytest.mark.parametrize("caption", [None, "a red square", " ,"], ids=["zeros", "the prompt", "another caption"])
def test_fault_wrong_null_of_text(text_run, cache, caption):
    pipeline = load_run(text_run)
    wrong = pipeline.conditions.null_hidden_states.new_zeros(())
    if caption is not None:
        wrong = encode_text(pipeline.tokenizer, pipeline.text_encoder, [caption])["encoder_hidden_states"][0]
    assert isinstance(pipeline.conditions, TextCondition)
    pipeline.conditions.null_hidden_states.copy_(wrong)
    with pytest.raises(AssertionError):
        assert_null_of_text(pipeline, cache)


# Faults put back: timestep spacing


def assert_trailing(pipeline):
    """Four steps start at the last timestep, and the rest follow 250 apart."""
    calls = told(pipeline, prompt="red", guidance_scale=1.0, num_inference_steps=4)
    timesteps = list(dict.fromkeys(int(call.timesteps[0]) for call in calls))
    assert timesteps == [999, 749, 499, 249]


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("flow")])
def test_samplers_start_at_the_last_timestep(text_run, name):
    pipeline = load_run(text_run)
    pipeline.scheduler = sampling_scheduler(pipeline.scheduler, name)
    assert_trailing(pipeline)


@pytest.mark.parametrize("name", ["flow_euler", "flow_heun"])
def test_flow_starts_at_noise(class_run, name):
    pipeline = load_run(class_run)
    pipeline.scheduler = sampling_scheduler(pipeline.scheduler, name)
    assert told(pipeline, class_labels=0, num_inference_steps=4)[0].timesteps.unique().tolist() == [1000]


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("flow")])
def test_fault_wrong_spacing(text_run, name, spacing):
    pipeline = load_run(text_run)
    pipeline.scheduler = SAMPLERS[name].from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    with pytest.raises(AssertionError):
        assert_trailing(pipeline)


# Faults put back: labels dropped twice


@dataclass(frozen=True)
class RecordLabels(Fault):
    """Writes down the labels that a training looks up in its table of embeddings: what the model is told in the end,
    whoever dropped them. `again` drops that share of them once more, inside the model."""

    path: str = ""
    again: float = 0.0

    def install(self):
        look_up, condition = nn.Embedding.forward, ClassCondition.forward

        def recorded(module, labels):
            if torch.is_grad_enabled():  # grids have nulls of their own
                with open(self.path, "a") as file:
                    file.write(" ".join(map(str, labels.tolist())) + "\n")
            return look_up(module, labels)

        def dropped_again(module, values, drop):
            return condition(module, values, drop | (torch.rand(len(drop)) < self.again))

        nn.Embedding.forward, ClassCondition.forward = recorded, dropped_again


RATE = 0.3


def labels_told(cache, model_flags, folder, again):
    fault = RecordLabels(Embedding.forward, 1, path=str(folder / "labels.txt"), again=again)
    run(
        "train_class_cond_ldm.py", "--latents_dir", cache, "--output_dir", folder / "run", *model_flags["dit"],
        "--max_train_steps", 20, "--train_batch_size", 64, "--cond_drop_prob", RATE, "--num_validation_images", 1,
        "--validation_inference_steps", 1, "--validation_labels", 0, fault=fault,
    )  # fmt: skip
    return np.array((folder / "labels.txt").read_text().split(), dtype=int)


def assert_dropped_once(labels):
    """The share of nulls within four standard errors of the rate; what is left is the classes, a third each."""
    assert len(labels) == 20 * 64
    assert set(labels) == {0, 1, 2, 3}
    assert abs(np.mean(labels == 3) - RATE) < 4 * math.sqrt(RATE * (1 - RATE) / len(labels))
    kept = labels[labels != 3]
    assert all(abs(np.mean(kept == label) - 1 / 3) < 4 * math.sqrt(2 / 9 / len(kept)) for label in range(3))


def test_labels_are_dropped_at_the_rate_asked_for(cache, model_flags, tmp_path):
    assert_dropped_once(labels_told(cache, model_flags, tmp_path, again=0.0))


def test_fault_labels_dropped_twice(cache, model_flags, tmp_path):
    with pytest.raises(AssertionError):
        assert_dropped_once(labels_told(cache, model_flags, tmp_path, again=RATE))


# The pipeline of a run


@pytest.mark.parametrize("which", ["text_run", "class_run"])
def test_outside_the_interval_only_the_conditional_branch_runs(request, which):
    """B samples there and 2 B inside; the timesteps say which is where."""
    pipeline = load_run(request.getfixturevalue(which))
    wanted = {"prompt": ["red", "blue"]} if which == "text_run" else {"class_labels": [0, 2]}
    calls = told(pipeline, **wanted, guidance_interval=(0.3, 0.8), num_inference_steps=10)
    assert len(calls) == 10
    inside = [0.3 <= float(call.timesteps[0]) / 1000 <= 0.8 for call in calls]
    assert 0 < sum(inside) < 10
    assert [call.count for call in calls] == [4 if each else 2 for each in inside]
    assert [call.count for call in told(pipeline, **wanted, num_inference_steps=10)] == [4] * 10


def test_conditions_are_encoded_once_whatever_the_number_of_steps(text_run):
    """Every distinct prompt once for all images of it, and both branches once for all steps; each image has its own."""
    pipeline = load_run(text_run)
    told_prompts, told_branches = [], []
    pipeline.text_encoder.register_forward_hook(lambda module, inputs, output: told_prompts.append(len(inputs[0])))
    pipeline.conditions.register_forward_hook(lambda module, inputs, output: told_branches.append(len(inputs[1])))
    settings = {"num_inference_steps": 3, "guidance_scale": 7.5, "output_type": "latent"}
    prompts = ["a red square", "blue", "a red square", "blue"]
    noise = normal(4, 4, 4, 4).float()
    together = pipeline(prompts, latents=noise, **settings).images
    assert (told_prompts, told_branches) == ([2], [8])
    singly = [pipeline(prompt, latents=noise[i : i + 1], **settings).images for i, prompt in enumerate(prompts)]
    torch.testing.assert_close(together, torch.cat(singly), rtol=1e-4, atol=1e-4)
    other = pipeline(["blue", *prompts[1:]], latents=noise, **settings).images
    assert not torch.equal(other[0], together[0])


def test_a_guide_runs_inside_the_interval_only(class_run):
    """Main model and guide see B samples each, both conditional."""
    pipeline, guide = load_run(class_run), load_run(class_run / "checkpoint-4")
    seen = []
    guide.denoiser.register_forward_pre_hook(lambda module, positional, named: seen.append(named), with_kwargs=True)
    calls = told(
        pipeline, class_labels=[0, 2], guide_model=guide.predict, guidance_interval=(0.3, 0.8), num_inference_steps=10
    )
    inside = [0.3 <= float(call.timesteps[0]) / 1000 <= 0.8 for call in calls]
    assert [call.count for call in calls] == [2] * 10
    assert 0 < len(seen) == sum(inside) < 10
    embeddings = guide.conditions.embedding.weight
    assert all(torch.equal(named["class_labels"], embeddings[[0, 2]]) for named in seen)


def test_a_model_does_not_guide_itself(class_run):
    """weaker + scale (prediction - weaker) with both the same is the prediction, whatever the scale."""
    pipeline = load_run(class_run)
    settings = {"class_labels": [0, 2], "num_inference_steps": 3, "output_type": "latent"}
    ends = [
        pipeline(**settings, **guidance, generator=torch.Generator().manual_seed(0)).images
        for guidance in ({"guidance_scale": 1.0}, {"guidance_scale": 5.0, "guide_model": pipeline.predict})
    ]
    torch.testing.assert_close(*ends)


def test_rescale_of_a_run_is_that_of_stable_diffusion(text_run):
    """The stock pipeline and ours, from the same noise; at a huge scale, for so short a training hardly heeds prompts."""
    stock, ours = StableDiffusionPipeline.from_pretrained(text_run), load_run(text_run)
    settings = {
        "prompt": "a red square", "num_inference_steps": 4, "guidance_scale": 1000.0, "guidance_rescale": 0.7,
        "latents": normal(1, 4, 4, 4).float(), "output_type": "latent",
    }  # fmt: skip
    truth = stock(**settings, height=16, width=16).images
    torch.testing.assert_close(ours(**settings).images, truth, rtol=1e-4, atol=5e-4)
    without = ours(**settings | {"guidance_rescale": 0.0}).images
    assert (without - truth).abs().max() > 0.01


# Guides that do not fit


def edited(source: Path, target: Path, file: str, **values) -> Path:
    """A copy of a finished run with other values in one of its JSON files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-*", "logs", "samples"))
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


def reweighted(source: Path, target: Path, part: str) -> Path:
    """A copy of a finished run with other weights in one of its parts."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-*", "logs", "samples"))
    path = next((target / part).glob("*.safetensors"))
    weights = load_file(path)
    weights |= {name: weight * 1.01 for name, weight in weights.items() if weight.is_floating_point()}
    save_file(weights, path, metadata={"format": "pt"})
    return target


def swapped_scheduler(source: Path, target: Path, donor: Path) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-*", "logs", "samples", "scheduler"))
    shutil.copytree(donor / "scheduler", target / "scheduler")
    return target


SCHEDULER = "scheduler/scheduler_config.json"

MISFITS = {
    "condition": ("text_run", lambda w, out: w.class_run, "another condition: ClassCondition, not TextCondition"),
    "flow": ("text_run", lambda w, out: swapped_scheduler(w.text_run, out, w.class_run), "another prediction type: flow, not v_pred"),
    "no flow": ("class_run", lambda w, out: swapped_scheduler(w.class_run, out, w.text_run), "another prediction type: v_pred.*, not flow"),
    "epsilon": ("text_run", lambda w, out: edited(w.text_run, out, SCHEDULER, prediction_type="epsilon"), "another prediction type: epsilon"),
    "betas": ("text_run", lambda w, out: edited(w.text_run, out, SCHEDULER, beta_end=0.02), "another noise schedule"),
    "zero SNR": ("text_run", lambda w, out: edited(w.text_run, out, SCHEDULER, rescale_betas_zero_snr=True), "another noise schedule"),
    "size": ("class_run", lambda w, out: edited(w.class_run, out, "transformer/config.json", sample_size=8), r"another shape .*\(4, 8\), not \(4, 4\)"),
    "normalisation": ("text_run", lambda w, out: edited(w.text_run, out, "latent_normalisation.json", std=[2.0] * 4), "another normalisation"),
    "names": ("class_run", lambda w, out: edited(w.class_run, out, "conditions/config.json", label_names=["b", "a", "c"]), "other names of classes"),
    "VAE": ("class_run", lambda w, out: reweighted(w.class_run, out, "vae"), "another VAE"),
    "text encoder": ("text_run", lambda w, out: reweighted(w.text_run, out, "text_encoder"), "another text encoder"),
    "itself": ("text_run", lambda w, out: w.text_run / "checkpoint-8", "the weights of --model"),
    "no run": ("text_run", lambda w, out: out, "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_guides_that_do_not_fit_are_refused(text_run, class_run, tmp_path, name):
    which, make, expected = MISFITS[name]
    runs = SimpleNamespace(text_run=text_run, class_run=class_run)
    guide = make(runs, tmp_path / "guide")
    with pytest.raises(UserError, match=f"^--guide_model: .*{expected}") as error:
        load_guide(str(guide), load_run(getattr(runs, which)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_a_guide_may_have_other_weights(text_run, class_run, tmp_path, part):
    """The copies above are refused for the fault that they have, and not for being copies."""
    source = text_run if part == "unet" else class_run
    load_guide(str(reweighted(source, tmp_path / "guide", part)), load_run(source))


# sample.py


@pytest.fixture(scope="module")
def unconditional_run(tmp_path_factory, cache, model_flags):
    folder = tmp_path_factory.mktemp("unconditional") / "run"
    run(
        "train_class_cond_ldm.py", "--unconditional", "--latents_dir", cache, "--output_dir", folder,
        *model_flags["dit"], *TRAIN_FLAGS, "--num_validation_images", 1, "--validation_inference_steps", 1,
    )  # fmt: skip
    return folder


def sampled(run_dir, output_dir, *flags):
    """The first image, as numbers, and its parameters."""
    run(
        "sample.py", "--model", run_dir, "--num_images_per_prompt", 1, "--num_inference_steps", 4,
        "--output_dir", output_dir, *flags,
    )  # fmt: skip
    image = Image.open(output_dir / "00000.png")
    return np.asarray(image), json.loads(image.info["parameters"])


@pytest.mark.parametrize(
    ("which", "wanted"),
    [("text_run", ["--prompt", "red"]), ("class_run", ["--class_labels", 1]), ("unconditional_run", [])],
)
def test_sample_with_each_flag(request, tmp_path, which, wanted):
    """Each makes another image, and stands in its parameters."""
    run_dir = request.getfixturevalue(which)
    wanted = [*wanted, "--guidance_scale", 30]
    guide = ["--guide_model", run_dir / "checkpoint-4"]
    if which == "unconditional_run":
        plain, parameters = sampled(run_dir, tmp_path / "off")
        assert parameters["guidance_scale"] == 1
        _, parameters = sampled(run_dir, tmp_path / "default", *guide)
        assert parameters["guidance_scale"] == 2
        wanted += guide
    images = {"none": sampled(run_dir, tmp_path / "none", *wanted)}
    images["interval"] = sampled(run_dir, tmp_path / "interval", *wanted, "--guidance_interval", 0.2, 0.8)
    images["rescale"] = sampled(run_dir, tmp_path / "rescale", *wanted, "--guidance_rescale", 0.7)
    if which == "unconditional_run":
        images["off"] = plain, {}
    else:
        images["guide"] = sampled(run_dir, tmp_path / "guide", *wanted, *guide)
        assert images["guide"][1]["guide_model"] == str(run_dir / "checkpoint-4")
        assert "guide_model" not in images["none"][1]
    pixels = [image.tobytes() for image, _ in images.values()]
    assert len(set(pixels)) == len(pixels) == 4
    assert images["none"][1]["guidance_scale"] == 30
    assert images["none"][1]["guidance_interval"] == [0, 1]
    assert images["none"][1]["guidance_rescale"] == 0
    assert images["interval"][1]["guidance_interval"] == [0.2, 0.8]
    assert images["rescale"][1]["guidance_rescale"] == 0.7


def test_an_image_is_made_again_from_a_config_file(class_run, tmp_path):
    """A pair of numbers in YAML is that pair on the command line."""
    flags = ["--class_labels", 1, "--guidance_scale", 5, "--guidance_interval", 0.2, 0.8]
    first, parameters = sampled(class_run, tmp_path / "first", *flags)
    names = ("guidance_scale", "guidance_interval", "guidance_rescale")
    config = {name: parameters[name] for name in names} | {"class_labels": [parameters["class_labels"]]}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    again, _ = sampled(class_run, tmp_path / "again", "--config", tmp_path / "again.yaml")
    assert np.array_equal(first, again)
    (tmp_path / "wrong.yaml").write_text("guidance_interval: [0.1, 0.2, 0.3]\n")
    result = run("sample.py", "--model", class_run, "--config", tmp_path / "wrong.yaml", check=False)
    assert "guidance_interval: expected a list of 2" in refused(result)


REFUSED_BY_SAMPLE = {
    "interval at scale 1": ("class_run", "--guidance_scale 1 --guidance_interval 0.2 0.8", "--guidance_interval: guidance is off"),
    "rescale at scale 1": ("class_run", "--guidance_scale 1 --guidance_rescale 0.7", "--guidance_rescale: guidance is off"),
    "guide at scale 1": ("class_run", "--guidance_scale 1 --guide_model {}/checkpoint-4", "--guide_model: guidance is off"),
    "negative prompt at scale 1": ("text_run", "--guidance_scale 1 --negative_prompt blue", "--negative_prompt: guidance is off"),
    "interval without condition": ("unconditional_run", "--guidance_interval 0.2 0.8", "--guidance_interval: guidance is off"),
    "rescale without condition": ("unconditional_run", "--guidance_rescale 0.7", "--guidance_rescale: guidance is off"),
    "scale without condition": ("unconditional_run", "--guidance_scale 3", "--guidance_scale 3: the run is unconditional"),
    "interval that holds no step": ("class_run", "--num_inference_steps 2 --guidance_interval 0.6 0.9", "none of the sampler's 2 steps"),
    "interval the wrong way round": ("class_run", "--guidance_interval 0.8 0.2", "--guidance_interval 0.8 0.2"),
    "interval in timesteps": ("class_run", "--guidance_interval 200 800", "--guidance_interval: 200 is not between 0 and 1"),
    "half an interval": ("class_run", "--guidance_interval 0.2", "--guidance_interval: expected 2"),
    "rescale above 1": ("class_run", "--guidance_rescale 7", "--guidance_rescale: 7 is not between 0 and 1"),
    "guide with negative prompt": ("text_run", "--negative_prompt blue --guide_model {}/checkpoint-4", "--guide_model with negative_prompt"),
    "guide that is not there": ("class_run", "--guide_model {}/nowhere", "--guide_model: "),
    "guide that is the run": ("class_run", "--guide_model {}", "--guide_model: "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_BY_SAMPLE)
def test_sample_refuses(request, tmp_path, name):
    which, flags, expected = REFUSED_BY_SAMPLE[name]
    run_dir = request.getfixturevalue(which)
    wanted = ["--prompt", "red"] if which == "text_run" else []
    before = snapshot(run_dir)
    result = run(
        "sample.py",
        "--model",
        run_dir,
        "--output_dir",
        tmp_path / "out",
        *wanted,
        *flags.format(run_dir).split(),
        check=False,
    )
    assert expected in refused(result)
    assert result.stderr.count("error:") == 1
    assert not (tmp_path / "out").exists()
    assert snapshot(run_dir) == before


def test_sample_refuses_a_guide_of_another_kind(text_run, class_run, tmp_path):
    flags = ["--model", text_run, "--prompt", "red", "--guide_model", class_run, "--output_dir", tmp_path / "out"]
    line = refused(run("sample.py", *flags, check=False))
    assert "--guide_model" in line
    assert "ClassCondition" in line
    assert not (tmp_path / "out").exists()
