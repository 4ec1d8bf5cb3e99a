"""Other kinds of adapters than low-rank pairs, for the same ball.

Each adapter is a node of a tree, with a `degree` and a `squared_norm`, like
`bilora_jax.Factors`; `bilora` trains trees that mix them. `adapt` runs the
adapters of kernels, LoKr, LoHa, VeRA and IA3::

  adapted = adapt(model, LoraSpec(), x)
  params = adapters.init(key, adapted, variables, adapters.loha(rank=4))
  y = adapted.apply(variables, params, x)

Soft prompts and bottlenecks are small modules, such as
`adapters.linen.SoftPrompt`, whose parameters are a node. To write your own
node, write a dataclass with the attributes of `Adapter`.
"""

from bilora_jax._nodes import Adapter as Adapter
from bilora_jax._nodes import norm as norm
from bilora_jax._nodes import without_held as without_held
from bilora_jax.adapters import linen as linen
from bilora_jax.adapters import nnx as nnx
from bilora_jax.adapters._bottleneck import Bottleneck as Bottleneck
from bilora_jax.adapters._ia3 import IA3 as IA3
from bilora_jax.adapters._ia3 import ia3 as ia3
from bilora_jax.adapters._init import init as init
from bilora_jax.adapters._loha import LoHa as LoHa
from bilora_jax.adapters._loha import loha as loha
from bilora_jax.adapters._lokr import LoKr as LoKr
from bilora_jax.adapters._lokr import lokr as lokr
from bilora_jax.adapters._prompt import SoftPrompt as SoftPrompt
from bilora_jax.adapters._vera import VeRA as VeRA
from bilora_jax.adapters._vera import vera as vera
