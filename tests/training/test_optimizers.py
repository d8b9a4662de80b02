"""Optimizers: Muon against singular values, which parameter belongs to whom, and the schedule of the learning rate."""

import math
from argparse import ArgumentParser
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from diffusers.optimization import get_scheduler
from torch import nn

from utils.args import checks as arg_checks
from utils.args.groups import add_optimizer_args
from utils.args.parsing import parse_with_config
from utils.diffusion.conditions import ClassCondition, NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.errors import UserError
from utils.image.vae.network import TrainableVAE, build_vae
from utils.models.dit import DiT
from utils.models.unet import build_unet, unet_config
from utils.training.optimizers import (
    LR_SCHEDULES,
    OPTIMIZERS,
    LearningRate,
    clip_grad_norm_,
    hidden_matrices,
    make_optimizer,
    set_learning_rate,
)

SETTINGS = {"learning_rate": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "epsilon": 1e-8}


def dit_denoiser(**settings):
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "cross_attention_dim": 10,
    }
    config |= {"projection_class_embeddings_input_dim": 48} | settings
    return ConditionalDenoiser(DiT(**config), ClassCondition(3, 48))


def unet_denoiser():
    return ConditionalDenoiser(build_unet(unet_config("tiny", 8, 4, 10, False)), NoCondition())


MODELS = {
    "dit": dit_denoiser,
    "plain dit": lambda: dit_denoiser(
        style="plain", projection_class_embeddings_input_dim=None, class_embed_type="identity"
    ),
    "unet": unet_denoiser,
    "vae": lambda: TrainableVAE(build_vae("base", 32)),
}


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# ---- the table and its flags


def test_choices_are_the_table():
    parser = ArgumentParser()
    add_optimizer_args(parser)
    (action,) = (action for action in parser._actions if action.dest == "optimizer")
    assert action.choices == list(OPTIMIZERS)


def parsed(*flags):
    parser = ArgumentParser()
    add_optimizer_args(parser)
    args = parse_with_config(parser, list(flags))
    arg_checks.check_optimizer_args(args)
    return args


def test_use_8bit_adam_is_an_alias(tmp_path):
    assert parsed().optimizer == "adamw"
    assert parsed("--use_8bit_adam").optimizer == "adamw_8bit"
    assert parsed("--use_8bit_adam", "--optimizer", "adamw_8bit").optimizer == "adamw_8bit"
    assert parsed("--no-use_8bit_adam", "--optimizer", "muon").optimizer == "muon"
    for name in ("muon", "adamw"):
        with pytest.raises(UserError, match=f"--use_8bit_adam with --optimizer {name}.*leave one out"):
            parsed("--use_8bit_adam", "--optimizer", name)
    (tmp_path / "config.yaml").write_text("use_8bit_adam: true\n")
    with pytest.raises(UserError, match="--no-use_8bit_adam if a file sets it"):
        parsed("--config", str(tmp_path / "config.yaml"), "--optimizer", "muon")
    with pytest.raises(UserError, match="--optimizer"):
        parsed("--optimizer", "lion")


def test_adamw_is_fused():
    optimizer = make_optimizer(dit_denoiser(), **SETTINGS)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["fused"] for group in optimizer.param_groups] == [True]


def test_torch_without_muon(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(
        UserError, match=r"--optimizer muon needs torch 2\.9 or newer, and this is " + torch.__version__[:3]
    ):
        make_optimizer(dit_denoiser(), **SETTINGS, name="muon")


def test_a_model_without_matrices():
    with pytest.raises(UserError, match="--optimizer muon: this model has no linear layers"):
        make_optimizer(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Linear(3, 3)), **SETTINGS, name="muon")


# ---- who moves what


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_trainable_parameter_is_in_one_group(kind, name):
    """Once; a frozen one in none."""
    pytest.importorskip("bitsandbytes")
    model = MODELS[kind]()
    frozen = [parameter for i, parameter in enumerate(model.parameters()) if i % 5 == 0]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = make_optimizer(model, **SETTINGS, name=name)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_muons_share_of_a_dit():
    """The matrices of attention and feed-forward of each block, and no other parameter."""
    model = dit_denoiser()
    matrices = {id(parameter) for parameter in hidden_matrices(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in matrices}
    layers = [f"{each}.{layer}" for each in ("attention", "cross_attention") for layer in ("to_q", "to_kv", "to_out")]
    layers += ["mlp.proj_in", "mlp.proj_out"]
    assert names == {f"model.blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}


def test_muons_share_of_a_unet():
    """Matrices of its transformers, and none of what takes the timestep or maps from and to latents."""
    model = unet_denoiser()
    matrices = {id(parameter) for parameter in hidden_matrices(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in matrices}
    assert names
    assert all("attentions." in name and name.endswith(".weight") for name in names)
    linear = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert all("time_emb" in name or "class_emb" in name for name in linear - names)


# ---- the update


def test_muon_orthogonalises_the_momentum():
    """Without weight decay the first step is lr x 0.2 sqrt(max(A, B)) x a matrix with the singular vectors of the gradient and
    singular values near 1 (0.7 to 1.2 is what five of Jordan's quintic steps reach), whatever those of the gradient were."""
    model = dit_denoiser(hidden_size=96)
    optimizer = make_optimizer(model, **SETTINGS | {"weight_decay": 0.0}, name="muon")
    matrices = hidden_matrices(model)
    before = [weight.detach().clone() for weight in matrices]
    give_gradients(model, seed=1)
    for weight in matrices:
        u, s, vt = torch.linalg.svd(weight.grad, full_matrices=False)
        weight.grad = 1e3 * (u * torch.linspace(0.05, 1.0, len(s))) @ vt  # of any size and an uneven spectrum
    optimizer.step()
    for weight, old in zip(matrices, before, strict=True):
        update = (old - weight.detach()) / (1e-2 * 0.2 * max(weight.shape) ** 0.5)
        u, s, vt = torch.linalg.svd(weight.grad, full_matrices=False)
        seen = u.T @ update @ vt.T  # in the gradient's own singular vectors: diagonal
        assert seen.diagonal().min() > 0.6
        assert seen.diagonal().max() < 1.3
        assert (seen - seen.diagonal().diag()).abs().max() < 0.1


def test_muons_second_step_follows_nesterov_momentum():
    """What is orthogonalised is g + mu (B - g) with B an exponential mean of gradients (Jordan's code), by the polar factor
    of an SVD; and weights decay by lr x weight decay first."""
    model = dit_denoiser(hidden_size=96, num_layers=1)
    optimizer = make_optimizer(model, **SETTINGS, name="muon")
    weight = model.model.blocks[0].attention.to_q.weight
    mean = torch.zeros_like(weight)
    for seed in (1, 2, 3):
        old = weight.detach().clone()
        give_gradients(model, seed)
        mean = 0.95 * mean + 0.05 * weight.grad
        optimizer.step()
        u, _, vt = torch.linalg.svd(0.05 * weight.grad + 0.95 * mean)
        update = ((1 - 1e-2 * 0.1) * old - weight.detach()) / (1e-2 * 0.2 * 96**0.5)
        cosine = (update * (u @ vt)).sum() / update.norm() / (u @ vt).norm()
        assert cosine > 0.97


def test_one_learning_rate_serves_both():
    """The root mean square of Muon's update is AdamW's usual 0.2 to 0.4 x lr for matrices of any shape (arXiv 2502.16982)."""
    model = dit_denoiser(hidden_size=96)
    optimizer = make_optimizer(model, **SETTINGS | {"weight_decay": 0.0}, name="muon")
    before = [weight.detach().clone() for weight in hidden_matrices(model)]
    set_learning_rate(optimizer, 3e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 3e-3]
    give_gradients(model, seed=1)
    optimizer.step()
    for weight, old in zip(hidden_matrices(model), before, strict=True):
        assert 0.1 < (weight.detach() - old).square().mean().sqrt() / 3e-3 < 0.4


def test_the_rest_is_adamws():
    """Bit for bit what torch's AdamW does to the same parameters."""
    model, reference = dit_denoiser(), dit_denoiser()
    optimizer = make_optimizer(model, **SETTINGS, name="muon")
    adamw = torch.optim.AdamW(
        reference.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8, fused=True
    )
    for step in range(3):
        for each, moved in ((model, optimizer), (reference, adamw)):
            give_gradients(each, seed=step)
            set_learning_rate(moved, 1e-2 / (step + 1))
            moved.step()
    matrices = {id(parameter) for parameter in hidden_matrices(model)}
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs) != (id(ours) in matrices)


# ---- state


@pytest.mark.parametrize("prepared", [False, True])
def test_a_loaded_state_goes_on_exactly(prepared, tmp_path):
    """Through a file, into a new optimizer, bare or as Accelerate prepares it, weights go on bit for bit and the learning rate
    can still be set."""

    def steps(model, optimizer, first, last):
        for step in range(first, last):
            give_gradients(model, seed=step)
            set_learning_rate(optimizer, 1e-2 / (step + 1))
            optimizer.step()

    def made():
        model = dit_denoiser()
        optimizer = make_optimizer(model, **SETTINGS, name="muon")
        return Accelerator(cpu=True).prepare(model, optimizer) if prepared else (model, optimizer)

    model, optimizer = made()
    steps(model, optimizer, 0, 6)
    half, its_optimizer = made()
    steps(half, its_optimizer, 0, 3)
    torch.save((half.state_dict(), its_optimizer.state_dict()), tmp_path / "half.pt")
    resumed, new_optimizer = made()
    weights, state = torch.load(tmp_path / "half.pt", weights_only=True)
    resumed.load_state_dict(weights)
    new_optimizer.load_state_dict(state)
    steps(resumed, new_optimizer, 3, 6)
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = new_optimizer.state_dict(), optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert len(ours["state"]) == len(theirs["state"]) == len(list(model.parameters()))


# ---- scripts


def test_identity_names_the_optimizer():
    from utils.training.setup import identity_of

    run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    args = parsed("--use_8bit_adam")
    args.train_batch_size = args.gradient_accumulation_steps = 1
    assert identity_of(args, run, nn.Linear(1, 1), "data")["optimizer"] == "adamw_8bit"


# ---- clipping


@pytest.mark.parametrize("max_norm", [1e-3, "the norm", 1e3])
def test_clipping_is_accelerates_to_the_bit(max_norm):
    """Above, at and below the norm; the norm is returned either way."""
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.zeros(size)) for size in (3, 50, 1000)] for _ in range(2))
    unused = nn.Parameter(torch.zeros(4))
    for mine, other in zip(ours, theirs, strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    before = [mine.grad.clone() for mine in ours]
    accelerator = Accelerator(cpu=True)
    limit = float(torch.cat(before).norm()) if max_norm == "the norm" else max_norm
    norm = clip_grad_norm_(accelerator, iter([*ours, unused]), limit)
    assert torch.equal(norm, accelerator.clip_grad_norm_(theirs, limit))
    assert all(torch.equal(mine.grad, other.grad) for mine, other in zip(ours, theirs, strict=True))
    assert all(torch.equal(mine.grad, was) for mine, was in zip(ours, before)) == (max_norm == 1e3)


def test_gradients_within_the_norm_are_not_touched(monkeypatch):
    """Which is what it is for: nothing passes over them again."""
    parameter = nn.Parameter(torch.zeros(8))
    parameter.grad = torch.ones(8)
    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", lambda *_: pytest.fail("gradients were scaled by 1"))
    assert clip_grad_norm_(Accelerator(cpu=True), [parameter], 10.0) == 8**0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_said(value):
    """Whatever happens to the gradients: the step will not be taken."""
    parameter = nn.Parameter(torch.zeros(8))
    parameter.grad = torch.full((8,), value)
    assert not clip_grad_norm_(Accelerator(cpu=True), [parameter], 1.0).isfinite()


def test_divided_gradients_are_clipped_by_accelerate():
    """Pieces of gradients, and those that an engine holds, have norms that only Accelerate knows."""
    for kind in ("FSDP", "DEEPSPEED", "XLA"):
        accelerator = SimpleNamespace(
            distributed_type=DistributedType(kind), clip_grad_norm_=lambda parameters, limit: (parameters, limit)
        )
        assert clip_grad_norm_(accelerator, ["weights"], 2.0) == (["weights"], 2.0)


# The learning rate


@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_is_diffusers(schedule, warmup_steps):
    """After the warm-up the rate is that of diffusers' get_scheduler; during it that of one step later, for the first
    step of ours is not wasted at zero."""
    peak, total = 3e-4, 60
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total)
    truth = []
    for _ in range(total + 1):
        truth.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    for step in range(total):
        expected = truth[step + 1] if step < warmup_steps else truth[step]
        if step + 1 == warmup_steps:
            expected = peak
        assert LearningRate(peak, schedule, warmup_steps, total).at(step) == pytest.approx(
            expected, rel=1e-9, abs=1e-15
        )


def test_constant_with_decay():
    """Constant for four fifths, then a straight line to zero (arXiv 2405.18392, section 3)."""
    rates = [LearningRate(1.0, "constant_with_decay", 0, 100).at(step) for step in range(101)]
    assert rates[:81] == pytest.approx([1.0] * 81)
    assert rates[80:101] == pytest.approx([1 - i / 20 for i in range(21)])


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 5, 100, 500])
def test_learning_rate_stays_in_range(schedule, warmup_steps):
    """Every step has a rate in (0, peak], the warm-up rises, and a warm-up longer than the run is only a warm-up."""
    rates = [LearningRate(2e-4, schedule, warmup_steps, 100).at(step) for step in range(100)]
    assert all(0 < rate <= 2e-4 * (1 + 1e-12) for rate in rates)
    assert rates[:warmup_steps] == pytest.approx(
        [2e-4 * (i + 1) / warmup_steps for i in range(min(warmup_steps, 100))]
    )
    assert all(math.isfinite(rate) for rate in rates)


def test_set_learning_rate_sets_every_group():
    """All parameter groups get the rate."""
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:], "lr": 7.0}], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
