"""Attention: one function, and the kernels that it chooses from.

Shapes: B batch, L queries, S keys, H heads, J key-value heads, G = H/J, K head
width, M segments.

The kernels 'matmul' and 'xla' keep an array of L x S; 'cudnn' and 'splash' do
not. If the devices of a mesh share the tokens of a row, each device computes
its own queries and gathers all keys and values.

The kernel is chosen when a program is traced, and not by
`jax.lax.platform_dependent`. That function traces every branch, but cuDNN's
branch needs a GPU's library when it is traced. For a gradient, it would also
keep the residuals of all branches.
"""

import dataclasses
import functools
from typing import Any

from flax.linen import spmd
import jax
from jax import typing
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp

from . import splits

CHOICES = ("auto", "matmul", "xla", "cudnn", "splash")

# A finite value keeps the softmax finite when all keys of a query are masked.
_MASKED = -1e9
_HALVES = (jnp.bfloat16, jnp.float16)
# Splash attention's blocks are multiples of a TPU's lanes. The largest block
# that divides the length is used.
_LANES, _BLOCKS = 128, (512, 256, 128)
# Measured on an H200: for rows of 64 tokens, cuDNN took 1.3 times as long as
# XLA. For packed rows of 64 tokens, it took 4 to 7 times as long. For rows of
# 1,024 tokens, it took half as long.
_SHORT_ON_GPU = 128

_Spec = jax.sharding.PartitionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
  """Which keys a query sees, in the form that a kernel takes.

  Attributes:
    kernel: one of `CHOICES`, but not 'auto'.
    causal: whether the keys after a query are hidden from it.
    window: the most keys that a query sees, which are its own key and those
      before it; None: no limit, or the mask has it.
    mask: bool (B, L, S), (B, 1, S) or (1, L, S), True where a query sees a key.
      If it is given, it holds everything.
    lengths: the tokens of each segment of a row, in order, int32 (B, M). A
      query sees its own segment. The tokens after the last segment are padding.
    segment_ids: int32 (B, L). A query sees the keys that have its id.
    parts: the number of devices that share the queries of a row. The other
      attributes describe whole rows.
    softcap: c of `capped`, which bounds the scores; None: they are unbounded.
  """

  kernel: str = dataclasses.field(metadata={"static": True})
  causal: bool = dataclasses.field(default=False, metadata={"static": True})
  window: int | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  mask: jax.Array | None = None
  lengths: jax.Array | None = None
  segment_ids: jax.Array | None = None
  parts: int = dataclasses.field(default=1, metadata={"static": True})
  softcap: float | None = dataclasses.field(
    default=None, metadata={"static": True}
  )


def chosen(
  choice: str,
  dtype: typing.DTypeLike,
  head_size: int,
  length: int,
  softcap: bool = False,
) -> str:
  """Returns the kernel of a choice; 'auto' depends on the devices.

  The devices are those of the mesh, or of this process's backend if there is no
  mesh. 'auto' means:
    on CPUs, 'matmul': batched products with the heads in front, whose backward
      pass is fast in XLA;
    on TPUs, 'splash', but 'xla' for rows shorter than its largest block;
    on GPUs, 'cudnn', but 'xla' for rows of less than 128 tokens, and for a
      dtype or a width that cuDNN does not support (`without_cudnn`).

  Args:
    choice: one of `CHOICES`.
    dtype: the dtype of queries, keys and values.
    head_size: K.
    length: the number of queries of a row on one device.
    softcap: whether the scores are bounded. Only 'matmul' and 'splash' can
      bound them, so 'auto' is then one of these two.

  Returns:
    One of `CHOICES`, but not 'auto'.

  Raises:
    ValueError: the choice is unknown, or its kernel does not support the
      arguments.
  """
  if choice not in CHOICES:
    raise ValueError(
      f"attention must be one of {', '.join(CHOICES)}, got {choice!r}."
    )
  reason = without_cudnn(dtype, head_size)
  if choice == "cudnn" and reason:
    raise ValueError(f"attention='cudnn' {reason}.")
  if softcap and choice in ("xla", "cudnn"):
    raise ValueError(
      f"attention={choice!r} has no softcap, which this model's attention has; "
      "matmul and splash have."
    )
  if choice != "auto":
    return choice
  platform = _platform()
  if platform == "cpu":
    return "matmul"
  if platform == "tpu" and length >= _BLOCKS[0]:
    return "splash"
  if softcap:
    return "matmul"
  long = length >= _SHORT_ON_GPU
  if platform == "gpu" and _is_cuda() and long and not reason:
    return "cudnn"
  return "xla"


def without_cudnn(dtype: typing.DTypeLike, head_size: int) -> str | None:
  """Returns why cuDNN has no kernel for these arguments, or None."""
  if jnp.dtype(dtype) not in _HALVES:
    return f"takes bfloat16 or float16, got {jnp.dtype(dtype)}"
  widest = 256 if _is_hopper() else 128
  if head_size > widest or head_size % 8:
    return (
      f"takes heads whose width is a multiple of 8 and at most {widest}, got "
      f"{head_size}"
    )
  return None


def causal(
  kernel: str,
  length: int,
  lengths: jax.Array | None = None,
  window: int | None = None,
) -> Seen:
  """Returns what causal attention sees: earlier tokens of the same segment.

  A row of one segment needs only the causal mask, because its padding comes
  last. The queries are split as the mesh splits the axis `length`. For split
  queries, cuDNN gets a mask, because its causal flag assumes that the first
  query belongs to the first key. Splash attention needs parts of whole blocks;
  other parts use 'xla'.

  Args:
    kernel: from `chosen`.
    length: L.
    lengths: the tokens of each segment of a row, int (B, M), with 0 for missing
      segments. None: a row is one segment.
    window: the most tokens that a token sees, itself included (sliding window
      attention, Beltagy et al., arXiv 2004.05150); None: all.
  """
  if lengths is not None and lengths.shape[1] == 1:
    lengths = None
  if window is not None and window >= length:
    window = None
  parts = splits.parts("length")
  whole = lengths is None or (window is None and _is_hopper())
  if kernel == "cudnn" and whole and parts == 1:
    return Seen(kernel, causal=True, window=window, lengths=lengths)
  segment_ids = None if lengths is None else ids(lengths, length)
  if kernel == "splash" and (parts == 1 or length % (parts * _LANES) == 0):
    return Seen(
      kernel, causal=True, window=window, segment_ids=segment_ids, parts=parts
    )
  mask_1xLxL = jnp.tri(length, dtype=bool)[None]
  if window is not None:
    mask_1xLxL &= ~jnp.tri(length, k=-window, dtype=bool)
  mask_BxLxL = mask_1xLxL
  if segment_ids is not None:
    same_BxLxL = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask_BxLxL = same_BxLxL & mask_1xLxL
  rows = None if segment_ids is None else "batch"
  mask_BxLxL = spmd.with_logical_constraint(mask_BxLxL, (rows, "length", None))
  # cuDNN adds the mask to the scores, and supports only even lengths for that.
  odd = kernel == "cudnn" and length // parts % 2
  kernel = "xla" if kernel == "splash" or odd else kernel
  return Seen(kernel, mask=mask_BxLxL, parts=parts)


def masked(kernel: str, mask: jax.Array) -> Seen:
  """Returns what a mask shows, for the steps of generation.

  Args:
    kernel: from `chosen`.
    mask: True where a query sees a key, bool (B, L, S).
  """
  return Seen("matmul" if kernel == "matmul" else "xla", mask=mask)


def real(kernel: str, mask: jax.Array | None = None) -> Seen:
  """Returns what an encoder sees: all tokens of a row, except padding.

  Args:
    kernel: from `chosen`.
    mask: True at a real token, bool (B, L); padding comes last. None: there is
      no padding.
  """
  if mask is None:
    return Seen(kernel)
  if kernel == "cudnn":
    # A row of padding sees its first token, else its softmax would be NaN.
    lengths_Bx1 = jnp.maximum(mask.sum(1, keepdims=True), 1)
    return Seen(kernel, lengths=lengths_Bx1)
  if kernel == "splash":
    return Seen(kernel, segment_ids=mask.astype(jnp.int32))
  return Seen(kernel, mask=mask[:, None])


def ids(lengths: jax.Array, length: int) -> jax.Array:
  """Returns segment ids from 1, and 0 at padding, int (B, L).

  Args:
    lengths: the tokens of each segment of a row, int (B, M).
    length: L.
  """
  stops_Bx1xM = jnp.cumsum(lengths, 1)[:, None]
  past_BxLxM = jnp.arange(length)[:, None] >= stops_Bx1xM
  return jnp.where(past_BxLxM.all(-1), 0, past_BxLxM.sum(-1) + 1)


def positions(lengths: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
  """Returns the place of each token in its segment, from 0, int (B, L).

  Args:
    lengths: as in `causal`.
    shape: the shape of the tokens, (B, L).
  """
  places_BxL = jnp.broadcast_to(jnp.arange(shape[1]), shape)
  if lengths is None or lengths.shape[1] == 1:
    return places_BxL
  stops_Bx1xM = jnp.cumsum(lengths, 1)[:, None]
  past_BxLxM = places_BxL[..., None] >= stops_Bx1xM
  return places_BxL - jnp.where(past_BxLxM, stops_Bx1xM, 0).max(-1)


def capped(x: jax.Array, softcap: float | None) -> jax.Array:
  """Returns c tanh(x / c), between -c and c (Gemma 2, arXiv 2408.00118)."""
  return x if softcap is None else softcap * jnp.tanh(x / softcap)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  seen: Seen,
  softcap: float | None = None,
) -> jax.Array:
  """Returns the softmax of scaled products of queries and keys, times values.

  The softmax is float32; the products have the dtype of the arguments.

  Args:
    q: queries (B, L, H, K).
    k: keys (B, S, J, K); J divides H.
    v: values (B, S, J, K).
    seen: from `causal`, `masked` or `real`. If there is a softcap, the kernel
      must be one that `chosen` returned for a softcap.
    softcap: c of `capped`, for the scaled products; None: they are unbounded.

  Returns:
    (B, L, H, K) in the dtype of q. The values at padding are finite, but have
    no meaning.
  """
  kernel = seen.kernel
  if softcap is not None:
    # `masked` returns 'xla' for 'splash', but 'xla' cannot bound scores.
    kernel = "matmul" if kernel == "xla" else kernel
    seen = dataclasses.replace(seen, kernel=kernel, softcap=softcap)
  if kernel in ("matmul", "xla") and seen.parts == 1:
    # XLA itself splits these kernels over the devices of a mesh.
    return _KERNELS[kernel](q, k, v, seen)
  return _on_mesh(q, k, v, seen)


def _matmul(q_BxLxHxK, k_BxSxJxK, v_BxSxJxK, seen):
  mask_BxLxS = seen.mask
  batch, length, heads, size = q_BxLxHxK.shape
  slots, groups = k_BxSxJxK.shape[1:3]

  def in_front(x):
    return x.transpose(0, 2, 1, 3)

  # All queries that share a key are rows of one matrix product.
  q_BxJxGLxK = in_front(q_BxLxHxK).reshape(batch, groups, -1, size)
  scores_BxHxLxS = jnp.matmul(
    q_BxJxGLxK,
    in_front(k_BxSxJxK).swapaxes(2, 3),
    preferred_element_type=jnp.float32,
  ).reshape(batch, heads, length, slots)
  scores_BxHxLxS = capped(scores_BxHxLxS * size**-0.5, seen.softcap)
  if mask_BxLxS is not None and mask_BxLxS.shape[1] == 1:
    # An added mask does not need to be kept for the backward pass.
    scores_BxHxLxS += jnp.where(mask_BxLxS, 0.0, _MASKED)[:, None]
  elif mask_BxLxS is not None:
    scores_BxHxLxS = jnp.where(mask_BxLxS[:, None], scores_BxHxLxS, _MASKED)
  probs_BxHxLxS = jax.nn.softmax(scores_BxHxLxS).astype(v_BxSxJxK.dtype)
  y_BxJxGLxK = jnp.matmul(
    probs_BxHxLxS.reshape(batch, groups, -1, slots), in_front(v_BxSxJxK)
  )
  return in_front(y_BxJxGLxK.reshape(batch, heads, length, size))


def _xla(q, k, v, seen):
  mask = None if seen.mask is None else seen.mask[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _cudnn(q, k, v, seen):
  mask, lengths = seen.mask, seen.lengths
  if lengths is not None and lengths.shape[1] > 1:
    return _cudnn_packed(q, k, v, lengths, seen.causal)
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=None if mask is None else mask[:, None],
    is_causal=seen.causal,
    local_window_size=None if seen.window is None else (seen.window - 1, 0),
    key_value_seq_lengths=(
      None if lengths is None else lengths[:, 0].astype(jnp.int32)
    ),
    implementation="cudnn",
  )


def _cudnn_packed(q, k, v, lengths_BxM, causal):
  """Computes each segment by itself, without a mask (cuDNN's ragged layout)."""
  length, heads, size = q.shape[1:]
  # jax 0.10 computes the keys' offsets with the number of the queries' heads.
  k, v = (jnp.repeat(x, heads // x.shape[2], 2) for x in (k, v))
  # Padding is a segment too, because cuDNN writes only the tokens of segments.
  padding_Bx1 = length - lengths_BxM.sum(1, keepdims=True)
  lengths_BxM = jnp.concatenate([lengths_BxM, padding_Bx1], 1)
  lengths_BxM = lengths_BxM.astype(jnp.int32)
  starts_BxM = jnp.cumsum(lengths_BxM, 1) - lengths_BxM
  there_BxM = lengths_BxM > 0
  lengths_BxM = jnp.where(there_BxM, lengths_BxM, -1)
  offsets_BxM1 = jnp.pad(
    jnp.where(there_BxM, starts_BxM, -1), ((0, 0), (0, 1)), constant_values=-1
  )
  kind = cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING
  return cudnn.dot_product_attention(
    q,
    k,
    v,
    q_seqlen=lengths_BxM,
    kv_seqlen=lengths_BxM,
    q_offsets=offsets_BxM1,
    kv_offsets=offsets_BxM1,
    scale=size**-0.5,
    mask_type=kind,
  )


def _splash(q, k, v, seen, program):
  length, size = q.shape[1], q.shape[-1]
  ids_BxS = seen.segment_ids
  if -k.shape[1] % _LANES and ids_BxS is None:
    ids_BxS = jnp.ones(k.shape[:2], jnp.int32)

  def padded(x):
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % _LANES)
    return jnp.pad(x, padding)

  q, k, v = (padded(x).transpose(0, 2, 1, 3) for x in (q * size**-0.5, k, v))
  segments: Any = None
  if ids_BxS is not None:
    own_BxL = ids_BxS
    if seen.parts > 1:
      first = jax.lax.axis_index(splits.axes("length")) * length
      own_BxL = jax.lax.dynamic_slice_in_dim(ids_BxS, first, length, 1)
    segments = splash.SegmentIds(padded(own_BxL), padded(ids_BxS))
  y_BxHxLxK = jax.vmap(program)(q, k, v, segments)
  return y_BxHxLxK.transpose(0, 2, 1, 3)[:, :length].astype(q.dtype)


def _splash_program(length: int, heads: int, seen: Seen) -> Any:
  """Returns the kernel for rows of this length and `heads` on each device."""
  whole = length + -length % _LANES
  block = next(x for x in _BLOCKS if whole // seen.parts % x == 0)
  one: Any = splash.CausalMask if seen.causal else splash.FullMask
  if seen.window is not None:
    one = functools.partial(
      splash.LocalMask, window_size=(seen.window - 1, 0), offset=0
    )
  return splash.make_splash_mha(
    splash.MultiHeadMask([one((whole, whole))] * heads),
    attn_logits_soft_cap=seen.softcap,
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,
    q_seq_shards=seen.parts,
  )


_KERNELS = {
  "matmul": _matmul,
  "xla": _xla,
  "cudnn": _cudnn,
  "splash": _splash,
}


def _on_mesh(q, k, v, seen) -> jax.Array:
  """Runs a kernel on each device's rows, queries and heads."""
  kernel, mesh = _KERNELS[seen.kernel], jax.sharding.get_abstract_mesh()
  # Heads are split if the mesh can split the keys' heads. If not, each device
  # has all heads.
  rows, heads = (
    splits.axes(name) if size % splits.parts(name) == 0 else ()
    for name, size in (("batch", k.shape[0]), ("kv_heads", k.shape[2]))
  )
  queries = splits.axes("length") if seen.parts > 1 else ()
  spec, by_row = _Spec(rows, queries, heads), _Spec(rows)
  programs: tuple[Any, ...] = ()
  if seen.kernel == "splash":
    split = splits.parts("kv_heads") if heads else 1
    programs = (_splash_program(q.shape[1], q.shape[2] // split, seen),)
  if mesh.empty or mesh.size == 1:
    return kernel(q, k, v, seen, *programs)
  by_query = jax.sharding.NamedSharding(mesh, _Spec(None, queries))

  def on_device(q, k, v, seen, *programs):
    if queries:
      k, v = (
        jax.lax.all_gather(x, queries, axis=1, tiled=True) for x in (k, v)
      )
    return kernel(q, k, v, seen, *programs)

  mask = seen.mask
  of_mask = _Spec(rows if mask is None or len(mask) > 1 else (), queries)
  return jax.shard_map(
    on_device,
    in_specs=(
      *(spec, spec, spec),
      dataclasses.replace(
        seen,
        mask=None if mask is None else of_mask,
        lengths=None if seen.lengths is None else by_row,
        segment_ids=None if seen.segment_ids is None else by_row,
      ),
      # A program has blocks for the queries of each part.
      *(x.manual_sharding_spec(by_query) for x in programs),
    ),
    out_specs=spec,
    check_vma=False,
  )(q, k, v, seen, *programs)


def _platform() -> str:
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def _is_hopper() -> bool:
  """Whether the GPU is of NVIDIA's Hopper generation or newer."""
  return cudnn.check_compute_capability("9.0")


def _is_cuda() -> bool:
  return "cuda" in jax.local_devices()[0].client.platform_version
