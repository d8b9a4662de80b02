"""Frozen CLIP text encoders through transformers or open_clip; either way what comes out is transformers'
CLIPTextModel.
"""

import gzip
import importlib.util
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from utils.errors import UserError
from utils.frozen import load_component

FLAG = "--pretrained_text_encoder_name_or_path"


def load_text_encoder(
    name_or_path: str, library: str = "transformers", tokenizer_name: str | None = None
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer and text encoder by hub name or folder, in evaluation mode, fp32.

    A folder may be the encoder itself, hold the tokenizer beside it, or be a whole pipeline with `text_encoder/` and
    `tokenizer/`. With `library` "open_clip" it is a hub name, or a local checkpoint as "ARCHITECTURE:FILE" or a folder
    with `open_clip_config.json`.
    """
    if library == "open_clip":
        return load_with_open_clip(name_or_path, tokenizer_name)
    text_encoder = load_component(CLIPTextModel.from_pretrained, name_or_path, "text_encoder", FLAG)
    flag = "--tokenizer_name" if tokenizer_name else FLAG
    tokenizer = load_component(CLIPTokenizer.from_pretrained, tokenizer_name or name_or_path, "tokenizer", flag)
    check_tokenizer(tokenizer, text_encoder.config.max_position_embeddings, text_encoder.config.vocab_size, flag)
    return tokenizer, text_encoder.float().eval().requires_grad_(False)


def check_tokenizer(tokenizer: CLIPTokenizer, max_positions: int, vocab_size: int, flag: str) -> None:
    """Captions are standardised to `model_max_length`; a tokenizer that names none takes the encoder's number of
    positions.
    """
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_positions)
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{flag}: the tokenizer knows {len(tokenizer)} tokens and the text encoder {vocab_size}; they do not "
            "belong together"
        )


def import_open_clip(flag: str):
    """open_clip, or a line that says how to install it."""
    what = "--text_encoder_library open_clip" if flag == FLAG else f"{flag} open_clip"
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"{what} needs the package open_clip_torch: pip install open_clip_torch") from error
    return open_clip


def load_open_clip_model(name_or_path: str, flag: str) -> tuple[nn.Module, str]:
    """A whole CLIP of open_clip_torch, fp32 on the CPU, and the name that open_clip knows it by: of a hub name, of
    "ARCHITECTURE:FILE", or of a folder with `open_clip_config.json`. Raises UserError, which names the flag.
    """
    open_clip = import_open_clip(flag)
    architecture, _, checkpoint = name_or_path.partition(":")
    if checkpoint:
        if not Path(checkpoint).is_file():
            raise UserError(f"{flag}: the open_clip checkpoint {checkpoint} does not exist")
        if architecture not in open_clip.list_models():
            raise UserError(
                f"{flag}: open_clip has no architecture {architecture}; open_clip.list_models() names those it has"
            )
        source = {"model_name": architecture, "pretrained": checkpoint}
    else:
        schema = "local-dir:" if Path(name_or_path).is_dir() else "hf-hub:"
        source = {"model_name": schema + name_or_path}
    model = load_component(
        lambda _: open_clip.create_model(**source, precision="fp32", device="cpu"),
        checkpoint or name_or_path,
        "text_encoder" if flag == FLAG else "CLIP model",
        flag,
    )
    return model, source["model_name"]


def load_with_open_clip(name_or_path: str, tokenizer_name: str | None) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The same as `load_text_encoder`, through open_clip_torch."""
    model, _ = load_open_clip_model(name_or_path, FLAG)
    text_encoder = text_model_from_open_clip(model)
    tokenizer = load_open_clip_tokenizer(tokenizer_name or name_or_path, bool(tokenizer_name))
    check_tokenizer(tokenizer, text_encoder.config.max_position_embeddings, text_encoder.config.vocab_size, FLAG)
    return tokenizer, text_encoder.eval().requires_grad_(False)


def load_open_clip_tokenizer(name_or_path: str, named: bool) -> CLIPTokenizer:
    """The CLIP tokenizer beside the weights or, for a bare checkpoint, built from the vocabulary that open_clip
    carries.
    """
    if named or (":" not in name_or_path and not Path(name_or_path).is_dir()):
        return load_component(CLIPTokenizer.from_pretrained, name_or_path, "tokenizer", "--tokenizer_name")
    if any((Path(name_or_path) / file).exists() for file in ("tokenizer.json", "vocab.json")):
        return CLIPTokenizer.from_pretrained(name_or_path)
    pass

    return build_clip_tokenizer()


def text_model_from_open_clip(model) -> CLIPTextModel:
    """open_clip's text tower as a CLIPTextModel with the same weights and, to rounding, the same states.

    Raises UserError for towers that are no CLIP text transformer: those of transformers inside open_clip, SigLIP (no
    causal mask), CoCa and others with weights that CLIPTextModel has no place for.
    """
    tower = getattr(model, "text", model)
    if not hasattr(tower, "token_embedding") or not hasattr(tower, "ln_final") or tower.attn_mask is None:
        raise UserError(f"{FLAG}: open_clip's {type(model).__name__} has no CLIP text tower (with a causal mask)")
    state = {k: v for k, v in tower.state_dict().items() if not k.startswith("visual.")}
    vocab_size, width = state["token_embedding.weight"].shape
    blocks = tower.transformer.resblocks
    is_tanh = getattr(blocks[0].mlp.gelu, "approximate", "none") == "tanh"
    activation = {"GELU": "gelu", "QuickGELU": "quick_gelu"}[type(blocks[0].mlp.gelu).__name__]
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=len(state["positional_embedding"]),
        hidden_act="gelu_pytorch_tanh" if is_tanh else activation,
        layer_norm_eps=tower.ln_final.eps,
        projection_dim=width,
        pad_token_id=1,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
    )
    text_encoder = CLIPTextModel(config)
    # transformers moved these names once (with and without "text_model."): the model itself says which it has.
    prefix = next(k for k in text_encoder.state_dict() if k.endswith("token_embedding.weight"))
    prefix = prefix.removesuffix("embeddings.token_embedding.weight")
    renamed = {prefix + name: tensor for name, tensor in rename_open_clip(state, len(blocks)).items()}
    unused = [name for name in state if not name.startswith(("text_projection", "logit_"))]
    if unused:
        raise UserError(f"{FLAG}: open_clip's {type(model).__name__} has no CLIP text tower: it also has {unused[0]}")
    missing, unexpected = text_encoder.load_state_dict(renamed, strict=False)
    if unexpected or any("position_ids" not in name for name in missing):
        raise UserError(f"{FLAG}: open_clip's text tower does not fit CLIPTextModel: {missing or unexpected}")
    return text_encoder.float()


def rename_open_clip(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Takes the weights of open_clip's text tower out of `state`, under the names of transformers' CLIP."""
    renamed = {
        "embeddings.token_embedding.weight": state.pop("token_embedding.weight"),
        "embeddings.position_embedding.weight": state.pop("positional_embedding"),
        "final_layer_norm.weight": state.pop("ln_final.weight"),
        "final_layer_norm.bias": state.pop("ln_final.bias"),
    }
    modules = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    modules["attn.out_proj"] = "self_attn.out_proj"
    for layer in range(num_layers):
        source, target = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            for old, new in modules.items():
                renamed[f"{target}.{new}.{kind}"] = state.pop(f"{source}.{old}.{kind}")
            projections = torch.chunk(state.pop(f"{source}.attn.in_proj_{kind}"), 3)
            for name, projection in zip(("q_proj", "k_proj", "v_proj"), projections, strict=True):
                renamed[f"{target}.self_attn.{name}.{kind}"] = projection
    return renamed


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
