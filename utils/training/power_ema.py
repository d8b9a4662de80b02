"""Power-function averages of weights, and any other such average made from stored ones after training.

Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2, arXiv 2312.02696),
section 3 and appendix C. An average at step t weighs the weights of step s by p(s) proportional to s^gamma;
`sigma_rel` is the standard deviation of that profile over t. Its length grows with the run, so there is no decay to
tune beforehand; and because two stored profiles span all the others well, the length is chosen when sampling.
"""

from collections.abc import Sequence

import numpy as np

# gamma > -1/2 is needed for a profile of finite energy; gamma = 0 is the plain mean of all weights.
MAX_SIGMA_REL = 12**-0.5


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile with relative width `sigma_rel`, in (0, 12^-0.5) (appendix C, algorithm 2).

    Raises ValueError for a width that no exponent >= 0 has.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(f"sigma_rel {sigma_rel} is not between 0 and {MAX_SIGMA_REL:.4f}")
    inverse = sigma_rel**-2
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), multiplied out.
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def power_decay(gamma: float, step: int) -> float:
    """How much of the average optimizer step `step`, counted from 1, keeps (section 3.1): nothing of the first."""
    return (1.0 - 1.0 / step) ** (gamma + 1.0)


def inner_products(steps_a: np.ndarray, gammas_a: np.ndarray, steps_b: np.ndarray, gammas_b: np.ndarray) -> np.ndarray:
    """Inner products (A, B) of the profiles (A,) with the profiles (B,), each given by the step it was stored at and
    its exponent (appendix C, algorithm 3): the integral of the product of two (gamma + 1) / t (s / t)^gamma over s, up
    to the earlier t.
    """
    t_a, g_a = steps_a[:, None].astype(np.float64), gammas_a[:, None].astype(np.float64)
    t_b, g_b = steps_b[None].astype(np.float64), gammas_b[None].astype(np.float64)
    earlier = np.minimum(t_a, t_b)
    return (
        (g_a + 1)
        * (g_b + 1)
        / (g_a + g_b + 1)
        * earlier
        / (t_a * t_b)
        * (earlier / t_a) ** g_a
        * (earlier / t_b) ** g_b
    )


def reconstruction_weights(
    steps: Sequence[int], sigma_rels: Sequence[float], target_step: int, target_sigma_rel: float
) -> tuple[np.ndarray, float]:
    """Weights (S,) of stored averages whose sum comes nearest, in least squares, to the average `target_sigma_rel` at
    `target_step` (section 3.2), and the part of that profile's norm which they miss, in [0, 1].
    """
    stored = (np.array(steps), np.array([gamma_of(each) for each in sigma_rels]))
    target = (np.array([target_step]), np.array([gamma_of(target_sigma_rel)]))
    gram = inner_products(*stored, *stored)  # (S, S)
    onto_target = inner_products(*stored, *target)[:, 0]  # (S,)
    weights = np.linalg.lstsq(gram, onto_target, rcond=1e-12)[0]
    norm = inner_products(*target, *target)[0, 0]
    missed = norm - 2 * weights @ onto_target + weights @ gram @ weights
    return weights, float(np.sqrt(max(0.0, missed) / norm))
