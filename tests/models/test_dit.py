"""Denoisers: sizes of the papers, initialisation, and the parts of the DiT against brute force."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention as UNetAttention
from torch import nn

from utils.diffusion.conditions import ClassCondition, TextCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.image.networks import dit_arguments
from utils.models.attention import Attention, RMSNorm, rotate
from utils.models.dit import DIT_SIZES, POSITIONS, DiT, position_table, rotary_table, timestep_embedding
from utils.models.unet import UNET_PRESETS, build_unet, unet_config


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def randomise(model, std=0.1):
    """Gives every parameter, the zero-initialised ones too, seeded random values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def tiny_dit(**settings):
    """A random DiT with both kinds of condition."""
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "cross_attention_dim": 10,
        "projection_class_embeddings_input_dim": 6,
    }
    torch.manual_seed(0)
    return DiT(**(config | settings))


def tiny_unet(cross_attention_dim, class_conditional):
    config = unet_config("tiny", 8, 4, cross_attention_dim, class_conditional)
    torch.manual_seed(0)
    return build_unet(config)


def tiny_inputs(batch=3, size=8, tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.tensor([3.0, 500.0, 999.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, tokens, 10, generator=generator),
        "class_labels": torch.randn(batch, 6, generator=generator),
    }


# Sizes


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_dit_sizes_are_the_papers(size, millions):
    """With patch 2 and 1,000 classes a DiT has the paper's number of parameters (table 1, arXiv 2212.09748) to 1 %."""
    num_layers, hidden_size, heads = DIT_SIZES[size]
    with torch.device("meta"):
        dit = DiT(32, 2, 4, num_layers, hidden_size, heads, projection_class_embeddings_input_dim=hidden_size)
        total = num_parameters(ConditionalDenoiser(dit, ClassCondition(1000, hidden_size)))
    assert total / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "text_width", "parameters"),
    [
        ("base", 768, 314_000_000),  # "a 314M (192, 384, 768, 768)"
        ("sd-v1", 768, 859_520_964),  # diffusers' UNet of Stable Diffusion 1.5
        ("sd-v2", 1024, 865_910_724),  # and of 2.1
        ("ldm-kl-8", 1280, 872_300_000),  # "DiffusionWrapper has 872.30 M params": CompVis' txt2img-1p4B
    ],
)
def test_unet_sizes_are_the_published_ones(preset, text_width, parameters):
    """U-Net presets have as many parameters as the models they are named after; Stable Diffusion's exactly."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config(preset, 64, 4, text_width, class_conditional=False))
    exact = preset.startswith("sd")
    assert num_parameters(unet) == (parameters if exact else pytest.approx(parameters, rel=1e-3))


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("sd-v1", {"cross_attention_dim": 768}),
        ("sd-v2", {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}),
    ],
)
def test_sd_presets_are_stable_diffusions_configs(preset, settings):
    """The presets and the hub's configs, over diffusers' defaults, give the same names, shapes and numbers of heads."""
    with torch.device("meta"):
        config = unet_config(preset, 64, 4, settings["cross_attention_dim"], class_conditional=False)
        ours = UNet2DConditionModel.from_config(config)
        stock = UNet2DConditionModel(sample_size=64, **settings)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in stock.state_dict().items()}
    heads = {name: module.heads for name, module in ours.named_modules() if hasattr(module, "heads")}
    assert heads == {name: module.heads for name, module in stock.named_modules() if hasattr(module, "heads")}
    assert set(heads.values()) == ({8} if preset == "sd-v1" else {5, 10, 20})


@pytest.mark.parametrize("preset", UNET_PRESETS)
def test_heads_without_text_have_64_channels(preset):
    """On the way down and on the way up. (Of a list of sizes, one a level, diffusers reverses none for the way up.)"""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config(preset, 32, 4, None, class_conditional=True))
    attentions = [module for module in unet.modules() if isinstance(module, UNetAttention)]
    assert len(attentions) >= 3
    assert {module.query_dim // module.heads for module in attentions} == {64}


def test_a_level_without_a_head_is_refused():
    config = unet_config("tiny", 32, 4, None, class_conditional=True) | {"block_out_channels": (16, 32)}
    with pytest.raises(ValueError, match="attention_head_dim 64 is more than the 32 channels"):
        build_unet(config)
    build_unet(config | {"attention_head_dim": 16})


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


# Attention


def rms(values, weight):
    return values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("dim", "heads"), [(24, 2), (36, 3), (32, 8)])
def test_attention_is_a_softmax(cross, dim, heads):
    """Attention with normalised queries and keys, rotation and mask equals loops over heads and queries in float64."""
    torch.manual_seed(0)
    attention = randomise(Attention(dim, heads, 7 if cross else None)).double()
    values = torch.randn(2, 6, dim, dtype=torch.float64)
    context = torch.randn(2, 5, 7, dtype=torch.float64) if cross else values
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]).bool() if cross else None
    head_dim = dim // heads
    rotary = None if cross else tuple(t.double() for t in rotary_table(2, 3, head_dim, torch.device("cpu")))
    output = attention(values, context if cross else None, rotary, mask)

    wk, wv = attention.to_kv.weight.chunk(2)
    bk, bv = attention.to_kv.bias.chunk(2)
    expected = torch.zeros_like(values)
    for b in range(2):
        for h in range(heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            q = rms((values[b] @ attention.to_q.weight.T + attention.to_q.bias)[:, part], attention.norm_q.weight)
            k = rms((context[b] @ wk.T + bk)[:, part], attention.norm_k.weight)
            v = (context[b] @ wv.T + bv)[:, part]
            if rotary is not None:
                q, k = turn(q, head_dim), turn(k, head_dim)
            for i in range(6):
                weights = torch.stack([(q[i] @ k[j] / head_dim**0.5).exp() for j in range(len(k))])
                if mask is not None:
                    weights = weights * mask[b]
                expected[b, i, part] = (weights / weights.sum()) @ v
    expected = expected @ attention.to_out.weight.T + attention.to_out.bias
    tolerance = 1e-10 if cross else 1e-5  # angles are computed in float32
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


def turn(values, head_dim):
    """Rotates (6, head_dim) at the places of a 2 x 3 grid pair by pair: complex numbers, one angle for each."""
    turned = values.clone()
    half, quarter = head_dim // 2, head_dim // 4
    for place in range(6):
        y, x = divmod(place, 3)
        for i in range(half):
            angle = (y if i < quarter else x) * 100.0 ** (-(i % quarter) / quarter)
            pair = torch.complex(values[place, i], values[place, i + half])
            pair = pair * torch.polar(torch.tensor(1.0, dtype=torch.float64), torch.tensor(angle, dtype=torch.float64))
            turned[place, i], turned[place, i + half] = pair.real, pair.imag
    return turned


@pytest.mark.parametrize("head_dim", [8, 12, 72])
def test_rotary_positions_are_relative(head_dim):
    """A query and a key that are moved together keep their product; moved apart, along y or x, they change it."""
    height, width = 7, 5
    rotary = rotary_table(height, width, head_dim, torch.device("cpu"))
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, head_dim), torch.randn(1, 1, 1, head_dim)
    everywhere = height * width
    queries = rotate(q.expand(1, 1, everywhere, -1), *rotary)[0, 0]
    keys = rotate(k.expand(1, 1, everywhere, -1), *rotary)[0, 0]
    logits = (queries @ keys.T).view(height, width, height, width)
    by_offset = {}
    for y1 in range(height):
        for x1 in range(width):
            for y2 in range(height):
                for x2 in range(width):
                    by_offset.setdefault((y2 - y1, x2 - x1), []).append(logits[y1, x1, y2, x2].item())
    assert max(max(group) - min(group) for group in by_offset.values()) < 1e-4
    means = torch.tensor([sum(group) / len(group) for group in by_offset.values()])
    distances = (means[:, None] - means).abs() + torch.eye(len(means))
    assert distances.min() < distances.max()
    assert len(torch.unique((means * 1e4).round())) > 0.9 * len(means)  # (dy, dx) is told from every other offset
    torch.testing.assert_close(queries.norm(dim=-1), q.norm().expand(everywhere))  # a rotation


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


@pytest.mark.parametrize("elementwise_affine", [True, False])
def test_a_norm_of_half_precision_is_in_half_precision(monkeypatch, elementwise_affine):
    """Weight and values reach the kernel in one dtype, which autocast does not change; its sums are float32."""
    norm = randomise(RMSNorm(64, eps=1e-6, elementwise_affine=elementwise_affine))
    values = (300 * torch.randn(5, 64)).bfloat16()
    expected = nn.RMSNorm.forward(norm, values.float())
    kernel, seen = F.rms_norm, []

    def seen_kernel(values, shape, weight, eps):
        seen.append((values.dtype, weight if weight is None else weight.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(values, shape, weight, eps)

    monkeypatch.setattr(F, "rms_norm", seen_kernel)
    with torch.autocast("cpu", torch.bfloat16):
        normalised = norm(values)
    assert seen == [(torch.bfloat16, torch.bfloat16 if elementwise_affine else None, False)]
    assert normalised.dtype == torch.bfloat16
    torch.testing.assert_close(normalised.float(), expected, rtol=0.012, atol=1e-3)
    if elementwise_affine:
        normalised.float().sum().backward()
        assert norm.weight.grad.dtype == torch.float32
