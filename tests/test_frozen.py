"""Hashes of the weights of frozen models."""

import torch
from diffusers import AutoencoderKL

from tests.support.vaes import tiny_kl
from utils import frozen
from utils.image import codec as codecs

# Hashes


def test_hash_knows_every_weight(tmp_path):
    """One flipped bit, another name, shape or dtype changes the hash; saving and loading, or training state, does not."""
    vae = tiny_kl()
    digest = frozen.weights_hash(vae)
    vae.save_pretrained(tmp_path)
    assert frozen.weights_hash(AutoencoderKL.from_pretrained(tmp_path)) == digest
    assert frozen.weights_hash(codecs.load_vae(str(tmp_path))) == digest
    assert frozen.weights_hash(vae.train().requires_grad_(False)) == digest
    with torch.no_grad():
        for parameter in list(vae.parameters())[::7]:
            kept = parameter.flatten()[-1].clone()
            parameter.flatten()[-1] = torch.nextafter(kept, torch.tensor(torch.inf))
            assert frozen.weights_hash(vae) != digest
            parameter.flatten()[-1] = kept
    assert frozen.weights_hash(vae) == digest
    assert frozen.weights_hash(vae.half()) != digest


def test_hash_knows_names_and_shapes():
    """The same bytes under another name or in another shape are another model; buffers count."""
    hashes = set()
    for make in (
        lambda: torch.nn.ParameterDict({"a": torch.zeros(4)}),
        lambda: torch.nn.ParameterDict({"b": torch.zeros(4)}),
        lambda: torch.nn.ParameterDict({"a": torch.zeros(2, 2)}),
        lambda: torch.nn.BatchNorm1d(2),
    ):
        hashes.add(frozen.weights_hash(make()))
    model = torch.nn.BatchNorm1d(2)
    model.running_mean += 1
    hashes.add(frozen.weights_hash(model))
    assert len(hashes) == 5


def test_hash_of_bf16_and_scalars():
    """Dtypes that NumPy lacks, and zero-dimensional tensors, are hashed too."""
    model = torch.nn.ParameterDict(
        {"a": torch.ones((), dtype=torch.bfloat16), "b": torch.ones(3, dtype=torch.bfloat16)}
    )
    first = frozen.weights_hash(model)
    with torch.no_grad():
        model["a"].fill_(2)
    assert frozen.weights_hash(model) != first
