"""What training a crystal autoencoder needs beside its loop: reconstructions on the way, and the measured latents."""

import logging
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from utils.crystal.codec import reconstruct
from utils.crystal.data.table import CrystalTable, crystal_batches
from utils.crystal.matching import match_pairs
from utils.crystal.vae.network import CrystalPrediction, CrystalVAE, reconstruction_losses
from utils.files import make_folder, write_json
from utils.latents.posterior import PosteriorStatistics, PosteriorSums
from utils.training.held_out import in_fixed_order

logger = logging.getLogger(__name__)
BATCH_SIZE = 256
STATISTICS_FILE = "latent_statistics.json"


class ReconstructionLoss:
    """The weighted sum of `reconstruction_losses`, with the weights by their names."""

    def __init__(self, **weights: float):
        self.weights = weights

    def __call__(
        self, prediction: CrystalPrediction, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A scalar, and its terms without their weights."""
        terms = {name: loss.mean() for name, loss in reconstruction_losses(prediction, **batch).items()}
        return sum((self.weights[name] * term for name, term in terms.items()), torch.zeros(())), terms


class Reconstructions:
    """How many held-out crystals come back from the mean of their posterior as what they were, and how near."""

    def __init__(self, accelerator: Accelerator, held_out: CrystalTable, num_crystals: int, num_processes: int):
        self.accelerator, self.num_processes = accelerator, num_processes
        self.table = held_out.take(np.sort(in_fixed_order(len(held_out))[:num_crystals]))

    @torch.no_grad()
    def run(self, vae: CrystalVAE, global_step: int) -> dict[str, float]:
        """Measures the weights that `vae` has now; the main process does it, the others wait at the next step."""
        if not self.accelerator.is_main_process:
            return {}
        sums, found = PosteriorSums(), []
        for batch in crystal_batches(self.table, BATCH_SIZE):
            batch = {name: values.to(vae.device) for name, values in batch.items()}
            add_posterior(sums, vae, batch)
            found += reconstruct(vae, batch)
        pairs = list(zip(found, self.table.crystals(), strict=True))
        matches = match_pairs(pairs, self.num_processes)
        rmsds = [rmsd for rmsd in matches.rmsds if rmsd is not None]
        statistics = sums.statistics()
        figures = {
            "match_rate": len(rmsds) / len(pairs),
            "rmsd": float(np.mean(rmsds)) if rmsds else float("nan"),
            "kl": statistics.kl,
            "active_channels": float(statistics.active_channels),
        }
        logger.info(
            "step %d: %.2f %% of %d held-out crystals match, RMSD %.4f; KL %.3f nats per latent value, %d of %d "
            "channels active",
            global_step,
            100 * figures["match_rate"],
            len(pairs),
            figures["rmsd"],
            statistics.kl,
            statistics.active_channels,
            len(statistics.mean),
        )
        for fault in statistics.faults():
            logger.warning("step %d: %s", global_step, fault)
        self.accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=global_step)
        return figures


def add_posterior(sums: PosteriorSums, vae: CrystalVAE, batch: dict[str, torch.Tensor]) -> None:
    """Counts the latents of the real atoms of a batch."""
    posterior, mask = vae.encode(**batch), batch["attention_mask"]
    sums.add(posterior.mean[mask][..., None, None], posterior.logvar[mask][..., None, None])


@torch.no_grad()
def measure_latents(vae: CrystalVAE, table: CrystalTable) -> PosteriorStatistics:
    """Measures the latents of the training crystals, and stores mean and std of each channel in the config. Says what
    is wrong with them.
    """
    sums = PosteriorSums()
    for batch in crystal_batches(table, BATCH_SIZE):
        add_posterior(sums, vae, {name: values.to(vae.device) for name, values in batch.items()})
    statistics = sums.statistics()
    vae.register_to_config(latents_mean=statistics.mean, latents_std=statistics.std)
    for fault in statistics.faults():
        logger.warning("at the end: %s", fault)
    return statistics


def save_vae(vae: CrystalVAE, statistics: PosteriorStatistics, figures: dict[str, float], folder: Path) -> None:
    """Writes the autoencoder, and beside its config what was measured."""
    make_folder(folder)
    vae.save_pretrained(folder)
    write_json(folder / STATISTICS_FILE, vars(statistics) | {"held_out": figures})
