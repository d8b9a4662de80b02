"""Power-function averages, and those made of snapshots, against averages computed from all the weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import nn

from tests.support.processes import refused, run
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
            ema.save_snapshots(Accelerator(), tmp_path, step + 1)
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
    ema.save_snapshots(Accelerator(), folder, 100)
    assert {step for step, _, _ in stored_snapshots(folder)} == {25, 50, 75, 100}


def test_what_snapshots_do_not_span_is_refused(trajectory, tmp_path):
    folder, _, _ = trajectory
    with pytest.raises(
        UserError, match=r"--ema_sigma_rel 0.004: .* miss .* nearer to those that were kept \(0.05, 0.1\)"
    ):
        reconstruct(folder, 0.004)
    with pytest.raises(UserError, match="no snapshots"):
        reconstruct(tmp_path / "other", 0.05)


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
