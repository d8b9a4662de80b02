"""Checkpoints that are complete or absent.

Every process writes into `.tmp-checkpoint-STEP`; files are synced and listed with their sha256 in a manifest; the
folder is renamed to `checkpoint-STEP` and its parent synced; only then old ones go, and at least two stay. Loading
verifies the manifest: a process killed at any moment, or a disk that lost a page, costs steps and never the run.
"""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from utils.errors import UserError
from utils.files import BEING_WRITTEN, fsync_path, read_json, remove_folder, remove_unfinished, sha256_file, write_json
from utils.training.ema import EMA
from utils.training.run import Run
from utils.training.sharding import load_state, save_state

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
MIN_KEPT = 2


def checkpoint_steps(output_dir: Path) -> list[int]:
    """Steps of the complete checkpoints in a run's folder, ascending."""
    matches = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*"))
    return sorted(int(match[1]) for match in matches if match and (output_dir / match[0] / MANIFEST).is_file())


class Checkpoints:
    """The checkpoints of one run. Every process has this object, and all call each of its methods together.

    `model` and `optimizer` are the prepared ones; `identity` is what a resumed run must share: model, objective, data,
    batch. The newest `keep` checkpoints stay, and at least two.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        ema: EMA | None,
        *,
        identity: dict[str, Any],
        keep: int,
    ):
        self.accelerator, self.folder = run.accelerator, run.folder
        self.model, self.optimizer, self.ema = model, optimizer.optimizer, ema
        self.identity, self.keep = identity, keep

    def save(self, global_step: int) -> None:
        """Writes `checkpoint-{global_step}` after `global_step` optimizer steps."""
        final = self.folder / f"checkpoint-{global_step}"
        temporary = self.folder / f"{BEING_WRITTEN}checkpoint-{global_step}"  # all processes write into it
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        save_state(self.accelerator, self.model, self.optimizer, temporary)
        if self.ema is not None:
            self.ema.save(temporary, self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._complete(temporary, final, global_step)
            prune(self.folder, self.keep)
        self.accelerator.wait_for_everyone()

    def _complete(self, temporary: Path, final: Path, global_step: int) -> None:
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        for path in files:
            fsync_path(path)
        manifest = {
            "global_step": global_step,
            "identity": self.identity,
            "num_processes": self.accelerator.num_processes,
            "is_sharded": self.accelerator.is_fsdp2,
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "files": {str(path.relative_to(temporary)): sha256_file(path) for path in files},
        }
        write_json(temporary / MANIFEST, manifest)
        if final.exists():  # left by a run that was resumed from an earlier step
            remove_folder(final)
        temporary.replace(final)
        fsync_path(self.folder)

    def resume(self, resume_from_checkpoint: str | None) -> int:
        """Loads the checkpoint that `--resume_from_checkpoint` names, if any; returns the number of optimizer steps
        done. Raises UserError where there is none of that name, or it is damaged, or of another run.
        """
        if not resume_from_checkpoint:
            return 0
        checkpoint = find_checkpoint(self.folder, resume_from_checkpoint)
        if checkpoint is None:
            logger.info("%s holds no checkpoint: starting from the beginning", self.folder)
            return 0
        manifest = read_json(checkpoint / MANIFEST)
        self._check_identity(checkpoint, manifest)
        scales = [group.get("lr_scale") for group in self.optimizer.param_groups]
        load_state(self.accelerator, self.model, self.optimizer, checkpoint)
        for group, scale in zip(self.optimizer.param_groups, scales, strict=True):
            group |= {} if scale is None else {"lr_scale": scale}  # that of this run's flags, as its learning rate is
        if self.ema is not None:
            self.ema.load(checkpoint)
        logger.info("resuming from %s, after %d steps", checkpoint, manifest["global_step"])
        return manifest["global_step"]

    def _check_identity(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        had = manifest["identity"] | {"FSDP": manifest.get("is_sharded", False)}
        has = self.identity | {"FSDP": self.accelerator.is_fsdp2}
        for key, value in has.items():
            if had.get(key) != value:
                raise UserError(
                    f"--resume_from_checkpoint: {checkpoint} was trained with {key} = {had.get(key)}, "
                    f"this run has {value}; give the same flags as then, or another --output_dir"
                )


def prune(output_dir: Path, keep: int) -> None:
    """Deletes the oldest checkpoints beyond `keep`, keeping at least two, and what killed processes left."""
    for step in checkpoint_steps(output_dir)[: -max(MIN_KEPT, keep)]:
        remove_folder(output_dir / f"checkpoint-{step}")
    for leftover in output_dir.glob(f"{BEING_WRITTEN}*checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    remove_unfinished(output_dir)  # the process that prunes writes no file


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}, so it was never completed"
    for name, digest in read_json(checkpoint / MANIFEST)["files"].items():
        if not (checkpoint / name).is_file():
            return f"its file {name} is missing"
        if sha256_file(checkpoint / name) != digest:
            return f"its file {name} is damaged (sha256 differs from the manifest)"
    return None


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    """The checkpoint to resume from: the newest for "latest" (None if there is none), or the named one.

    Raises UserError for one that is missing or damaged, and names the one before it.
    """
    steps = checkpoint_steps(output_dir)
    if resume_from_checkpoint == "latest":
        if not steps:
            return None
        checkpoint = output_dir / f"checkpoint-{steps[-1]}"
    else:
        checkpoint = Path(resume_from_checkpoint)
        if not checkpoint.is_dir():
            checkpoint = output_dir / resume_from_checkpoint
        if not checkpoint.is_dir():
            known = ", ".join(f"checkpoint-{step}" for step in steps) or "none"
            raise UserError(
                f"--resume_from_checkpoint: {resume_from_checkpoint} does not exist; {output_dir} holds: {known}"
            )
    found = damage(checkpoint)
    if found:
        number = re.sub(r"\D", "", checkpoint.name)
        earlier = [step for step in steps if number and step < int(number)]
        advice = f"use --resume_from_checkpoint checkpoint-{earlier[-1]}" if earlier else "there is no earlier one"
        raise UserError(f"--resume_from_checkpoint: {checkpoint} cannot be used: {found}; {advice}")
    return checkpoint
