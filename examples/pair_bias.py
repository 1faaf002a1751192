"""Train triangle attention, as protein models have it, on distances of which most are hidden.

Points lie along a random chain. Of every pair the model is told whether it is near on the chain, and of some pairs a
noisy distance; it learns to say all distances. What two sides of a triangle say of the third travels by triangle
attention (Jumper et al. 2021, "Highly accurate protein structure prediction with AlphaFold", supplement, algorithms 13
and 14): the pairs (i, j) of a point i attend to its pairs (i, k), beside a bias that is made of pair (j, k), through a
gate; then the same in the other direction, the pairs that end at a point. So every attention is one cuflash call whose
batch is i, with a bias that the batch shares and whose gradient sums over it.

Beside it is a twin in float64 whose attention is written out: first the gradients of both are compared, weight by
weight, then both learn from the same chains.

    python examples/pair_bias.py
    python examples/pair_bias.py --length 128 --width 128 --steps 300

The second is for a GPU, where the matrix products outside attention need cuBLAS: pip install nvidia-cublas.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np

import cuflash

Array = Any
"""A NumPy or a CuPy array."""
Pullback = Callable[..., Any]
"""From the gradient with respect to a layer's output to the gradients with respect to what it was given."""
Layer = Callable[..., tuple[Array, Pullback]]
"""Each layer returns its output and its pullback, as cuflash's attention does."""

STEP, FARTHEST, RADII = 1.0, 12.0, 12
"""From a point of the chain to the next; what counts as far; and how many numbers a distance becomes."""


def flash_attention(q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, Pullback]:
    """q, k and v (batch, length, heads, dim) and a bias (1, heads, length, length) to attention and its pullback."""
    out, pullback = cuflash.flash_attn_vjp(q, k, v, attn_bias=bias, bias_grad=True)
    return out, lambda dout: pullback(dout)[:4]  # the last would be of a sink


def naive_attention(xp: ModuleType, q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, Pullback]:
    """The same written out: softmax(q kᵀ / √d + bias) v, with batch × heads × length × length numbers in memory."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (batch, heads, length, dim)
    scale = q.shape[-1] ** -0.5
    scores = q @ k.swapaxes(2, 3) * scale + bias
    p = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)

    def pullback(dout: Array) -> list[Array]:
        dout = dout.swapaxes(1, 2)
        dp = dout @ v.swapaxes(2, 3)
        dscores = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
        grads = scale * dscores @ k, scale * dscores.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout
        return [*(x.swapaxes(1, 2) for x in grads), dscores.sum(axis=0, keepdims=True)]

    return (p @ v).swapaxes(1, 2), pullback


def linear(x: Array, weight: Array) -> tuple[Array, Pullback]:
    """x W, of x (..., inputs) and W (inputs, outputs)."""

    def pullback(dy: Array) -> tuple[Array, Array]:
        return dy @ weight.T, x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])

    return x @ weight, pullback


def norm(x: Array) -> tuple[Array, Pullback]:
    """x divided by its root mean square over the last axis."""
    inverse = ((x * x).mean(axis=-1, keepdims=True) + 1e-5) ** -0.5
    unit = x * inverse
    return unit, lambda dy: inverse * (dy - unit * (dy * unit).mean(axis=-1, keepdims=True))


class Distances:
    """Features of pairs, blocks of triangle attention in both directions and a two-layer network, and a distance.

    The same `seed` gives the same weights wherever they live: `xp` is numpy or cupy.
    """

    def __init__(
        self, xp: ModuleType, attention: Layer, dtype: type, layers: int, heads: int, width: int, seed: int
    ) -> None:
        self.xp, self.attention, self.layers, self.heads = xp, attention, layers, heads
        rng = np.random.default_rng(seed)
        into_residual = (3 * layers * width) ** -0.5  # 3 · layers branches are added up, to a variance of about 1
        weights = {"features": RADII**-0.5 * rng.standard_normal((2 * RADII + 1, width))}
        for i in range(layers):
            for side in ("starting", "ending"):  # q, k, v and the gate, and a number of the bias for every head
                columns = 4 * width + heads
                weights[f"{i}.{side}.project"] = width**-0.5 * rng.standard_normal((width, columns))
                weights[f"{i}.{side}.merge"] = 2 * into_residual * rng.standard_normal((width, width))
            weights[f"{i}.expand"] = width**-0.5 * rng.standard_normal((width, 2 * width))
            weights[f"{i}.shrink"] = into_residual * rng.standard_normal((2 * width, width))
        weights["distance"] = 0.1 * width**-0.5 * rng.standard_normal((width, 1))
        self.weights = {name: xp.asarray(weight, dtype) for name, weight in weights.items()}

    def triangle(self, z: Array, name: str) -> tuple[Array, Pullback]:
        """What attention adds to pairs z (i, j, width), where those of a point i look at each other."""
        w, (points, _, width) = self.weights, z.shape
        normed, normalise = norm(z)
        projected, project = linear(normed, w[f"{name}.project"])
        q, k, v, gate = (
            projected[..., n * width : (n + 1) * width].reshape(points, points, self.heads, -1) for n in range(4)
        )
        bias = projected[None, ..., 4 * width :].transpose(0, 3, 1, 2)  # of pair (j, k), whatever i
        attended, attention = self.attention(q, k, v, self.xp.ascontiguousarray(bias))
        gate = 1 / (1 + self.xp.exp(-gate))
        merged, merge = linear((gate * attended).reshape(z.shape), w[f"{name}.merge"])

        def pullback(dmerged: Array) -> tuple[Array, dict[str, Array]]:
            dgated, dmerge = merge(dmerged)
            dgated = dgated.reshape(gate.shape)
            *dqkv, dbias = attention(gate * dgated)
            dgate = dgated * attended * gate * (1 - gate)
            dprojected = [d.astype(z.dtype).reshape(z.shape) for d in (*dqkv, dgate)]
            dprojected.append(dbias[0].astype(z.dtype).transpose(1, 2, 0))
            dnormed, dproject = project(self.xp.concatenate(dprojected, axis=-1))
            return normalise(dnormed), {f"{name}.project": dproject, f"{name}.merge": dmerge}

        return merged, pullback

    def network(self, z: Array, i: int) -> tuple[Array, Pullback]:
        """What a two-layer network adds to each pair."""
        normed, normalise = norm(z)
        expanded, expand = linear(normed, self.weights[f"{i}.expand"])
        active = expanded * (expanded > 0)
        shrunk, shrink = linear(active, self.weights[f"{i}.shrink"])

        def pullback(dshrunk: Array) -> tuple[Array, dict[str, Array]]:
            dactive, dshrink = shrink(dshrunk)
            dnormed, dexpand = expand(dactive * (expanded > 0))
            return normalise(dnormed), {f"{i}.expand": dexpand, f"{i}.shrink": dshrink}

        return shrunk, pullback

    def ending(self, z: Array, name: str) -> tuple[Array, Pullback]:
        """Triangle attention of the pairs that end at a point."""
        merged, triangle = self.triangle(z.swapaxes(0, 1), name)

        def pullback(dmerged: Array) -> tuple[Array, dict[str, Array]]:
            dz, dweights = triangle(dmerged.swapaxes(0, 1))
            return dz.swapaxes(0, 1), dweights

        return merged.swapaxes(0, 1), pullback

    def distances(self, features: Array) -> tuple[Array, Pullback]:
        """What the model says of all pairs, (length, length), from their features (length, length, 2 RADII + 1)."""
        z, embed = linear(features, self.weights["features"])
        branches = []
        for i in range(self.layers):
            for layer, name in ((self.triangle, f"{i}.starting"), (self.ending, f"{i}.ending"), (self.network, i)):
                added, branch = layer(z, name)
                z = z + added
                branches.append(branch)
        z, last_norm = norm(z)
        said, project = linear(z, self.weights["distance"])

        def pullback(dsaid: Array) -> dict[str, Array]:
            dweights = {}
            dz, dweights["distance"] = project(dsaid[..., None])
            dz = last_norm(dz)
            for branch in reversed(branches):
                dbranch, dnamed = branch(dz)
                dz = dz + dbranch
                dweights |= dnamed
            _, dweights["features"] = embed(dz)
            return dweights

        return FARTHEST / 2 * (1 + said[..., 0]), lambda dsaid: pullback(FARTHEST / 2 * dsaid)

    def loss(self, features: np.ndarray, distances: np.ndarray) -> tuple[Array, Pullback]:
        """Mean square error over all pairs."""
        dtype = self.weights["distance"].dtype
        said, pullback = self.distances(self.xp.asarray(features, dtype))
        error = said - self.xp.asarray(distances, dtype)
        return (error * error).mean(), lambda: pullback(2 / error.size * error)


def chain(rng: np.random.Generator, length: int, known: float) -> tuple[np.ndarray, np.ndarray]:
    """Features of the pairs of a random chain, of which a part is known, and all distances."""
    steps = rng.standard_normal((length, 3)) + 1.5 * np.sin(
        np.arange(length)[:, None] / 4 + 2 * math.pi * rng.random(3)
    )
    points = np.cumsum(STEP * steps / np.linalg.norm(steps, axis=1, keepdims=True), axis=0)
    distances = np.minimum(np.linalg.norm(points[:, None] - points, axis=-1), FARTHEST)
    told = rng.random(distances.shape) < known
    told = np.triu(told) | np.triu(told).T
    noise = np.triu(0.1 * rng.standard_normal(distances.shape))
    centres = np.linspace(0, FARTHEST, RADII)
    measured = np.exp(-((((distances + noise + noise.T)[..., None] - centres) * RADII / FARTHEST / 2) ** 2))
    apart = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    along = np.exp(-((np.minimum(apart, FARTHEST)[..., None] - centres) ** 2) / 2)
    return np.concatenate([told[..., None], told[..., None] * measured, along], axis=-1), distances


class Adam:
    """Adam, with a warm-up and a learning rate that falls to 0 by half a cosine."""

    def __init__(self, model: Distances, steps: int) -> None:
        self.model, self.steps, self.done = model, steps, 0
        self.moments = {name: (0 * weight, 0 * weight) for name, weight in model.weights.items()}

    def step(self, features: np.ndarray, distances: np.ndarray) -> float:
        """Take one step and return the loss before it; to read that number is to wait for a GPU."""
        loss, pullback = self.model.loss(features, distances)
        gradients = pullback()
        rate = 5e-3 * min(1, (self.done + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * self.done / self.steps))
        self.done += 1
        for name, (first, second) in self.moments.items():
            gradient = gradients[name]
            first += (1 - 0.9) * (gradient - first)
            second += (1 - 0.99) * (gradient * gradient - second)
            scale = rate / (1 - 0.9**self.done)
            self.model.weights[name] -= scale * first / ((second / (1 - 0.99**self.done)) ** 0.5 + 1e-8)
        return float(loss)


def errors(model: Distances, twin: Distances, features: np.ndarray, distances: np.ndarray) -> dict[str, float]:
    """How far the gradients of a model are from its twin's: the norm of the difference over that of the gradient."""
    ours, exact = (one.loss(features, distances)[1]() for one in (model, twin))
    return {name: float((((ours[name] - x) ** 2).sum() / (x**2).sum()) ** 0.5) for name, x in exact.items()}


def train(models: list[Distances], *, steps: int, length: int, known: float, seed: int) -> np.ndarray:
    """Train models on the same chains; return their losses, (steps, models)."""
    rng = np.random.default_rng(seed + 1)
    optimisers = [Adam(model, steps) for model in models]
    examples = (chain(rng, length, known) for _ in range(steps))
    return np.array([[optimiser.step(*example) for optimiser in optimisers] for example in examples])


def gpu_or_cpu() -> ModuleType:
    """CuPy if it finds a GPU and can multiply matrices there, else NumPy."""
    try:
        import cupy

        cupy.eye(2) @ cupy.eye(2)
        return cupy
    except Exception:
        return np


def main() -> None:
    """Compare gradients, train both models, then print their curves and what was learnt of a chain not seen before."""
    summary = "Train triangle attention by cuflash, beside a float64 twin whose attention is written out."
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="steps of the optimiser, each on one chain, at least 2")
    parser.add_argument("--length", type=int, default=24, help="points of a chain")
    parser.add_argument("--known", type=float, default=0.3, help="the part of all pairs whose distance is told")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model")
    parser.add_argument("--heads", type=int, default=4, help="heads of attention, a divisor of the width")
    parser.add_argument("--width", type=int, default=32, help="numbers that stand for a pair")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the chains")
    options = parser.parse_args()
    if options.steps < 2 or min(options.length, options.layers, options.heads, options.width) < 1:
        parser.error("--steps must be at least 2, and every size at least 1")
    if not 0 < options.known < 1:
        parser.error("--known must be between 0 and 1")
    if options.width % options.heads:
        parser.error(f"--width {options.width} cannot be divided among --heads {options.heads}")

    xp = gpu_or_cpu()
    shape = {name: getattr(options, name) for name in ("layers", "heads", "width", "seed")}
    model = Distances(xp, flash_attention, np.float32, **shape)
    twin = Distances(xp, partial(naive_attention, xp), np.float64, **shape)
    size = sum(weight.size for weight in model.weights.values())
    print(f"{size:,} weights on {xp.__name__} arrays, {options.length}² pairs of which {options.known:.0%} are told")

    rng = np.random.default_rng(options.seed)
    off = errors(model, twin, *chain(rng, options.length, options.known))
    worst = max(off, key=lambda name: off[name])
    print(
        f"gradients in float32 are within {off[worst]:.1e} of float64's, of all {len(off)} weights; {worst} the worst"
    )

    begin = perf_counter()
    job = {name: getattr(options, name) for name in ("steps", "length", "known", "seed")}
    losses = train([model, twin], **job)
    print("steps      cuflash   written out in float64   (mean square error of a distance)")
    for part in np.array_split(np.arange(options.steps), min(6, options.steps)):
        loss, twin_loss = losses[part].mean(axis=0)
        print(f"{part[0] + 1:4}-{part[-1] + 1:<4} {loss:9.4f} {twin_loss:13.4f}")
    features, distances = chain(rng, options.length, options.known)
    said = np.asarray([x.tolist() for x in model.distances(xp.asarray(features, np.float32))[0]])
    hidden = features[..., 0] == 0
    off_by, spread = (np.sqrt(((x - distances)[hidden] ** 2).mean()) for x in (said, distances[hidden].mean()))
    print(f"of a new chain, hidden distances are off by {off_by:.2f}; all the same, they would be by {spread:.2f}")
    print(f"{perf_counter() - begin:.0f} s")
    assert off[worst] < 1e-4
    assert abs(losses[:, 0] - losses[:, 1]).max() < 0.1 * losses[0, 1]
    assert options.steps < 80 or off_by < 0.6 * spread


if __name__ == "__main__":
    main()
