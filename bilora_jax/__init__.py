"""Bi-LoRA for JAX: a primary adapter descends the loss, an auxiliary climbs it.

The auxiliary stays in a ball, so that it approximates SAM's perturbation.
"""

from bilora_jax import adapters as adapters
from bilora_jax import baselines as baselines
from bilora_jax import diffusers as diffusers
from bilora_jax import initializers as initializers
from bilora_jax import peft as peft
from bilora_jax import sharpness as sharpness
from bilora_jax import variants as variants
from bilora_jax._adapt import adapt as adapt
from bilora_jax._adapted import Adapted as Adapted
from bilora_jax._ball import hold_ball as hold_ball
from bilora_jax._ball import keep_in_ball as keep_in_ball
from bilora_jax._ball import keep_in_frobenius_ball as keep_in_frobenius_ball
from bilora_jax._factors import Factors as Factors
from bilora_jax._files import load_adapters as load_adapters
from bilora_jax._files import load_spec as load_spec
from bilora_jax._files import save_adapters as save_adapters
from bilora_jax._layouts import Layout as Layout
from bilora_jax._layouts import joined as joined
from bilora_jax._layouts import nnx_lora_layout as nnx_lora_layout
from bilora_jax._layouts import qwix_layout as qwix_layout
from bilora_jax._partition import count_parameters as count_parameters
from bilora_jax._partition import primary as primary
from bilora_jax._partition import without_auxiliary as without_auxiliary
from bilora_jax._spec import LoraSpec as LoraSpec
from bilora_jax._transform import bilora as bilora

__version__ = "0.1.0"
