"""Methods that Bi-LoRA is compared with: gradient estimators and updates."""

from bilora_jax.baselines._balance import balanced as balanced
from bilora_jax.baselines._eflat_lora import eflat_lora as eflat_lora
from bilora_jax.baselines._esam import esam as esam
from bilora_jax.baselines._estimator import (
  GradientEstimator as GradientEstimator,
)
from bilora_jax.baselines._estimator import gradient as gradient
from bilora_jax.baselines._flat_lora import flat_lora as flat_lora
from bilora_jax.baselines._looksam import looksam as looksam
from bilora_jax.baselines._lora_plus import lora_plus as lora_plus
from bilora_jax.baselines._noise import weight_noise as weight_noise
from bilora_jax.baselines._outputs import output_noise as output_noise
from bilora_jax.baselines._s2sam import s2sam as s2sam
from bilora_jax.baselines._sam import sam as sam
from bilora_jax.baselines._wsam import wsam as wsam
