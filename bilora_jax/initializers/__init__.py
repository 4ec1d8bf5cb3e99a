"""Initialisations of the primary, to use before training in place of LoRA's.

All of them leave the output of the adapted model unchanged. An initialisation
with a weight other than zero subtracts this weight from the base, so that the
variables change too; after training, `on_original` converts the adapters to
adapters for the original weights.
"""

from bilora_jax.initializers._decompositions import olora as olora
from bilora_jax.initializers._decompositions import pissa as pissa
from bilora_jax.initializers._lora_ga import lora_ga as lora_ga
from bilora_jax.initializers._original import on_original as on_original
from bilora_jax.initializers._random import gaussian as gaussian
from bilora_jax.initializers._random import orthogonal as orthogonal
