"""What training an autoencoder of expression needs beside its loop: the ELBO, held-out cells, the best weights, and
the measured latents.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.expression.data.stream import cell_batches, gene_shares, theta_of_moments
from utils.expression.data.table import CellTable
from utils.expression.vae.likelihoods import LIKELIHOODS, CountParameters
from utils.expression.vae.network import PER_CELL, ExpressionVAE
from utils.files import make_folder, read_json, replace_durably, temporary_path, write_json
from utils.latents.posterior import GaussianPosterior, PosteriorStatistics, PosteriorSums, kl_to_standard_normal

logger = logging.getLogger(__name__)
BATCH_SIZE = 256
STATISTICS_FILE = "latent_statistics.json"
BEST_FILE, BEST_WEIGHTS = "best.json", "best.safetensors"


class Elbo:
    """The two halves of the evidence lower bound (Kingma & Welling 2013, arXiv 1312.6114), in nats per cell."""

    def __init__(self, likelihood: str):
        self.likelihood = LIKELIHOODS[likelihood]

    def __call__(
        self, parameters: CountParameters, posterior: GaussianPosterior, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood (B,) of raw `counts` (B, G), in fp32 whatever autocast says, and the KL divergence
        (B,) of the posterior from a standard normal.
        """
        with torch.autocast(counts.device.type, enabled=False):
            log_prob = self.likelihood.distribution(parameters).log_prob(counts.float())
        return -log_prob.sum(dim=1), kl_to_standard_normal(posterior.mean, posterior.logvar).sum(dim=1)


@torch.no_grad()
def initialise(vae: ExpressionVAE, table: CellTable) -> None:
    """Starts a decoder at the mean of the training cells, and its dispersion at that of their moments. A dispersion
    that starts at one keeps the noise of most genes wrong for most of a training.
    """
    shares = gene_shares(table)
    rest = [max(1 - shares.sum(), 1e-6)] if vae.config.library == "all" else []
    vae.to_shares.bias.copy_(torch.from_numpy(np.log([*shares, *rest])))
    log_library = np.log(table.library_sizes)
    vae.log_library_mean.fill_(log_library.mean())
    vae.log_library_std.fill_(max(log_library.std(), 1e-3))  # cells may all have one library size
    theta = theta_of_moments(table, LIKELIHOODS[vae.config.likelihood])
    vae.log_theta.copy_(torch.from_numpy(np.log(theta)))


class HeldOutCells:
    """How well cells that are not trained on are explained: the ELBO at the final KL weight, and correlations."""

    def __init__(
        self,
        accelerator: Accelerator,
        table: CellTable,
        batch_index: np.ndarray | None,
        kl_weight: float,
    ):
        self.accelerator, self.table, self.batch_index, self.kl_weight = accelerator, table, batch_index, kl_weight

    @torch.no_grad()
    def measure(self, vae: ExpressionVAE, global_step: int) -> dict[str, float]:
        """Measures the weights that `vae` has now, from the mean of the posterior for correlations and from a sample
        of it for the likelihood: the same noise every time.
        """
        elbo, sums = Elbo(vae.config.likelihood), PosteriorSums()
        totals, real, expected = np.zeros(2), [], []
        noise = torch.Generator().manual_seed(0)
        for batch in cell_batches(self.table, BATCH_SIZE, self.batch_index):
            batch = {name: values.to(vae.device) for name, values in batch.items()}
            shape = (len(batch["counts"]), vae.config.latent_channels)
            parameters, posterior = vae(batch, torch.randn(shape, generator=noise).to(vae.device))
            nll, kl = elbo(parameters, posterior, batch["counts"])
            totals += [nll.double().sum().item(), kl.double().sum().item()]
            sums.add(posterior.mean[..., None, None], posterior.logvar[..., None, None])
            given = {name: value for name, value in batch.items() if name != "counts"}
            mean = LIKELIHOODS[vae.config.likelihood].distribution(vae.decode(posterior.mean, **given)).mean
            scale = (PER_CELL / batch["library_size"])[:, None]
            real.append((batch["counts"] * scale).log1p().cpu().numpy())
            expected.append((mean * scale).log1p().cpu().numpy())
        nll, kl = (totals / len(self.table)).tolist()
        statistics = sums.statistics()
        figures = {"nll": nll, "kl": kl, "elbo": -(nll + kl), "loss": nll + self.kl_weight * kl}
        figures["active_channels"] = float(statistics.active_channels)
        figures |= correlations(np.concatenate(real), np.concatenate(expected))
        self.report(figures, statistics, global_step)
        return figures

    def report(self, figures: dict[str, float], statistics: PosteriorStatistics, global_step: int) -> None:
        """Says what was found, and what is wrong with it."""
        logger.info(
            "step %d: held-out cells: ELBO %.1f nats (NLL %.1f, KL %.2f), %d of %d latent dimensions active, "
            "correlation %.3f per cell, %.3f per gene",
            global_step,
            figures["elbo"],
            figures["nll"],
            figures["kl"],
            statistics.active_channels,
            len(statistics.mean),
            figures["cell_correlation"],
            figures["gene_correlation"],
        )
        for fault in statistics.faults():
            logger.warning("step %d: %s", global_step, fault)
        self.accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=global_step)


def correlations(real: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Mean Pearson correlation of two matrices (R, G) along genes, for each cell, and along cells, for each gene that
    differs among them.
    """
    found = {}
    for name, axis in (("cell", 1), ("gene", 0)):
        a, b = (each - each.mean(axis=axis, keepdims=True) for each in (real, expected))
        norms = np.sqrt((a**2).sum(axis=axis) * (b**2).sum(axis=axis))
        varies = norms > 0
        products = (a * b).sum(axis=axis)[varies] / norms[varies]
        found[f"{name}_correlation"] = float(products.mean()) if varies.any() else 0.0
    return found


class BestWeights:
    """The weights with the lowest held-out loss, in a run's folder. A run that goes on from before their step finds
    them again on its way.
    """

    def __init__(self, output_dir: Path, first_step: int):
        self.weights, self.file = output_dir / BEST_WEIGHTS, output_dir / BEST_FILE
        self.about: dict[str, Any] | None = None
        if self.file.is_file() and self.weights.is_file():
            about = read_json(self.file)
            self.about = about if about["global_step"] <= first_step else None

    def offer(self, vae: ExpressionVAE, figures: dict[str, float], global_step: int) -> None:
        """Keeps the weights of `vae` if there were no better ones."""
        if self.about is not None and not figures["loss"] < self.about["loss"]:
            return
        temporary = temporary_path(self.weights)
        save_file({name: tensor.contiguous().cpu() for name, tensor in vae.state_dict().items()}, temporary)
        self.file.unlink(missing_ok=True)  # a file that is there is of the weights that are there
        replace_durably(temporary, self.weights)
        self.about = figures | {"global_step": global_step}
        write_json(self.file, self.about)

    def restore(self, vae: ExpressionVAE) -> dict[str, Any] | None:
        """Gives `vae` the best weights; None, and no change, where none were kept."""
        if self.about is not None:
            vae.load_state_dict(load_file(self.weights))
            logger.info("the best weights are of step %d: loss %.2f", self.about["global_step"], self.about["loss"])
        return self.about


@torch.no_grad()
def measure_latents(vae: ExpressionVAE, table: CellTable, batch_index: np.ndarray | None) -> PosteriorStatistics:
    """Measures the latents of the training cells, and stores mean and std of each dimension in the config, the
    logarithm of the library size last. Says what is wrong with them. Returns the statistics without that.
    """
    sums = PosteriorSums()
    for batch in cell_batches(table, BATCH_SIZE, batch_index):
        posterior = vae.encode(**{name: values.to(vae.device) for name, values in batch.items()})
        sums.add(posterior.mean[..., None, None], posterior.logvar[..., None, None])
    statistics, log_library = sums.statistics(), np.log(table.library_sizes)
    stds = [max(each, 1e-6) for each in (*statistics.std, float(log_library.std()))]  # all may have one library size
    vae.register_to_config(latents_mean=[*statistics.mean, float(log_library.mean())], latents_std=stds)
    for fault in statistics.faults():
        logger.warning("at the end: %s", fault)
    return statistics


def save_vae(
    vae: ExpressionVAE, statistics: PosteriorStatistics, figures: dict[str, Any], split_file: Path, folder: Path
) -> None:
    """Writes the autoencoder, and beside its config what was measured and which cells it saw."""
    make_folder(folder)
    vae.save_pretrained(folder)
    write_json(folder / STATISTICS_FILE, vars(statistics) | {"held_out": figures})
    if split_file != folder / split_file.name:
        shutil.copy(split_file, folder / split_file.name)
