"""Denoisers: sizes of the papers, initialisation, and the DiT against brute force."""

import inspect

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from tests.support.models import num_parameters, randomise, tiny_dit, tiny_inputs, tiny_unet
from utils.diffusion.conditions import ClassCondition, TextCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.image.networks import dit_arguments
from utils.models.dit import DIT_SIZES, POSITIONS, DiT, position_table, rotary_table, timestep_embedding

# Sizes


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_dit_sizes_are_the_papers(size, millions):
    """With patch 2 and 1,000 classes a DiT has the paper's number of parameters (table 1, arXiv 2212.09748) to 1 %."""
    num_layers, hidden_size, heads = DIT_SIZES[size]
    with torch.device("meta"):
        dit = DiT(32, 2, 4, num_layers, hidden_size, heads, projection_class_embeddings_input_dim=hidden_size)
        total = num_parameters(ConditionalDenoiser(dit, ClassCondition(1000, hidden_size)))
    assert total / 1e6 == pytest.approx(millions, rel=0.01)


# Initialisation


def dit_denoiser():
    return ConditionalDenoiser(tiny_dit(), TextCondition(10, 5)).model, tiny_inputs()


def unet_denoiser():
    inputs = tiny_inputs()
    return tiny_unet(10, True), inputs | {"class_labels": torch.randn(3, 128)}


@pytest.mark.parametrize("make", [dit_denoiser, unet_denoiser])
def test_new_models_output_zero(make):
    """A new model predicts exactly 0: its last layer starts there."""
    model, inputs = make()
    output = model(**inputs).sample
    assert output.shape == inputs["sample"].shape
    assert (output == 0).all()


def test_new_blocks_are_the_identity():
    """A new DiT block, cross-attention included, returns what it is given."""
    dit = tiny_dit()
    values, emb, context = torch.randn(2, 16, 48), torch.randn(2, 48), torch.randn(2, 5, 10)
    rotary = rotary_table(4, 4, 12, torch.device("cpu"))
    for block in dit.blocks:
        assert torch.equal(block(values, emb, rotary, context, None), values)


@pytest.mark.parametrize("make", [dit_denoiser, unet_denoiser])
def test_every_parameter_learns(make):
    """Zeros at the start do not stay: after a few steps each parameter has a gradient that is not zero, and has moved."""
    model, inputs = make()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    target = torch.randn_like(inputs["sample"])
    for _ in range(4):
        optimizer.zero_grad()
        (model(**inputs).sample - target).square().mean().backward()
        optimizer.step()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert idle == []
    assert [name for name, p in model.named_parameters() if torch.equal(p, start[name])] == []


@pytest.mark.parametrize("make", [dit_denoiser, unet_denoiser])
def test_inputs_matter(make):
    """Once weights are random, timestep, latents and each condition change the output, and each sample only its own."""
    model, inputs = make()
    randomise(model).eval()
    output = model(**inputs).sample
    for name in inputs:
        changed = inputs[name].clone()
        changed[0] = changed[0] + 1 if name != "timestep" else 700
        other = model(**(inputs | {name: changed})).sample
        assert (other[0] - output[0]).abs().max() > 1e-3, name
        torch.testing.assert_close(other[1:], output[1:], rtol=1e-4, atol=1e-4)


# Shapes


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_unpatchify_inverts_patchify(patch):
    """Patches are p x p squares in row-major order with their channels, and go back where they came from."""
    dit = tiny_dit(patch_size=patch)
    sample = torch.randn(2, 4, 16, 8)
    patches = dit.patchify(sample)
    assert patches.shape == (2, (16 // patch) * (8 // patch), 4 * patch * patch)
    second = sample[:, :, :patch, patch : 2 * patch] if patch < 8 else sample[:, :, patch : 2 * patch, :patch]
    assert torch.equal(patches[:, 1], second.flatten(1))
    assert torch.equal(dit.unpatchify(patches, 16, 8), sample)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_dit_runs_with_every_patch_size(patch):
    """Output and input have one shape, and a patch's output lands at the patch."""
    dit = randomise(tiny_dit(patch_size=patch))
    inputs = tiny_inputs()
    assert dit(**inputs).sample.shape == (3, 4, 8, 8)
    with torch.no_grad():  # no attention, no conditions: each patch sees itself only
        for name, parameter in dit.named_parameters():
            if "attention" in name:
                parameter.zero_()
    output = dit(**inputs).sample
    changed = inputs["sample"].clone()
    changed[:, :, -1, -1] += 1
    difference = (dit(**(inputs | {"sample": changed})).sample - output).abs().amax(dim=(0, 1)) > 1e-6
    assert difference[8 - patch :, 8 - patch :].all()
    assert difference.sum() == patch * patch


def test_dit_refuses_impossible_shapes():
    """Latents that do not divide into patches, and heads too many to rotate, are refused with the numbers."""
    with pytest.raises(ValueError, match="patches of 3"):
        tiny_dit(patch_size=3)
    with pytest.raises(ValueError, match="hidden_size 48"):
        tiny_dit(num_attention_heads=5)


def test_dit_takes_the_arguments_of_the_unet():
    """Every argument of DiT.forward but the last, its own, is one of UNet2DConditionModel.forward, by the same name and in the
    same order."""
    unet = list(inspect.signature(UNet2DConditionModel.forward).parameters)
    *dit, own = inspect.signature(DiT.forward).parameters
    assert own == "kept_tokens"
    assert [name for name in unet if name in dit] == dit
    assert {"sample", "timestep", "encoder_hidden_states", "class_labels", "encoder_attention_mask"} <= set(dit)
    dit = randomise(tiny_dit())
    inputs = tiny_inputs()
    output = dit(**inputs)
    assert torch.equal(dit(**inputs, return_dict=False)[0], output.sample)
    for timestep in (torch.tensor(7), torch.tensor([7.0])):  # as schedulers give it
        expected = dit(**(inputs | {"timestep": torch.full((3,), 7)})).sample
        torch.testing.assert_close(dit(**(inputs | {"timestep": timestep})).sample, expected)


def test_timestep_embedding_is_diffusers():
    """The sinusoids are those of diffusers' get_timestep_embedding with cosine first, as in DiT and Stable Diffusion."""
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = torch.tensor([0.0, 0.5, 17.0, 999.0, 1000.0])
    truth = get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps, 256), truth, rtol=1e-4, atol=1e-4)


def test_masked_tokens_have_no_influence():
    """What stands in a masked token changes nothing, and masking equals leaving the token out."""
    dit = randomise(tiny_dit()).eval()
    inputs = tiny_inputs()
    mask = torch.tensor([[True, True, True, False, False]]).expand(3, -1)
    output = dit(**inputs, encoder_attention_mask=mask).sample
    garbage = inputs["encoder_hidden_states"].clone()
    garbage[:, 3:] = 100.0
    again = dit(**(inputs | {"encoder_hidden_states": garbage}), encoder_attention_mask=mask).sample
    assert torch.equal(again, output)
    shorter = dit(**(inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :3]})).sample
    torch.testing.assert_close(output, shorter, rtol=1e-4, atol=1e-5)
    unmasked = dit(**inputs).sample
    assert (unmasked - output).abs().max() > 1e-4
    everything = dit(**inputs, encoder_attention_mask=torch.ones_like(mask)).sample
    torch.testing.assert_close(everything, unmasked, rtol=1e-4, atol=1e-5)


# Memory, files, precision


@pytest.mark.parametrize("make", [dit_denoiser, unet_denoiser])
def test_gradient_checkpointing_changes_nothing(make):
    """Output and every gradient are the same with and without, and blocks are recomputed."""
    model, inputs = make()
    randomise(model).train()
    results = []
    calls = []
    attention = next(m for m in model.modules() if type(m).__name__ in ("Attention", "BasicTransformerBlock"))
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        if enable:
            model.enable_gradient_checkpointing()
        calls.clear()
        model.zero_grad()
        output = model(**inputs).sample
        output.square().mean().backward()
        results.append((output.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}, len(calls)))
    (output, gradients, once), (again, recomputed, twice) = results
    torch.testing.assert_close(again, output)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)
    assert twice == 2 * once


def test_dit_saves_and_loads(tmp_path):
    """A saved DiT comes back with its config, its weights and its output bit for bit."""
    dit = randomise(tiny_dit()).eval()
    dit.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = DiT.from_pretrained(tmp_path)
    for name in ("patch_size", "hidden_size", "cross_attention_dim", "projection_class_embeddings_input_dim"):
        assert loaded.config[name] == dit.config[name]
    assert torch.equal(loaded(**tiny_inputs()).sample, dit(**tiny_inputs()).sample)


@pytest.mark.parametrize("make", [dit_denoiser, unet_denoiser])
def test_bf16_autocast(make):
    """Under bf16 autocast forward and backward run, close to fp32, and gradients stay fp32."""
    model, inputs = make()
    randomise(model, std=0.02)
    exact = model(**inputs).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs).sample
    assert (output.float() - exact).norm() < 0.05 * exact.norm()
    assert not torch.equal(output.float(), exact)
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dit_runs_in_half_precision(dtype):
    """A DiT cast to half precision, as for sampling, stays there and is close to fp32."""
    dit = randomise(tiny_dit(), std=0.02).eval()
    inputs = tiny_inputs()
    exact = dit(**inputs).sample
    halved = {name: value if name == "timestep" else value.to(dtype) for name, value in inputs.items()}
    output = dit.to(dtype)(**halved, encoder_attention_mask=torch.ones(3, 5, dtype=torch.bool)).sample
    assert output.dtype == dtype
    assert (output.float() - exact).norm() < 0.05 * exact.norm()


def test_dit_takes_a_lora_adapter():
    """An adapter of peft changes nothing when new, trains alone, and changes the output once trained."""
    peft = pytest.importorskip("peft")
    dit = randomise(tiny_dit())
    before = dit(**tiny_inputs()).sample.detach()
    dit.requires_grad_(False)
    dit.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_kv", "to_out"]))
    trained = [name for name, p in dit.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 2 * 2  # 2 blocks, self and cross, 3 layers, A and B
    assert all("lora" in name for name in trained)
    output = dit(**tiny_inputs()).sample
    torch.testing.assert_close(output, before)
    optimizer = torch.optim.SGD([p for p in dit.parameters() if p.requires_grad], lr=1.0)
    output.square().mean().backward()
    optimizer.step()
    assert not torch.allclose(dit(**tiny_inputs()).sample, before)
    dit.disable_adapters()
    torch.testing.assert_close(dit(**tiny_inputs()).sample, before)


def test_zero_layers_are_the_papers():
    """adaLN gates, final modulation and projection of the DiT, and of the U-Net the ends of each block, start at zero."""
    dit = tiny_dit()
    assert all((block.adaln.weight == 0).all() and (block.adaln.bias == 0).all() for block in dit.blocks)
    unet = tiny_unet(10, True)
    ends = [m for name, m in unet.named_modules() if name.endswith((".conv2", ".proj_out")) or name == "conv_out"]
    assert len(ends) > 5
    assert all((p == 0).all() for module in ends for p in module.parameters())
    others = [m for m in unet.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in ends]
    assert all((module.weight != 0).any() for module in others)


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_are_turned_added_or_both(positions):
    dit = tiny_dit(positions=positions)
    sample = torch.randn(2, 4, 8, 8)
    values, rotary = dit.embed(sample)
    added = values - dit.patch_embed(dit.patchify(sample))
    fixed = position_table(4, 4, 48, sample.device).expand(2, -1, -1)
    torch.testing.assert_close(added, torch.zeros_like(fixed) if positions == "rotary" else fixed, rtol=0, atol=1e-6)
    assert (rotary is None) == (positions == "fixed")
    if rotary is not None:
        for table, expected in zip(rotary, rotary_table(4, 4, 12, sample.device), strict=True):
            assert torch.equal(table, expected)


@pytest.mark.parametrize("positions", POSITIONS)
def test_rotary_positions_alone_do_not_say_where_a_token_is(positions):
    """Of a picture that is the same everywhere every token says the same, unless it knows its place."""
    dit = randomise(tiny_dit(positions=positions))
    inputs = tiny_inputs() | {"sample": torch.ones(3, 4, 8, 8)}
    patches = dit.patchify(dit(**inputs).sample)  # (3, 16, 16)
    spread = (patches - patches[:, :1]).abs().max()
    assert spread < 1e-4 if positions == "rotary" else spread > 1e-2


def test_positions_of_a_run_made_before_there_was_a_choice():
    """Its config.json has none, and its style says what it was trained with; the sizes have both."""
    assert tiny_dit().positions == "rotary"
    assert tiny_dit(style="plain").positions == "fixed"
    assert dit_arguments("S/2", 8, 4, None, "class")["positions"] == "both"
    assert DiT(**dit_arguments("plain-S/2", 8, 4, None, "class")).positions == "fixed"
    with pytest.raises(ValueError, match="positions none is none of rotary, fixed, both"):
        tiny_dit(positions="none")
