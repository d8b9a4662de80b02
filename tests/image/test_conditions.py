"""What images are conditioned on: the rows of the table, each against the cache and the networks."""

import inspect
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from diffusers import UNet2DConditionModel

from utils.diffusion.conditions import CONDITIONS, ClassCondition, NoCondition, TextCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.pipelines import ASKED_BY, LatentDiffusionPipeline
from utils.errors import UserError
from utils.image.conditions import IMAGE_CONDITIONS, condition_of
from utils.image.networks import MODELS
from utils.image.sampler import requested_images
from utils.models.dit import DiT
from utils.models.unet import build_unet

SIZES = {"unet": "tiny", "dit": "S/4"}
ROWS = np.array([40, 3, 17, 3])


def test_rows_are_those_of_the_encoders():
    """By the same names, so that a run says by its encoder what it was trained on."""
    assert {name: row.encoder for name, row in IMAGE_CONDITIONS.items()} == {
        name: encoder for name, encoder in CONDITIONS.items() if name != "columns"
    }
    parameters = inspect.signature(LatentDiffusionPipeline.__call__).parameters
    assert set(ASKED_BY) - {None} <= set(parameters)


def test_requests_are_the_conditions_of_rows(cache, opened):
    table = load_from_disk(str(cache / "latents"))
    rows = [table[int(row)] for row in ROWS]
    found = {name: row.requests(opened, ROWS) for name, row in IMAGE_CONDITIONS.items()}
    assert found == {
        "text": [{"prompt": row["caption"][0]} for row in rows],
        "class": [{"class_labels": row["label"]} for row in rows],
        "none": [{}] * len(ROWS),
    }


@pytest.mark.parametrize("network", MODELS)
@pytest.mark.parametrize("name", IMAGE_CONDITIONS)
def test_a_network_takes_what_an_encoder_gives(opened, name, network):
    """The arguments that a condition decides, and the width of its encoder, fit for every kind of network; and what
    it is told changes what it predicts."""
    row, (channels, size, _) = IMAGE_CONDITIONS[name], opened.spec.shape
    text_dim = row.text_dim(opened.spec)
    config = MODELS[network](SIZES[network], size, channels, text_dim, name)
    torch.manual_seed(0)
    model = build_unet(config) if network == "unet" else DiT.from_config(config)
    for parameter in model.parameters():  # a new model predicts zero
        torch.nn.init.normal_(parameter, std=0.05)
    denoiser = ConditionalDenoiser(model, row.make_encoder(opened, config, network == "dit")).eval()
    batch = opened.gather(np.array([0, 20, 40]))
    noisy = torch.randn(1, channels, size, size).expand(3, -1, -1, -1)
    with torch.no_grad():
        told, untold = (
            denoiser(noisy, torch.tensor([500] * 3), batch, torch.full((3,), drop)) for drop in (False, True)
        )
    assert told.shape == noisy.shape
    torch.testing.assert_close(untold[0], untold[1])
    differs = [not torch.allclose(*pair) for pair in pairwise(told)]
    assert differs == [name != "none"] * 2


@pytest.mark.parametrize("name", ["none", "class"])
def test_an_unconditional_unet_becomes_a_conditional_one(opened, name):
    """What it changes for a condition makes it the network that the condition would have made."""
    channels, size, _ = opened.spec.shape
    before, after = (MODELS["unet"]("tiny", size, channels, None, each) for each in ("none", name))
    changed = before | IMAGE_CONDITIONS[name].added_to_unet()
    assert UNet2DConditionModel.from_config(changed).config == UNet2DConditionModel.from_config(after).config


ASKED = {
    "text": ("--prompt", ["red", "blue"], [{"prompt": "red"}, {"prompt": "blue"}], ["red", "blue"]),
    "class": ("--class_labels", [2, 0], [{"class_labels": 2}, {"class_labels": 0}], ["emu", "cat"]),
    "none": (None, None, [{}], [""]),
}
FLAGS = ("--prompt", "--negative_prompt", "--class_labels")


@pytest.mark.parametrize("name", IMAGE_CONDITIONS)
def test_a_run_is_asked_by_its_own_flags(name, tmp_path):
    """What they give, or the default of the run; and a request is named as a person would."""
    encoder = {
        "text": lambda: TextCondition(4, 3),
        "class": lambda: ClassCondition(3, 4, ["cat", "dog", "emu"]),
        "none": NoCondition,
    }[name]()
    row, (flag, value, requests, titles) = condition_of(encoder), ASKED[name]
    assert row is IMAGE_CONDITIONS[name]
    nothing = dict.fromkeys(FLAGS)
    given = nothing | ({flag: value} if flag else {})
    assert row.asked(given, encoder, tmp_path) == requests
    assert [row.title(request, encoder) for request in requests] == titles
    (tmp_path / "args.yaml").write_text("validation_prompts: [green]\n")
    default = {"text": [{"prompt": "green"}], "class": [{"class_labels": label} for label in range(3)], "none": [{}]}
    assert row.asked(nothing, encoder, tmp_path) == default[name]
    for other in set(FLAGS) - set(row.flags):
        asked = {
            "--prompt": (["red"], None, None),
            "--negative_prompt": ([], None, ""),
            "--class_labels": ([], [1], None),
        }
        pipeline = SimpleNamespace(conditions=encoder)
        with pytest.raises(UserError, match=f"{other}: the run .* takes no .*, it is {row.trained}"):
            requested_images(pipeline, tmp_path, *asked[other])


def test_a_negative_prompt_stands_in_every_request(tmp_path):
    given = {"--prompt": ["red", "blue"], "--negative_prompt": "green", "--class_labels": None}
    requests = IMAGE_CONDITIONS["text"].asked(given, TextCondition(4, 3), tmp_path)
    assert requests == [{"prompt": "red", "negative_prompt": "green"}, {"prompt": "blue", "negative_prompt": "green"}]
