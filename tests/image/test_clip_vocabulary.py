"""The demo's tokenizer against open_clip's own, token by token."""

import pytest
from transformers import CLIPTokenizer

from utils.image.text import build_clip_tokenizer, byte_characters, read_merges

TOKENIZED = [
    "a handwritten seven",
    "7",
    "A Photo of TWO Dogs, playing (happily) at the beach!",
    "it's they're don't I'll we've I'm she'd",
    "price: $1,299.99 -- 50% off... only @ 10:30?!",
    "smile \N{GRINNING FACE} \N{WAVING HAND SIGN} couple \N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}",
    "naïve café, Überstraße, Ελληνικά, 日本語 text",
    "  spaces\tand\nlines   collapse ",
    "unbelievablyhyperlongcompoundwordwithoutanyspaces",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_clip_tokenizer()


@pytest.mark.parametrize("caption", TOKENIZED)
def test_ids_equal_open_clip(tokenizer: CLIPTokenizer, caption: str) -> None:
    import open_clip

    expected = [49406, *open_clip.SimpleTokenizer().encode(caption), 49407]
    assert tokenizer(caption).input_ids == expected


def test_truncates_and_pads_to_77_as_open_clip_does(tokenizer: CLIPTokenizer) -> None:
    import open_clip

    captions = ["word " * 200, "a handwritten seven"]
    ids = tokenizer(captions, padding="max_length", truncation=True).input_ids
    expected = open_clip.SimpleTokenizer()(captions).tolist()  # pads with 0, CLIP in transformers with the end token
    assert ids[0] == expected[0]
    assert ids[1] == [index or 49407 for index in expected[1]]


def test_the_vocabulary_has_clips_size_and_special_tokens(tokenizer: CLIPTokenizer) -> None:
    assert len(set(byte_characters())) == 256
    assert len(read_merges()) == 48894
    assert len(tokenizer) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    assert tokenizer.model_max_length == 77


def test_a_saved_tokenizer_loads_and_is_the_same(tokenizer: CLIPTokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 77
    assert loaded(TOKENIZED).input_ids == tokenizer(TOKENIZED).input_ids
