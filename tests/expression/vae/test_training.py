"""Where training of the autoencoder begins, its bound, its latents, and what is measured of held-out cells."""

import logging
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.stats import norm
from torch import nn

from tests.support.cells.models import CELLS, CHANNELS, make_vae, normals, small_table
from utils.expression.data.stream import cell_batch, theta_of_moments
from utils.expression.vae.likelihoods import LIKELIHOODS
from utils.expression.vae.network import ExpressionVAE
from utils.expression.vae.training import BestWeights, Elbo, HeldOutCells, correlations, initialise, measure_latents
from utils.latents.posterior import PosteriorSums, kl_weight_at


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
