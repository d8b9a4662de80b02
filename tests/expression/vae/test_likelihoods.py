"""Likelihoods of counts, against scipy, and draws from them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, nbinom, norm

from tests.support.cells.models import COUNTS, MUS, THETAS, grid, log_prob, parameters_of
from utils.expression.vae.likelihoods import LIKELIHOODS, MAX_THETA, MIN_STD, MIN_THETA, CountParameters


def test_nb_is_scipys():
    """Means of a millionth to a million, dispersions of all that is allowed, counts of 0 to 100,000."""
    mu, theta, counts = grid(MUS, THETAS, COUNTS)
    parameters, p = parameters_of(mu, theta), theta / (theta + mu)
    expected = nbinom.logpmf(counts, theta, p)
    np.testing.assert_allclose(log_prob("nb", parameters, counts), expected, rtol=1e-8, atol=1e-8)
    distribution = LIKELIHOODS["nb"].distribution(parameters)
    np.testing.assert_allclose(distribution.mean[0], mu, rtol=1e-10)
    np.testing.assert_allclose(distribution.mean[0], nbinom.mean(theta, p), rtol=1e-7)
    np.testing.assert_allclose(distribution.variance[0], mu + mu**2 / theta, rtol=1e-10)
    np.testing.assert_allclose(distribution.variance[0], nbinom.var(theta, p), rtol=1e-7)


def test_zinb_by_hand():
    """A zero is lost or drawn; anything else was kept and drawn."""
    mu, theta, pi, counts = grid(MUS[::3], THETAS[::2], [1e-6, 0.1, 0.5, 0.999], COUNTS)
    parameters, of_nb = parameters_of(mu, theta, pi), nbinom.logpmf(counts, theta, theta / (theta + mu))
    expected = np.log1p(-pi) + of_nb
    expected = np.where(counts == 0, np.logaddexp(np.log(pi), expected), expected)
    np.testing.assert_allclose(log_prob("zinb", parameters, counts), expected, rtol=1e-8, atol=1e-8)
    distribution = LIKELIHOODS["zinb"].distribution(parameters)
    np.testing.assert_allclose(distribution.mean[0], (1 - pi) * mu, rtol=1e-8)
    second_moment = (1 - pi) * (mu + mu**2 / theta + mu**2)
    np.testing.assert_allclose(distribution.variance[0], second_moment - ((1 - pi) * mu) ** 2, rtol=1e-6)


def test_gaussian_is_scipys():
    mu, std, counts = grid(MUS, [MIN_STD, 1.0, 1e3], COUNTS)
    parameters = parameters_of(mu, std)
    np.testing.assert_allclose(log_prob("gaussian", parameters, counts), norm.logpdf(counts, mu, std), rtol=1e-8)
    distribution = LIKELIHOODS["gaussian"].distribution(parameters)
    np.testing.assert_allclose(distribution.mean[0], mu, rtol=1e-10)
    np.testing.assert_allclose(distribution.variance[0], std**2, rtol=1e-10)


@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_probabilities_add_up_to_one(kind):
    mu, theta, pi = grid([0.01, 1.0, 30.0], [0.1, 1.0, 1000.0], [0.01, 0.7])
    values = torch.arange(20_000, dtype=torch.float64)[:, None]
    log_probs = LIKELIHOODS[kind].distribution(parameters_of(mu, theta, pi)).log_prob(values)
    np.testing.assert_allclose(log_probs.exp().sum(dim=0), 1, rtol=1e-7)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_single_precision_is_enough(kind):
    """What training computes in: within 0.001 nats of the truth for counts up to 1,000 that are not absurd, though
    the logarithms of gamma functions that cancel go up to 7,000."""
    mu, theta, pi, counts = grid([1e-4, 0.01, 1.0, 100.0], [0.1, 1.0, 30.0, MAX_THETA], [0.01, 0.6], [0.0, 1, 5, 200])
    whole = log_prob(kind, parameters_of(mu, theta, pi), counts)
    single = log_prob(kind, parameters_of(mu, theta, pi, torch.float32), counts)
    likely = whole > -50
    assert likely.mean() > 0.3
    np.testing.assert_allclose(single[likely], whole[likely], rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_gradients_are_finite_at_the_extremes(kind):
    """Whatever logits a decoder gives, down to shares that are zero in single precision."""
    log_mu, log_theta, lost, counts = (
        torch.from_numpy(each).float()
        for each in grid([-200.0, -87, -10, 0, 10, 20], [-200.0, -7, 0, 7, 80], [-200.0, 0, 200], [0.0, 1, 1e5])
    )
    for each in (log_mu, log_theta, lost):
        each.requires_grad_()
    likelihood = LIKELIHOODS[kind]
    parameters = CountParameters(log_mu[None], likelihood.within(log_theta.exp()), lost[None])
    log_probs = likelihood.distribution(parameters).log_prob(counts[None])
    assert log_probs.isfinite().all()
    log_probs.sum().backward()
    for each in (log_mu, log_theta, *([lost] if likelihood.has_pi else [])):
        assert each.grad.isfinite().all()
    assert log_mu.grad.any()
    assert log_theta.grad.any()


def test_theta_stays_within_what_can_be_computed():
    theta = torch.tensor([0.0, 1e-9, 1.0, 1e9, math.inf])
    assert LIKELIHOODS["nb"].within(theta).tolist() == pytest.approx([MIN_THETA, MIN_THETA, 1, MAX_THETA, MAX_THETA])
    assert LIKELIHOODS["gaussian"].within(theta).tolist() == pytest.approx([MIN_STD, MIN_STD, 1, 1e9, math.inf])


def draws(kind: str, mu: float, theta: float, pi: float | None = None) -> np.ndarray:
    """40,000 of one gene, as if it were as many."""
    ones = np.ones(40_000)
    parameters = parameters_of(mu * ones, theta * ones, None if pi is None else pi * ones, torch.float32)
    return LIKELIHOODS[kind].draw(parameters, 0, np.random.default_rng(0))


def fits(found: np.ndarray, probabilities: np.ndarray) -> float:
    """The p-value of counts that have these probabilities of 0, 1, 2, ..., bins of fewer than ten pooled."""
    expected = len(found) * np.append(probabilities, 1 - probabilities.sum())
    seen = np.bincount(np.minimum(found.astype(int), len(probabilities)), minlength=len(expected))
    edges = [0]
    for i in range(len(expected)):
        if expected[edges[-1] : i].sum() >= 10 and expected[i:].sum() >= 10:
            edges.append(i)
    expected, seen = (np.add.reduceat(each, edges) for each in (expected, seen))
    return chisquare(seen, expected * seen.sum() / expected.sum()).pvalue


@pytest.mark.parametrize(("mu", "theta"), [(0.05, 0.2), (1.5, 0.5), (3.0, 1000.0), (200.0, 4.0)])
def test_draws_of_nb(mu, theta):
    counts = draws("nb", mu, theta)
    assert counts.dtype == np.float32
    assert (counts == np.rint(counts)).all()
    assert counts.min() >= 0
    assert fits(counts, nbinom.pmf(np.arange(2000), theta, theta / (theta + mu))) > 1e-3
    variance = mu + mu**2 / theta
    assert counts.mean() == pytest.approx(mu, abs=5 * math.sqrt(variance / len(counts)))
    assert counts.var() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("pi", [0.05, 0.6])
def test_draws_of_zinb(pi):
    mu, theta = 4.0, 2.0
    pmf = (1 - pi) * nbinom.pmf(np.arange(500), theta, theta / (theta + mu))
    pmf[0] += pi
    assert fits(draws("zinb", mu, theta, pi), pmf) > 1e-3


@pytest.mark.parametrize(("mu", "std"), [(0.3, 1.0), (20.0, 3.0)])
def test_draws_of_gaussian_are_counts(mu, std):
    """Rounded, and what lies below zero is zero."""
    counts = draws("gaussian", mu, std)
    assert counts.min() >= 0
    assert (counts == np.rint(counts)).all()
    edges = norm.cdf(np.arange(200) + 0.5, mu, std)
    assert fits(counts, np.diff(edges, prepend=0)) > 1e-3


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_draws_belong_to_their_generator(kind):
    """And to their row."""
    mu, theta, pi = np.full(50, 5.0), np.full(50, 2.0), np.full(50, 0.2)
    one = parameters_of(mu, theta, pi, torch.float32)
    two = one._replace(log_mu=torch.cat([one.log_mu, one.log_mu + 3]), pi_logits=one.pi_logits.expand(2, -1))
    draw = LIKELIHOODS[kind].draw
    first = draw(two, 0, np.random.default_rng(3))
    np.testing.assert_array_equal(first, draw(one, 0, np.random.default_rng(3)))
    assert (first != draw(one, 0, np.random.default_rng(4))).any()
    assert draw(two, 1, np.random.default_rng(3)).mean() > 5 * first.mean()


def test_a_mean_of_nothing_is_drawn():
    """Shares that are zero in single precision."""
    for kind in LIKELIHOODS:
        parameters = CountParameters(torch.full((1, 3), -200.0), torch.full((3,), MIN_STD), torch.zeros(1, 3))
        assert not LIKELIHOODS[kind].draw(parameters, 0, np.random.default_rng(0)).any()
