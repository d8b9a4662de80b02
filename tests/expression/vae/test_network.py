"""Cells in models: likelihoods against scipy, the bound against an integral, denoisers of vectors, and what is measured,
drawn and asked of them by brute force.
"""

import itertools
import logging
import math
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.sparse import csr_matrix
from scipy.stats import chisquare, nbinom, norm
from torch import Tensor, nn

from tests.support.processes import with_random_weights
from utils.diffusion.conditions import ConditionSum, NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser, JointDenoiser, num_tokens
from utils.diffusion.objectives import training_scheduler
from utils.diffusion.sampling import sampling_scheduler
from utils.errors import UserError
from utils.expression.codec import draw_cells, encode_cells
from utils.expression.data import stream as expression_stream
from utils.expression.data.stream import CellStream, cell_batch, gene_shares, theta_of_moments
from utils.expression.data.table import CellTable
from utils.expression.pictures import principal_plane, scatter_grid
from utils.expression.pipeline import ExpressionPipeline
from utils.expression.sampler import as_trained, condition_values, draw_batches, sample_cells
from utils.expression.setup import dit_arguments, mlp_arguments
from utils.expression.vae.likelihoods import LIKELIHOODS, MAX_THETA, MIN_STD, MIN_THETA, CountParameters
from utils.expression.vae.network import ExpressionVAE
from utils.expression.vae.training import BestWeights, Elbo, HeldOutCells, correlations, initialise, measure_latents
from utils.expression.validation import latent_distance
from utils.latents.posterior import PosteriorSums, kl_weight_at
from utils.latents.spec import Normalisation
from utils.models.dit import DiT
from utils.models.vector_mlp import VECTOR_MLP_SIZES, VectorMLP
from utils.training.checkpoints import Checkpoints
from utils.training.optimizers import LR_SCHEDULES, learning_rate_at, make_optimizer, set_learning_rate

GENES, CHANNELS, CELLS = 12, 3, 40
NAMES = [f"G{i}" for i in range(GENES)]
ADAMW = ((0.9, 0.999), 0.01, 1e-12)  # betas, weight decay, epsilon


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters_of(mu, theta, pi=None, dtype=torch.float64) -> CountParameters:
    """Of one cell whose genes have these means, dispersions and shares of lost counts, (G,) each."""
    log_mu, theta = torch.from_numpy(np.log(mu))[None].to(dtype), torch.from_numpy(np.asarray(theta)).to(dtype)
    lost = None if pi is None else torch.from_numpy(np.log(pi) - np.log1p(-np.asarray(pi)))[None].to(dtype)
    return CountParameters(log_mu, theta, lost)


def grid(*values) -> list[np.ndarray]:
    return [each.ravel() for each in np.meshgrid(*values, indexing="ij")]


MUS, THETAS = 10.0 ** np.arange(-6, 7), 10.0 ** np.arange(-3, 4)
COUNTS = np.array([0, 1, 2, 10, 1000, 100_000.0])


# ---- likelihoods -----------------------------------------------------------------------------------------------------


def log_prob(kind: str, parameters: CountParameters, counts: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(counts)[None].to(parameters.theta.dtype)
    return LIKELIHOODS[kind].distribution(parameters).log_prob(values)[0].double().numpy()


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


# ---- draws -----------------------------------------------------------------------------------------------------------


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


# ---- where training begins -------------------------------------------------------------------------------------------


def table_of(counts: np.ndarray, library_sizes: np.ndarray | None = None, **obs) -> CellTable:
    libraries = counts.sum(axis=1, dtype=np.float64) if library_sizes is None else library_sizes
    ids = np.array([f"cell-{i}" for i in range(len(counts))], dtype=object)
    genes = [f"G{i}" for i in range(counts.shape[1])]
    return CellTable(csr_matrix(counts.astype(np.float32)), libraries, genes, ids, obs)


def small_table(seed: int = 0, extra: float = 0.0) -> CellTable:
    """Cells of 12 genes in which three groups differ; `extra` counts of each library lie in other genes."""
    generator = np.random.default_rng(seed)
    profiles = generator.dirichlet(np.ones(GENES), 3)[np.arange(CELLS) % 3]
    counts = generator.poisson(generator.lognormal(5, 0.5, (CELLS, 1)) * profiles)
    counts[:, 0] += 1
    return table_of(counts, counts.sum(axis=1) + extra)


@pytest.fixture(scope="module")
def planted():
    """Counts of 12,000 cells with shares, libraries and dispersions that are known."""
    generator = np.random.default_rng(0)
    shares, theta = np.array([0.3, 0.1, 0.05, 0.02, 0.03]), np.array([0.3, 1.0, 3.0, 10.0, np.inf])
    libraries = generator.lognormal(5, 0.4, 12_000)
    mu = libraries[:, None] * shares
    finite = np.minimum(theta, 1e9)
    rates = np.where(np.isinf(theta), 1.0, generator.gamma(finite, 1 / finite, mu.shape))
    return table_of(generator.poisson(mu * rates), libraries), theta, shares


@pytest.mark.parametrize("rows_at_once", [4096, 700])
def test_a_planted_dispersion_is_found(planted, monkeypatch, rows_at_once):
    monkeypatch.setattr(expression_stream, "MOMENT_ROWS", rows_at_once)
    table, theta, shares = planted
    np.testing.assert_allclose(gene_shares(table), shares, rtol=0.03)
    for kind in ("nb", "zinb"):
        found = theta_of_moments(table, LIKELIHOODS[kind])
        np.testing.assert_allclose(found[:4], theta[:4], rtol=0.1)
        assert 80 < found[4] <= MAX_THETA  # a Poisson distribution has no finite one
    mu = table.library_sizes[:, None] * gene_shares(table)
    residual = np.sqrt(np.square(table.counts.toarray() - mu).mean(axis=0))
    np.testing.assert_allclose(theta_of_moments(table, LIKELIHOODS["gaussian"]), residual, rtol=1e-6)


def test_counts_of_many_cells_add_up():
    """Beyond the whole numbers that single precision holds."""
    counts = np.ones((9, 2))
    counts[0] = 2**24
    np.testing.assert_array_equal(gene_shares(table_of(counts)), [0.5, 0.5])
    assert gene_shares(table_of(counts, np.full(9, 1.0)))[0] == (2**24 + 8) / 9


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_moments_of_odd_genes(kind):
    """Without counts, and with the same count everywhere: a dispersion that can be computed with."""
    counts = np.zeros((20, 3))
    counts[:, 1], counts[:, 2] = 4, np.arange(20)
    theta = theta_of_moments(table_of(counts), LIKELIHOODS[kind])
    low, high = LIKELIHOODS[kind].limits
    assert ((low <= theta) & (theta <= high) & np.isfinite(theta)).all()


@pytest.mark.parametrize("library", ["chosen", "all"])
def test_a_new_decoder_says_the_mean(library):
    """Told nothing by its weights, of which the bias alone is left."""
    table = small_table(extra=0.0 if library == "chosen" else 50.0)
    vae = make_vae(library=library)
    initialise(vae, table)
    nn.init.zeros_(vae.to_shares.weight)
    batch = cell_batch(table, np.arange(CELLS))
    mu = vae.decode(normals(CELLS, CHANNELS), batch["library_size"]).log_mu.exp()
    torch.testing.assert_close(mu.sum(dim=0), batch["counts"].sum(dim=0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(vae.theta.detach(), theta_of_moments(table, LIKELIHOODS["nb"]), rtol=1e-4)
    logs = np.log(table.library_sizes)
    assert vae.log_library_mean.item() == pytest.approx(logs.mean())
    assert vae.log_library_std.item() == pytest.approx(logs.std())


# ---- the autoencoder -------------------------------------------------------------------------------------------------


def make_vae(**settings) -> ExpressionVAE:
    torch.manual_seed(0)
    settings = {"latent_channels": CHANNELS, "hidden_size": 16, "num_layers": 2} | settings
    vae = ExpressionVAE(genes=NAMES, **settings)
    with torch.no_grad():
        for layer in (vae.to_shares, vae.to_moments):
            layer.weight.mul_(3)
        vae.log_theta.copy_(torch.linspace(-1, 2, GENES))
    return vae.eval()


BATCHES = {"batch_column": "donor", "batch_names": ["D1", "D2", "D3"]}


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_shares_add_up_to_the_library(kind):
    """Of the chosen genes; with "all" other genes have a share of each cell, which is not zero."""
    libraries = torch.tensor([3.0, 500.0, 1e6])
    latents = normals(3, CHANNELS)
    chosen = make_vae(likelihood=kind).decode(latents, libraries).log_mu.exp()
    assert chosen.shape == (3, GENES)
    torch.testing.assert_close(chosen.sum(dim=1), libraries, rtol=1e-5, atol=0)
    part = make_vae(likelihood=kind, library="all").decode(latents, libraries).log_mu.exp().sum(dim=1) / libraries
    assert ((part > 0.2) & (part < 0.999)).all()


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_the_likelihood_is_in_single_precision_under_autocast(kind):
    vae, table = make_vae(likelihood=kind), small_table()
    batch, noise, elbo = cell_batch(table, np.arange(CELLS)), normals(CELLS, CHANNELS), Elbo(kind)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parameters, posterior = vae(batch, noise)
            inside = elbo(parameters, posterior, batch["counts"])
        outside = elbo(parameters, posterior, batch["counts"])
        whole = elbo(*vae(batch, noise), batch["counts"])
    for each in (*parameters, *posterior, *inside):
        assert each is None or each.dtype == torch.float32
    for one, other, exact in zip(inside, outside, whole, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, exact, rtol=0.1, atol=1)  # that of the layers before is rounded


def test_logits_are_not_rounded_under_autocast():
    """In bf16 a share of exp(-7.01) would be one of exp(-7)."""
    vae = make_vae()
    nn.init.zeros_(vae.to_shares.weight)
    with torch.no_grad():
        vae.to_shares.bias.copy_(torch.linspace(-7.01, 1.003, GENES))
        latents, libraries = normals(4, CHANNELS), torch.full((4,), 1001.0)
        expected = vae.decode(latents, libraries).log_mu
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(vae.decode(latents, libraries).log_mu, expected)


def test_a_batch_changes_what_is_decoded_and_encoded():
    vae, batch = make_vae(**BATCHES), cell_batch(small_table(), np.arange(4))
    latents, libraries = normals(4, CHANNELS), batch["library_size"]
    decoded = [vae.decode(latents, libraries, torch.full((4,), i)).log_mu for i in (-1, 0, 1, 2)]
    encoded = [vae.encode(**batch, batch_index=torch.full((4,), i)).mean for i in (-1, 0, 1, 2)]
    for found in (decoded, encoded):
        for one, other in itertools.combinations(found, 2):
            assert (one - other).abs().amax(dim=1).min() > 1e-4
    mixed = vae.decode(latents, libraries, torch.tensor([0, 1, 2, -1])).log_mu
    for row, place in enumerate([1, 2, 3, 0]):  # each cell has its own
        torch.testing.assert_close(mixed[row], decoded[place][row])


def test_counts_are_normalised_before_they_are_encoded():
    """A cell that was read three times as deep differs by its depth alone, which the model is told: in units in which
    that is nothing it does not differ at all. What is decoded goes with the depth too.
    """
    vae, batch = make_vae(), cell_batch(small_table(), np.arange(6))
    deeper, latents = {name: 3 * values for name, values in batch.items()}, normals(6, CHANNELS)
    shares = [vae.decode(latents, each["library_size"]).log_mu.softmax(dim=1) for each in (batch, deeper)]
    assert (vae.encode(**deeper).mean - vae.encode(**batch).mean).abs().amax(dim=1).min() > 1e-3
    assert (shares[0] - shares[1]).abs().amax(dim=1).min() > 1e-3
    vae.log_library_std.fill_(1e9)
    for one, other in zip(vae.encode(**batch), vae.encode(**deeper), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    other = vae.encode(deeper["counts"], batch["library_size"])
    assert (other.mean - vae.encode(**batch).mean).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [{}, BATCHES | {"likelihood": "zinb", "library": "all"}], ids=["plain", "all"])
def test_saved_and_loaded(tmp_path, settings):
    vae, batch = make_vae(**settings), cell_batch(small_table(extra=9), np.arange(5))
    if settings:
        batch["batch_index"] = torch.tensor([0, 1, 2, 0, 1])
    vae.register_to_config(latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    vae.save_pretrained(tmp_path)
    loaded = ExpressionVAE.from_pretrained(tmp_path)
    assert loaded.config.genes == NAMES
    assert loaded.config.latents_std == [2.0] * 4
    for one, other in zip((*vae(batch, normals(5, CHANNELS))[0],), (*loaded(batch, normals(5, CHANNELS))[0],)):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("settings", [{"likelihood": "poisson"}, {"library": "some"}])
def test_what_is_no_autoencoder_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make_vae(**settings)


ALL = BATCHES | {"likelihood": "zinb", "library": "all"}


@pytest.mark.parametrize("settings", [{}, ALL, {"likelihood": "gaussian"}])
def test_every_weight_of_the_autoencoder_learns(settings):
    vae, table = make_vae(**settings), small_table(extra=9)
    batch = cell_batch(table, np.arange(CELLS), np.arange(CELLS) % 3 if "batch_names" in settings else None)
    nll, kl = Elbo(vae.config.likelihood)(*vae(batch, normals(CELLS, CHANNELS)), batch["counts"])
    (nll + kl).mean().backward()
    assert [name for name, each in vae.named_parameters() if each.grad is None or not each.grad.any()] == []


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_the_bound_is_that_of_an_integral(kind):
    """With one latent dimension everything can be integrated: the expected likelihood, the divergence, and the
    evidence, which lies above the bound by the divergence of the posterior from the true one."""
    vae, table = make_vae(likelihood=kind, latent_channels=1), small_table()
    z = torch.linspace(-15, 15, 6001)
    for row in range(3):
        batch = cell_batch(table, np.array([row]))
        many = {name: values.expand(len(z), *values.shape[1:]) for name, values in batch.items()}
        with torch.no_grad():
            posterior = vae.encode(**batch)
            parameters = vae.decode(z[:, None], many["library_size"])
            log_probs = LIKELIHOODS[kind].distribution(parameters).log_prob(many["counts"])
            nlls, kls = Elbo(kind)(*vae(many, normals(len(z), 1)), many["counts"])
        likelihoods, dz, prior = log_probs.sum(dim=1).double().numpy(), 30 / 6000, norm.logpdf(z.numpy())
        log_q = norm.logpdf(z.numpy(), posterior.mean.item(), posterior.std.item())
        q = np.exp(log_q)
        expected_nll, divergence = -(q * likelihoods).sum() * dz, (q * (log_q - prior)).sum() * dz
        assert kls[0].item() == pytest.approx(divergence, rel=1e-3, abs=1e-4)
        assert nlls.mean().item() == pytest.approx(expected_nll, abs=5 * nlls.std().item() / math.sqrt(len(z)))
        joint = likelihoods + prior
        evidence = joint.max() + math.log(np.exp(joint - joint.max()).sum() * dz)
        gap = (q * (log_q - joint + evidence)).sum() * dz
        assert gap > 0
        assert evidence + expected_nll + divergence == pytest.approx(gap, abs=1e-3)


def test_warm_up_of_the_divergence():
    weights = [kl_weight_at(step, 2.0, 4) for step in range(8)]
    assert weights == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 2.0, 2.0])
    assert kl_weight_at(0, 0.5, 0) == 0.5


def test_statistics_of_vectors():
    means, logvars = normals(50, 4) * torch.tensor([1, 2, 0.01, 3]) + 1, normals(50, 4, seed=1) - 2
    sums = PosteriorSums()
    for first in range(0, 50, 16):
        rows = slice(first, first + 16)
        sums.add(means[rows, :, None, None], logvars[rows, :, None, None])
    found, m, v = sums.statistics(), means.double().numpy(), logvars.double().exp().numpy()
    np.testing.assert_allclose(found.mean, m.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.std_of_mean, m.std(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.posterior_std, np.sqrt(v.mean(axis=0)), rtol=1e-6)
    np.testing.assert_allclose(found.std, np.sqrt(m.var(axis=0) + v.mean(axis=0)), rtol=1e-6)
    assert found.kl == pytest.approx(0.5 * (m**2 + v - 1 - np.log(v)).mean(), rel=1e-6)
    assert found.active_channels == 3


@pytest.mark.parametrize("same_library", [False, True])
def test_measured_latents(same_library):
    """Mean and std of sampled latents, and of the logarithm of the library, for a normalisation that is stored."""
    table = small_table()
    if same_library:
        table.library_sizes[:] = 100.0
    vae = make_vae()
    statistics = measure_latents(vae, table, None)
    posterior = vae.encode(**cell_batch(table, np.arange(CELLS)))
    mean, variance = posterior.mean.detach().double().numpy(), posterior.std.detach().double().numpy() ** 2
    logs = np.log(table.library_sizes.astype(np.float32)).astype(np.float64)
    np.testing.assert_allclose(vae.config.latents_mean, [*mean.mean(axis=0), logs.mean()], rtol=1e-5, atol=1e-6)
    stds = [*np.sqrt(mean.var(axis=0) + variance.mean(axis=0)), max(logs.std(), 1e-6)]
    np.testing.assert_allclose(vae.config.latents_std, stds, rtol=1e-4, atol=1e-7)
    assert len(statistics.mean) == CHANNELS  # of what has a posterior


def collapsed(vae: ExpressionVAE, channels: range) -> ExpressionVAE:
    """Of which some channels say nothing of the cell."""
    with torch.no_grad():
        for channel in channels:
            for row in (channel, CHANNELS + channel):  # mean and log-variance
                vae.to_moments.weight[row] = 0
                vae.to_moments.bias[row] = 0
    return vae


@pytest.mark.parametrize(
    ("channels", "words"),
    [(range(3), "posterior collapse: KL of 0 nats"), (range(1, 3), "only 1 of 3 latent channels"), (range(0), None)],
)
def test_a_collapsed_posterior_is_noticed(caplog, channels, words):
    caplog.set_level(logging.INFO, logger="utils")
    vae = collapsed(make_vae(), channels)
    figures = HeldOutCells(Accelerator(cpu=True), small_table(), None, 1.0).measure(vae, 7)
    assert figures["active_channels"] == CHANNELS - len(channels)
    if len(channels) == CHANNELS:
        assert figures["kl"] == pytest.approx(0, abs=1e-6)
    measure_latents(vae, small_table(), None)
    warned = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    if words is None:
        assert warned == []
    else:
        assert [each.split(": ")[0] for each in warned] == ["step 7", "at the end"]
        assert all(words in each and "lower --kl_weight" in each for each in warned)


def test_held_out_cells(monkeypatch):
    """The bound at the final weight, and correlations of what is expected; the same twice."""
    table, vae = small_table(seed=1), make_vae()
    held_out = HeldOutCells(Accelerator(cpu=True), table, None, 0.5)
    found = held_out.measure(vae, 1)
    assert held_out.measure(vae, 2) == found
    batch = cell_batch(table, np.arange(CELLS))
    parameters, posterior = vae(batch, normals(CELLS, CHANNELS))
    nll, kl = (each.double().mean().item() for each in Elbo("nb")(parameters, posterior, batch["counts"]))
    assert found["nll"] == pytest.approx(nll, rel=1e-6)
    assert found["loss"] == pytest.approx(nll + 0.5 * kl, rel=1e-6)
    assert found["elbo"] == pytest.approx(-nll - kl, rel=1e-6)
    expected = vae.decode(posterior.mean, batch["library_size"]).log_mu.exp()
    scale = 1e4 / batch["library_size"][:, None]
    logs = [(each * scale).log1p().detach().numpy() for each in (batch["counts"], expected)]
    by_hand = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*logs, strict=True)])
    assert found["cell_correlation"] == pytest.approx(by_hand, rel=1e-4)


def test_the_best_weights_are_kept(tmp_path):
    """Those of the lowest loss; a run that goes on from before them does not know them."""
    best, vae = BestWeights(tmp_path, 0), make_vae()
    first = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    best.offer(vae, {"loss": 5.0}, 2)
    nn.init.ones_(vae.to_shares.weight)
    best.offer(vae, {"loss": 5.0}, 4)
    best.offer(vae, {"loss": math.nan}, 6)
    assert best.restore(vae) == {"loss": 5.0, "global_step": 2}
    assert all(torch.equal(tensor, first[name]) for name, tensor in vae.state_dict().items())
    assert BestWeights(tmp_path, 2).about == best.about
    assert BestWeights(tmp_path, 1).about is None
    assert BestWeights(tmp_path / "new", 9).restore(vae) is None


# ---- batches and cells -----------------------------------------------------------------------------------------------


def test_a_stream_of_cells_is_a_function_of_the_position():
    table, numbers = small_table(), np.arange(CELLS) % 3
    stream = CellStream(table, 5, numbers)
    epoch = stream.__getitems__(list(range(CELLS)))
    np.testing.assert_array_equal(np.sort(epoch["counts"].numpy(), axis=0), np.sort(table.counts.toarray(), axis=0))
    later = stream.__getitems__([CELLS + 3, 7])
    assert torch.equal(later["counts"][1], epoch["counts"][7])
    assert torch.equal(later["library_size"][1], epoch["library_size"][7])
    row = table.dense(slice(None)).tolist().index(epoch["counts"][7].tolist())
    assert later["batch_index"][1] == numbers[row]
    assert later["positions"].tolist() == [CELLS + 3, 7]
    assert torch.equal(stream[7]["counts"], epoch["counts"][7])
    other = CellStream(table, 6).__getitems__(list(range(CELLS)))
    assert "batch_index" not in other
    assert not torch.equal(other["counts"], epoch["counts"])


def test_cells_to_latents_and_back():
    """The library size is the last number, and has no posterior; each cell is drawn by its own generator."""
    vae, table = make_vae(), small_table()
    batch = cell_batch(table, np.arange(CELLS))
    mean, std = encode_cells(vae, batch)
    assert mean.shape == std.shape == (CELLS, CHANNELS + 1)
    torch.testing.assert_close(mean[:, -1].exp(), batch["library_size"], rtol=1e-5, atol=0)
    assert not std[:, -1].any()
    assert torch.equal(mean[:, :-1], vae.encode(**batch).mean)
    generators = [np.random.default_rng(i) for i in range(CELLS)]
    counts, libraries = draw_cells(vae, mean, None, generators)
    np.testing.assert_allclose(libraries, table.library_sizes, rtol=1e-5)
    assert (counts == np.rint(counts)).all()
    alone, _ = draw_cells(vae, mean[7:8], None, [np.random.default_rng(7)])
    np.testing.assert_array_equal(alone[0], counts[7])


# ---- denoisers of vectors --------------------------------------------------------------------------------------------

SIZE, WIDTH = 9, 32


def mlp() -> VectorMLP:
    return VectorMLP(SIZE, num_layers=3, hidden_size=WIDTH, projection_class_embeddings_input_dim=6)


def dit(**settings) -> DiT:
    settings = {"num_layers": 3, "hidden_size": WIDTH, "num_attention_heads": 2, "patch_size": 4} | settings
    settings = {"latent_kind": "vector", "in_channels": 1, "projection_class_embeddings_input_dim": 6} | settings
    return DiT(sample_size=SIZE, **settings)


def plain_dit(**settings) -> DiT:
    return dit(style="plain", **settings)


DENOISERS = {"mlp": mlp, "dit": dit, "plain dit": plain_dit}
TIMESTEPS = torch.tensor([3, 400, 990, 700])


def predict(model, sample, timesteps=TIMESTEPS, pooled=None):
    return model(sample, timesteps, class_labels=normals(len(sample), 6, seed=5) if pooled is None else pooled).sample


@pytest.fixture(params=DENOISERS)
def new_model(request):
    torch.manual_seed(0)
    return DENOISERS[request.param]()


@pytest.fixture
def model(new_model):
    return with_random_weights(new_model)


def test_a_new_denoiser_predicts_zero(new_model):
    assert not predict(new_model, normals(4, SIZE)).any()


def test_every_weight_learns(new_model):
    """The last layer from the first step on; the gates, which start at zero, let the rest learn from the third on."""
    optimizer = torch.optim.SGD(new_model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (predict(new_model, normals(4, SIZE)) - normals(4, SIZE, seed=1)).square().mean().backward()
        still = [name for name, each in new_model.named_parameters() if each.grad is None or not each.grad.any()]
        assert "proj_out.weight" not in still
        optimizer.step()
    assert still == []


def test_the_condition_and_the_time_matter(model):
    sample, pooled = normals(4, SIZE), normals(4, 6, seed=5)
    expected = predict(model, sample)
    assert expected.shape == (4, SIZE)
    assert (predict(model, sample, pooled=-pooled) - expected).abs().amax(dim=1).min() > 1e-2
    assert (predict(model, sample, 900 - TIMESTEPS) - expected).abs().amax(dim=1).min() > 1e-2
    torch.testing.assert_close(predict(model, sample, torch.tensor(400))[1], expected[1])  # one time for all
    for row in range(4):
        part = slice(row, row + 1)
        alone = predict(model, sample[part], TIMESTEPS[part], pooled[part])
        torch.testing.assert_close(alone, expected[part], rtol=1e-5, atol=1e-5)


def test_every_number_sees_every_other(model):
    """So all pieces of the vector are read and written, the last one too, which is filled up: nine is no multiple of
    the four that a token of the DiT takes."""
    if isinstance(model, DiT):
        assert num_tokens(model) == 3
    jacobian = torch.autograd.functional.jacobian(lambda x: predict(model, x[None], TIMESTEPS[:1])[0], normals(SIZE))
    assert jacobian.abs().min() > 1e-6


@pytest.mark.parametrize("patch_size", [1, 4, 9, 16])
def test_pieces_of_any_size(patch_size):
    model = with_random_weights(dit(patch_size=patch_size))
    found = predict(model, normals(4, SIZE))
    assert found.shape == (4, SIZE)
    if patch_size < SIZE:  # pieces have places: in another order they are another vector
        first, second, rest = normals(4, SIZE).split([patch_size, patch_size, SIZE - 2 * patch_size], dim=1)
        other = predict(model, torch.cat([second, first, rest], dim=1))
        assert (other[:, :patch_size] - found[:, patch_size : 2 * patch_size]).abs().max() > 1e-3


def test_pieces_come_back_where_they_were_cut():
    """What is filled up at the end is cut off there."""
    model, sample = dit(), normals(4, SIZE)
    model.patch_embed = nn.Identity()
    model.places = nn.Parameter(torch.zeros(3, 4))
    tokens, _ = model.embed(sample)
    assert tokens.shape == (4, 3, 4)
    assert not tokens[:, -1, 1:].any()
    assert torch.equal(model.unembed(tokens, sample.shape), sample)


def test_gradient_checkpointing_changes_nothing(model):
    gradients = []
    for checkpointed in (False, True):
        model.train().zero_grad()
        if checkpointed:
            model.enable_gradient_checkpointing()
        predict(model, normals(4, SIZE)).square().sum().backward()
        gradients.append({name: each.grad.clone() for name, each in model.named_parameters()})
    assert model.gradient_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_denoiser_is_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(predict(loaded, normals(4, SIZE)), predict(model, normals(4, SIZE)))


def test_sizes():
    """As --help says: 3.2M to 319M; and those of the DiT paper."""
    millions = []
    for size in VECTOR_MLP_SIZES:
        with torch.device("meta"):
            millions.append(sum(each.numel() for each in VectorMLP(**mlp_arguments(size, 17)).parameters()) / 1e6)
    assert millions == sorted(millions)
    assert [round(millions[0], 1), round(millions[-1])] == [3.2, 319]
    with torch.device("meta"):
        model = DiT(**dit_arguments("B", 17))
    assert (model.config.num_layers, model.config.hidden_size, num_tokens(model)) == (12, 768, 5)


def test_what_a_vector_has_not():
    with pytest.raises(ValueError, match="no cross-attention"):
        mlp()(normals(2, SIZE), TIMESTEPS[:2], encoder_hidden_states=normals(2, 3, 4))
    with pytest.raises(ValueError, match="in_channels 2"):
        dit(in_channels=2)


# ---- learning rates of their own -------------------------------------------------------------------------------------


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
            optimizer = make_optimizer(model, 1e-3, *ADAMW, own={prefix: own})
            rate = learning_rate_at(step, 1e-3, schedule, 5, 20)
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
        make_optimizer(make_vae(), 1e-3, *ADAMW, name="muon", own={"log_theta": {"lr_scale": 2.0}})


def test_a_run_that_goes_on_takes_the_learning_rates_of_its_flags(tmp_path):
    """Of both groups: what a checkpoint holds is that of the flags of then."""
    rates = []
    for scale in (10.0, 3.0):
        accelerator, model = Accelerator(cpu=True), nn.ModuleDict({"a": nn.Linear(2, 2), "vae": nn.Linear(2, 2)})
        optimizer = make_optimizer(model, 1e-3, *ADAMW, own={"vae.": {"lr_scale": scale}})
        model, optimizer = accelerator.prepare(model, optimizer)
        saver = Checkpoints(accelerator, tmp_path, model, optimizer, None, {}, 3)
        if scale == 3.0:
            assert saver.resume("latest") == 1
            assert optimizer.state_dict()["state"]
        else:
            moved(model, optimizer)
            saver.save(1)
        set_learning_rate(optimizer, 1.0)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [[1.0, 10.0], [1.0, 3.0]]


# ---- what is measured on the way -------------------------------------------------------------------------------------


def test_correlations_are_numpys():
    real, expected = np.random.default_rng(0).random((7, 30)), np.random.default_rng(1).random((7, 30))
    expected += real
    found = correlations(real, expected)
    cells = [np.corrcoef(a, b)[0, 1] for a, b in zip(real, expected, strict=True)]
    genes = [np.corrcoef(a, b)[0, 1] for a, b in zip(real.T, expected.T, strict=True)]
    assert list(found.values()) == pytest.approx([np.mean(cells), np.mean(genes)])
    real[:, 3], real[2] = 1.0, 0.5  # a gene and a cell that tell nothing
    cells = [np.corrcoef(a, b)[0, 1] for a, b in zip(np.delete(real, 2, 0), np.delete(expected, 2, 0), strict=True)]
    assert correlations(real, expected)["cell_correlation"] == pytest.approx(np.mean(cells))
    assert correlations(np.ones((3, 4)), np.ones((3, 4))) == {"cell_correlation": 0.0, "gene_correlation": 0.0}


def test_distance_of_latents_by_brute_force():
    first, second = normals(6, 4).numpy(), normals(6, 4, seed=1).numpy()
    costs = [((first - second[list(order)]) ** 2).sum(axis=1).mean() for order in itertools.permutations(range(6))]
    assert latent_distance(first, second) == pytest.approx(math.sqrt(min(costs)), rel=1e-6)
    assert latent_distance(first, first[::-1]) == pytest.approx(0, abs=1e-6)
    assert latent_distance(first, first + 3) == pytest.approx(6)  # of a shift its length


def coloured(picture) -> float:
    return (np.asarray(picture) != 255).any(axis=2).mean()


def test_pictures_of_odd_points():
    """One label, none, more than there are colours, a single cell, cells that all lie in one place or are not finite."""
    points = normals(50, 2).numpy()
    blank = coloured(scatter_grid([("none", np.full((50, 2), 1e9), None), ("none", points + 1e10, None)]))
    for labels in (None, np.array(["B cell"] * 50), np.array([f"type {i}" for i in range(50)])):
        picture = scatter_grid([("real", points, labels), ("samples", -points, labels)])
        assert picture.size[0] == 2 * scatter_grid([("real", points, labels)]).size[0]
        assert coloured(picture) > blank
    broken = points.copy()
    broken[::2] = np.nan
    broken[1] = np.inf
    assert coloured(scatter_grid([("real", points, None), ("samples", broken, None)])) > blank
    scatter_grid([("one", points[:1], np.array(["B"])), ("same", np.zeros((4, 2)), np.array(["B"] * 4))])


def test_principal_axes():
    values = normals(300, 5).numpy() @ np.diag([0.1, 3, 0.2, 2, 0.3]) + 7
    mean, axes = principal_plane(values)
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-5)
    assert np.abs(axes @ axes.T - np.eye(2)).max() < 1e-5
    vectors = np.linalg.eigh(np.cov(values.T))[1]
    np.testing.assert_allclose(np.abs(axes), np.abs(vectors.T[[4, 3]]), atol=1e-4)
    assert principal_plane(values[:1])[1].shape == (2, 5)  # of a single cell too


# ---- what is asked of a run ------------------------------------------------------------------------------------------

COLUMNS = {
    "cell_type": {"kind": "class", "names": ["B", "NK", "T"]},
    "age": {"kind": "property", "mean": 40.0, "std": 10.0},
}
TYPES = np.array(["T"] * 60 + ["B"] * 30 + ["NK"] * 8 + [None] * 2, dtype=object)
KNOWN = {
    "cell_type": TYPES,
    "age": np.where(np.arange(100) % 10 == 9, np.nan, np.arange(100.0)),
    "donor": np.array(["D1", "D2", "D3", "D1"] * 25, dtype=object),
}
KNOWN["donor"][:60] = "D3"  # that of every T cell


def make_pipeline(columns=COLUMNS, **settings) -> ExpressionPipeline:
    conditions = with_random_weights(ConditionSum(6, columns)) if columns else NoCondition()
    torch.manual_seed(0)
    model = VectorMLP(CHANNELS + 1, 2, WIDTH, projection_class_embeddings_input_dim=6 if columns else None)
    denoiser = ConditionalDenoiser(with_random_weights(model), conditions).eval()
    normalisation = Normalisation((0.1,) * CHANNELS + (6.0,), (0.9,) * CHANNELS + (0.4,))
    known = {name: KNOWN[name] for name in (*columns, *(["donor"] if "batch_names" in settings else []))}
    scheduler = sampling_scheduler(training_scheduler("flow"))
    return ExpressionPipeline(denoiser, scheduler, make_vae(**settings), normalisation, known)


def test_cells_as_trained():
    """In the proportions of the training set, with all that is known of a training cell together, and nothing else."""
    pipeline = make_pipeline()
    requests = as_trained(pipeline, 6000, 0)
    found = Counter(request.get("cell_type") for request in requests)
    expected = Counter(TYPES.tolist())
    assert set(found) == set(expected)
    assert chisquare([found[name] for name in expected], [60 * times for times in expected.values()]).pvalue > 1e-3
    rows = {(name, None if math.isnan(age) else age) for name, age in zip(TYPES, KNOWN["age"], strict=True)}
    assert {(request.get("cell_type"), request.get("age")) for request in requests} == rows
    assert as_trained(pipeline, 5, 100) == requests[100:105]  # each belongs to its seed
    assert as_trained(make_pipeline({}), 3, 0) == [{}] * 3


def test_values_of_conditions():
    pipeline = make_pipeline()
    values = condition_values(pipeline, [{"cell_type": "T", "age": 61.5}, {"age": 3.0}, {"cell_type": "B"}, {}])
    assert values["cell_type"].tolist() == [2, -1, 0, -1]
    assert values["age"][:2].tolist() == [61.5, 3.0]
    assert values["age"][2:].isnan().all()
    assert list(condition_values(pipeline, [{"cell_type": "T"}])) == ["cell_type"]
    assert condition_values(pipeline, [{}, {}]) == {}
    alone = condition_values(pipeline, [{"cell_type": "T", "age": 61.5}])  # what is missing is not told, however said
    noisy, drop = normals(1, CHANNELS + 1), torch.tensor([False])
    for name in alone:
        left = {name: alone[name]}
        missing = condition_values(pipeline, [{name: 61.5 if name == "age" else "T"}, {"cell_type": "B", "age": 1.0}])
        first = {each: tensor[:1] for each, tensor in missing.items()}
        with torch.no_grad():
            one, other = (pipeline.denoiser(noisy, TIMESTEPS[:1], each, drop) for each in (left, first))
        torch.testing.assert_close(one, other)


def test_batches_for_the_decoder():
    """Those of training cells of the same type; the one that is asked for; of a type that no cell has, any."""
    pipeline = make_pipeline(**BATCHES)
    drawn = draw_batches(pipeline, [{"cell_type": "T"}] * 50 + [{"cell_type": "B"}] * 300 + [{}] * 3000, 0)
    assert set(drawn[:50]) == {2}
    of_b = Counter(KNOWN["donor"][60:90])
    found = Counter(BATCHES["batch_names"][i] for i in drawn[50:350])
    assert chisquare([found[name] for name in of_b], [10 * times for times in of_b.values()]).pvalue > 1e-3
    found, everywhere = Counter(drawn[350:].tolist()), Counter(KNOWN["donor"])
    expected = [30 * everywhere[name] for name in BATCHES["batch_names"]]
    assert chisquare([found[i] for i in range(3)], expected).pvalue > 1e-3
    np.testing.assert_array_equal(draw_batches(pipeline, [{}] * 10, 360), draw_batches(pipeline, [{}] * 20, 350)[10:])
    assert draw_batches(make_pipeline(), [{}], 0) is None


@pytest.mark.parametrize("kind", ["class", "property"])
def test_a_batch_that_is_a_condition_is_the_one_asked_for(kind):
    """Numbers too, whole or not."""
    names = ["1", "2"]
    settings = {"kind": "class", "names": names} if kind == "class" else {"kind": "property", "mean": 1.5, "std": 0.5}
    pipeline = make_pipeline(batch_column="lane", batch_names=names, columns={})
    pipeline.training_columns = {"lane": np.array([1.0, 2.0] * 20)}
    pipeline.denoiser.conditions = ConditionSum(6, {"lane": settings})
    asked = "2" if kind == "class" else 2.0
    assert draw_batches(pipeline, [{"lane": asked}] * 8, 0).tolist() == [1] * 8
    if kind == "property":  # between two batches: either
        assert set(draw_batches(pipeline, [{"lane": 1.5}] * 40, 0)) == {0, 1}


SETTINGS = {"num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.mark.parametrize("settings", [{}, BATCHES, {"likelihood": "zinb"}, {"likelihood": "gaussian"}], ids=str)
def test_a_sample_is_its_own(settings):
    """Whatever stands beside it; counts too, for they are drawn by a seed of their own."""
    pipeline = make_pipeline(**settings)
    requests = [{"cell_type": "T", "age": 50.0}, {"cell_type": "B"}, {}, {"age": 10.0}] * 3
    whole = next(sample_cells(pipeline, requests, SETTINGS, 5, 100))
    assert whole.counts.shape == (12, GENES)
    assert (whole.counts == np.rint(whole.counts)).all()
    assert whole.counts.min() >= 0
    parts = [list(sample_cells(pipeline, requests, SETTINGS, 5, size)) for size in (1, 5)]
    for part in parts:
        counts, libraries = (np.concatenate(each) for each in zip(*part, strict=True))
        np.testing.assert_allclose(libraries, whole.library_sizes, rtol=1e-4)
        assert (counts != whole.counts).mean() < 0.01  # a mean that is rounded otherwise may tip a draw
    later = next(sample_cells(pipeline, requests[4:], SETTINGS, 9, 100))
    np.testing.assert_allclose(later.library_sizes, whole.library_sizes[4:], rtol=1e-4)
    others = next(sample_cells(pipeline, requests, SETTINGS, 50, 100))
    assert (others.library_sizes != whole.library_sizes).all()


@pytest.mark.parametrize("fault", ["not finite", "without bounds"])
def test_a_run_that_gives_no_cells_is_refused(fault):
    """Libraries of more counts than could be drawn, too."""
    pipeline = make_pipeline()
    with torch.no_grad():
        bias = pipeline.denoiser.model.proj_out.bias
        bias.fill_(math.nan) if fault == "not finite" else bias.fill_(-500.0)  # flow goes against its velocity
    with pytest.raises(UserError, match="--model: it gives cells that are not finite"):
        list(sample_cells(pipeline, [{}] * 2, SETTINGS | {"guidance_scale": 1.0}, 0, 8))
