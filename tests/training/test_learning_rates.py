"""Weights with a learning rate of their own."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.support.cells.models import ADAMW, make_vae, mlp
from utils.diffusion.conditions import NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser, JointDenoiser
from utils.errors import UserError
from utils.training.checkpoints import Checkpoints
from utils.training.optimizers import LR_SCHEDULES, LearningRate, make_optimizer, set_learning_rate
from utils.training.run import Run


def moved(model: nn.Module, optimizer) -> dict[str, float]:
    """How far the largest step of each parameter goes, under gradients of one."""
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    return {name: (each.detach() - before[name]).abs().max().item() for name, each in model.named_parameters()}


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_a_learning_rate_of_its_own(schedule):
    """Of the dispersion and of an autoencoder beside its denoiser: the schedule of the rest, at another height. Adam's
    first step is as long as the learning rate, plus the decay where there is one."""
    denoiser = ConditionalDenoiser(mlp(), NoCondition())
    cases = [
        (make_vae(), "log_theta", {"lr_scale": 10.0, "weight_decay": 0.0}),
        (JointDenoiser(denoiser, make_vae()), "vae.", {"lr_scale": 0.1}),
    ]
    for model, prefix, own in cases:
        for step in (0, 3, 15):
            optimizer = make_optimizer(model, **ADAMW, own={prefix: own})
            rate = LearningRate(1e-3, schedule, 5, 20).at(step)
            set_learning_rate(optimizer, rate)
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, rate * own["lr_scale"]])
            weights = dict(model.named_parameters())
            largest = {name: weights[name].abs().max().item() for name in weights}
            for name, distance in moved(model, optimizer).items():
                is_own = name.startswith(prefix)
                expected = rate * own["lr_scale"] if is_own else rate
                decay = 0.0 if is_own and "weight_decay" in own else 0.01 * expected * largest[name]
                assert expected * 0.99 - decay - 1e-6 <= distance <= expected * 1.01 + decay + 1e-6, name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(weights)


def test_muon_has_one_learning_rate():
    with pytest.raises(UserError, match="log_theta has a learning rate of its own; use adamw"):
        make_optimizer(make_vae(), **ADAMW, name="muon", own={"log_theta": {"lr_scale": 2.0}})


def test_a_run_that_goes_on_takes_the_learning_rates_of_its_flags(tmp_path):
    """Of both groups: what a checkpoint holds is that of the flags of then."""
    rates = []
    for scale in (10.0, 3.0):
        accelerator, model = Accelerator(cpu=True), nn.ModuleDict({"a": nn.Linear(2, 2), "vae": nn.Linear(2, 2)})
        optimizer = make_optimizer(model, **ADAMW, own={"vae.": {"lr_scale": scale}})
        model, optimizer = accelerator.prepare(model, optimizer)
        saver = Checkpoints(Run(accelerator, tmp_path), model, optimizer, None, identity={}, keep=3)
        if scale == 3.0:
            assert saver.resume("latest") == 1
            assert optimizer.state_dict()["state"]
        else:
            moved(model, optimizer)
            saver.save(1)
        set_learning_rate(optimizer, 1.0)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [[1.0, 10.0], [1.0, 3.0]]
