"""Variants of Bi-LoRA beyond the paper: initialisations, radii and ascents.

Optax itself provides some variants: another auxiliary optimizer, as
`bilora(adam, rho, optax.sign_sgd(rate))`, and a schedule of the radius, as
`bilora(adam, optax.linear_schedule(0.0, 0.05, steps))`.
"""

from bilora_jax.variants._held import OrthonormalA as OrthonormalA
from bilora_jax.variants._moments import rescale_moments as rescale_moments
from bilora_jax.variants._nystroem import nystroem_ascent as nystroem_ascent
from bilora_jax.variants._nystroem_sam import nystroem_sam as nystroem_sam
from bilora_jax.variants._orthonormal import orthonormal_a as orthonormal_a
from bilora_jax.variants._orthonormal import redraw_a as redraw_a
from bilora_jax.variants._power import power_ascent as power_ascent
from bilora_jax.variants._radius import adaptive_radius as adaptive_radius
from bilora_jax.variants._shared import share_a as share_a
from bilora_jax.variants._shared import shared_a as shared_a
from bilora_jax.variants._shared import with_shared_a as with_shared_a
from bilora_jax.variants._start import scattered as scattered
