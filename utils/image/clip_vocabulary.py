"""CLIP's tokenizer without a network: its vocabulary, from the copy that open_clip carries."""

import gzip
import importlib.util
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# 49,152 entries as in the released CLIP: 256 bytes, the same 256 ending a word, the merges, and two special tokens.
NUM_MERGES = 49152 - 256 - 2
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"


def byte_characters() -> list[str]:
    """A printable character for each of the 256 bytes, in the order of GPT-2's and CLIP's vocabularies: first the
    bytes that are printable themselves, then the others as the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def read_merges() -> list[str]:
    """The merges of CLIP's byte-pair encoding, `"left right"`, best first, from the file that open_clip installs."""
    spec = importlib.util.find_spec("open_clip")  # found, not imported: importing it loads torch and timm
    if spec is None or spec.origin is None:
        raise ImportError("CLIP's vocabulary comes with open_clip_torch: pip install -r requirements.txt")
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    return lines[1 : NUM_MERGES + 1]  # line 0 is a header; the file holds more merges than CLIP uses


def build_clip_tokenizer() -> "CLIPTokenizer":
    """The tokenizer of the released CLIP models: 49,408 tokens, start 49406, end and padding 49407, 77 tokens at most.

    It is loaded from `vocab.json` and `merges.txt` like OpenAI's, the one form that every version of transformers
    reads.
    """
    from transformers import CLIPTokenizer

    characters = byte_characters()
    merges = read_merges()
    tokens = [*characters, *(character + "</w>" for character in characters)]
    tokens += ["".join(merge.split()) for merge in merges] + [START_OF_TEXT, END_OF_TEXT]
    with TemporaryDirectory() as folder:
        vocabulary = json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False)
        (Path(folder) / "vocab.json").write_text(vocabulary, encoding="utf-8")
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)
