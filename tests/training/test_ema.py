"""The moving average against a recursion in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from utils.training.ema import EMA


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False)).to(dtype)
    model.register_buffer("seen", torch.zeros(2))
    return model


def move(model, generator):
    """A stand-in for an optimizer step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_average_is_the_recursion(decay):
    """shadow = d shadow + (1 - d) weights with d = min(decay, (1 + step) / (10 + step)), computed in float64."""
    model = small_model()
    ema = EMA(model, decay)
    truth = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for step in range(300):
        move(model, generator)
        ema.step(step)
        d = min(decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            truth[name] = d * truth[name] + (1 - d) * parameter.detach().double().numpy()
        if step == 0 and decay > 0.1:  # warm-up: the first step forgets nine tenths of the random start
            assert d == pytest.approx(0.1)
    averaged = small_model()
    ema.copy_to(averaged)
    for name, parameter in averaged.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), truth[name], rtol=1e-4, atol=1e-4)


def test_average_of_a_bf16_model_moves():
    """A thousand steps towards new weights at decay 0.999, with a bf16 model, arrive where theory says; bf16 would stay put."""
    model = small_model(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    ema = EMA(model, 0.999)
    assert all(tensor.dtype == torch.float32 for tensor in ema.shadow.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.25)
    for step in range(100_000, 101_000):  # after the warm-up
        ema.step(step)
    expected = 1.25 - 0.25 * 0.999**1000
    for tensor in ema.shadow.values():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, torch.full_like(tensor, expected), rtol=1e-4, atol=0)


def test_swap_twice_changes_nothing():
    """The first swap puts the average into the model, the second restores both, bit for bit."""
    model = small_model()
    ema = EMA(model, 0.9)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        move(model, generator)
        ema.step(step)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    averages = {name: t.clone() for name, t in ema.shadow.items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    ema.swap(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, averages[name])
        assert not torch.equal(parameter, weights[name])
    ema.swap(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(ema.shadow[name], averages[name])
    assert [p.data_ptr() for p in model.parameters()] == pointers  # the optimizer's parameters are still the model's
    move(model, generator)
    ema.step(5)  # and it goes on averaging
    for name, parameter in model.named_parameters():
        d = 6 / 15
        truth = d * averages[name].double() + (1 - d) * parameter.detach().double()
        torch.testing.assert_close(ema.shadow[name].double(), truth, rtol=1e-5, atol=1e-6)


def test_the_average_is_a_copy():
    """Moving the weights in place does not move the average, and copy_to does not tie the two."""
    model = small_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema = EMA(model, 0.9)
    move(model, torch.Generator().manual_seed(1))
    assert all(torch.equal(ema.shadow[name], start[name]) for name in start)
    ema.copy_to(model)
    move(model, torch.Generator().manual_seed(1))
    assert all(torch.equal(ema.shadow[name], start[name]) for name in start)


def test_save_and_load(tmp_path):
    """A loaded average equals the saved one bit for bit, continues alike, and is in plain safetensors."""
    from safetensors.torch import load_file

    model, generator = small_model(), torch.Generator().manual_seed(1)
    ema = EMA(model, 0.9)
    for step in range(3):
        move(model, generator)
        ema.step(step)
    ema.save(tmp_path)
    assert load_file(tmp_path / "ema.safetensors").keys() == dict(model.named_parameters()).keys()
    other = EMA(model, 0.9)  # which starts as the weights are now
    other.load(tmp_path)
    for _ in range(2):
        assert all(torch.equal(other.shadow[name], tensor) for name, tensor in ema.shadow.items())
        move(model, generator)
        ema.step(3)
        other.step(3)


def test_load_of_another_model_is_an_error(tmp_path):
    """A file that lacks a weight is not taken for an average of this model."""
    EMA(nn.Linear(2, 2), 0.9).save(tmp_path)
    with pytest.raises(KeyError):
        EMA(small_model(), 0.9).load(tmp_path)
