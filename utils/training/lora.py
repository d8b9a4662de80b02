"""Fine-tuning of a trained denoiser: where it starts from, and low-rank adapters (LoRA, arXiv 2106.09685) beside its
frozen weights.

Adapters are peft's, put in by diffusers' own `add_adapter`. They are saved apart in peft's format, and merged into the
weights of what is exported, so that nothing needs peft to sample.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils.diffusion.conditions import CONDITIONS, ClassCondition, NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser, own_config
from utils.errors import UserError
from utils.files import make_folder, read_json, write_json
from utils.training.sharding import new_like

logger = logging.getLogger(__name__)
FOLDER = "lora"  # of a run
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # peft's names
ADAPTER, PREFIX = "default", "base_model.model."  # of peft too: in a model, and before the names in its files

# The layers that are adapted, by the ends of their names: all linear ones of attention, feed-forward and adaLN; of a
# U-Net's transformers the projections (1x1 convolutions, or linear) too.
TARGETS = {
    "DiT": ("to_q", "to_kv", "to_out", "mlp.proj_in", "mlp.proj_out", "mlp.0", "mlp.2", "adaln"),
    "VectorMLP": ("mlp.proj_in", "mlp.proj_out", "adaln"),
    "UNet2DConditionModel": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
}
# What a condition adds to a model that knew none. It is trained in full.
NEW_MODULES = ("pooled_embed", "cross_attention", "cross_norm")


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


# ---- the start


def start_from(new: ConditionalDenoiser, base: ConditionalDenoiser, flag: str) -> list[str]:
    """Copies a trained denoiser's weights into a new one, which may have a condition where `base` has none, or other
    classes. Returns the names of the modules of `new.model` that `base` lacks.

    Where the condition is new, the new denoiser predicts what `base` does without one, whatever it is told: what joins
    the condition to the rest starts at zero, and other classes start as the null class. Raises UserError, which names
    `flag`, where one does not fit into the other.
    """
    had, has = type(base.conditions).__name__, type(new.conditions).__name__
    if not isinstance(base.conditions, NoCondition | type(new.conditions)):
        raise UserError(
            f"{flag}: it was trained with {had}, this run with {has}; fine-tune with the same kind of condition, or "
            "start from an unconditional run"
        )
    ours, theirs = new.model.state_dict(), base.model.state_dict()
    added = {name: new_module_of(name) for name in ours if name not in theirs}
    wrong = [name for name, tensor in theirs.items() if name not in ours or ours[name].shape != tensor.shape]
    wrong += [name for name, module in added.items() if module is None]
    if wrong:
        raise UserError(
            f"{flag}: its weights do not fit the model that this condition ({has}) needs: {', '.join(wrong[:3])}"
            f"{' and others' if len(wrong) > 3 else ''} differ; start from a run with the same kind of condition"
        )
    new.model.load_state_dict(ours | theirs)
    modules = sorted({module for module in added.values() if module})
    for name in modules:
        if not name.endswith("cross_norm"):
            joint = new.model.get_submodule(f"{name}.to_out" if name.endswith("cross_attention") else name)
            nn.init.zeros_(joint.weight)
            nn.init.zeros_(joint.bias)
    start_condition(new.conditions, base.conditions, is_projected=bool(modules))
    return modules


def new_module_of(name: str) -> str | None:
    """The module of `NEW_MODULES` in which a parameter lies, or None: "blocks.0.cross_attention.to_q.bias" lies in
    "blocks.0.cross_attention"."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part in NEW_MODULES), None)


@torch.no_grad()
def start_condition(new: Any, base: Any, is_projected: bool) -> None:
    """Gives a condition encoder its first weights; `is_projected` says that a new layer, which is zero, follows it."""
    ours, theirs = (own_config(each) for each in (new, base))
    if not isinstance(base, NoCondition) and ours == theirs:
        weights = dict(base.named_parameters())  # no buffers: the null of a text is that of this run's cache
        for name, parameter in new.named_parameters():
            parameter.copy_(weights[name])
    elif isinstance(new, ClassCondition) and isinstance(base, ClassCondition):
        logger.info("other classes than the base's: they start as its null class")
        new.embedding.weight.copy_(base.embedding.weight[-1:].expand_as(new.embedding.weight))
    elif isinstance(new, ClassCondition) and not is_projected:  # added to the timestep embedding as it is
        nn.init.zeros_(new.embedding.weight)


# ---- adapters


def add_lora(
    denoiser: ConditionalDenoiser,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    new_modules: Sequence[str] = (),
    base: str | None = None,
) -> None:
    """Freezes the model's weights and puts adapters W + (alpha / rank) B A beside those of `targets` (ends of names;
    default: `TARGETS`), with B = 0. What stays trainable: the adapters, `new_modules`, and the condition encoder.

    `alpha` is `rank` by default; `base` is the name that is saved with the adapters. Raises UserError for targets that
    name no linear layer or convolution, and without peft.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("--lora_rank needs the package peft: pip install peft") from error
    model = denoiser.model
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # a float does as well
        target_modules=adapted_layers(model, targets, new_modules),
    )
    model.add_adapter(config, ADAPTER)
    config.base_model_name_or_path = base
    # Only said here, for the file: peft would wrap these modules, and they are in the model to be trained anyway.
    config.modules_to_save = sorted({name.rpartition(".")[2] for name in new_modules}) or None
    prefixes = tuple(f"{name}." for name in new_modules)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(prefixes))


def adapted_layers(model: nn.Module, targets: Sequence[str] | None, new_modules: Sequence[str]) -> list[str]:
    """Full names of the layers to adapt. Raises UserError for a target that is none, or if there is none at all."""
    new = tuple(f"{each}{end}" for each in new_modules for end in (".", ""))
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(new)
    ]
    names = [each.__name__ for each in type(model).__mro__]
    chosen = targets or next((TARGETS[name] for name in names if name in TARGETS), ())
    found = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in chosen}
    absent = [target for target in targets or () if not found[target]]
    if absent or not any(found.values()):
        ends = sorted({".".join(part for part in name.split(".")[-2:] if not part.isdigit()) for name in layers})
        raise UserError(
            f"--lora_target_modules: no layer of this {names[0]} ends with {' or '.join(absent or chosen)}; its "
            f"layers end with {', '.join(ends)}"
        )
    adapted = set().union(*found.values())
    return [name for name in layers if name in adapted]


def scaling_of(settings: dict[str, Any]) -> float:
    """alpha / rank of an `adapter_config.json`."""
    return settings["lora_alpha"] / settings["r"]


def identity_of(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint remembers of adapters, beside the number of their parameters; nothing where there are none."""
    if not is_adapted(model):
        return {}
    settings = settings_of(model)
    return {"LoRA": f"rank {settings['r']}, alpha {settings['lora_alpha']:g}, {' '.join(settings['target_modules'])}"}


def settings_of(model: Any) -> dict[str, Any]:
    """peft's config of a model's adapters, as JSON takes it."""
    settings = model.peft_config[ADAPTER].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


# ---- merging


def merge_weights(weights: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Weights of a model with adapters -> W + scaling B A (equation 3 of the paper), by the names of a model without.

    Of a convolution A is one of the same kernel to `rank` channels and B a 1x1 one.
    """
    merged = {}
    for name, tensor in weights.items():
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            down, up = (weights[f"{layer}.lora_{each}.{ADAPTER}.weight"] for each in "AB")
            tensor = tensor + scaling * (up.flatten(1) @ down.flatten(1)).view_as(tensor)  # (out, r) @ (r, in k k)
        if ".lora_" not in name:
            merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def merge_lora(denoiser: ConditionalDenoiser) -> ConditionalDenoiser:
    """A denoiser without adapters that predicts the same; the given one stays as it is, and is returned where it has
    none. Weights that no adapter changes are shared.
    """
    if not is_adapted(denoiser.model):
        return denoiser
    weights = {name: tensor.detach() for name, tensor in denoiser.state_dict().items()}
    copy = blank(denoiser)
    copy.load_state_dict(merge_weights(weights, scaling_of(settings_of(denoiser.model))), assign=True)
    return copy.eval()


def blank(denoiser: ConditionalDenoiser) -> ConditionalDenoiser:
    """The shapes of a denoiser without its adapters, on the meta device."""
    with torch.device("meta"):
        return ConditionalDenoiser(new_like(denoiser.model), new_like(denoiser.conditions))


# ---- files


def save_lora_config(denoiser: ConditionalDenoiser, folder: Path) -> None:
    """Writes what must be known of adapters to read a checkpoint."""
    make_folder(folder)
    write_json(folder / CONFIG_FILE, settings_of(denoiser.model))


def save_lora(denoiser: ConditionalDenoiser, folder: Path) -> None:
    """Writes the adapters and all else that was trained: what `load_lora` adds to the base again. peft's
    `PeftModel.from_pretrained` reads the folder too, as does diffusers' `load_lora_adapter` with the prefix
    "base_model.model" and this weight_name, for a model of the config in `denoiser/`.
    """
    save_lora_config(denoiser, folder)
    weights = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): parameter.detach().cpu().contiguous()
        for name, parameter in denoiser.model.named_parameters()
        if parameter.requires_grad
    }
    settings = settings_of(denoiser.model)
    about = {PREFIX + name: settings[name] for name in ("r", "lora_alpha", "target_modules")}
    # For diffusers. Nothing else stands there: safetensors writes several entries in any order.
    header = {"lora_adapter_metadata": json.dumps(about, sort_keys=True)}
    save_file(weights, folder / WEIGHTS_FILE, metadata=header)
    denoiser.model.save_config(folder / "denoiser")
    denoiser.conditions.save_pretrained(folder / "conditions")


def load_lora(base: ConditionalDenoiser, folder: str | Path, flag: str = "--lora") -> ConditionalDenoiser:
    """A new denoiser: `base` with the adapters, the new modules and the condition encoder that `save_lora` wrote.
    Raises UserError for a folder without them, and for one of another base.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{flag}: {folder} holds no {WEIGHTS_FILE}; give the folder {FOLDER}/ of a run with --lora_rank"
        )
    settings = read_json(folder / CONFIG_FILE)
    encoders = {each.__name__: each for each in CONDITIONS.values()}
    condition = encoders[read_json(folder / "conditions" / "config.json")["_class_name"]]
    config = base.model.load_config(folder / "denoiser")
    denoiser = ConditionalDenoiser(
        type(base.model).from_config(config), condition.from_pretrained(folder / "conditions")
    )
    trained_condition = {name: tensor.clone() for name, tensor in denoiser.conditions.state_dict().items()}
    new_modules = start_from(denoiser, base, flag)
    denoiser.conditions.load_state_dict(trained_condition)
    add_lora(denoiser, settings["r"], settings["lora_alpha"], settings["target_modules"], new_modules)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    for name, parameter in denoiser.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(weights[name.replace(f".{ADAPTER}.", ".")])
    return denoiser.eval()
