"""Diagnostics: how flat a minimum is, and what the auxiliary does.

The functions take a loss `params -> scalar` and a tree of floats; wrap them in
`jax.jit` if they are called more than once. Flatness correlates weakly with
generalisation (Andriushchenko et al, `A Modern Look at the Relationship between
Sharpness and Generalization <https://arxiv.org/abs/2302.07011>`_, 2023): report
flatness, but do not select models by it.
"""

from bilora_jax.sharpness._alignment import Overlap as Overlap
from bilora_jax.sharpness._alignment import cosine as cosine
from bilora_jax.sharpness._alignment import gradient_overlap as gradient_overlap
from bilora_jax.sharpness._alignment import subspace_overlap as subspace_overlap
from bilora_jax.sharpness._alignment import turnover as turnover
from bilora_jax.sharpness._ascent import Ascent as Ascent
from bilora_jax.sharpness._ascent import one_step as one_step
from bilora_jax.sharpness._ascent import projected_ascent as projected_ascent
from bilora_jax.sharpness._average import average as average
from bilora_jax.sharpness._batches import over as over
from bilora_jax.sharpness._estimate import Estimate as Estimate
from bilora_jax.sharpness._hessian import (
  hessian_eigenvalues as hessian_eigenvalues,
)
from bilora_jax.sharpness._hessian import hessian_trace as hessian_trace
from bilora_jax.sharpness._landscape import (
  filter_normalized as filter_normalized,
)
from bilora_jax.sharpness._landscape import landscape as landscape
from bilora_jax.sharpness._low_rank import LowRank as LowRank
from bilora_jax.sharpness._low_rank import low_rank as low_rank
from bilora_jax.sharpness._space import direction as direction
from bilora_jax.sharpness._space import move as move
