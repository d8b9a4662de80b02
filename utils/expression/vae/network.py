"""A variational autoencoder of gene expression: counts of a cell <-> a latent vector, with a likelihood of raw counts
(Lopez et al. 2018, scVI, Nature Methods 15, 1053).
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from utils.expression.vae.likelihoods import LIBRARIES, LIKELIHOODS, CountParameters
from utils.latents.posterior import GaussianPosterior

PER_CELL = 1e4  # counts that a cell is scaled to before the logarithm


def mlp(input_dim: int, hidden_size: int, num_layers: int, dropout: float) -> nn.Sequential:
    """Layers of a linear map, a norm and SiLU."""
    layers: list[nn.Module] = []
    for i in range(num_layers):
        layers += [nn.Linear(hidden_size if i else input_dim, hidden_size), nn.LayerNorm(hidden_size), nn.SiLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers)


class ExpressionVAE(ModelMixin, ConfigMixin):
    """`encode` and `decode` of raw counts of `genes`, which come in this order.

    The decoder's softmax shares a cell's library out. With `library` "chosen" that is the sum over these genes; with
    "all" it is that of the whole transcriptome, and the softmax has one more entry, for all other genes together.
    Encoder and decoder are told the library: what share of a cell some genes have depends on how deep it was read.
    With `batch_names`, of the column `batch_column` of obs, encoder and decoder are told the batch. `latents_mean` and
    `latents_std` are per dimension, measured on the training set when training ends; the last dimension is the
    logarithm of the library size, which has no posterior.
    """

    @register_to_config
    def __init__(
        self,
        genes: list[str],
        latent_channels: int = 16,
        hidden_size: int = 256,
        num_layers: int = 2,
        likelihood: str = "nb",
        library: str = "chosen",
        batch_column: str | None = None,
        batch_names: list[str] | None = None,
        dropout: float = 0.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood {likelihood} is none of {', '.join(LIKELIHOODS)}")
        if library not in LIBRARIES:
            raise ValueError(f"library {library} is none of {', '.join(LIBRARIES)}")
        num_genes, num_batches = len(genes), len(batch_names or [])
        self.encoder = mlp(num_genes + num_batches + 1, hidden_size, num_layers, dropout)
        self.to_moments = nn.Linear(hidden_size, 2 * latent_channels)
        self.decoder = mlp(latent_channels + num_batches + 1, hidden_size, num_layers, dropout)
        self.to_shares = nn.Linear(hidden_size, num_genes + (library == "all"))
        self.to_pi = nn.Linear(hidden_size, num_genes) if LIKELIHOODS[likelihood].has_pi else None
        self.log_theta = nn.Parameter(torch.zeros(num_genes))
        self.register_buffer("log_library_mean", torch.zeros(()))  # of the training cells
        self.register_buffer("log_library_std", torch.ones(()))

    def with_covariates(self, values: Tensor, library_size: Tensor, batch_index: Tensor | None) -> Tensor:
        """`values` (B, ...), the library size of each cell and, if the model knows batches, its batch; -1 is none."""
        log_library = (library_size.float().log() - self.log_library_mean) / self.log_library_std
        known = [values, log_library[:, None].to(values.dtype)]
        if names := self.config.batch_names:
            assert batch_index is not None
            one_hot = torch.arange(len(names), device=values.device) == batch_index[:, None]  # (B, batches)
            known.append(one_hot.to(values.dtype))
        return torch.cat(known, dim=1)

    def encode(self, counts: Tensor, library_size: Tensor, batch_index: Tensor | None = None) -> GaussianPosterior:
        """Raw `counts` (B, G), `library_size` (B,), `batch_index` (B,) -> the posterior of latents (B, D)."""
        values = torch.log1p(counts.float() * (PER_CELL / library_size.float())[:, None])
        values = self.with_covariates(values.to(self.to_moments.weight.dtype), library_size, batch_index)
        return GaussianPosterior.of_moments(self.to_moments(self.encoder(values)))

    def decode(self, latents: Tensor, library_size: Tensor, batch_index: Tensor | None = None) -> CountParameters:
        """Latents (B, D), `library_size` (B,), `batch_index` (B,) -> what is said of the counts (B, G), in fp32."""
        latents = latents.to(self.to_shares.weight.dtype)
        values = self.decoder(self.with_covariates(latents, library_size, batch_index))
        with torch.autocast(values.device.type, enabled=False):  # a logit in half precision is off by 3 % of a count
            values = values.float()
            log_shares = self.to_shares(values).log_softmax(dim=1)[:, : len(self.config.genes)]
            pi_logits = None if self.to_pi is None else self.to_pi(values)
            return CountParameters(log_shares + library_size.float().log()[:, None], self.theta, pi_logits)

    @property
    def theta(self) -> Tensor:
        """(G,) the dispersion, within what the likelihood takes."""
        return LIKELIHOODS[self.config.likelihood].within(self.log_theta.float().exp())

    def forward(self, batch: dict[str, Tensor], noise: Tensor) -> tuple[CountParameters, GaussianPosterior]:
        """Cells and noise (B, D) -> what a sample of the posterior says of the counts, and the posterior."""
        posterior = self.encode(**batch)
        given = {name: value for name, value in batch.items() if name != "counts"}
        return self.decode(posterior.mean + posterior.std * noise, **given), posterior
