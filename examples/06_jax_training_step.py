"""Train a small language model in JAX, whose every attention is one cuflash call inside jit, grad, scan and remat.

A decoder-only transformer learns to continue, character by character, the manual that comes with Python. Beside it
learns a twin, from the same first weights and the same batches, whose attention is jax.nn.dot_product_attention in
float32. Shown are both losses, which may not differ more than batches do, and the speed of both. On a GPU attention is
bfloat16; where JAX has several devices each takes its part of a batch.

    python examples/06_jax_training_step.py
    python examples/06_jax_training_step.py --width 512 --heads 8 --layers 6 --length 1024
    XLA_FLAGS=--xla_force_host_platform_device_count=2 JAX_PLATFORMS=cpu python examples/06_jax_training_step.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import cuflash

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Causal attention of q (batch, length, heads, dim), and k and v with half as many heads."""
Tree = Any
"""Arrays in dictionaries."""

CHARACTERS = 128


def flash(dtype: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention by cuflash in a dtype."""
    return cuflash.flash_attn_func(*(x.astype(dtype) for x in (q, k, v)), causal=True).astype(q.dtype)


def initial(key: jax.Array, layers: int, width: int, length: int) -> Tree:
    """The first weights; those of all layers in one array."""
    keys = iter(jax.random.split(key, 7))
    shapes = {"qkv": (width, 2 * width), "merge": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    blocks = {name: jax.random.normal(next(keys), (layers, *s)) * s[0] ** -0.5 for name, s in shapes.items()}
    blocks |= {name: blocks[name] * (2 * layers) ** -0.5 for name in ("merge", "down")}
    return {
        "blocks": blocks,
        "characters": 0.1 * jax.random.normal(next(keys), (CHARACTERS, width)),
        "positions": 0.1 * jax.random.normal(next(keys), (length, width)),
    }


def norm(x: jax.Array) -> jax.Array:
    """x divided by its root mean square over the last axis."""
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)


def loss(attention: Attention, heads: int, weights: Tree, ids: jax.Array) -> jax.Array:
    """Mean of −log p(next character), in nats, over `ids` (batch, length + 1)."""
    x = weights["characters"][ids[:, :-1]] + weights["positions"]
    batch, length, width = x.shape

    @jax.checkpoint
    def block(x: jax.Array, w: Tree) -> tuple[jax.Array, None]:
        q, k, v = jnp.split(norm(x) @ w["qkv"], (width, width + width // 2), axis=-1)
        attended = attention(*(y.reshape(batch, length, -1, width // heads) for y in (q, k, v)))
        x = x + attended.reshape(x.shape) @ w["merge"]
        return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(block, x, weights["blocks"])
    logits = norm(x) @ weights["characters"].T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1).mean()


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2,))
def step(attention: Attention, heads: int, state: Tree, ids: jax.Array) -> tuple[Tree, jax.Array]:
    """One step of Adam, and the loss before it."""
    weights, first, second, count = state
    value, gradients = jax.value_and_grad(partial(loss, attention, heads))(weights, ids)
    count = count + 1
    rate = 3e-3 * jnp.minimum(1, count / 20)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, second, gradients)
    weights = jax.tree.map(
        lambda w, m, n: w - rate * (m / (1 - 0.9**count)) / (jnp.sqrt(n / (1 - 0.99**count)) + 1e-8),
        weights, first, second,
    )  # fmt: skip
    return (weights, first, second, count), value


def main() -> None:
    """Train both models, then print their curves and their speed."""
    summary = "Train a character-level transformer in JAX, by cuflash and by jax.nn.dot_product_attention."
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of the optimiser, at least 4")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step, on all devices together")
    parser.add_argument("--length", type=int, default=128, help="characters in a sequence")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the transformer")
    parser.add_argument("--heads", type=int, default=4, help="heads of queries, an even divisor of the width")
    parser.add_argument("--width", type=int, default=128, help="numbers that stand for a character")
    options = parser.parse_args()
    if options.steps < 4 or options.heads % 2 or options.width % options.heads or options.batch % jax.device_count():
        parser.error("expected 4 steps or more, an even number of heads that divides --width, and a batch for devices")

    on_gpu = jax.default_backend() == "gpu"
    models = {
        "cuflash": partial(flash, jnp.bfloat16 if on_gpu else jnp.float32),
        "jax.nn": partial(jax.nn.dot_product_attention, is_causal=True),
    }
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))
    states = {}
    for name in models:
        weights = initial(jax.random.key(0), options.layers, options.width, options.length)
        zeros = jax.tree.map(jnp.zeros_like, weights)
        states[name] = jax.device_put((weights, zeros, jax.tree.map(jnp.copy, zeros), jnp.zeros(())), whole)
    print(f"{sum(x.size for x in jax.tree.leaves(weights)):,} weights on {jax.device_count()} {jax.default_backend()}")

    text = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace"), np.uint8)
    rng = np.random.default_rng(0)
    losses, seconds = np.zeros((2, options.steps, len(models)))
    for i in range(options.steps):
        starts = rng.integers(len(text) - options.length, size=options.batch)
        ids = jax.device_put(text[starts[:, None] + np.arange(options.length + 1)].astype(np.int32), divided)
        for j, (name, attention) in enumerate(models.items()):
            begin = perf_counter()
            states[name], value = step(attention, options.heads, states[name], ids)
            losses[i, j] = value
            seconds[i, j] = perf_counter() - begin

    print("steps      cuflash      jax.nn   (mean loss in nats a character)")
    tenths = np.array_split(np.arange(options.steps), min(10, options.steps))
    curves = np.array([losses[steps].mean(axis=0) for steps in tenths])
    for steps, (ours, twin) in zip(tenths, curves, strict=True):
        print(f"{steps[0] + 1:4}-{steps[-1] + 1:<4} {ours:8.3f} {twin:11.3f}")
    apart = abs(curves[:, 0] - curves[:, 1]).max()
    noise = abs(np.diff(losses[options.steps // 2 :, 1])).mean()
    print(f"the curves are {apart:.1e} apart at most; from batch to batch the loss changes by {noise:.1e}")
    speeds = options.batch * options.length / np.median(seconds, axis=0)
    print(f"{speeds[0]:,.0f} tokens/s with cuflash, {speeds[1]:,.0f} with jax.nn")
    assert apart < noise


if __name__ == "__main__":
    main()
