"""The benchmarks' peer in JAX: the same Llama, loss, clip and AdamW in one jitted function with donated state.

Invariant: the same function as `functitan.models.llama` for an untied config whose vocabulary needs no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import Tensor

import functitan as ft
from functitan.models.llama import LlamaConfig


def make_step(
    c: LlamaConfig, params: ft.tree.Tree, clip: float, rate: float, decay: float, devices: int
) -> Callable[[dict[str, Tensor]], float]:
    """A step from a global batch of torch's tensors to its loss; with several devices, ZeRO-3 over all of them."""
    mesh = Mesh(jax.devices("cpu")[:devices], ("fsdp",))
    weights = ft.tree.map(lambda x: jnp.asarray(x.numpy()), params)
    weights = jax.device_put(weights, jax.tree.map(lambda x: _sharding(mesh, x.shape), weights))
    zeros = jax.tree.map(jnp.zeros_like, weights)
    state = [weights, zeros, jax.tree.map(jnp.copy, zeros), jnp.zeros((), jnp.int32)]
    of_batch = NamedSharding(mesh, PartitionSpec("fsdp"))

    def update(params: Any, first: Any, second: Any, count: Any, tokens: Any, labels: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, tokens, labels, c)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / (norm + 1e-6)), grads)
        count += 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
        one, two = 1 - 0.9**count, 1 - 0.999**count
        new = lambda p, m, v: p * (1 - rate * decay) - rate * (m / one) / (jnp.sqrt(v / two) + 1e-8)
        return jax.tree.map(new, params, first, second), first, second, count, loss

    jitted = jax.jit(update, donate_argnums=(0, 1, 2, 3))

    def step(batch: dict[str, Tensor]) -> float:
        tokens, labels = (
            jax.device_put(batch[name].numpy().astype("int32"), of_batch) for name in ("tokens", "labels")
        )
        *state[:], loss = jitted(*state, tokens, labels)
        return float(loss)

    return step


def loss_of(params: Any, tokens: Any, labels: Any, c: LlamaConfig) -> Any:
    """Mean cross entropy of the labels."""
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        x = x + attention(layer["attention"], norm(x, layer["attention_norm"]["scale"], c), c)
        h = norm(x, layer["mlp_norm"]["scale"], c)
        mlp = layer["mlp"]
        x = x + (jax.nn.silu(h @ mlp["gate"]) * (h @ mlp["up"])) @ mlp["down"]
    logits = norm(x, params["norm"]["scale"], c) @ params["unembedding"]
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def attention(p: Any, h: Any, c: LlamaConfig) -> Any:
    q, k, v = (jnp.einsum("bse,ehd->bshd", h, p[name]) for name in ("q", "k", "v"))
    q, k = rotate(q, c), rotate(k, c)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return jnp.einsum("bshd,hde->bse", out, p["out"])


def norm(x: Any, scale: Any, c: LlamaConfig) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + c.norm_eps) * scale


def rotate(x: Any, c: LlamaConfig) -> Any:
    freqs = 1.0 / c.rope_theta ** (jnp.arange(0, c.head_dim, 2) / c.head_dim)
    angles = jnp.outer(jnp.arange(x.shape[1]), freqs)[:, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), -1)


def _sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Over the first axis that the devices divide."""
    n = mesh.size
    axis = next((i for i, size in enumerate(shape) if size % n == 0), None)
    return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*([None] * axis), "fsdp"))
