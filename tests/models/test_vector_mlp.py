"""Denoisers of vectors: the MLP, and the DiT on pieces of a vector."""

import pytest
import torch
from torch import nn

from tests.support.cells.models import SIZE, TIMESTEPS, WIDTH, mlp, normals
from tests.support.processes import with_random_weights
from utils.diffusion.denoiser import num_tokens
from utils.expression.setup import dit_arguments, mlp_arguments
from utils.models.dit import DiT
from utils.models.vector_mlp import VECTOR_MLP_SIZES, VectorMLP


def dit(**settings) -> DiT:
    settings = {"num_layers": 3, "hidden_size": WIDTH, "num_attention_heads": 2, "patch_size": 4} | settings
    settings = {"latent_kind": "vector", "in_channels": 1, "projection_class_embeddings_input_dim": 6} | settings
    return DiT(sample_size=SIZE, **settings)


def plain_dit(**settings) -> DiT:
    return dit(style="plain", **settings)


DENOISERS = {"mlp": mlp, "dit": dit, "plain dit": plain_dit}


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
