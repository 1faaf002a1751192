"""Train a small language model whose every attention, and its gradient, is one cuflash call.

A decoder-only transformer learns to continue, character by character, the manual that comes with Python: what
help("while") shows. Forward and backward are array code for NumPy arrays and CuPy arrays alike; on a GPU attention is
bfloat16, all else float32. Beside it learns a twin, from the same first weights and the same batches, whose attention
is written out in float32. Shown are both losses, which may not differ more than batches do, the speed of both, and what
the model writes in the end.

    python examples/02_training_step.py
    python examples/02_training_step.py --width 512 --heads 8 --layers 6 --length 1024

The second is for a GPU, where the matrix products outside attention need cuBLAS: pip install nvidia-cublas.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics
from time import perf_counter
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import Progress

import cuflash

Array = Any
"""A NumPy or a CuPy array."""
Pullback = Callable[..., Any]
"""From the gradient with respect to a layer's output to the gradients with respect to what it was given."""
Layer = Callable[..., tuple[Array, Pullback]]
"""Each layer returns its output and its pullback, as cuflash's attention does."""

CHARACTERS = "\n" + "".join(map(chr, range(ord(" "), 127)))
"""All that the model knows."""

flash_attention: Layer = partial(cuflash.flash_attn_vjp, causal=True)
"""q, k and v (batch, length, heads, dim) and `alibi_slopes` (heads,) to causal attention and its pullback."""


def naive_attention(xp: ModuleType, q: Array, k: Array, v: Array, alibi_slopes: Array) -> tuple[Array, Pullback]:
    """The same written out: softmax(q kᵀ / √d − slope · distance) v, length × length probabilities in memory."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (batch, heads, length, dim)
    scale, positions = q.shape[-1] ** -0.5, xp.arange(q.shape[2], dtype=q.dtype)
    distances = positions[:, None] - positions
    scores = q @ k.swapaxes(2, 3) * scale - alibi_slopes[:, None, None] * distances
    scores = xp.where(distances >= 0, scores, -math.inf)
    p = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)

    def pullback(dout: Array) -> list[Array]:
        dout = dout.swapaxes(1, 2)
        dp = dout @ v.swapaxes(2, 3)
        dscores = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
        return [x.swapaxes(1, 2) for x in (dscores @ k, dscores.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout)]

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


def squared_relu(x: Array) -> tuple[Array, Pullback]:
    """max(x, 0)²."""
    positive = x * (x > 0)
    return positive * positive, lambda dy: 2 * positive * dy


class Transformer:
    """A pre-norm decoder: embeddings, `layers` blocks of attention and a two-layer network, a norm, and logits.

    The same `seed` gives the same weights wherever they live: `xp` is numpy or cupy. Only attention is computed in
    `attention_dtype`.
    """

    def __init__(
        self, xp: ModuleType, attention: Layer, attention_dtype: type, layers: int, heads: int, width: int, seed: int,
        dtype: type = np.float32,
    ) -> None:  # fmt: skip
        self.xp, self.layers, self.heads = xp, layers, heads
        self.attention, self.attention_dtype = attention, attention_dtype
        rng = np.random.default_rng(seed)
        into_residual = (2 * layers * width) ** -0.5  # 2 · layers branches are added up, to a variance of about 1
        weights = {"embedding": rng.standard_normal((len(CHARACTERS), width))}
        for i in range(layers):
            weights[f"{i}.qkv"] = width**-0.5 * rng.standard_normal((width, 3 * width))
            weights[f"{i}.merge"] = into_residual * rng.standard_normal((width, width))
            weights[f"{i}.expand"] = width**-0.5 * rng.standard_normal((width, 4 * width))
            weights[f"{i}.shrink"] = 0.5 * into_residual * rng.standard_normal((4 * width, width))
        weights["logits"] = 0.1 * width**-0.5 * rng.standard_normal((width, len(CHARACTERS)))
        self.weights = {name: xp.asarray(weight, dtype) for name, weight in weights.items()}
        self.one_hot = xp.eye(len(CHARACTERS), dtype=dtype)
        self.slopes = xp.asarray(2.0 ** -np.arange(heads), np.float32)  # of ALiBi: each head looks twice as far

    def block(self, x: Array, i: int) -> tuple[Array, Pullback]:
        """x plus attention, plus the two-layer network, each of the normalised sum before it."""
        w, (batch, length, _) = self.weights, x.shape
        normed, attention_norm = norm(x)
        qkv, project = linear(normed, w[f"{i}.qkv"])
        qkv = qkv.astype(self.attention_dtype).reshape(batch, length, 3, self.heads, -1)
        attended, attention = self.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], alibi_slopes=self.slopes)
        merged, merge = linear(attended.astype(x.dtype).reshape(x.shape), w[f"{i}.merge"])
        x = x + merged
        normed, network_norm = norm(x)
        expanded, expand = linear(normed, w[f"{i}.expand"])
        active, activation = squared_relu(expanded)
        shrunk, shrink = linear(active, w[f"{i}.shrink"])

        def pullback(dx: Array) -> tuple[Array, dict[str, Array]]:
            dweights = {}
            dactive, dweights[f"{i}.shrink"] = shrink(dx)
            dnormed, dweights[f"{i}.expand"] = expand(activation(dactive))
            dx = dx + network_norm(dnormed)
            dattended, dweights[f"{i}.merge"] = merge(dx)
            dqkv = attention(dattended.astype(self.attention_dtype).reshape(attended.shape))
            dqkv = self.xp.concatenate([d.astype(dx.dtype).reshape(dx.shape) for d in dqkv], axis=-1)
            dnormed, dweights[f"{i}.qkv"] = project(dqkv)
            return dx + attention_norm(dnormed), dweights

        return x + shrunk, pullback

    def logits(self, ids: np.ndarray) -> tuple[Array, Pullback]:
        """Scores of every next character, (batch, length, characters), after each of `ids` (batch, length)."""
        x, embed = linear(self.one_hot[self.xp.asarray(ids)], self.weights["embedding"])
        blocks = []
        for i in range(self.layers):
            x, block = self.block(x, i)
            blocks.append(block)
        x, last_norm = norm(x)
        logits, project = linear(x, self.weights["logits"])

        def pullback(dlogits: Array) -> dict[str, Array]:
            dweights = {}
            dx, dweights["logits"] = project(dlogits)
            dx = last_norm(dx)
            for block in reversed(blocks):
                dx, dblock = block(dx)
                dweights |= dblock
            _, dweights["embedding"] = embed(dx)
            return dweights

        return logits, pullback

    def loss(self, ids: np.ndarray) -> tuple[Array, Pullback]:
        """Mean of −log p(next character), in nats, over `ids` (batch, length + 1)."""
        logits, logits_pullback = self.logits(ids[:, :-1])
        one_hot = self.one_hot[self.xp.asarray(ids[:, 1:])]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        sums = self.xp.exp(shifted).sum(axis=-1, keepdims=True)
        positions = ids[:, 1:].size
        loss = (self.xp.log(sums).sum() - (shifted * one_hot).sum()) / positions
        return loss, lambda: logits_pullback((self.xp.exp(shifted) / sums - one_hot) / positions)


class AdamW:
    """Adam with weight decay, a warm-up, and a learning rate that falls to 0 by half a cosine."""

    def __init__(self, model: Transformer, steps: int) -> None:
        self.model, self.steps, self.done = model, steps, 0
        self.moments = {name: (0 * weight, 0 * weight) for name, weight in model.weights.items()}

    def step(self, ids: np.ndarray) -> float:
        """Take one step and return the loss before it; to read that number is to wait for a GPU."""
        loss, pullback = self.model.loss(ids)
        gradients = pullback()
        rate = 3e-3 * min(1, (self.done + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * self.done / self.steps))
        self.done += 1
        for name, (first, second) in self.moments.items():
            weight, gradient = self.model.weights[name], gradients[name]
            first += (1 - 0.9) * (gradient - first)
            second += (1 - 0.99) * (gradient * gradient - second)
            weight *= 1 - 0.1 * rate
            weight -= rate / (1 - 0.9**self.done) * first / ((second / (1 - 0.99**self.done)) ** 0.5 + 1e-8)
        return float(loss)


def encode(text: str) -> np.ndarray:
    """Each character's place in CHARACTERS, of what is not there that of "?" or of a new line."""
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)
    return np.maximum(codes - ord(" ") + 1, 0)


def train(models: list[Transformer], *, steps: int, batch: int, length: int, seed: int) -> tuple[np.ndarray, ...]:
    """Train models on the same batches; return their losses and their seconds, each (steps, models)."""
    text = encode(re.sub(" +", " ", "\n".join(topics[name] for name in sorted(topics))))
    rng = np.random.default_rng(seed)
    optimisers = [AdamW(model, steps) for model in models]
    losses, seconds = np.zeros((2, steps, len(models)))
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("the first step", total=steps)
        for i in range(steps):
            starts = rng.integers(len(text) - length, size=batch)
            ids = text[starts[:, None] + np.arange(length + 1)]
            for j, optimiser in enumerate(optimisers):
                begin = perf_counter()
                losses[i, j] = optimiser.step(ids)
                seconds[i, j] = perf_counter() - begin
            speed = batch * length / seconds[i, 0]
            progress.update(task, advance=1, description=f"loss {losses[i, 0]:.2f}, {speed:,.0f} tokens/s")
    return losses, seconds


def write(model: Transformer, prompt: str, characters: int, *, length: int, seed: int) -> str:
    """Continue `prompt` by drawing each next character from what the model expects after the last `length`."""
    rng = np.random.default_rng(seed)
    ids = encode(prompt).tolist()
    for _ in range(characters):
        logits, _ = model.logits(np.array([ids[-length:]]))
        scores = np.array(logits[0, -1].tolist())
        p = np.exp((scores - scores.max()) / 0.7)  # below 1: likely characters more often than they are expected
        ids.append(int(rng.choice(len(CHARACTERS), p=p / p.sum())))
    return "".join(CHARACTERS[i] for i in ids)


def gpu_or_cpu() -> ModuleType:
    """CuPy if it finds a GPU and can multiply matrices there, else NumPy."""
    try:
        import cupy

        cupy.eye(2) @ cupy.eye(2)
        return cupy
    except Exception:
        return np


def main() -> None:
    """Train both models, then print their curves, their speed, and what one writes."""
    summary = "Train a character-level transformer by cuflash, beside one whose attention is written out."
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="steps of the optimiser, at least 4")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--length", type=int, default=128, help="characters in a sequence")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the transformer")
    parser.add_argument("--heads", type=int, default=4, help="heads of attention, a divisor of the width")
    parser.add_argument("--width", type=int, default=128, help="numbers that stand for a character")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the text")
    options = parser.parse_args()
    if options.steps < 4 or min(options.batch, options.length, options.layers, options.heads, options.width) < 1:
        parser.error("--steps must be at least 4, and every other size at least 1")
    if options.width % options.heads:
        parser.error(f"--width {options.width} cannot be divided among --heads {options.heads}")

    xp = gpu_or_cpu()
    dtype = np.float32 if xp is np else ml_dtypes.bfloat16
    shape = {name: getattr(options, name) for name in ("layers", "heads", "width", "seed")}
    flash = Transformer(xp, flash_attention, dtype, **shape)
    twin = Transformer(xp, partial(naive_attention, xp), np.float32, **shape)
    size = sum(weight.size for weight in flash.weights.values())
    print(f"{size:,} weights on {xp.__name__} arrays, attention of {np.dtype(dtype)} elements")
    job = {name: getattr(options, name) for name in ("steps", "batch", "length", "seed")}
    losses, seconds = train([flash, twin], **job)

    print("steps      cuflash   written out   (mean loss in nats a character)")
    tenths = np.array_split(np.arange(options.steps), min(10, options.steps))
    curves = np.array([losses[steps].mean(axis=0) for steps in tenths])
    for steps, (loss, twin_loss) in zip(tenths, curves, strict=True):
        print(f"{steps[0] + 1:4}-{steps[-1] + 1:<4} {loss:8.3f} {twin_loss:11.3f}")
    apart = abs(curves[:, 0] - curves[:, 1]).max()
    noise = abs(np.diff(losses[options.steps // 2 :, 1])).mean()
    print(f"the curves are {apart:.1e} apart at most; from batch to batch the loss changes by {noise:.1e}")
    speeds = options.batch * options.length / np.median(seconds, axis=0)
    print(f"{speeds[0]:,.0f} tokens/s with cuflash, {speeds[1]:,.0f} written out")
    print(write(flash, "The ", 300, length=options.length, seed=options.seed))
    assert apart < noise


if __name__ == "__main__":
    main()
