"""The plain DiT: the paper's sizes to the last parameter, and diffusers' port of it on copied weights."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from utils.diffusion.conditions import ClassCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.errors import UserError
from utils.image.conditions import IMAGE_CONDITIONS
from utils.image.networks import build_denoiser, dit_arguments
from utils.models.dit import DIT_SIZES, DiT, position_table


def randomised(module, std=0.1):
    """The module with seeded random values added, so that nothing is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module.eval()


# ---- sizes


@pytest.mark.parametrize(("name", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_are_the_papers(name, millions):
    """Table 1 of the paper, to the million, counted as its code does: at patch 2 on latents of 32 x 32 x 4, with 1,000 classes
    and the null class, with positions (fixed, but a parameter there) and with a learnt sigma (8 output channels; ours has 4,
    some thousand parameters less). DiT-XL/2 prints 675,129,632."""
    with torch.device("meta"):
        config = dit_arguments(f"plain-{name}/2", 32, 4, None, "class")
        denoiser = ConditionalDenoiser(DiT.from_config(config), ClassCondition(1000, config["hidden_size"]))
        ours = sum(parameter.numel() for parameter in denoiser.parameters())
    num_layers, width, _ = DIT_SIZES[name]
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 6 * width**2 + 6 * width  # attention, MLP, adaLN
    embedders = 257 * width + width**2 + width + 1001 * width + 17 * width  # timestep, labels, patches
    final = 2 * width**2 + 2 * width + 16 * width + 16
    assert ours == num_layers * block + embedders + final
    positions, sigma = 256 * width, 16 * width + 16
    assert (ours + positions + sigma) / 1e6 == pytest.approx(millions, abs=0.6)
    if name == "XL":
        assert ours + positions + sigma == 675_129_632
    assert sigma < 0.0002 * ours


# ---- diffusers


def diffusers_copy(denoiser, heads, num_classes):
    """A DiTTransformer2DModel with the weights of our DiT and of its class embedding. Of its defaults two differ from the
    paper's code: an epsilon of 1e-5 in one norm, and timestep frequencies that are spread over 127 steps instead of 128."""
    dit, labels = denoiser.model, denoiser.conditions.embedding
    config = dit.config
    theirs = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=config.hidden_size // heads, in_channels=config.in_channels,
        out_channels=config.in_channels, num_layers=config.num_layers, sample_size=config.sample_size,
        patch_size=config.patch_size, num_embeds_ada_norm=num_classes, norm_eps=1e-6,
    ).eval()  # fmt: skip

    def copy(source, target):
        target.load_state_dict(
            {name: value.reshape(target.state_dict()[name].shape) for name, value in source.items()}
        )

    copy(dit.patch_embed.state_dict(), theirs.pos_embed.proj)  # (D, C p p) -> (D, C, p, p)
    for ours, block in zip(dit.blocks, theirs.transformer_blocks, strict=True):
        embedders = block.norm1.emb
        embedders.time_proj.downscale_freq_shift = 0
        copy(dit.time_embed[0].state_dict(), embedders.timestep_embedder.linear_1)
        copy(dit.time_embed[2].state_dict(), embedders.timestep_embedder.linear_2)
        copy(labels.state_dict(), embedders.class_embedder.embedding_table)
        copy(ours.adaln.state_dict(), block.norm1.linear)
        copy(ours.attention.to_q.state_dict(), block.attn1.to_q)
        for i, layer in enumerate((block.attn1.to_k, block.attn1.to_v)):
            copy({name: value.chunk(2)[i] for name, value in ours.attention.to_kv.state_dict().items()}, layer)
        copy(ours.attention.to_out.state_dict(), block.attn1.to_out[0])
        copy(ours.mlp[0].state_dict(), block.ff.net[0].proj)
        copy(ours.mlp[2].state_dict(), block.ff.net[2])
    copy(dit.adaln_out.state_dict(), theirs.proj_out_1)
    p, c = config.patch_size, config.in_channels  # ours puts out (C, p, p), theirs (p, p, C)
    turned = {k: v.unflatten(0, (c, p, p)).moveaxis(0, 2).flatten(0, 2) for k, v in dit.proj_out.state_dict().items()}
    copy(turned, theirs.proj_out_2)
    return theirs


@pytest.mark.parametrize(("patch", "size", "channels"), [(2, 8, 4), (1, 4, 4), (4, 16, 3)])
def test_equals_diffusers(patch, size, channels):
    """Forward and gradient are those of diffusers' DiT with the same weights, labels and null labels included."""
    torch.manual_seed(0)
    config = dit_arguments(f"plain-S/{patch}", size, channels, None, "class")
    config |= {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 4}
    denoiser = randomised(ConditionalDenoiser(DiT.from_config(config), ClassCondition(7, 48)))
    theirs = diffusers_copy(denoiser, heads=4, num_classes=7)
    latents = torch.randn(4, channels, size, size, requires_grad=True)
    timesteps, labels = torch.tensor([0, 17, 500, 999]), torch.tensor([3, 0, 6, 2])
    drop = torch.tensor([False, True, False, True])
    ours = denoiser(latents, timesteps, {"class_labels": labels}, drop)
    truth = theirs(latents, timesteps, torch.where(drop, 7, labels)).sample
    assert truth.abs().mean() > 0.1
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.square().mean(), latents)
    (true_gradient,) = torch.autograd.grad(truth.square().mean(), latents)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-3, atol=1e-6)


def test_frequencies_are_the_papers_not_diffusers():
    """Left at diffusers' own frequencies the outputs differ: the comparison above sees them."""
    config = dit_arguments("plain-S/2", 8, 4, None, "class") | {
        "num_layers": 1,
        "hidden_size": 48,
        "num_attention_heads": 4,
    }
    denoiser = randomised(ConditionalDenoiser(DiT.from_config(config), ClassCondition(7, 48)))
    theirs = diffusers_copy(denoiser, heads=4, num_classes=7)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([500, 999])
    labels = torch.tensor([3, 0])
    ours = denoiser(*inputs, {"class_labels": labels}, torch.zeros(2, dtype=torch.bool))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    assert (theirs(*inputs, labels).sample - ours).abs().max() > 1e-3


# ---- the parts


def test_positions_are_a_float64_sum():
    """Every number by the formula of "Attention is all you need": half the width for x, half for y, sines before cosines."""
    table = position_table(3, 5, 16, torch.device("cpu")).double()
    assert table.shape == (15, 16)
    for place in range(15):
        y, x = divmod(place, 5)
        for offset, at in ((0, x), (8, y)):
            for i in range(4):
                angle = torch.tensor(at / 10_000 ** (i / 4), dtype=torch.float64)
                torch.testing.assert_close(table[place, offset + i], angle.sin(), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(table[place, offset + 4 + i], angle.cos(), rtol=1e-5, atol=1e-6)


def test_what_a_plain_dit_is_made_of():
    """LayerNorm without weights, no norm of queries and keys, one GELU, no projection of labels; the timestep's layers start
    as narrow as in the paper's code, and the output at zero."""
    torch.manual_seed(0)
    dit = DiT.from_config(dit_arguments("plain-S/2", 32, 4, None, "class"))
    kinds = {type(module) for module in dit.modules()}
    assert nn.RMSNorm not in kinds
    assert all(
        module.weight is None and module.eps == 1e-6 for module in dit.modules() if isinstance(module, nn.LayerNorm)
    )
    assert not [name for name, _ in dit.named_parameters() if "norm" in name or "pooled" in name]
    assert [module.approximate for module in dit.modules() if isinstance(module, nn.GELU)] == ["tanh"] * 12
    assert dit.time_embed[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (dit(torch.randn(1, 4, 32, 32), torch.tensor([5]), class_labels=torch.randn(1, 384)).sample == 0).all()


def test_text_conditions_are_projected():
    """Also where the text is as wide as the model: its states are no embedding that was learnt beside the timestep's."""
    config = dit_arguments("plain-S/2", 8, 4, 384, "text")
    assert config["class_embed_type"] is None
    dit = randomised(DiT.from_config(config | {"num_layers": 1}))
    assert isinstance(dit.pooled_embed, nn.Linear)
    inputs = {"encoder_hidden_states": torch.randn(2, 5, 384), "class_labels": torch.randn(2, 384)}
    assert dit(torch.randn(2, 4, 8, 8), torch.tensor([5, 6]), **inputs).sample.shape == (2, 4, 8, 8)


def test_the_modern_dit_is_as_it_was():
    """A config.json from before there were styles gives the same modules, by the same names."""
    old = {"sample_size": 8, "num_layers": 1, "hidden_size": 48, "num_attention_heads": 4}
    old |= {"cross_attention_dim": 10, "projection_class_embeddings_input_dim": 6}
    dit = DiT.from_config(old)
    attention = ["to_q.weight", "to_q.bias", "to_kv.weight", "to_kv.bias", "norm_q.weight", "norm_k.weight"]
    attention += ["to_out.weight", "to_out.bias"]
    block = [f"{name}.{each}" for name in ("attention", "cross_attention") for each in attention]
    block += ["cross_norm.weight"]
    block += [f"{name}.{each}" for name in ("mlp.proj_in", "mlp.proj_out", "adaln") for each in ("weight", "bias")]
    outer = ["patch_embed", "time_embed.0", "time_embed.2", "pooled_embed", "adaln_out", "proj_out"]
    names = {f"{name}.{each}" for name in outer for each in ("weight", "bias")} | {
        f"blocks.0.{name}" for name in block
    }
    assert set(dit.state_dict()) == names
    assert dit.config.style == "modern"


def test_saves_and_loads(tmp_path):
    config = dit_arguments("plain-S/4", 8, 4, None, "class") | {
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
    }
    dit = randomised(DiT.from_config(config))
    dit.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([5, 6]))
    labels = torch.randn(2, 48)
    assert torch.equal(loaded(*inputs, class_labels=labels).sample, dit(*inputs, class_labels=labels).sample)


# ---- flags


def test_presets_by_name():
    for name in ("plain-S/2", "plain-XL/8", "B/4"):
        config = dit_arguments(name, 32, 4, None, "none")
        assert config["style"] == ("plain" if name.startswith("plain") else "modern")
        assert config["class_embed_type"] is None
    for name in ("plain-M/2", "plain/2", "plainS/2", "modern-S/2", "plain-S/3"):
        with pytest.raises(UserError, match="plain-B/2"):
            dit_arguments(name, 32, 4, None, "none")


def test_labels_are_as_wide_as_a_model_of_another_width(tmp_path):
    """`--model_config` may change the width of a preset; labels, which are added as they are, follow it."""
    (tmp_path / "dit.yaml").write_text("hidden_size: 48\nnum_attention_heads: 4\nnum_layers: 1\n")
    spec = SimpleNamespace(shape=(4, 8, 8), captions=None, labels={"num_classes": 3, "names": None})
    args = Namespace(
        model="dit", model_size="plain-S/2", model_config=str(tmp_path / "dit.yaml"), gradient_checkpointing=False, tread_ratio=0.0,
        pretrained_model_name_or_path=None,
    )  # fmt: skip
    denoiser = build_denoiser(args, SimpleNamespace(spec=spec), "class")
    assert denoiser.conditions.embedding.weight.shape == (4, 48)
    modern = {"projection_class_embeddings_input_dim": 384, "hidden_size": 48}
    assert IMAGE_CONDITIONS["class"].make_encoder(SimpleNamespace(spec=spec), modern, True).embedding.weight.shape == (
        4,
        384,
    )
