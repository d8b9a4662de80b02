"""Whether two runs are the same to the bit."""

import torch
from safetensors.torch import load_file

STEPS = 24  # of the runs that are compared
LATEST = ["--resume_from_checkpoint", "latest"]


def tensors(value, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor inside nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, each in items for name, tensor in tensors(each, f"{path}/{key}").items()}


def trained(folder) -> dict[str, torch.Tensor]:
    """Exported weights, and weights, average and optimizer state of the last checkpoint."""
    files = [*folder.glob("*/*.safetensors"), *(folder / f"checkpoint-{STEPS}").glob("*.safetensors")]
    everything = {str(path.relative_to(folder)): load_file(path) for path in files if path.parent.name != "vae"}
    everything["optimizer"] = torch.load(folder / f"checkpoint-{STEPS}" / "optimizer.bin", weights_only=True)
    return tensors(everything)


def assert_identical(folder, expected) -> None:
    ours, theirs = trained(folder), trained(expected)
    assert len(ours) > 50
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
