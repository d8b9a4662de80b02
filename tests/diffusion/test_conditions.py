"""Conditions, their nulls, guidance and the encoding of captions, against transformers' own CLIP."""

import numpy as np
import pytest
import torch
from torch import nn

from utils.diffusion.conditions import ClassCondition, Conditioning, NoCondition, TextCondition, encode_text, tokenize
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.guidance import guided_prediction
from utils.draws import SampleDraws
from utils.image.text import load_text_encoder

CAPTIONS = ["a red square", "", "word " * 2000, "x" * 10_000, "🎨🦊 ünïcödé 漢字", "🦊" * 500, "two birds, one stone"]


@pytest.fixture(scope="module")
def clip(tiny_text_encoder):
    """Tokenizer and text encoder as a script loads them."""
    return load_text_encoder(str(tiny_text_encoder))


@pytest.fixture(scope="module")
def plain_clip(tiny_text_encoder):
    """The same files through transformers alone."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_text_encoder / "tokenizer")
    return tokenizer, CLIPTextModel.from_pretrained(tiny_text_encoder / "text_encoder").eval()


def text_values(clip, captions):
    return encode_text(*clip, captions)


# Tokens and states


@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda caption: f"{len(caption)} characters")
def test_captions_become_77_tokens(clip, caption):
    """Any caption is 77 tokens: start, at most 75 of its own, end, then padding; the count says how many are real."""
    input_ids, num_tokens = tokenize(clip[0], [caption])
    assert input_ids.shape == (1, 77)
    count = int(num_tokens[0])
    own = clip[0](caption, add_special_tokens=False).input_ids[:75]
    start, end, pad = clip[0].bos_token_id, clip[0].eos_token_id, clip[0].pad_token_id
    assert input_ids[0].tolist() == [start, *own, end] + [pad] * (77 - 2 - len(own))
    assert count == len(own) + 2


def test_states_and_pooled_are_transformers(clip, plain_clip):
    """encode_text gives CLIPTextModel's last_hidden_state, and the pooled condition its pooler_output, caption by caption."""
    values = text_values(clip, CAPTIONS)
    condition = TextCondition(16, 77, use_pooled=True)
    pooled = condition(values, torch.zeros(len(CAPTIONS), dtype=torch.bool)).pooled_projections
    tokenizer, model = plain_clip
    for i, caption in enumerate(CAPTIONS):
        tokens = tokenizer(caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.no_grad():
            truth = model(tokens.input_ids)
        torch.testing.assert_close(values["encoder_hidden_states"][i], truth.last_hidden_state[0])
        torch.testing.assert_close(pooled[i], truth.pooler_output[0])


def test_one_caption_does_not_depend_on_the_others(clip):
    """A caption's states are the same alone and in any batch."""
    together = text_values(clip, CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone = text_values(clip, [caption])
        torch.testing.assert_close(alone["encoder_hidden_states"][0], together["encoder_hidden_states"][i])
        assert alone["num_tokens"][0] == together["num_tokens"][i]


# The null


@pytest.mark.parametrize("use_pooled", [False, True])
def test_text_null_is_the_empty_caption(clip, plain_clip, use_pooled, tmp_path):
    """What a dropped caption becomes is what CLIPTextModel gives for "", also after the condition was saved and loaded."""
    empty = text_values(clip, [""])
    condition = TextCondition(16, 77, use_pooled=use_pooled)
    condition.set_null(empty["encoder_hidden_states"][0], int(empty["num_tokens"][0]))
    condition.save_pretrained(tmp_path)
    tokenizer, model = plain_clip
    tokens = tokenizer("", padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        truth = model(tokens.input_ids)
    values = text_values(clip, ["a red square", "blue"])
    for each in (condition, TextCondition.from_pretrained(tmp_path)):
        dropped = each(values, torch.tensor([True, True]))
        torch.testing.assert_close(dropped.encoder_hidden_states, truth.last_hidden_state.expand(2, -1, -1))
        if use_pooled:
            torch.testing.assert_close(dropped.pooled_projections, truth.pooler_output.expand(2, -1))
        else:
            assert dropped.pooled_projections is None
        assert dropped.encoder_attention_mask is None  # unmasked, as Stable Diffusion trains


def test_the_null_of_text_is_not_trained(clip):
    """The null is a buffer: no optimizer moves it away from the empty caption."""
    assert list(TextCondition(16, 77).parameters()) == []
    assert not TextCondition(16, 77).null_hidden_states.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dropped_text_rows_are_the_null_and_others_untouched(dtype):
    """Row by row, for every drop mask of three samples: the null exactly, or the row exactly, whatever dtype the cache has."""
    torch.manual_seed(0)
    condition = TextCondition(6, 5, use_pooled=True)
    null = torch.randn(5, 6)
    condition.set_null(null, 2)
    values = {"encoder_hidden_states": torch.randn(3, 5, 6).to(dtype), "num_tokens": torch.tensor([5, 3, 4])}
    for bits in range(8):
        drop = torch.tensor([bool(bits >> i & 1) for i in range(3)])
        conditioning = condition(values, drop)
        assert conditioning.encoder_hidden_states.dtype == torch.float32
        for i in range(3):
            expected = null if drop[i] else values["encoder_hidden_states"][i].float()
            last = 2 if drop[i] else int(values["num_tokens"][i])
            assert torch.equal(conditioning.encoder_hidden_states[i], expected)
            assert torch.equal(conditioning.pooled_projections[i], expected[last - 1])
    half = condition.half()(values, torch.tensor([True, False, False]))  # the model decides the dtype, not the cache
    assert half.encoder_hidden_states.dtype == torch.float16


def test_dropped_labels_are_the_row_after_the_last_class():
    """Label i is row i of the embedding, the null row num_classes, and only those rows learn."""
    condition = ClassCondition(4, 8, ["a", "b", "c", "d"])
    labels = torch.tensor([0, 3, 3, 1])
    drop = torch.tensor([False, True, False, True])
    embeddings = condition({"class_labels": labels}, drop).pooled_projections
    table = condition.embedding.weight
    assert table.shape == (5, 8)
    assert torch.equal(embeddings, torch.stack([table[0], table[4], table[3], table[4]]))
    embeddings.sum().backward()
    assert (table.grad.abs().sum(dim=1) > 0).tolist() == [True, False, False, True, True]
    everything = condition({"class_labels": torch.arange(4)}, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(everything.pooled_projections, table[:4])


def test_no_condition_is_nothing():
    """An unconditional model is told nothing, dropped or not."""
    assert NoCondition()({}, torch.tensor([True, False])) == Conditioning(None, None, None)
    assert list(NoCondition().parameters()) == []


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_effective_drop_rate(probability):
    """Of the labels that reach the model in training, the share that is null is cond_drop_prob: dropped once, not twice."""

    class Recorder(nn.Module):
        """Stands where the denoiser stands."""

        def forward(self, sample, timestep, class_labels, **others):
            self.seen = class_labels
            return (sample,)

    denoiser = ConditionalDenoiser(Recorder(), ClassCondition(10, 3)).train()
    null_rows, masks = [], []
    for start in range(0, 20_000, 4000):
        positions = torch.arange(start, start + 4000)
        drop = SampleDraws(0, positions).uniform("condition_drop") < probability
        values = {"class_labels": positions % 10}
        denoiser(torch.zeros(4000, 1), torch.zeros(4000), values, drop)
        seen = denoiser.model.seen
        null_rows.append((seen == denoiser.conditions.embedding.weight[10]).all(dim=1))
        masks.append(drop)
    null_rows, masks = torch.cat(null_rows), torch.cat(masks)
    assert torch.equal(null_rows, masks)
    deviation = np.sqrt(probability * (1 - probability) / 20_000)
    assert null_rows.float().mean().item() == pytest.approx(probability, abs=4 * deviation + 1e-9)
    if 0 < probability < 1:  # and every class is dropped alike
        rates = null_rows.view(-1, 10).float().mean(dim=0)
        assert (rates - probability).abs().max() < 5 * deviation * 10**0.5


# Guidance


def test_guidance_formula_in_one_call():
    """null + scale (conditional - null), from one call with the conditional half first."""
    torch.manual_seed(0)
    latents, conditional, null = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    calls = []

    def predict(noisy_latents, timesteps):
        calls.append((noisy_latents, timesteps))
        return torch.cat([conditional, null])

    for scale in (0.0, 0.5, 4.0, 7.5):
        calls.clear()
        guided = guided_prediction(predict, latents, torch.tensor(17.0), scale)
        truth = null.double() + scale * (conditional.double() - null.double())
        torch.testing.assert_close(guided.double(), truth, rtol=1e-5, atol=1e-5)
        assert len(calls) == 1
        assert torch.equal(calls[0][0], torch.cat([latents, latents]))
        assert torch.equal(calls[0][1], torch.full((6,), 17.0))


def test_guidance_of_one_is_off():
    """At scale 1 the model sees the B conditional samples and nothing else, and its prediction is returned as it is."""
    latents, prediction = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    calls = []

    def predict(noisy_latents, timesteps):
        calls.append((noisy_latents, timesteps))
        return prediction

    assert torch.equal(guided_prediction(predict, latents, torch.tensor(17), 1.0), prediction)
    assert len(calls) == 1
    assert torch.equal(calls[0][0], latents)
    assert calls[0][1].tolist() == [17, 17, 17]
