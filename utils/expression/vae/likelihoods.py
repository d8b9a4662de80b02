"""Likelihoods of raw counts: what the decoder of expression gives, as distributions to train with and to draw from.

All are written with the logarithm of the mean, which a softmax gives without rounding, and are evaluated in fp32. One
of your own is a subclass with a row in `LIKELIHOODS`.
"""

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, NegativeBinomial, Normal

# Above, a negative binomial is a Poisson distribution to within 0.1 % of its variance at a mean of one, and in fp32
# the difference of two lgamma(theta) would be rounded to more than that.
MIN_THETA, MAX_THETA = 1e-3, 1e3
START = (1e-2, 1e2)  # well within: a theta that begins at a limit gets no gradient that would lead it away
MIN_STD = 1e-2
LIBRARIES = ("chosen", "all")  # what the library size of a cell is summed over: the genes that are modelled, or all


class CountParameters(NamedTuple):
    """What a decoder says of the counts of cells."""

    log_mu: Tensor  # (B, G) logarithm of the mean, of zinb before counts are lost
    theta: Tensor  # (G,) inverse dispersion of nb and zinb: variance = mu + mu^2 / theta; gaussian: standard deviation
    pi_logits: Tensor | None = None  # (B, G) of zinb: of the probability that a count is lost

    def cpu(self) -> "CountParameters":
        """On the CPU, without gradients."""
        return CountParameters(*(None if each is None else each.detach().cpu() for each in self))  # type: ignore[arg-type]


class ZeroInflatedNegativeBinomial(Distribution):
    """A negative binomial of which counts are lost (read as zero) with probability sigmoid(`pi_logits`).

    Source: Lopez et al. 2018, scVI, Nature Methods 15, supplementary note 1.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: NegativeBinomial, pi_logits: Tensor):
        self.base, self.pi_logits = base, pi_logits
        super().__init__(base.batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(-self.pi_logits) * self.base.mean

    @property
    def variance(self) -> Tensor:
        lost = torch.sigmoid(self.pi_logits)
        return (1 - lost) * (self.base.variance + lost * self.base.mean.square())

    def log_prob(self, value: Tensor) -> Tensor:
        log_kept, log_lost = F.logsigmoid(-self.pi_logits), F.logsigmoid(self.pi_logits)
        counted = log_kept + self.base.log_prob(value)
        return torch.where(value < 0.5, torch.logaddexp(log_lost, counted), counted)


class Likelihood:
    """A family of distributions of counts, and how to draw from it."""

    has_pi = False  # whether the decoder gives `pi_logits`

    def distribution(self, parameters: CountParameters) -> Distribution:
        """Of counts (B, G)."""
        raise NotImplementedError

    limits = (MIN_THETA, MAX_THETA)

    def within(self, theta: Tensor) -> Tensor:
        """`theta` (G,) within what can be computed."""
        return theta.clamp(*self.limits)

    def initial_theta(self, mu_squares: np.ndarray, residual_squares: np.ndarray, mus: np.ndarray) -> np.ndarray:
        """`theta` (G,) by moments, from means over cells of mu^2, (count - mu)^2 and mu, each (G,)."""
        raise NotImplementedError

    def draw(self, parameters: CountParameters, row: int, generator: np.random.Generator) -> np.ndarray:
        """Counts (G,) of cell `row`: whole numbers from zero up, float32."""
        raise NotImplementedError


class NegativeBinomialLikelihood(Likelihood):
    """Overdispersed counts. Source: Lopez et al. 2018, scVI."""

    def distribution(self, parameters: CountParameters) -> NegativeBinomial:
        logits = parameters.log_mu - parameters.theta.log()
        return NegativeBinomial(parameters.theta, logits=logits, validate_args=False)

    def initial_theta(self, mu_squares: np.ndarray, residual_squares: np.ndarray, mus: np.ndarray) -> np.ndarray:
        excess = np.maximum(residual_squares - mus, mu_squares / MAX_THETA)
        return np.clip(mu_squares / np.maximum(excess, 1e-12), *START)

    def draw(self, parameters: CountParameters, row: int, generator: np.random.Generator) -> np.ndarray:
        theta = parameters.theta.double().numpy()
        mu = parameters.log_mu[row].double().exp().numpy()
        return generator.negative_binomial(theta, theta / (theta + mu)).astype(np.float32)


class ZeroInflatedLikelihood(NegativeBinomialLikelihood):
    """As `nb`, with counts that are lost."""

    has_pi = True

    def distribution(self, parameters: CountParameters) -> Distribution:  # type: ignore[override]
        assert parameters.pi_logits is not None
        return ZeroInflatedNegativeBinomial(super().distribution(parameters), parameters.pi_logits)

    def draw(self, parameters: CountParameters, row: int, generator: np.random.Generator) -> np.ndarray:
        assert parameters.pi_logits is not None
        lost = torch.sigmoid(parameters.pi_logits[row].double()).numpy()
        counts = super().draw(parameters, row, generator)
        return np.where(generator.random(len(counts)) < lost, np.float32(0), counts)


class GaussianLikelihood(Likelihood):
    """A normal distribution with a standard deviation for each gene; drawn counts are rounded, and zero from below."""

    limits = (MIN_STD, float("inf"))

    def distribution(self, parameters: CountParameters) -> Normal:
        return Normal(parameters.log_mu.exp(), parameters.theta, validate_args=False)

    def initial_theta(self, mu_squares: np.ndarray, residual_squares: np.ndarray, mus: np.ndarray) -> np.ndarray:
        return np.clip(np.sqrt(residual_squares), *self.limits)

    def draw(self, parameters: CountParameters, row: int, generator: np.random.Generator) -> np.ndarray:
        mu, std = parameters.log_mu[row].double().exp().numpy(), parameters.theta.double().numpy()
        return np.maximum(np.rint(generator.normal(mu, std)), 0).astype(np.float32)


LIKELIHOODS: dict[str, Likelihood] = {
    "nb": NegativeBinomialLikelihood(),
    "zinb": ZeroInflatedLikelihood(),
    "gaussian": GaussianLikelihood(),
}
