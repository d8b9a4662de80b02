"""Runs that are compared to the bit, and runs that were made before."""

import json
import shutil
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.processes import ROOT

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


def unpack_old_run(modality: str, folder: Path) -> Path:
    """NAME/cache and NAME/run of tests/support/old_runs; the VAE of the cache is a copy of the run's, in NAME/vae."""
    with tarfile.open(ROOT / "tests" / "support" / "old_runs" / f"{modality}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / modality
    shutil.copytree(unpacked / "run" / "vae", unpacked / "vae")
    spec = json.loads((unpacked / "cache" / "latent_spec.json").read_text())
    (unpacked / "cache" / "latent_spec.json").write_text(json.dumps(spec | {"vae": str(unpacked)}))
    return unpacked
