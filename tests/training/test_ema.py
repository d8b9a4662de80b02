"""The moving average against a recursion in float64; power-function averages, and those made of snapshots, against
averages computed from all the weights."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import nn

from utils.errors import UserError
from utils.training.ema import (
    EMA,
    gamma_of,
    inner_products,
    power_decay,
    reconstruct,
    reconstruction_weights,
    stored_snapshots,
)
from utils.training.run import Run


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
    ema.swap(averaged)
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
    """Moving the weights in place does not move the average."""
    model = small_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema = EMA(model, 0.9)
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


def profile(step: int, sigma_rel: float) -> np.ndarray:
    """Weight of each of the weights 1, ..., `step` in the average, by unrolling the recursion."""
    gamma = gamma_of(sigma_rel)
    weights = np.zeros(step)
    for s in range(1, step + 1):
        keep = power_decay(gamma, s)
        weights *= keep
        weights[s - 1] += 1 - keep
    return weights


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_gamma_gives_the_width_asked_for(sigma_rel):
    """The standard deviation of the density (gamma + 1) s^gamma on [0, 1], by integration."""

    def width(gamma):
        mean, square = (quad(lambda s, k=k: (gamma + 1) * s ** (gamma + k), 0, 1)[0] for k in (1, 2))
        return np.sqrt(square - mean**2)

    assert gamma_of(sigma_rel) == pytest.approx(brentq(lambda g: width(g) - sigma_rel, 0, 300), rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0])
def test_widths_that_no_profile_has(sigma_rel):
    with pytest.raises(ValueError, match="is not between"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_profile_of_the_recursion_is_the_power_function(sigma_rel):
    weights, gamma = profile(2000, sigma_rel), gamma_of(sigma_rel)
    assert weights.sum() == pytest.approx(1)
    times = np.arange(1, 2001)
    expected = times**gamma / (times**gamma).sum()
    assert np.abs(weights - expected).sum() < 0.02
    assert np.sqrt(np.cov(times / 2000, aweights=weights, ddof=0)) == pytest.approx(sigma_rel, rel=0.01)


def test_inner_products_are_those_integrals():
    steps, gammas = np.array([1000, 400, 1000]), np.array([6.9, 16.9, 0.4])
    found = inner_products(steps, gammas, steps, gammas)
    for i in range(3):
        for j in range(3):
            end = min(steps[i], steps[j])
            densities = [lambda s, k=k: (gammas[k] + 1) / steps[k] * (s / steps[k]) ** gammas[k] for k in (i, j)]
            truth = quad(lambda s, one=densities[0], two=densities[1]: one(s) * two(s), 0, end)[0]
            assert found[i, j] == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(
    ("sigma_rel", "tolerance"), [(0.03, 0.05), (0.05, 1e-6), (0.08, 0.01), (0.15, 0.01), (0.25, 0.1)]
)
def test_snapshots_span_other_profiles(sigma_rel, tolerance):
    """Two profiles, 16 snapshots each: the sum of their unrolled weights is the unrolled target, and the part missed is
    the part that is reported."""
    steps = [step for step in range(100, 1601, 100) for _ in range(2)]
    sigma_rels = [0.05, 0.1] * 16
    weights, missed = reconstruction_weights(steps, sigma_rels, 1600, sigma_rel)
    total = np.zeros(1600)
    for weight, step, each in zip(weights, steps, sigma_rels, strict=True):
        total[:step] += weight * profile(step, each)
    target = profile(1600, sigma_rel)
    error = np.linalg.norm(total - target) / np.linalg.norm(target)
    assert missed < tolerance
    assert missed == pytest.approx(error, rel=0.01, abs=1e-6)
    assert weights.sum() == pytest.approx(1, abs=0.02)


class Accelerator:
    is_main_process = True


@pytest.fixture
def trajectory(tmp_path):
    """Weights that wander for 400 steps, their averages' snapshots, and all the weights."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(16, 16)
    ema, history = EMA(model, 0.99, (0.05, 0.1)), []
    for step in range(400):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator) + 0.01
        history.append(model.weight.detach().double().clone())
        ema.step(step)
        if (step + 1) % 25 == 0:
            ema.save_snapshots(Run(Accelerator(), tmp_path), step + 1)
    return tmp_path, torch.stack(history), ema


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.1, 0.2])
@pytest.mark.parametrize("last_step", [None, 210])
def test_any_average_after_training(trajectory, sigma_rel, last_step):
    """To the precision of half-precision snapshots and of what two profiles span."""
    folder, history, _ = trajectory
    found = reconstruct(folder, sigma_rel, last_step)["weight"].double()
    step = 200 if last_step else 400
    weights = torch.from_numpy(profile(step, sigma_rel))
    truth = torch.einsum("s,sij->ij", weights, history[:step])
    other = torch.einsum("s,sij->ij", torch.from_numpy(profile(step, 0.14)), history[:step])
    assert (found - truth).abs().mean() < 0.1 * (other - truth).abs().mean()
    assert (found - truth).abs().mean() < 0.02 * truth.abs().mean()


def test_averages_are_the_recursions(trajectory):
    _, history, ema = trajectory
    for shadow, sigma_rel in zip(ema.shadows[1:], (0.05, 0.1), strict=True):
        truth = torch.einsum("s,sij->ij", torch.from_numpy(profile(400, sigma_rel)), history)
        torch.testing.assert_close(shadow["weight"].double(), truth, rtol=1e-4, atol=1e-5)


def test_snapshots_of_a_past_that_was_given_up_go(trajectory):
    folder, _, ema = trajectory
    ema.save_snapshots(Run(Accelerator(), folder), 100)
    assert {step for step, _, _ in stored_snapshots(folder)} == {25, 50, 75, 100}


def test_what_snapshots_do_not_span_is_refused(trajectory, tmp_path):
    folder, _, _ = trajectory
    with pytest.raises(
        UserError, match=r"--ema_sigma_rel 0.004: .* miss .* nearer to those that were kept \(0.05, 0.1\)"
    ):
        reconstruct(folder, 0.004)
    with pytest.raises(UserError, match="no snapshots"):
        reconstruct(tmp_path / "other", 0.05)
