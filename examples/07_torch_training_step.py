"""Train a small language model in PyTorch, whose every attention is one cuflash call under autograd.

A decoder-only transformer learns to continue, character by character, the manual that comes with Python. Beside it
learns a twin, from the same first weights and the same batches, whose attention is PyTorch's own
scaled_dot_product_attention in float32. Shown are both losses, which may not differ more than batches do, and the speed
of both. On a GPU the attention of cuflash is bfloat16.

    python examples/07_torch_training_step.py
    python examples/07_torch_training_step.py --width 512 --heads 8 --layers 6 --length 1024
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cuflash

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of q (batch, length, heads, dim), and k and v with half as many heads."""

CHARACTERS = 128


def flash(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by cuflash in a dtype."""
    return cuflash.flash_attn_func(*(x.to(dtype) for x in (q, k, v)), causal=True).to(q.dtype)


def twin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by PyTorch, in the dtype of q."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def weight(inputs: int, outputs: int, scale: float = 1.0) -> nn.Parameter:
    """The first weights of a layer, from the generator that torch.manual_seed seeds."""
    return nn.Parameter(torch.randn(inputs, outputs) * scale * inputs**-0.5)


def norm(x: Tensor) -> Tensor:
    """x divided by its root mean square over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


class Block(nn.Module):
    """x plus attention, plus a two-layer network, each of the normalised sum before it."""

    def __init__(self, attention: Attention, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.attention, self.heads = attention, heads
        into_residual = (2 * layers) ** -0.5  # 2 · layers branches are added up
        self.qkv, self.merge = weight(width, 2 * width), weight(width, width, into_residual)
        self.up, self.down = weight(width, 4 * width), weight(4 * width, width, into_residual)

    def forward(self, x: Tensor) -> Tensor:
        """Of x (batch, length, width), the same shape."""
        width = x.shape[-1]
        parts = (norm(x) @ self.qkv).split((width, width // 2, width // 2), dim=-1)
        q, k, v = (y.unflatten(-1, (-1, width // self.heads)) for y in parts)
        x = x + self.attention(q, k, v).flatten(-2) @ self.merge
        return x + F.gelu(norm(x) @ self.up) @ self.down


class Transformer(nn.Module):
    """A pre-norm decoder; the same seed of torch gives the same weights whatever computes attention."""

    def __init__(self, attention: Attention, layers: int, heads: int, width: int, length: int) -> None:
        super().__init__()
        self.characters = nn.Parameter(0.1 * torch.randn(CHARACTERS, width))
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(attention, layers, heads, width) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        """Mean of −log p(next character), in nats, over `ids` (batch, length + 1)."""
        x = self.characters[ids[:, :-1]] + self.positions
        for block in self.blocks:
            x = block(x)
        logits = norm(x) @ self.characters.T
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def main() -> None:
    """Train both models, then print their curves and their speed."""
    summary = "Train a character-level transformer in PyTorch, by cuflash and by scaled_dot_product_attention."
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of the optimiser, at least 4")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--length", type=int, default=128, help="characters in a sequence")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the transformer")
    parser.add_argument("--heads", type=int, default=4, help="heads of queries, an even divisor of the width")
    parser.add_argument("--width", type=int, default=128, help="numbers that stand for a character")
    options = parser.parse_args()
    if min(options.batch, options.length, options.layers, options.heads, options.width) < 1 or options.steps < 4:
        parser.error("--steps must be at least 4, and every other size at least 1")
    if options.heads % 2 or options.width % options.heads:
        parser.error(f"--heads {options.heads} must be even and divide --width {options.width}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    attentions = {"cuflash": partial(flash, torch.bfloat16 if device == "cuda" else torch.float32), "torch": twin}
    models, optimisers, schedules = [], [], []
    for attention in attentions.values():
        torch.manual_seed(0)
        model = Transformer(attention, options.layers, options.heads, options.width, options.length).to(device)
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
        models.append(model)
        optimisers.append(optimiser)
        schedules.append(torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1, (step + 1) / 20)))
    print(f"{sum(weights.numel() for weights in models[0].parameters()):,} weights on {device}")

    text = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace"), np.uint8)
    rng = np.random.default_rng(0)
    losses, seconds = np.zeros((2, options.steps, len(models)))
    for i in range(options.steps):
        starts = rng.integers(len(text) - options.length, size=options.batch)
        ids = torch.from_numpy(text[starts[:, None] + np.arange(options.length + 1)].astype(np.int64)).to(device)
        for j, (model, optimiser, schedule) in enumerate(zip(models, optimisers, schedules, strict=True)):
            begin = perf_counter()
            optimiser.zero_grad()
            loss = model(ids)
            loss.backward()
            optimiser.step()
            schedule.step()
            losses[i, j] = loss.item()
            seconds[i, j] = perf_counter() - begin

    print("steps      cuflash       torch   (mean loss in nats a character)")
    tenths = np.array_split(np.arange(options.steps), min(10, options.steps))
    curves = np.array([losses[steps].mean(axis=0) for steps in tenths])
    for steps, (ours, theirs) in zip(tenths, curves, strict=True):
        print(f"{steps[0] + 1:4}-{steps[-1] + 1:<4} {ours:8.3f} {theirs:11.3f}")
    apart = abs(curves[:, 0] - curves[:, 1]).max()
    noise = abs(np.diff(losses[options.steps // 2 :, 1])).mean()
    print(f"the curves are {apart:.1e} apart at most; from batch to batch the loss changes by {noise:.1e}")
    speeds = options.batch * options.length / np.median(seconds, axis=0)
    print(f"{speeds[0]:,.0f} tokens/s with cuflash, {speeds[1]:,.0f} with torch")
    assert apart < noise


if __name__ == "__main__":
    main()
