"""Tiny autoencoders and denoisers of cells, and counts for them."""

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from utils.expression.data.table import CellTable
from utils.expression.vae.likelihoods import LIKELIHOODS, CountParameters
from utils.expression.vae.network import ExpressionVAE
from utils.models.vector_mlp import VectorMLP

GENES, CHANNELS, CELLS = 12, 3, 40
NAMES = [f"G{i}" for i in range(GENES)]
ADAMW = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01, "epsilon": 1e-12}


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters_of(mu, theta, pi=None, dtype=torch.float64) -> CountParameters:
    """Of one cell whose genes have these means, dispersions and shares of lost counts, (G,) each."""
    log_mu, theta = torch.from_numpy(np.log(mu))[None].to(dtype), torch.from_numpy(np.asarray(theta)).to(dtype)
    lost = None if pi is None else torch.from_numpy(np.log(pi) - np.log1p(-np.asarray(pi)))[None].to(dtype)
    return CountParameters(log_mu, theta, lost)


def grid(*values) -> list[np.ndarray]:
    return [each.ravel() for each in np.meshgrid(*values, indexing="ij")]


MUS, THETAS = 10.0 ** np.arange(-6, 7), 10.0 ** np.arange(-3, 4)
COUNTS = np.array([0, 1, 2, 10, 1000, 100_000.0])


def log_prob(kind: str, parameters: CountParameters, counts: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(counts)[None].to(parameters.theta.dtype)
    return LIKELIHOODS[kind].distribution(parameters).log_prob(values)[0].double().numpy()


def table_of(counts: np.ndarray, library_sizes: np.ndarray | None = None, **obs) -> CellTable:
    libraries = counts.sum(axis=1, dtype=np.float64) if library_sizes is None else library_sizes
    ids = np.array([f"cell-{i}" for i in range(len(counts))], dtype=object)
    genes = [f"G{i}" for i in range(counts.shape[1])]
    return CellTable(csr_matrix(counts.astype(np.float32)), libraries, genes, ids, obs)


def small_table(seed: int = 0, extra: float = 0.0) -> CellTable:
    """Cells of 12 genes in which three groups differ; `extra` counts of each library lie in other genes."""
    generator = np.random.default_rng(seed)
    profiles = generator.dirichlet(np.ones(GENES), 3)[np.arange(CELLS) % 3]
    counts = generator.poisson(generator.lognormal(5, 0.5, (CELLS, 1)) * profiles)
    counts[:, 0] += 1
    return table_of(counts, counts.sum(axis=1) + extra)


def make_vae(**settings) -> ExpressionVAE:
    torch.manual_seed(0)
    settings = {"latent_channels": CHANNELS, "hidden_size": 16, "num_layers": 2} | settings
    vae = ExpressionVAE(genes=NAMES, **settings)
    with torch.no_grad():
        for layer in (vae.to_shares, vae.to_moments):
            layer.weight.mul_(3)
        vae.log_theta.copy_(torch.linspace(-1, 2, GENES))
    return vae.eval()


BATCHES = {"batch_column": "donor", "batch_names": ["D1", "D2", "D3"]}
SIZE, WIDTH = 9, 32


def mlp() -> VectorMLP:
    return VectorMLP(SIZE, num_layers=3, hidden_size=WIDTH, projection_class_embeddings_input_dim=6)


TIMESTEPS = torch.tensor([3, 400, 990, 700])
