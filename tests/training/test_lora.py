"""Fine-tuning: every adapter works, merging changes nothing, and what is new starts at nothing."""

import copy
import json
from argparse import Namespace
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.args.checks import check_lora_args
from utils.diffusion.conditions import ClassCondition, NoCondition, TextCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.objectives import OBJECTIVES, training_scheduler
from utils.errors import UserError
from utils.models.dit import DiT
from utils.models.unet import build_unet, unet_config
from utils.training import lora
from utils.training.ema import EMA
from utils.training.flops import forward_flops, training_flops
from utils.training.optimizers import make_optimizer

FLAG = "--pretrained_model_name_or_path"

NUM_CLASSES, TEXT_DIM, NUM_TOKENS = 3, 12, 5

SMALL = {"sample_size": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}


def dit(style: str, condition: str) -> DiT:
    is_plain_class = style == "plain" and condition == "class"
    return DiT(
        **SMALL,
        style=style,
        cross_attention_dim=TEXT_DIM if condition == "text" else None,
        projection_class_embeddings_input_dim={
            "class": None if is_plain_class else 32, "text": TEXT_DIM, "none": None
        }[condition],
        class_embed_type="identity" if is_plain_class else None,
    )  # fmt: skip


def unet(condition: str):
    config = unet_config("tiny", 8, 4, TEXT_DIM if condition == "text" else None, condition == "class")
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 2}
    return build_unet(config | sizes)


def encoder(condition: str, num_classes: int = NUM_CLASSES, is_unet: bool = False):
    if condition == "class":
        return ClassCondition(num_classes, 32)
    if condition == "text":
        text = TextCondition(TEXT_DIM, NUM_TOKENS, use_pooled=not is_unet)
        text.set_null(torch.randn(NUM_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(7)), 2)
        return text
    return NoCondition()


KINDS: dict[str, Callable[[str], nn.Module]] = {
    "modern": lambda condition: dit("modern", condition),
    "plain": lambda condition: dit("plain", condition),
    "unet": unet,
}


# fmt: off
EVERY = [("modern", "class"), ("modern", "text"), ("modern", "none"), ("plain", "class"), ("plain", "text"),
         ("unet", "class"), ("unet", "text"), ("unet", "none")]


# fmt: on


def trained(kind: str, condition: str, num_classes: int = NUM_CLASSES) -> ConditionalDenoiser:
    """A denoiser none of whose weights is zero, as after training."""
    torch.manual_seed(0)
    denoiser = ConditionalDenoiser(KINDS[kind](condition), encoder(condition, num_classes, kind == "unet"))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return denoiser.eval()


def untrained(kind: str, condition: str, num_classes: int = NUM_CLASSES) -> ConditionalDenoiser:
    torch.manual_seed(1)
    return ConditionalDenoiser(KINDS[kind](condition), encoder(condition, num_classes, kind == "unet")).eval()


def predict(denoiser: ConditionalDenoiser, dropped: bool = False) -> Tensor:
    """The prediction of three fixed samples, of classes 0, 1, 2 and as many texts."""
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(3, 4, 8, 8, generator=generator)
    states = torch.randn(3, NUM_TOKENS, TEXT_DIM, generator=generator)
    values = {"class_labels": torch.arange(3), "encoder_hidden_states": states, "num_tokens": torch.tensor([3, 4, 5])}
    return denoiser(noisy, torch.tensor([100.0, 400.0, 900.0]), values, torch.full((3,), dropped))


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Takes adapters away from their start, where B is zero and they do nothing."""
    for number, layer in enumerate(adapters(model).values()):
        up = layer.lora_B["default"].weight
        up.copy_(0.1 * torch.randn(up.shape, generator=torch.Generator().manual_seed(number)))


def dead_adapters(denoiser: ConditionalDenoiser) -> list[str]:
    """Adapters that get no gradient, or without which the prediction is the same to the last bit."""
    randomise(denoiser.model)
    denoiser.zero_grad()
    output = predict(denoiser)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    dead = []
    for name, layer in adapters(denoiser.model).items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        has_gradients = all(each.grad is not None and each.grad.abs().max() > 0 for each in (down, up))
        kept = up.detach().clone()
        with torch.no_grad():
            up.zero_()
            changes = not torch.equal(predict(denoiser), output)
            up.copy_(kept)
        if not (has_gradients and changes):
            dead.append(name)
    return dead


# ---- every adapter works ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "condition"), EVERY)
def test_no_adapter_is_dead(kind, condition):
    denoiser = trained(kind, condition)
    layers = {name for name, part in denoiser.model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    lora.add_lora(denoiser, rank=2)
    found = set(adapters(denoiser.model))
    assert found <= layers
    if kind == "unet":
        attention = {name for name in layers if ".attentions." in name and "conv" not in name}
        assert found == attention
    else:
        assert found == {name for name in layers if name.startswith("blocks.")}  # attention, feed-forward, adaLN
    assert len(found) >= 4
    assert dead_adapters(denoiser) == []


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["modern", "unet"])
def test_adapters_of_every_layer_work_under_gradient_checkpointing(kind, gradient_checkpointing):
    denoiser = trained(kind, "text")
    if gradient_checkpointing:
        denoiser.model.enable_gradient_checkpointing()
    lora.add_lora(denoiser, rank=2)
    assert dead_adapters(denoiser.train()) == []


def test_dead_adapters_are_found():
    """Attention that multiplies by the weights itself, as fused kernels do, passes its adapters by."""
    denoiser = trained("modern", "class")
    lora.add_lora(denoiser, rank=2)
    attention = denoiser.model.blocks[1].attention
    bypassed = type(
        "Fused", (nn.Module,), {"forward": lambda self, x: F.linear(x, self.inner.weight, self.inner.bias)}
    )
    attention.to_q, inner = bypassed(), attention.to_q
    attention.to_q.inner = inner
    assert dead_adapters(denoiser) == ["blocks.1.attention.to_q.inner"]


def test_targets_are_chosen_by_the_ends_of_names():
    denoiser = trained("unet", "class")
    lora.add_lora(denoiser, rank=2, targets=["conv1", "to_out.0"])
    assert {name.rpartition(".")[2] for name in adapters(denoiser.model)} == {"conv1", "0"}
    assert dead_adapters(denoiser) == []
    with pytest.raises(UserError, match=r"ends with to_qq; its layers end with .*attention\.to_q"):
        lora.add_lora(trained("modern", "class"), rank=2, targets=["to_q", "to_qq"])


# ---- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "condition"), EVERY)
def test_only_adapters_and_conditions_are_trained(kind, condition):
    denoiser = trained(kind, condition)
    before = predict(denoiser)
    base = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    lora.add_lora(denoiser, rank=2, alpha=3)
    assert torch.equal(predict(denoiser), before)  # B = 0
    moving = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    assert moving == {name for name, _ in denoiser.named_parameters() if ".lora_" in name or "conditions." in name}
    ema = EMA(denoiser, 0.5)
    assert ema.shadow.keys() == moving
    optimizer = make_optimizer(denoiser, learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.1, epsilon=1e-8)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(moving)
    for step in range(2):
        predict(denoiser).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(step)
    assert not torch.equal(predict(denoiser), before)
    for name, tensor in denoiser.state_dict().items():
        if ".lora_" not in name and "conditions." not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer.", ".")]), name


def test_adapters_learn_new_data():
    """A model that knows one image learns three others by their labels."""
    torch.manual_seed(0)
    objective = OBJECTIVES["flow"](training_scheduler("flow"))
    images = torch.randn(4, 4, 8, 8)

    def train(denoiser, shown, steps):
        optimizer, losses = (
            make_optimizer(denoiser, learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.0, epsilon=1e-8),
            [],
        )
        for _ in range(steps):
            labels = torch.randint(len(shown), (16,))
            noise, timesteps = torch.randn(16, 4, 8, 8), objective.sample_timesteps(torch.rand(16))
            noisy = objective.add_noise(shown[labels], noise, timesteps)
            model_pred = denoiser(noisy, timesteps, {"class_labels": labels}, torch.zeros(16, dtype=torch.bool))
            loss = objective.loss(model_pred, objective.target(shown[labels], noise, timesteps), timesteps)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return sum(losses[:5]) / 5, sum(losses[-20:]) / 20

    base = untrained("modern", "none")
    train(base, images[:1], 100)
    denoiser = untrained("modern", "class")
    lora.add_lora(denoiser, 2, new_modules=lora.start_from(denoiser, base, FLAG))
    first, last = train(denoiser, images[1:], 150)
    assert last < 0.4 * first, (first, last)


def test_flops_of_adapted_models_are_those_of_the_base():
    denoiser = trained("modern", "text")
    expected = 2 * forward_flops(denoiser, (4, 8, 8), NUM_TOKENS)
    lora.add_lora(denoiser, rank=2)
    assert training_flops(denoiser, (4, 8, 8), NUM_TOKENS) == expected


# ---- merging and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "condition"), EVERY)
def test_merged_predicts_what_the_adapters_do(kind, condition):
    denoiser = trained(kind, condition)
    lora.add_lora(denoiser, rank=2, alpha=3, targets=["conv1", "to_q", "conv_in"] if kind == "unet" else None)
    before = predict(denoiser)
    randomise(denoiser.model)
    weights = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    expected = predict(denoiser)
    merged = lora.merge_lora(denoiser)
    assert not adapters(merged)
    assert not lora.is_adapted(merged.model)
    assert (predict(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - before).abs().max() > 1e-3
    assert torch.equal(predict(denoiser), expected)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in denoiser.state_dict().items())
    # peft's own merging, as a second opinion
    for layer in adapters(denoiser.model).values():
        layer.merge()
    theirs = {name.replace(".base_layer.", "."): each for name, each in denoiser.state_dict().items()}
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "had", "has"), [
    ("modern", "class", "class"), ("modern", "none", "class"), ("plain", "none", "class"), ("modern", "none", "text"),
    ("unet", "none", "class"), ("unet", "text", "text"),
])  # fmt: skip
def test_saved_adapters_load_onto_the_base_again(kind, had, has, tmp_path):
    """By `load_lora` and, what is in the model, by peft and by diffusers."""
    from peft import PeftModel

    base, denoiser = trained(kind, had), untrained(kind, has)
    new_modules = lora.start_from(denoiser, base, FLAG)
    empty = copy.deepcopy(denoiser)
    lora.add_lora(denoiser, 2, 3, None, new_modules, "a/run")
    randomise(denoiser.model)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if parameter.requires_grad and ".lora_" not in name:
                parameter.add_(0.3)
    expected = predict(denoiser)
    lora.save_lora(denoiser, tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (2, 3, "a/run")

    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    assert torch.equal(predict(lora.load_lora(base, tmp_path / "lora")), expected)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())

    for of_peft in (True, False):
        model = copy.deepcopy(empty.model)
        if of_peft:
            wrapped = PeftModel.from_pretrained(model, tmp_path / "lora")
            model = wrapped.get_base_model()
        else:
            model.load_lora_adapter(
                tmp_path / "lora", weight_name="adapter_model.safetensors", prefix="base_model.model"
            )
        if of_peft or not new_modules:  # diffusers reads adapters only
            close = predict(ConditionalDenoiser(model.eval(), denoiser.conditions))
            torch.testing.assert_close(close, expected, rtol=1e-4, atol=1e-5)


def test_adapters_of_another_base_are_refused(tmp_path):
    denoiser = trained("modern", "class")
    lora.add_lora(denoiser, 2)
    lora.save_lora(denoiser, tmp_path)
    wider = ConditionalDenoiser(DiT(**SMALL | {"hidden_size": 64}), NoCondition())
    with pytest.raises(UserError, match="--lora: its weights do not fit"):
        lora.load_lora(wider, tmp_path)
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        lora.load_lora(denoiser, tmp_path / "conditions")


# ---- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "has", "new"), [
    ("modern", "class", ["pooled_embed"]),
    ("plain", "class", []),
    ("unet", "class", []),
    ("modern", "text", [
        "blocks.0.cross_attention", "blocks.0.cross_norm", "blocks.1.cross_attention", "blocks.1.cross_norm", "pooled_embed",
    ]),
])  # fmt: skip
@pytest.mark.parametrize("rank", [None, 2])
def test_a_new_condition_starts_as_none(kind, has, new, rank):
    """Whatever it is told, the new model says what the unconditional one did; and it learns to listen."""
    base, denoiser = trained(kind, "none"), untrained(kind, has)
    expected = predict(base)
    assert lora.start_from(denoiser, base, FLAG) == new
    if rank:
        lora.add_lora(denoiser, rank, new_modules=new)
        assert not any(name.startswith(tuple(new)) for name in adapters(denoiser.model)) or not new
    torch.testing.assert_close(predict(denoiser), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(predict(denoiser, dropped=True), expected, rtol=0, atol=1e-6)
    moving = {name: each for name, each in denoiser.named_parameters() if each.requires_grad}
    assert all(any(name.startswith(f"model.{module}.") for name in moving) for module in new)
    optimizer = make_optimizer(denoiser, learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.0, epsilon=1e-8)
    start = {name: each.detach().clone() for name, each in moving.items()}
    for _ in range(3):
        (predict(denoiser) * torch.tensor([-1.0, 0.5, 1.0])[:, None, None, None]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in moving.items():
        assert not torch.equal(parameter, start[name]), name
    difference = predict(denoiser) - predict(denoiser, dropped=True)
    assert difference.abs().amax(dim=(1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_other_classes_start_as_the_null_class(kind):
    base, denoiser = trained(kind, "class"), untrained(kind, "class", num_classes=5)
    assert lora.start_from(denoiser, base, FLAG) == []
    assert torch.equal(predict(denoiser), predict(base, dropped=True))
    same = untrained(kind, "class")
    lora.start_from(same, base, FLAG)
    assert torch.equal(predict(same), predict(base))
    assert not torch.equal(predict(base), predict(base, dropped=True))


@pytest.mark.parametrize(("had", "has"), [("class", "none"), ("text", "none"), ("class", "text"), ("text", "class")])
def test_a_condition_is_not_taken_away(had, has):
    with pytest.raises(UserError, match="start from an unconditional run"):
        lora.start_from(untrained("modern", has), trained("modern", had), FLAG)


def test_another_shape_is_refused():
    deeper = ConditionalDenoiser(DiT(**SMALL | {"num_layers": 3}), NoCondition())
    with pytest.raises(UserError, match="do not fit"):
        lora.start_from(deeper, trained("modern", "none"), FLAG)


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "message"), [
    ({"lora_alpha": 8.0}, "--lora_alpha without --lora_rank"),
    ({"lora_target_modules": ["to_q"]}, "--lora_target_modules without --lora_rank"),
    ({"lora_rank": 4}, "--lora_rank without --pretrained_model_name_or_path"),
    ({"lora_rank": 4, "pretrained_model_name_or_path": "x", "optimizer": "muon"}, "muon with --lora_rank"),
    ({"lora_rank": 4, "pretrained_model_name_or_path": "x", "ema_sigma_rels": [0.1]}, "--ema_sigma_rels with"),
    ({"lora_rank": 4, "pretrained_model_name_or_path": "nowhere"}, "nowhere is no run"),
])  # fmt: skip
def test_flags_that_make_no_sense_are_refused(flags, message):
    off = dict.fromkeys(("lora_rank", "lora_alpha", "lora_target_modules", "pretrained_model_name_or_path"))
    args = Namespace(**off | {"optimizer": "adamw", "ema_sigma_rels": None, "given": set(flags)} | flags)
    with pytest.raises(UserError, match=message):
        check_lora_args(args)
