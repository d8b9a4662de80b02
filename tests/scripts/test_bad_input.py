"""What a user can get wrong: one line that names what is at fault, exit code 2, and nothing on disk changed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from tests.support.models import cache_flags
from tests.support.processes import refused, run, snapshot

PRECOMPUTE, TEXT, CLASS, SAMPLE = (
    "precompute_latents.py",
    "train_text_to_image_ldm.py",
    "train_class_cond_ldm.py",
    "sample.py",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory, cache, text_run, class_run, image_folder, tiny_vae, tiny_text_encoder, model_flags):
    """Everything a command can be given, right and wrong. Tests must leave it as it is."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    folder = tmp_path_factory.mktemp("world")
    vae = AutoencoderKL.from_pretrained(tiny_vae)
    with torch.no_grad():
        vae.quant_conv.bias += 0.5
    vae.save_pretrained(folder / "other_vae")
    text_encoder = CLIPTextModel.from_pretrained(tiny_text_encoder / "text_encoder")
    with torch.no_grad():
        next(text_encoder.parameters()).mul_(1.5)
    shutil.copytree(tiny_text_encoder, folder / "other_text")
    text_encoder.save_pretrained(folder / "other_text" / "text_encoder")
    plain = ["--train_data_dir", image_folder, "--resolution", 16, "--pretrained_vae_model_name_or_path", tiny_vae]
    run(PRECOMPUTE, *plain, "--max_samples", 4, "--latents_dir", folder / "bare_cache")
    (folder / "empty").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.txt").write_text("years of work")
    (folder / "a_file").write_text("x")
    datasets.Dataset.from_dict({"image": [], "text": []}).to_parquet(folder / "empty.parquet")
    ignored = shutil.ignore_patterns("checkpoint-*", "model_index.json")
    shutil.copytree(text_run, folder / "no_checkpoint", ignore=ignored)
    shutil.copytree(text_run, folder / "damaged")
    weights = folder / "damaged" / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    texts = {
        "no_prompts.txt": "\n \n",
        "unknown_key.yaml": "learning_rat: 1\n",
        "wrong_type.yaml": "max_train_steps: many\n",
        "wrong_choice.yaml": "model: gan\n",
        "not.yaml": "a: [1\n",
        "a_list.yaml": "- model\n",
        "unknown.json": json.dumps({"num_layer": 2}),
        "contradiction.json": json.dumps({"in_channels": 3}),
        "impossible.json": json.dumps({"hidden_size": 33, "num_attention_heads": 2}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return SimpleNamespace(
        folder=folder, cache=cache, text_run=text_run, class_run=class_run, images=image_folder, vae=tiny_vae,
        text_encoder=tiny_text_encoder, cache_flags=cache_flags(image_folder, tiny_vae, tiny_text_encoder), plain=plain,
        dit=model_flags["dit"], unet=model_flags["unet"],
    )  # fmt: skip


# What is wrong: the script, its flags, and what the one line must contain. `w` is the world, `out` a folder that does
# not exist yet.
def precompute(*flags):
    return lambda w, out: (PRECOMPUTE, [*w.plain, "--latents_dir", out, *(f(w) if callable(f) else f for f in flags)])


def dataset(*flags):
    """Without the data set of `precompute`."""
    return lambda w, out: (
        PRECOMPUTE,
        ["--resolution", 16, "--pretrained_vae_model_name_or_path", w.vae, "--latents_dir", out]
        + [f(w) if callable(f) else f for f in flags],
    )


def trains(script, *flags):
    return lambda w, out: (
        script,
        ["--latents_dir", w.cache, "--output_dir", out, "--max_train_steps", 2, "--model_size", "tiny"]
        + [f(w) if callable(f) else f for f in flags],
    )


def samples(run_name, *flags):
    return lambda w, out: (
        SAMPLE,
        ["--model", getattr(w, run_name), "--output_dir", out] + [f(w) if callable(f) else f for f in flags],
    )


def given(name):
    """A file or folder of the world."""
    return lambda w: w.folder / name


DATASETS = {
    "folder is not there": (dataset("--train_data_dir", given("nowhere")), ["--train_data_dir", "nowhere"]),
    "folder is empty": (dataset("--train_data_dir", given("empty")), ["--train_data_dir", "found nothing"]),
    "folder has no images": (dataset("--train_data_dir", given("foreign")), ["--train_data_dir", "thesis.txt"]),
    "parquet is not there": (dataset("--dataset_name", given("no.parquet")), ["--dataset_name", "no.parquet"]),
    "parquet has no rows": (dataset("--dataset_name", given("empty.parquet")), ["--dataset_name", "empty"]),
    "hub cannot be reached": (dataset("--dataset_name", "nobody/nothing"), ["--dataset_name nobody/nothing"]),
    "no dataset": (dataset(), ["--dataset_name", "--train_data_dir"]),
    "two datasets": (precompute("--dataset_name", "a/b"), ["--dataset_name", "--train_data_dir", "both"]),
    "no such split": (precompute("--dataset_split", "test"), ["--dataset_split test"]),
    "no such image column": (precompute("--image_column", "picture"), ["--image_column picture", "text"]),
    "no such caption column": (precompute("--caption_column", "titel"), ["--caption_column titel", "text"]),
    "no such label column": (precompute("--label_column", "class"), ["--label_column class", "label"]),
    "image column holds labels": (precompute("--image_column", "label"), ["--image_column label", "int64"]),
    "caption column holds images": (precompute("--caption_column", "image"), ["--caption_column image", "images"]),
    "label column holds text": (precompute("--label_column", "text"), ["--label_column text", "integers"]),
}
CACHES = {
    "resolution does not divide": (precompute("--resolution", 18), ["--resolution: 18", "divisible by 4", "use 16"]),
    "resolution is too small": (precompute("--resolution", 3), ["--resolution: 3", "divisible by 4", "use 4"]),
    "folder holds something else": (precompute("--latents_dir", given("foreign")), ["--latents_dir", "not empty"]),
    "folder is a file": (precompute("--latents_dir", given("a_file")), ["--latents_dir", "a_file"]),
    "no folder": (lambda w, out: (PRECOMPUTE, w.plain), ["--latents_dir is required"]),
    "no such VAE": (
        precompute("--pretrained_vae_model_name_or_path", given("nowhere")),
        ["--pretrained_vae_model_name_or_path", "nowhere", "does not exist"],
    ),
    "no VAE in the folder": (
        precompute("--pretrained_vae_model_name_or_path", given("empty")),
        ["--pretrained_vae_model_name_or_path", "cannot load a vae"],
    ),
    "a VAE that is none": (
        precompute("--pretrained_vae_model_name_or_path", lambda w: w.text_run / "unet"),
        ["--pretrained_vae_model_name_or_path", "UNet2DConditionModel"],
    ),
    "no such text encoder": (
        precompute("--caption_column", "text", "--pretrained_text_encoder_name_or_path", given("nowhere")),
        ["--pretrained_text_encoder_name_or_path", "nowhere"],
    ),
    "no tokenizer": (
        precompute(
            *("--caption_column", "text", "--pretrained_text_encoder_name_or_path", lambda w: w.text_encoder),
            *("--tokenizer_name", given("nowhere")),
        ),
        ["--tokenizer_name", "nowhere"],
    ),
    "rows of no shard": (precompute("--rows_per_shard", 0), ["--rows_per_shard", "0"]),
    "no images at once": (precompute("--encode_batch_size", 0), ["--encode_batch_size", "0"]),
    "no samples": (precompute("--max_samples", 0), ["--max_samples", "0"]),
    "more than all skipped": (precompute("--max_skipped_fraction", 2), ["--max_skipped_fraction", "2"]),
    "unknown flag": (precompute("--resolutoin", 16), ["--resolutoin"]),
}
TRAINING = {
    "no data": (lambda w, out: (TEXT, ["--output_dir", out]), ["--latents_dir", "--dataset_name"]),
    "no output folder": (lambda w, out: (TEXT, ["--latents_dir", w.cache]), ["--output_dir is required"]),
    "no such cache": (trains(TEXT, "--latents_dir", given("nowhere")), ["--latents_dir", "nowhere", "not exist"]),
    "no cache in the folder": (trains(TEXT, "--latents_dir", given("foreign")), ["--latents_dir", "latent_spec.json"]),
    "cache of another VAE": (
        trains(TEXT, "--pretrained_vae_model_name_or_path", given("other_vae")),
        ["--latents_dir", "vae", "other_vae", "was made with"],
    ),
    "cache of another text encoder": (
        trains(TEXT, "--pretrained_text_encoder_name_or_path", given("other_text")),
        ["--latents_dir", "text_encoder", "other_text", "was made with"],
    ),
    "cache of another resolution": (
        trains(TEXT, "--resolution", 32),
        ["--latents_dir", "resolution = 16", "resolution = 32"],
    ),
    "cache without the flips": (
        trains(CLASS, "--no-random_flip"),
        ["--latents_dir", "random_flip = True", "random_flip = False"],
    ),
    "cache of another dataset": (
        lambda w, out: (TEXT, ["--latents_dir", w.cache, "--output_dir", out, *w.cache_flags, "--max_samples", 4]),
        ["--latents_dir", "max_samples = None", "max_samples = 4"],
    ),
    "cache without captions": (trains(TEXT, "--latents_dir", given("bare_cache")), ["--latents_dir", "no captions"]),
    "cache without labels": (trains(CLASS, "--latents_dir", given("bare_cache")), ["--latents_dir", "no labels"]),
    "no steps": (trains(TEXT, "--max_train_steps", 0), ["--max_train_steps", "0"]),
    "half a step": (trains(TEXT, "--max_train_steps", 0.5), ["--max_train_steps", "0.5"]),
    "no batch": (trains(CLASS, "--train_batch_size", 0), ["--train_batch_size", "0"]),
    "no accumulation": (trains(CLASS, "--gradient_accumulation_steps", 0), ["--gradient_accumulation_steps", "0"]),
    "learning rate 0": (trains(CLASS, "--learning_rate", 0), ["--learning_rate", "0"]),
    "dropping more than all": (trains(CLASS, "--cond_drop_prob", 1.5), ["--cond_drop_prob", "1.5"]),
    "folder of another run": (
        trains(TEXT, "--output_dir", lambda w: w.class_run),
        ["--output_dir", "holds a run already", "--resume_from_checkpoint"],
    ),
    "folder of another run, resumed": (
        trains(TEXT, "--output_dir", lambda w: w.class_run, "--resume_from_checkpoint", "latest"),
        ["--resume_from_checkpoint", "checkpoint-8", "model = dit", "unet"],
    ),
    "folder of somebody": (trains(TEXT, "--output_dir", given("foreign")), ["--output_dir", "not empty"]),
    "folder is a file": (trains(TEXT, "--output_dir", given("a_file")), ["--output_dir", "is a file"]),
    "unknown checkpoint": (
        trains(TEXT, "--output_dir", lambda w: w.text_run, "--resume_from_checkpoint", "checkpoint-7"),
        ["--resume_from_checkpoint", "checkpoint-7", "checkpoint-4, checkpoint-8"],
    ),
    "Min-SNR with flow": (
        trains(TEXT, "--prediction_type", "flow", "--snr_gamma", 5),
        ["--snr_gamma", "--prediction_type flow"],
    ),
    "noise offset with flow": (
        trains(CLASS, "--prediction_type", "flow", "--noise_offset", 0.1),
        ["--noise_offset", "--prediction_type flow"],
    ),
    "input perturbation with flow": (
        trains(CLASS, "--prediction_type", "flow", "--input_perturbation", 0.1),
        ["--input_perturbation", "--prediction_type flow"],
    ),
    "flow's shift with DDPM": (trains(CLASS, "--flow_shift", 3), ["--flow_shift", "--prediction_type v_prediction"]),
    "zero SNR with epsilon": (
        trains(TEXT, "--prediction_type", "epsilon", "--rescale_betas_zero_snr"),
        ["--rescale_betas_zero_snr", "--prediction_type epsilon", "v_prediction"],
    ),
    "zero SNR with noise offset": (
        trains(TEXT, "--rescale_betas_zero_snr", "--noise_offset", 0.1),
        ["--rescale_betas_zero_snr", "--noise_offset"],
    ),
    "unknown model": (trains(TEXT, "--model", "gan"), ["--model", "gan", "unet"]),
    "unknown DiT size": (trains(TEXT, "--model", "dit", "--model_size", "Q/2"), ["--model_size Q/2", "XL"]),
    "unknown DiT patch": (trains(TEXT, "--model", "dit", "--model_size", "S/3"), ["--model_size S/3", "patch"]),
    "DiT size without patch": (trains(TEXT, "--model", "dit", "--model_size", "S"), ["--model_size S", "patch"]),
    "DiT patch does not divide": (
        trains(CLASS, "--model", "dit", "--model_size", "S/8"),
        ["--model_size S/8", "4 x 4", "patches of 8"],
    ),
    "unknown U-Net size": (trains(TEXT, "--model_size", "huge"), ["--model_size huge", "cifar10"]),
    "U-Net too deep": (trains(TEXT, "--model_size", "base"), ["--model_size base", "4 x 4", "multiple of 8"]),
    "no such model config": (trains(CLASS, "--model_config", given("no.json")), ["--model_config", "no.json"]),
    "unknown key of the model": (
        trains(CLASS, "--model", "dit", "--model_size", "S/2", "--model_config", given("unknown.json")),
        ["--model_config", "unknown.json", "num_layer"],
    ),
    "model contradicts the latents": (
        trains(CLASS, "--model", "dit", "--model_size", "S/2", "--model_config", given("contradiction.json")),
        ["--model_config", "in_channels is 3", "need 4"],
    ),
    "model that cannot be built": (
        trains(CLASS, "--model", "dit", "--model_size", "S/2", "--model_config", given("impossible.json")),
        ["--model_config", "33"],
    ),
    "model config that is not YAML": (
        trains(CLASS, "--model_config", given("not.yaml")),
        ["--model_config", "not.yaml"],
    ),
    "xformers on the CPU": (
        trains(TEXT, "--enable_xformers_memory_efficient_attention"),
        ["--enable_xformers_memory_efficient_attention", "CUDA", "cpu"],
    ),
    "unknown tracker": (trains(CLASS, "--report_to", "abacus"), ["--report_to", "abacus", "tensorboard"]),
    "validation label outside": (
        trains(CLASS, "--validation_labels", 0, 3),
        ["--validation_labels: 3", "0 to 2"],
    ),
    "negative validation label": (trains(CLASS, "--validation_labels", -1), ["--validation_labels", "-1"]),
    "validation labels without labels": (
        trains(CLASS, "--unconditional", "--validation_labels", 0),
        ["--validation_labels", "--unconditional"],
    ),
    "no config file": (trains(TEXT, "--config", given("no.yaml")), ["--config", "no.yaml", "does not exist"]),
    "unknown key in the config file": (
        trains(TEXT, "--config", given("unknown_key.yaml")),
        ["--config", "unknown_key.yaml", "'learning_rat'", "learning_rate"],
    ),
    "wrong type in the config file": (
        trains(TEXT, "--config", given("wrong_type.yaml"), "--learning_rate", 1),
        ["--config", "wrong_type.yaml", "max_train_steps", "'many'"],
    ),
    "wrong choice in the config file": (
        trains(TEXT, "--config", given("wrong_choice.yaml")),
        ["--config", "wrong_choice.yaml", "model", "unet, dit", "'gan'"],
    ),
    "config file is not YAML": (trains(TEXT, "--config", given("not.yaml")), ["--config", "not.yaml", "not YAML"]),
    "config file is a list": (trains(TEXT, "--config", given("a_list.yaml")), ["--config", "a_list.yaml", "list"]),
}
SAMPLING = {
    "no such run": (samples("text_run", "--model", given("nowhere")), ["--model", "nowhere", "does not exist"]),
    "a folder that is no run": (samples("text_run", "--model", given("foreign")), ["--model", "foreign", "no run"]),
    "a cache is no run": (samples("text_run", "--model", lambda w: w.cache), ["--model", "no run"]),
    "a run without a checkpoint": (
        samples("text_run", "--model", given("no_checkpoint"), "--prompt", "red"),
        ["--model", "no_checkpoint", "no checkpoint"],
    ),
    "a damaged checkpoint": (
        samples("text_run", "--model", given("damaged/checkpoint-8"), "--prompt", "red"),
        ["--model", "checkpoint-8", "model.safetensors", "damaged"],
    ),
    "prompt for a class-conditional run": (samples("class_run", "--prompt", "red"), ["--prompt", "--class_labels"]),
    "negative prompt for a class-conditional run": (
        samples("class_run", "--negative_prompt", "red"),
        ["--negative_prompt", "--class_labels"],
    ),
    "prompts file for a class-conditional run": (
        samples("class_run", "--prompts_file", given("unknown_key.yaml")),
        ["--prompt", "--class_labels"],
    ),
    "label for a text run": (samples("text_run", "--class_labels", 1), ["--class_labels", "--prompt"]),
    "label outside": (samples("class_run", "--class_labels", 1, 3), ["--class_labels: 3", "0 to 2"]),
    "negative label": (samples("class_run", "--class_labels", -1), ["--class_labels", "-1"]),
    "no steps": (samples("class_run", "--num_inference_steps", 0), ["--num_inference_steps", "0"]),
    "no batch": (samples("class_run", "--batch_size", 0), ["--batch_size", "0"]),
    "no images": (samples("class_run", "--num_images_per_prompt", 0), ["--num_images_per_prompt", "0"]),
    "negative guidance": (samples("class_run", "--guidance_scale", -1), ["--guidance_scale", "-1"]),
    "folder is not empty": (samples("class_run", "--output_dir", given("foreign")), ["--output_dir", "not empty"]),
    "folder is a file": (samples("class_run", "--output_dir", given("a_file")), ["--output_dir", "a_file"]),
    "DDIM for flow": (samples("class_run", "--scheduler", "ddim"), ["--scheduler ddim", "flow_euler"]),
    "flow for DDPM": (samples("text_run", "--scheduler", "flow_heun"), ["--scheduler flow_heun", "ddim"]),
    "unknown scheduler": (samples("text_run", "--scheduler", "magic"), ["--scheduler", "magic", "ddim"]),
    "unknown device": (samples("text_run", "--prompt", "red", "--device", "abacus"), ["--device", "abacus"]),
    "no prompts file": (samples("text_run", "--prompts_file", given("no.txt")), ["--prompts_file", "no.txt"]),
    "empty prompts file": (samples("text_run", "--prompts_file", given("no_prompts.txt")), ["--prompts_file", "no prompts"]),
}  # fmt: skip
CASES = {
    f"{group}: {name}": case
    for group, cases in {"dataset": DATASETS, "cache": CACHES, "train": TRAINING, "sample": SAMPLING}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(name, world, tmp_path):
    case, expected = CASES[name]
    script, flags = case(world, tmp_path / "out")
    folders = [tmp_path, world.folder, world.cache, world.text_run, world.class_run, world.images]
    before = snapshot(*folders)
    result = run(script, *flags, check=False)
    line = refused(result)
    for part in expected:
        assert part in line
    assert result.stderr.count("error:") == 1
    assert snapshot(*folders) == before


def test_the_same_commands_without_the_fault_work(world, tmp_path):
    """The flags of the cases above are right but for the one at fault: otherwise they would pass for the wrong reason."""
    run(
        *unpacked(
            precompute("--caption_column", "text", "--pretrained_text_encoder_name_or_path", lambda w: w.text_encoder),
            world,
            tmp_path / "cache",
        )
    )
    run(*unpacked(trains(TEXT, *world.unet), world, tmp_path / "text"))
    run(*unpacked(trains(CLASS, *world.dit), world, tmp_path / "class"))
    run(*unpacked(samples("text_run", "--prompt", "red", "--num_inference_steps", 1), world, tmp_path / "images"))
    run(*unpacked(samples("class_run", "--class_labels", 2, "--num_inference_steps", 1), world, tmp_path / "more"))
    made = [
        "cache/latent_spec.json",
        "text/model_index.json",
        "class/model_index.json",
        "images/grid.png",
        "more/grid.png",
    ]
    assert [name for name in made if not (tmp_path / name).is_file()] == []


def unpacked(case, world, out: Path):
    script, flags = case(world, out)
    return script, *flags
