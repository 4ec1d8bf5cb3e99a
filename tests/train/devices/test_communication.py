"""What Bi-LoRA adds to the communication of LoRA, read from compiled steps."""

import collections
import dataclasses

import jax
import pytest

from train.data import objectives
from train.devices import mesh as mesh_lib
from train.models.bert import model as bert
from train.planning import hlo
from train.run import assemble, lowering
from train.run import config as config_lib

# Of the auxiliary's rank is nothing else: what is (5, 5) is a Gram.
R1, R2 = 3, 5
ROWS, LENGTH = 8, 12
SIZES = bert.BertConfig(
  vocab_size=88,
  hidden_size=16,
  num_layers=1,
  num_heads=8,
  intermediate_size=48,
  max_positions=LENGTH,
)
# One kernel with its rows over fsdp and its columns over tensor, and one with
# them the other way round.
TARGETS = ".*(query|/output)"
_SCALAR = ()


@dataclasses.dataclass(frozen=True)
class Step:
  """What a compiled step communicates, and how its adapters are laid out.

  Attributes:
    collectives: how often each kind, dtype and shape.
    auxiliary: the shardings of its factors.
  """

  collectives: collections.Counter
  auxiliary: list


def _step(mesh: str, **fields) -> Step:
  layout = mesh_lib.make(mesh, ROWS)
  model = bert.BertClassifier(SIZES, num_classes=2)
  objective = objectives.CLASSIFICATION
  batch = {
    name: jax.ShapeDtypeStruct(shape, "int32")
    for name, shape in {
      "tokens": (ROWS, LENGTH),
      "mask": (ROWS, LENGTH),
      "token_types": (ROWS, LENGTH),
      "labels": (ROWS,),
    }.items()
  }
  inputs = objective.inputs(batch)
  config = config_lib.build({"targets": TARGETS, **fields})
  method = assemble.method_of(config, model, inputs, 10, objective)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  variables, state = lowering.abstract(
    config, method, layout, shapes, bert.logical_axes(shapes)
  )
  lowered = lowering.lower(layout, method, objective, variables, state, batch)
  # Machine code is what takes time, and says nothing of collectives.
  compiled = lowered.compile(
    compiler_options={"xla_backend_optimization_level": 0}
  )
  return Step(
    collections.Counter(
      (c.kind, c.dtype, c.shape)
      for c in hlo.collectives(compiled.as_text())
      for _ in range(c.times)
    ),
    [x.sharding for x in jax.tree.leaves(state.trained.get("auxiliary", {}))],
  )


@pytest.mark.parametrize(
  "mesh", ["data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2"]
)
def test_bilora_adds_only_scalars_and_grams_to_loras_communication(mesh):
  # LoRA of the joined rank: the same gradients are added up.
  lora = _step(mesh, method="lora", rank=R1 + R2)
  bilora = _step(mesh, method="bilora", rank=R1, auxiliary_rank=R2)
  assert lora.collectives.total() > 0
  assert not lora.collectives - bilora.collectives
  added = bilora.collectives - lora.collectives
  gram = ("all-reduce", "f32", (R2, R2))
  assert {x for x in added if x[2] != _SCALAR} <= {gram}
  assert all(kind == "all-reduce" for kind, _, _ in added)
  # A Gram is added up where its factor is in parts, and nowhere else.
  split = sum(not sharding.is_fully_replicated for sharding in bilora.auxiliary)
  assert added[gram] == split
  assert (split > 0) is (mesh != "data=8")
