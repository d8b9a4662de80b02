"""The cache of images: labels, captions, and what is drawn of a row."""

import numpy as np
import torch
from datasets import load_from_disk

from utils.diffusion.conditions import encode_text
from utils.image.text import load_text_encoder

ROWS = np.array([0, 17, 46, 17])


def test_a_row_is_mirrored_below_a_half_of_its_draw(cache, opened):
    """And has the caption in whose share of [0, 1) its own draw lies; each draw is asked for once."""
    asked, table, captions = [], *(load_from_disk(str(cache / name)) for name in ("latents", "captions"))
    drawn = {"flip": np.array([0.0, 0.4999, 0.5, 0.9999]), "caption": np.array([0.6, 0.0, 0.4999, 0.5])}
    batch = opened.gather(ROWS, lambda name: drawn[asked.append(name) or name])
    assert asked == ["flip", "caption"]
    columns = ["latents_flipped"] * 2 + ["latents"] * 2
    expected = [table[int(row)][column] for row, column in zip(ROWS, columns, strict=True)]
    assert torch.equal(batch["latents"].flatten(1).float(), torch.tensor(expected))
    texts = [table[int(row)]["caption"][place] for row, place in zip(ROWS, (1, 0, 0, 1), strict=True)]
    states = dict(zip(captions["caption"][:], captions["hidden_states"][:], strict=True))
    expected = [states[text] for text in texts]
    assert torch.equal(batch["encoder_hidden_states"].flatten(1).float(), torch.tensor(expected))


def test_first_captions_are_those_without_a_draw(cache, opened):
    table = load_from_disk(str(cache / "latents"))
    assert opened.first_captions(ROWS) == [table[int(row)]["caption"][0] for row in ROWS]
    first = opened.gather(ROWS, lambda name: np.zeros(len(ROWS)))["encoder_hidden_states"]
    assert torch.equal(opened.gather(ROWS)["encoder_hidden_states"], first)


def test_null_caption_is_the_encoded_empty_string(opened, tiny_text_encoder):
    expected = encode_text(*load_text_encoder(str(tiny_text_encoder)), [""])
    states, num_tokens = opened.null_caption()
    torch.testing.assert_close(states.float(), expected["encoder_hidden_states"][0], atol=1e-3, rtol=2e-3)
    assert num_tokens == expected["num_tokens"][0] == 2
