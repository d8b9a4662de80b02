"""One set of random weights, through open_clip and through transformers, against both libraries' own forward; and our
tokenizer against open_clip's, token by token."""

import json

import pytest
import torch
from transformers import CLIPTokenizer

from utils.diffusion.conditions import encode_text
from utils.errors import UserError
from utils.image.text import build_clip_tokenizer, byte_characters, load_text_encoder, read_merges

open_clip = pytest.importorskip("open_clip")


CAPTIONS = ["a red square", "", "two birds and a stone " * 40, "🦊 ünïcödé"]

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}

VISION = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}


# Architectures that are CLIP's text tower in all but size; of each a checkpoint with random weights.
TOWERS = {
    "tiny-gelu": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-quickgelu": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-custom": {"embed_dim": 24, "custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-short": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT | {"context_length": 16}},
    "tiny-tanh": {
        "embed_dim": 24,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}},
    },
}


# Towers that CLIPTextModel cannot stand for.
OTHERS = {
    "tiny-bidirectional": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"},
    },
    "tiny-classtoken": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"context_length": 76, "embed_cls": True},
    },
    "tiny-layerscale": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT | {"ls_init_value": 0.1}},
}


def randomised(model):
    """Every weight random and not small, so that no part of the network can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.5 if "embedding" in name else 0.2))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Architecture name -> (open_clip's model, its checkpoint file), all known to open_clip by name."""
    folder = tmp_path_factory.mktemp("open_clip")
    configs = folder / "configs"
    configs.mkdir()
    for name, config in (TOWERS | OTHERS).items():
        (configs / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(configs)
    made = {}
    for name in TOWERS | OTHERS:
        model = randomised(open_clip.create_model(name, pretrained=None))
        torch.save(model.state_dict(), folder / f"{name}.pt")
        made[name] = (model, folder / f"{name}.pt")
    return made


@torch.no_grad()
def states_of_open_clip(model, captions):
    """open_clip's own forward up to the final norm, on its own tokens, (B, S, D)."""
    tower = getattr(model, "text", model)
    length = tower.context_length
    input_ids = open_clip.SimpleTokenizer(context_length=length)(captions)  # (B, S), padded with 0
    values = tower.token_embedding(input_ids) + tower.positional_embedding[:length]
    values = tower.transformer(values, attn_mask=tower.attn_mask[:length, :length])
    return tower.ln_final(values)


def assert_same_states(states, num_tokens, truth):
    """Equal to 1e-5 up to each caption's end; what follows is padding, with which the two libraries fill differently."""
    assert states.shape == truth.shape
    for row, expected, count in zip(states, truth, num_tokens, strict=True):
        torch.testing.assert_close(row[:count], expected[:count], rtol=1e-5, atol=1e-5)


def as_transformers_state(tower):
    """open_clip's text weights under transformers' names, written down anew: one name for each kind of weight."""
    state = {
        "text_model.embeddings.token_embedding.weight": tower.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": tower.positional_embedding,
        "text_model.final_layer_norm.weight": tower.ln_final.weight,
        "text_model.final_layer_norm.bias": tower.ln_final.bias,
    }
    for i, block in enumerate(tower.transformer.resblocks):
        layer = f"text_model.encoder.layers.{i}"
        width = block.attn.embed_dim
        for j, name in enumerate("qkv"):
            rows = slice(j * width, (j + 1) * width)
            state[f"{layer}.self_attn.{name}_proj.weight"] = block.attn.in_proj_weight[rows]
            state[f"{layer}.self_attn.{name}_proj.bias"] = block.attn.in_proj_bias[rows]
        parts = {
            "self_attn.out_proj": block.attn.out_proj,
            "layer_norm1": block.ln_1,
            "layer_norm2": block.ln_2,
            "mlp.fc1": block.mlp.c_fc,
            "mlp.fc2": block.mlp.c_proj,
        }
        for name, module in parts.items():
            state[f"{layer}.{name}.weight"], state[f"{layer}.{name}.bias"] = module.weight, module.bias
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def text_config(tower, activation, eos_token_id=2):
    """The `text_config` of a CLIP on the hub; most of those name 2 as the end of text, whatever the vocabulary."""
    block = tower.transformer.resblocks[0]
    return {
        "model_type": "clip_text_model",
        "vocab_size": tower.vocab_size,
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "max_position_embeddings": tower.context_length,
        "hidden_act": activation,
        "projection_dim": 24,
        "eos_token_id": eos_token_id,
    }


def save_as_transformers(model, folder, activation, whole):
    """A folder as on the hub: a text model alone, or with `whole` a CLIPModel whose config has both towers, as LAION's."""
    from safetensors.torch import save_file

    from utils.image.text import build_clip_tokenizer

    folder.mkdir()
    tower = getattr(model, "text", model)
    state, config = as_transformers_state(tower), text_config(tower, activation)
    if whole:
        from transformers import CLIPConfig, CLIPModel

        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 32, "patch_size": 16, "projection_dim": 24, "model_type": "clip_vision_model"}
        rest = CLIPModel(CLIPConfig(text_config=config, vision_config=vision, projection_dim=24)).state_dict()
        state |= {k: v.clone() for k, v in rest.items() if not k.startswith("text_model.") or "position_ids" in k}
        config = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": 24,
            "text_config": config,
            "vision_config": vision,
        }
    else:
        config |= {"architectures": ["CLIPTextModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    build_clip_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TOWERS)
def test_open_clip_checkpoint_gives_open_clips_states(checkpoints, name):
    """ARCHITECTURE:FILE gives the last hidden states of open_clip's own forward on its own tokens."""
    model, checkpoint = checkpoints[name]
    tokenizer, text_encoder = load_text_encoder(f"{name}:{checkpoint}", library="open_clip")
    assert tokenizer.model_max_length == TOWERS[name]["text_cfg"]["context_length"]
    assert not text_encoder.training
    assert not any(p.requires_grad for p in text_encoder.parameters())
    values = encode_text(tokenizer, text_encoder, CAPTIONS)
    assert_same_states(values["encoder_hidden_states"], values["num_tokens"], states_of_open_clip(model, CAPTIONS))


@pytest.mark.parametrize("name", ["tiny-gelu", "tiny-custom"])
def test_open_clip_folder_loads(checkpoints, tmp_path, name):
    """A folder as open_clip puts on the hub (open_clip_config.json beside the weights) gives the same states."""
    from safetensors.torch import save_file

    model, _ = checkpoints[name]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TOWERS[name], "preprocess_cfg": {}}))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    tokenizer, text_encoder = load_text_encoder(str(tmp_path), library="open_clip")
    values = encode_text(tokenizer, text_encoder, CAPTIONS)
    assert_same_states(values["encoder_hidden_states"], values["num_tokens"], states_of_open_clip(model, CAPTIONS))


@pytest.mark.parametrize("whole", [False, True], ids=["CLIPTextModel", "CLIPModel"])
@pytest.mark.parametrize(("name", "activation"), [("tiny-gelu", "gelu"), ("tiny-quickgelu", "quick_gelu")])
def test_both_libraries_give_the_same_embeddings(checkpoints, tmp_path, name, activation, whole):
    """The same weights through transformers and through open_clip: equal states, all 77, the empty caption's too."""
    model, checkpoint = checkpoints[name]
    folder = save_as_transformers(model, tmp_path / "clip", activation, whole)
    ours = encode_text(*load_text_encoder(str(folder), library="transformers"), CAPTIONS)
    theirs = encode_text(*load_text_encoder(f"{name}:{checkpoint}", library="open_clip"), CAPTIONS)
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs["encoder_hidden_states"], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours["num_tokens"], theirs["num_tokens"])
    truth = states_of_open_clip(model, CAPTIONS)
    assert_same_states(ours["encoder_hidden_states"], ours["num_tokens"], truth)


def test_activation_matters(checkpoints):
    """The two activations give different states, so that the tests above can tell them apart."""
    states = [states_of_open_clip(checkpoints[name][0], CAPTIONS) for name in ("tiny-gelu", "tiny-quickgelu")]
    assert (states[0] - states[1]).abs().max() > 1e-2


def test_pooled_state_with_the_hubs_end_token(checkpoints, tmp_path):
    """With the eos_token_id 2 of most hub configs the state of the last real token is still CLIP's pooled one."""
    from transformers import CLIPTextModel

    from utils.diffusion.conditions import TextCondition, tokenize

    model, _ = checkpoints["tiny-gelu"]
    folder = save_as_transformers(model, tmp_path / "clip", "gelu", whole=False)
    tokenizer, text_encoder = load_text_encoder(str(folder))
    values = encode_text(tokenizer, text_encoder, CAPTIONS)
    pooled = TextCondition(32, 77, use_pooled=True)(values, torch.zeros(4, dtype=torch.bool)).pooled_projections
    with torch.no_grad():
        truth = CLIPTextModel.from_pretrained(folder)(tokenize(tokenizer, CAPTIONS)[0]).pooler_output
    torch.testing.assert_close(pooled, truth)


def test_converted_model_saves_and_loads(checkpoints, tmp_path):
    """What open_clip's weights became is saved as a CLIPTextModel that transformers alone loads, with equal states, and
    whose pooler_output is open_clip's: the state of the end of text, the token with the largest id."""
    from transformers import CLIPTextModel

    from utils.diffusion.conditions import tokenize

    model, checkpoint = checkpoints["tiny-gelu"]
    tokenizer, text_encoder = load_text_encoder(f"tiny-gelu:{checkpoint}", library="open_clip")
    text_encoder.save_pretrained(tmp_path)
    values = encode_text(tokenizer, text_encoder, CAPTIONS)
    loaded = CLIPTextModel.from_pretrained(tmp_path).eval()
    again = encode_text(tokenizer, loaded, CAPTIONS)
    assert torch.equal(values["encoder_hidden_states"], again["encoder_hidden_states"])
    ends = open_clip.SimpleTokenizer(context_length=77)(CAPTIONS).argmax(dim=1)
    truth = states_of_open_clip(model, CAPTIONS)[torch.arange(len(CAPTIONS)), ends]
    with torch.no_grad():
        pooled = loaded(tokenize(tokenizer, CAPTIONS)[0]).pooler_output
    torch.testing.assert_close(pooled, truth, rtol=1e-5, atol=1e-5)


# Bad input: one line that names what is wrong


def refusal(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        load_text_encoder(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("--")
    return message


@pytest.mark.parametrize("name", OTHERS)
def test_towers_that_are_not_clips_are_refused(checkpoints, name):
    """A tower with another mask, a class token or layer scales would give other states than open_clip: refused."""
    _, checkpoint = checkpoints[name]
    assert "CLIP text" in refusal(f"{name}:{checkpoint}", library="open_clip")


def test_missing_checkpoint(checkpoints, tmp_path):
    """A checkpoint that does not exist is named."""
    assert "nowhere.pt" in refusal(f"tiny-gelu:{tmp_path / 'nowhere.pt'}", library="open_clip")


def test_unknown_architecture(checkpoints):
    """An architecture that open_clip does not know is named."""
    _, checkpoint = checkpoints["tiny-gelu"]
    assert "ViT-Q-99" in refusal(f"ViT-Q-99:{checkpoint}", library="open_clip")


def test_checkpoint_of_another_architecture(checkpoints):
    """Weights that do not fit the architecture are an error, not a model with random parts."""
    _, checkpoint = checkpoints["tiny-short"]
    refusal(f"tiny-classtoken:{checkpoint}", library="open_clip")


def test_file_that_is_no_checkpoint(checkpoints, tmp_path):
    """A file of something else is refused."""
    (tmp_path / "weights.pt").write_text("not a checkpoint")
    assert "weights.pt" in refusal(f"tiny-gelu:{tmp_path / 'weights.pt'}", library="open_clip")


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_empty_folder(tmp_path, library):
    """A folder that holds no model is named."""
    assert str(tmp_path) in refusal(str(tmp_path), library=library)


def test_missing_folder(tmp_path):
    """A folder that does not exist is named, without asking a network."""
    assert "does not exist" in refusal(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_tokenizer_larger_than_the_vocabulary(tmp_path, tiny_text_encoder, library):
    """CLIP's 49,408 tokens with an encoder that knows 1,000 are refused with both numbers."""
    if library == "transformers":
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(
            vocab_size=1000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        CLIPTextModel(config).save_pretrained(tmp_path / "small")
        message = refusal(str(tmp_path / "small"), tokenizer_name=str(tiny_text_encoder / "tokenizer"))
    else:
        (tmp_path / "configs").mkdir()
        config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT | {"vocab_size": 1000}}
        (tmp_path / "configs" / "tiny-vocabulary.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / "configs")
        model = open_clip.create_model("tiny-vocabulary", pretrained=None)
        torch.save(model.state_dict(), tmp_path / "small.pt")
        message = refusal(f"tiny-vocabulary:{tmp_path / 'small.pt'}", library="open_clip")
    assert "49408" in message
    assert "1000" in message


# The real shapes


@pytest.mark.slow
@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_text_tower_of_clip_l(tmp_path, library):
    """CLIP ViT-L/14's text tower (12 layers, 768 wide, 12 heads, 123M parameters) with random weights gives open_clip's states."""
    text = open_clip.get_model_config("ViT-L-14")["text_cfg"]
    assert (text["width"], text["layers"], text["heads"], text["vocab_size"]) == (768, 12, 12, 49408)
    (tmp_path / "configs").mkdir()
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": text}
    (tmp_path / "configs" / "clip-l-text.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    torch.manual_seed(0)
    model = open_clip.create_model("clip-l-text", pretrained=None).eval()
    if library == "open_clip":
        torch.save(model.state_dict(), tmp_path / "clip.pt")
        source = f"clip-l-text:{tmp_path / 'clip.pt'}"
    else:
        source = str(save_as_transformers(model, tmp_path / "clip", "gelu", whole=True))
    tokenizer, text_encoder = load_text_encoder(source, library=library)
    assert sum(p.numel() for p in text_encoder.parameters()) == 123_060_480  # as counted for OpenAI's
    values = encode_text(tokenizer, text_encoder, CAPTIONS)
    assert values["encoder_hidden_states"].shape == (4, 77, 768)
    assert_same_states(values["encoder_hidden_states"], values["num_tokens"], states_of_open_clip(model, CAPTIONS))


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
