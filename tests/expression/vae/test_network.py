"""The autoencoder of cells: libraries, batches, precision, and what is no autoencoder."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.cells.models import BATCHES, CELLS, CHANNELS, GENES, NAMES, make_vae, normals, small_table
from utils.expression.data.stream import cell_batch
from utils.expression.vae.likelihoods import LIKELIHOODS
from utils.expression.vae.network import ExpressionVAE
from utils.expression.vae.training import Elbo


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
