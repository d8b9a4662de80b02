"""How a run of any modality is guided: what flags ask for, what is asked of the run, and the defaults between them."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils.diffusion.objectives import training_scheduler
from utils.diffusion.sampling import sampling_scheduler
from utils.errors import UserError
from utils.modalities import MODALITIES
from utils.runs.sampler import GUIDED_SCALE, Sampler

ASKED = {"image": [{"prompt": "a"}], "crystal": [{"gap": 1.0}], "expression": [{"gap": 1.0}]}
GUIDE = torch.nn.Identity()


def make_sampler(name: str, guide=None, condition: bool = True, **flags) -> Sampler:
    columns = {"gap": {"kind": "property"}} if condition else {}
    conditions = SimpleNamespace()
    if not condition:
        from utils.diffusion.conditions import NoCondition

        conditions = NoCondition()
    pipeline = SimpleNamespace(
        scheduler=sampling_scheduler(training_scheduler("flow")),
        columns=columns,
        conditions=conditions,
        learns_variance=False,
    )
    defaults = {"guidance_scale": None, "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0}
    defaults |= {"num_inference_steps": 10, "num_atoms": None, "clamp_composition": False}
    return MODALITIES[name].load("sampler:Sampler")(Namespace(**(defaults | flags)), Path("run"), pipeline, guide)


@pytest.mark.parametrize("name", MODALITIES)
def test_default_scales(name):
    """That of the modality where something is asked for, that of a guide where one guides, and off otherwise."""
    assert make_sampler(name).guidance(ASKED[name]).scale == MODALITIES[name].guidance_scale
    assert make_sampler(name, GUIDE).guidance(ASKED[name]).scale == GUIDED_SCALE
    assert make_sampler(name, GUIDE, condition=False).guidance([{}]).scale == GUIDED_SCALE
    assert make_sampler(name, condition=False).guidance([{}]).scale == 1
    assert make_sampler(name, guidance_scale=3.0).guidance(ASKED[name]).scale == 3


@pytest.mark.parametrize("name", MODALITIES)
def test_guidance_that_would_do_nothing_is_refused(name):
    with pytest.raises(UserError, match=r"^--guidance_scale 3: .*nothing to guide towards"):
        make_sampler(name, condition=False, guidance_scale=3.0).guidance([{}])
    with pytest.raises(UserError, match=r"^--guide_model: guidance is off"):
        make_sampler(name, GUIDE, guidance_scale=1.0).guidance(ASKED[name])
    with pytest.raises(UserError, match=r"^--guidance_interval 0.91 0.92: none of the sampler"):
        make_sampler(name, guidance_scale=3.0, guidance_interval=[0.91, 0.92]).guidance(ASKED[name])


def test_a_negative_prompt_needs_guidance_and_no_guide():
    requests = [{"prompt": "a", "negative_prompt": "b"}]
    assert make_sampler("image").guidance(requests).scale == 7.5
    with pytest.raises(UserError, match=r"^--guide_model with negative_prompt"):
        make_sampler("image", GUIDE).guidance(requests)


def test_settings_are_those_that_make_the_samples_again():
    settings = make_sampler("crystal", guidance_scale=3.0).settings(ASKED["crystal"])
    assert settings == {
        "guidance_scale": 3.0,
        "guidance_interval": [0.0, 1.0],
        "guidance_rescale": 0.0,
        "num_inference_steps": 10,
        "model": "run",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
