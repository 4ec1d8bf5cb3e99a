"""Where the primary starts: instead of LoRA's own start, and before training.

All leave the adapted model as it is at the first step. What starts at a weight
other than zero takes that weight out of the base, so that variables change too;
`on_original` puts what was trained back beside the weights as they came.
"""

from bilora_jax.initializers._decompositions import olora as olora
from bilora_jax.initializers._decompositions import pissa as pissa
from bilora_jax.initializers._lora_ga import lora_ga as lora_ga
from bilora_jax.initializers._original import on_original as on_original
from bilora_jax.initializers._random import gaussian as gaussian
from bilora_jax.initializers._random import orthogonal as orthogonal
