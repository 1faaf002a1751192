"""The training job of examples/: its gradients, what it learns beside a float32 reference, and what it prints."""

from __future__ import annotations

import importlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import cuflash

example = importlib.import_module("02_training_step")

CHARACTERS = len(example.CHARACTERS)
SMALL = {"layers": 2, "heads": 4, "width": 48, "seed": 0}
JOB = {"steps": 120, "batch": 4, "length": 64, "seed": 0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The processes of pytest-xdist fill the cores, and BLAS on small matrices waits by spinning."""
    with threadpool_limits(1, "blas"):
        yield


def transformer(attention: str, xp: ModuleType = np, dtype: type = np.float32, **shape: int) -> example.Transformer:
    """The model by cuflash in a type, or with attention written out."""
    by_cuflash = {"fp64": np.float64, "fp32": np.float32, "bf16": ml_dtypes.bfloat16}
    if attention == "written out":
        return example.Transformer(xp, partial(example.naive_attention, xp), dtype, **SMALL | shape, dtype=dtype)
    return example.Transformer(xp, example.flash_attention, by_cuflash[attention], **SMALL | shape, dtype=dtype)


@pytest.mark.parametrize("attention", ["fp64", "written out"])
def test_every_gradient_is_what_finite_differences_measure(attention):
    model = transformer(attention, dtype=np.float64, heads=3, width=12)
    rng = np.random.default_rng(1)
    ids = rng.integers(CHARACTERS, size=(2, 10))
    _, pullback = model.loss(ids)
    gradients = pullback()
    assert gradients.keys() == model.weights.keys()
    tiny = 1e-5
    for weight, gradient in ((model.weights[name], gradients[name]) for name in gradients):
        assert gradient.shape == weight.shape
        original = weight.copy()
        for _ in range(3):
            direction = rng.standard_normal(weight.shape)
            losses = []
            for step in (tiny, -tiny):
                weight[...] = original + step * direction
                losses.append(model.loss(ids)[0])
            weight[...] = original
            ahead, behind = losses
            error = (ahead - behind) / (2 * tiny) - (gradient * direction).sum()
            assert abs(error) < 1e-6 * np.sqrt((gradient * gradient).sum())


def test_no_position_sees_a_later_character():
    model = transformer("fp32")
    ids = np.random.default_rng(1).integers(CHARACTERS, size=(2, 20))
    before, _ = model.logits(ids)
    ids[:, 12] = (ids[:, 12] + 1) % CHARACTERS
    after, _ = model.logits(ids)
    np.testing.assert_array_equal(after[:, :12], before[:, :12])
    assert (after[:, 12:] != before[:, 12:]).any(axis=(0, 2)).all()


def test_the_optimiser_is_adamw():
    model = transformer("written out", dtype=np.float64)
    optimiser = example.AdamW(model, steps=8)
    expected = {name: weight.copy() for name, weight in model.weights.items()}
    first, second = ({name: np.zeros(weight.shape) for name, weight in expected.items()} for _ in range(2))
    rng = np.random.default_rng(1)
    for step in range(3):
        ids = rng.integers(CHARACTERS, size=(2, 10))
        loss, pullback = model.loss(ids)
        gradients = pullback()
        assert optimiser.step(ids) == float(loss)
        rate = 3e-3 * (step + 1) / 20 * (1 + np.cos(np.pi * step / 8)) / 2
        for name, gradient in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.99 * second[name] + 0.01 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.99 ** (step + 1))
            expected[name] = expected[name] - rate * (mean / (np.sqrt(square) + 1e-8) + 0.1 * expected[name])
            np.testing.assert_allclose(model.weights[name], expected[name], rtol=1e-12, atol=1e-12)


def test_models_learn_alike_whoever_computes_attention_and_in_which_type():
    """bf16 by NumPy stands for what a GPU does."""
    names = ["written out", "fp32", "bf16"]
    models = [transformer(name) for name in names]
    losses, seconds = example.train(models, **JOB)
    assert losses.shape == seconds.shape == (120, 3)
    assert (seconds > 0).all()
    np.testing.assert_allclose(losses[0], np.log(CHARACTERS), rtol=0, atol=0.1)
    assert (losses[-10:].mean(axis=0) < 3.1).all()  # how often each character occurs explains 3.33 nats
    apart = abs(losses[:, 1:] - losses[:, :1]).max(axis=0)
    assert apart[0] < 1e-4
    assert 0 < apart[1] < 0.005


def test_the_same_seed_gives_the_same_losses_and_another_seed_others():
    curves = []
    for seed in (0, 0, 1):
        model = transformer("fp32", seed=seed)
        losses, _ = example.train([model], steps=4, batch=2, length=16, seed=seed)
        curves.append(losses.tolist())
    assert curves[0] == curves[1] != curves[2]


def test_characters_have_places_and_others_become_question_marks_or_new_lines():
    assert len(set(example.CHARACTERS)) == CHARACTERS == 96
    assert example.encode(example.CHARACTERS).tolist() == [*range(CHARACTERS)]
    assert [example.CHARACTERS[i] for i in example.encode("é\t\r東~")] == ["?", "\n", "\n", "?", "~"]


def test_a_terminal_shows_a_bar_with_loss_and_speed(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    model = transformer("fp32")
    losses, _ = example.train([model], steps=4, batch=2, length=16, seed=0)
    printed = sys.stdout.getvalue()
    assert "100%" in printed
    assert f"loss {losses[-1, 0]:.2f}, " in printed
    assert "tokens/s" in printed


def run(*options: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")},
        "PYTHONPATH": str(Path(cuflash.__file__).parent.parent),
        "CUDA_VISIBLE_DEVICES": "",
        "CUFLASH_CACHE_DIR": str(folder),
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error", example.__file__, *options]
    return subprocess.run(command, capture_output=True, cwd=folder, env=environment, check=False)


def test_a_pipe_gets_plain_lines(tmp_path):
    done = run("--steps", "5", "--batch", "2", "--length", "16", "--width", "16", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert not {b"\r", b"\x1b"} & {bytes([byte]) for byte in done.stdout.replace(os.linesep.encode(), b"\n")}
    first, header, *curve = done.stdout.decode().splitlines()[:7]
    assert first.endswith(" weights on numpy arrays, attention of float32 elements")
    assert header.split()[:4] == ["steps", "cuflash", "written", "out"]
    assert [line.split()[0] for line in curve] == ["1-1", "2-2", "3-3", "4-4", "5-5"]
    [apart] = re.findall(r"the curves are (\S+) apart at most", done.stdout.decode())
    assert float(apart) < 1e-5


def test_help_names_every_option(tmp_path):
    done = run("--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    for option in ("--steps", "--batch", "--length", "--layers", "--heads", "--width", "--seed"):
        assert option in done.stdout.decode()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "3"], "--steps must be at least 4"),
        (["--length", "0"], "every other size at least 1"),
        (["--width", "50"], "--width 50 cannot be divided among --heads 4"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path, options, message):
    done = run(*options, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.decode()


@pytest.mark.gpu
def test_a_gpu_learns_what_numpy_learns():
    import cupy

    try:
        cupy.eye(2) @ cupy.eye(2)
    except ImportError as error:
        pytest.skip(f"the layers around attention need cuBLAS: {error}")
    assert example.gpu_or_cpu() is cupy
    places = [(np, "written out"), (cupy, "written out"), (cupy, "bf16")]
    models = [transformer(name, xp, width=256) for xp, name in places]
    losses, _ = example.train(models, **JOB | {"steps": 30})
    assert all(type(weight) is cupy.ndarray and weight.dtype == np.float32 for weight in models[2].weights.values())
    apart = abs(losses[:, 1:] - losses[:, :1]).max(axis=0)
    assert apart[0] < 1e-3
    assert 0 < apart[1] < 0.05
    assert len(example.write(models[2], "The ", 20, length=64, seed=0)) == 24
