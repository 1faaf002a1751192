"""Triangle attention of examples/: its gradients, its two directions, and what it learns."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

example = importlib.import_module("pair_bias")

SMALL = {"layers": 2, "heads": 2, "width": 8, "seed": 0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """BLAS on small matrices waits by spinning."""
    with threadpool_limits(1, "blas"):
        yield


def model(attention: str = "cuflash", dtype: type = np.float64) -> example.Distances:
    layer = example.flash_attention if attention == "cuflash" else partial(example.naive_attention, np)
    return example.Distances(np, layer, dtype, **SMALL)


@pytest.mark.parametrize("attention", ["cuflash", "written out"])
def test_every_gradient_is_what_finite_differences_measure(attention: str) -> None:
    distances, rng = model(attention), np.random.default_rng(1)
    pairs = example.chain(rng, 7, 0.5)
    gradients = distances.loss(*pairs)[1]()
    assert gradients.keys() == distances.weights.keys()
    tiny = 1e-5
    for name, weight in distances.weights.items():
        assert gradients[name].shape == weight.shape
        original, direction, losses = weight.copy(), rng.standard_normal(weight.shape), []
        for step in (tiny, -tiny):
            weight[...] = original + step * direction
            losses.append(distances.loss(*pairs)[0])
        weight[...] = original
        error = (losses[0] - losses[1]) / (2 * tiny) - (gradients[name] * direction).sum()
        assert abs(error) < 1e-6 * np.sqrt((gradients[name] ** 2).sum()), name


def test_gradients_are_compared_with_float64() -> None:
    pairs = example.chain(np.random.default_rng(1), 9, 0.5)
    off = example.errors(model(dtype=np.float32), model("written out"), *pairs)
    assert off.keys() == model().weights.keys()
    assert 0 < max(off.values()) < 1e-5
    assert max(example.errors(model(), model("written out"), *pairs).values()) < 1e-12


def test_the_bias_of_a_pair_reaches_every_point_and_directions_are_each_others_transpose() -> None:
    distances, rng = model(), np.random.default_rng(2)
    z = rng.standard_normal((6, 6, SMALL["width"]))
    distances.weights["0.ending.project"] = distances.weights["0.starting.project"]
    distances.weights["0.ending.merge"] = distances.weights["0.starting.merge"]
    added, _ = distances.triangle(z, "0.starting")
    ending, _ = distances.ending(z.swapaxes(0, 1), "0.ending")
    np.testing.assert_array_equal(ending, added.swapaxes(0, 1))
    changed = z.copy()
    changed[2, 4] += 1  # pair (j, k) = (2, 4): the bias of every (i, 2) to (i, 4), and what is of point 2
    moved = (distances.triangle(changed, "0.starting")[0] != added).any(axis=-1)
    assert moved[:, 2].all() and moved[2].all()
    assert not moved[[0, 1, 3, 4, 5]][:, [0, 1, 3, 4, 5]].any()


def test_it_learns_and_repeats() -> None:
    curves = [example.train([model(dtype=np.float32)], steps=40, length=8, known=0.5, seed=0) for _ in range(2)]
    np.testing.assert_array_equal(*curves)
    assert curves[0].shape == (40, 1)
    assert curves[0][-10:].mean() < 0.5 * curves[0][:5].mean()


def test_a_chain_has_the_distances_that_it_is_said_to_have() -> None:
    features, distances = example.chain(np.random.default_rng(0), 30, 0.4)
    assert features.shape == (30, 30, 2 * example.RADII + 1) and distances.shape == (30, 30)
    np.testing.assert_array_equal(distances, distances.T)
    np.testing.assert_allclose(np.diag(distances, 1), example.STEP, rtol=1e-12)
    told = features[..., 0]
    np.testing.assert_array_equal(features, features.swapaxes(0, 1))
    assert 0.3 < told.mean() < 0.5 and not features[told == 0][:, 1 : example.RADII + 1].any()
