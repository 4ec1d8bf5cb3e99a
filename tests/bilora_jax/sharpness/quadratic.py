"""A quadratic loss over a tree, and its maximum over a ball in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

SHAPES = {"u": (3,), "v": (2, 2)}
SIZE = 7


def tree(flat):
  """Seven numbers as float32 parameters."""
  return {"u": jnp.float32(flat[:3]), "v": jnp.float32(flat[3:].reshape(2, 2))}


def flat(params):
  """Undoes `tree`, in float64."""
  return np.concatenate(
    [
      np.asarray(params[k].astype(jnp.float32), np.float64).ravel()
      for k in "uv"
    ]
  )


def symmetric(eigenvalues, seed=0):
  rng = np.random.default_rng(seed)
  q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
  return (q * eigenvalues) @ q.T


def loss(hessian, linear):
  """params -> 1/2 w^T H w + c^T w."""
  hessian, linear = jnp.float32(hessian), jnp.float32(linear)

  def value(params):
    w = jnp.concatenate([params[k].astype(jnp.float32).ravel() for k in "uv"])
    product = jnp.matmul(hessian, w, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * w @ product + linear @ w

  return value


def highest(hessian, gradient, radius):
  """max of 1/2 e^T H e + g^T e over the ball, by the secular equation."""
  sigma, q = np.linalg.eigh(hessian)
  g = q.T @ gradient

  def value(e):
    return 0.5 * np.sum(sigma * e**2) + g @ e

  if sigma[-1] < 0 and np.linalg.norm(g / sigma) <= radius:
    return value(-g / sigma)
  least = max(sigma[-1], 0.0)
  mu = scipy.optimize.brentq(
    lambda mu: np.linalg.norm(g / (mu - sigma)) - radius,
    least + 1e-9,
    least + np.linalg.norm(g) / radius + 1.0,
    xtol=1e-14,
  )
  return value(g / (mu - sigma))
