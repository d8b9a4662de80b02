"""The denoiser with its conditions."""

import pytest
import torch

from tests.support.models import randomise, tiny_dit, tiny_inputs, tiny_unet
from utils.diffusion.conditions import ClassCondition, TextCondition
from utils.diffusion.denoiser import ConditionalDenoiser


def test_the_denoiser_has_no_dropout_of_its_own():
    """The same batch with the same drop mask gives the same prediction in training mode: nothing else is drawn."""
    from utils.models.dit import DiT

    torch.manual_seed(0)
    dit = DiT(4, 2, 2, 1, 16, 2, projection_class_embeddings_input_dim=8)
    denoiser = ConditionalDenoiser(dit, ClassCondition(3, 8)).train()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(std=0.1)
    inputs = (
        torch.randn(6, 2, 4, 4),
        torch.full((6,), 9.0),
        {"class_labels": torch.arange(6) % 3},
        torch.arange(6) > 3,
    )
    first = denoiser(*inputs)
    assert all(torch.equal(denoiser(*inputs), first) for _ in range(10))


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_conditional_denoiser_passes_each_condition_on(kind):
    """Through ConditionalDenoiser text and labels change the prediction, and a dropped sample is deaf to them."""
    cases = [(TextCondition(10, 5), True), (ClassCondition(3, 6 if kind == "dit" else 128), False)]
    for condition, is_text in cases:
        if kind == "dit":
            model = tiny_dit(
                **({"projection_class_embeddings_input_dim": None} if is_text else {"cross_attention_dim": None})
            )
        else:
            model = tiny_unet(10 if is_text else None, not is_text)
        denoiser = randomise(ConditionalDenoiser(model, condition)).eval()
        inputs = tiny_inputs()
        values = {
            "encoder_hidden_states": inputs["encoder_hidden_states"],
            "num_tokens": torch.tensor([2, 5, 3]),
            "class_labels": torch.tensor([0, 1, 2]),
        }
        others = {name: value.roll(1, 0) for name, value in values.items()}
        drop = torch.tensor([False, True, False])
        first = denoiser(inputs["sample"], inputs["timestep"], values, drop)
        second = denoiser(inputs["sample"], inputs["timestep"], others, drop)
        assert (first[0] - second[0]).abs().max() > 1e-3
        torch.testing.assert_close(first[1], second[1], rtol=1e-4, atol=1e-4)
