"""The NumPy backend on many threads: the same bits on any number of them, from anywhere, and no work done twice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import threadpoolctl
from inputs import FP16, FP32, FP64, arrays
from numpy_backend import run

import cuflash
from cuflash import settings
from cuflash.errors import InvalidArgument
from cuflash.masks import Mask
from cuflash.reference import loops, pool, softmax, tiles
from cuflash.reference.scores import Scores
from cuflash.reference.softmax import EXP, EXP2, Power, fastest_power

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two_blas_threads() -> Iterator[None]:
    pool._libraries.cache_clear()  # another test may have loaded SciPy's since, which no job of ours uses
    with threadpoolctl.threadpool_limits(2, "blas"):
        yield


@pytest.fixture
def many_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, and every call worth sharing."""
    monkeypatch.setattr(tiles, "ROWS", 8)
    monkeypatch.setattr(tiles, "KEYS", 16)
    monkeypatch.setattr(tiles, "SCORES", 256)
    monkeypatch.setattr(loops, "ROW_TILES", 2)
    monkeypatch.setattr(pool, "WORTH", 0)
    monkeypatch.setattr(pool, "TINY", 0)


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]


SHAPE = {"b": 3, "h": 4, "hk": 2, "sq": 40, "sk": 53, "d": 8, "dv": 8}
RNG = np.random.default_rng(0)
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "sink": {"sink": np.float32([0.5, -1, 2, 0])},
    "dropout": {"dropout_p": 0.3, "rng_state": (1, 4)},
    "bias-of-each": {"bias": RNG.standard_normal((3, 4, 40, 53), FP32)},
    "bias-shared-by-batch": {"bias": RNG.standard_normal((1, 4, 40, 53), FP32)},
    "bias-shared-by-heads": {"bias": RNG.standard_normal((3, 1, 40, 53), FP32)},
    "bias-of-keys": {"bias": RNG.standard_normal(53, FP32)},
}


@pytest.mark.usefixtures("many_jobs")
@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_any_number_of_threads_gives_the_same_bits(
    features: dict, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("CUFLASH_NUM_THREADS", threads)
        for _ in range(3 if threads != "1" else 1):
            results.append(run(*arrays(SHAPE, dtype), **features))
    for other in results[1:]:
        for name, a, b in zip(oracle.Attention._fields, results[0], other, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.usefixtures("many_jobs")
@pytest.mark.parametrize("bias", [None, (1, 4, 40, 53), (3, 1, 40, 53)])
def test_packed_sequences_give_the_same_bits_on_any_number_of_threads(
    bias: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts_q, starts_k = np.int32([0, 40, 41, 70]), np.int32([0, 13, 60, 113])
    q, k, v, dout, dlse = (x[0] for x in arrays(SHAPE | {"b": 1, "sq": 70, "sk": 113}, FP32))
    options = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "causal": True}
    if bias is not None:
        options["bias"] = RNG.standard_normal(bias, FP32)
    results = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("CUFLASH_NUM_THREADS", threads)
        results.append(run(q, k, v, dout, dlse, **options))
    exact = oracle.attention(q, k, v, dout, dlse, **options)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    if bias is not None:
        np.testing.assert_allclose(results[0].dbias, exact.dbias, atol=1e-4)


@pytest.mark.usefixtures("many_jobs")
@pytest.mark.parametrize("bias", [None, (3, 4, 40, 53)], ids=["alone", "bias"])
def test_gradients_of_what_a_score_reads_have_the_same_bits_on_any_number_of_threads(
    bias: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, dout, dlse = arrays(SHAPE, FP32)
    table, factor = RNG.standard_normal((4, 9), FP32), RNG.standard_normal((3, 40), FP32)
    given = {} if bias is None else {"attn_bias": RNG.standard_normal(bias, FP32), "bias_grad": True}

    def written(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s * factor[b, q] + table[h, k - q + 4]

    def gradients(**others: Any) -> Any:
        _, pullback = cuflash.flash_attn_vjp(q, k, v, score_mod=written, captured_grad=True, **given, **others)
        return pullback(dout, dlse)

    monkeypatch.setenv("CUFLASH_NUM_THREADS", "1")
    first = gradients()
    for threads in ("2", "5", "5"):
        monkeypatch.setenv("CUFLASH_NUM_THREADS", threads)
        again = gradients()
        for a, b in zip((*first[:4], *first.dcaptured), (*again[:4], *again.dcaptured), strict=True):
            np.testing.assert_array_equal(a, b)
    q, k, v, dout, dlse, table, factor = (x.astype(np.float64) for x in (q, k, v, dout, dlse, table, factor))
    given = {name: x.astype(np.float64) if name == "attn_bias" else x for name, x in given.items()}
    exact = gradients()
    for a, b in zip(first.dcaptured, exact.dcaptured, strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)


@pytest.mark.usefixtures("two_blas_threads", "many_jobs")
def test_blas_has_one_thread_in_jobs_and_what_it_had_after_overlapping_calls() -> None:
    before, inside = blas_threads(), []
    assert 2 in before
    begun, go_on = threading.Event(), threading.Event()

    def first(scratch: pool.Scratch) -> None:
        begun.set()
        go_on.wait(60)
        inside.append(blas_threads())

    long_call = threading.Thread(target=lambda: pool.run([first], 1))
    long_call.start()
    begun.wait(60)
    pool.run([lambda scratch: inside.append(blas_threads())], 1)  # begins and ends while the other runs
    go_on.set()
    long_call.join()
    assert all(set(numbers) == {1} for numbers in inside) and len(inside) == 2
    assert blas_threads() == before


class OpenMP:
    """A BLAS that keeps a number of threads for each thread that calls it."""

    def __init__(self) -> None:
        self._own = threading.local()

    @property
    def num_threads(self) -> int:
        return getattr(self._own, "number", 8)

    def set_num_threads(self, number: int) -> None:
        self._own.number = number


@pytest.mark.usefixtures("many_jobs")
def test_blas_that_counts_for_each_thread_has_one_in_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    library, seen, barrier = OpenMP(), [], threading.Barrier(3)
    monkeypatch.setattr(pool, "_libraries", lambda: pool._Libraries([], [library]))
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "3")

    def job(scratch: pool.Scratch) -> None:
        barrier.wait(60)
        seen.append((threading.get_ident(), library.num_threads))

    pool.run([job] * 3, 1)
    assert len(dict(seen)) == 3 and {number for _, number in seen} == {1}
    assert library.num_threads == 8


@pytest.mark.usefixtures("two_blas_threads", "many_jobs")
@pytest.mark.parametrize("failing", [0, 3, 19])
def test_the_exception_of_a_job_is_raised_when_no_other_runs_any_more(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "4")
    before, running, most = blas_threads(), [], []

    def job(number: int) -> pool.Job:
        def work(scratch: pool.Scratch) -> None:
            running.append(number)
            most.append(threading.get_ident())
            try:
                if number == failing:
                    raise ValueError(f"job {number}")
                threading.Event().wait(0.01)
            finally:
                running.remove(number)

        return work

    with pytest.raises(ValueError, match=f"job {failing}"):
        pool.run([job(i) for i in range(20)], 1)
    assert not running and blas_threads() == before
    pool.run([job(100)], 1)  # and the pool goes on


def test_calls_from_many_threads_neither_wait_for_each_other_nor_differ() -> None:
    q, k, v = (x.astype(FP32) for x in np.random.default_rng(0).standard_normal((3, 1, 600, 4, 32)))
    expected, before = cuflash.flash_attn_func(q, k, v, causal=True), blas_threads()
    with ThreadPoolExecutor(12) as callers:
        for result in callers.map(lambda _: cuflash.flash_attn_func(q, k, v, causal=True), range(36), timeout=300):
            np.testing.assert_array_equal(result, expected)
    assert blas_threads() == before


def test_a_call_inside_the_backends_own_threads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "WORTH", 0)
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "3")
    done = []
    inner = [lambda scratch: done.append(threading.get_ident())] * 4
    pool.run([lambda scratch: pool.run(inner, 10**6)] * 9, 10**6)
    assert len(done) == 36


FORK = """
import os, threading
import numpy as np
import cuflash
from cuflash.reference import pool

x = np.random.default_rng(0).standard_normal((1, 600, 4, 32)).astype(np.float32)
expected = cuflash.flash_attn_func(x, x, x)
begun, go_on = threading.Event(), threading.Event()


def job(scratch):
    begun.set()
    go_on.wait(60)


busy = threading.Thread(target=lambda: pool.run([job] * 4, 10**9))  # a call that the child knows nothing of
busy.start()
begun.wait(60)
child = os.fork()
if child == 0:
    same = np.array_equal(cuflash.flash_attn_func(x, x, x), expected)
    os._exit(0 if same and pool._held.calls == 0 else 1)
go_on.set()
busy.join()
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(cuflash.flash_attn_func(x, x, x), expected)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_threads_of_its_own() -> None:
    environment = os.environ | {"CUFLASH_NUM_THREADS": "3", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be kept to cores here")
@pytest.mark.parametrize("briefly", [True, False])
def test_threads_compute_on_other_cores_than_the_caller_which_may_use_all_again(
    briefly: bool, many_jobs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = os.sched_getaffinity(0)
    if len(usable) < 2:
        pytest.skip("one core")
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "2")
    caller, seen, both = threading.get_ident(), {}, threading.Barrier(2, timeout=20)

    def job(scratch: pool.Scratch) -> None:
        seen[threading.get_ident()] = os.sched_getaffinity(0)
        both.wait()

    pool.run([job, job], pool.BRIEF - briefly)
    (others,) = (cores for thread, cores in seen.items() if thread != caller)
    assert others < usable
    assert len(usable - others) == 1
    assert seen[caller] == (usable - others if briefly else usable)
    assert os.sched_getaffinity(0) == usable


def test_a_small_call_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_crew", pool._Crew())
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "4")
    q, k, v, dout, _ = arrays({"b": 2, "h": 4, "hk": 2, "sq": 64, "sk": 64, "d": 8, "dv": 8}, FP32)
    cuflash.flash_attn_vjp(q, k, v)[1](dout)
    assert not pool._crew.threads
    q, k, v, dout, _ = arrays({"b": 2, "h": 4, "hk": 2, "sq": 512, "sk": 512, "d": 8, "dv": 8}, FP32)
    cuflash.flash_attn_func(q, k, v)
    assert len(pool._crew.threads) == 3


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "9" * 5000])
def test_the_number_of_threads_is_checked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_NUM_THREADS", text)
    x = np.zeros((1, 600, 2, 8), FP32)
    with pytest.raises(InvalidArgument, match=r"CUFLASH_NUM_THREADS is .*expected an integer from 1"):
        cuflash.flash_attn_func(x, x, x)


def test_the_number_of_threads_is_that_of_the_cores_a_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUFLASH_NUM_THREADS", raising=False)
    if hasattr(os, "sched_getaffinity"):
        assert settings.num_threads() == len(os.sched_getaffinity(0))
    for text, number in (("7", 7), (" 2 ", 2)):
        monkeypatch.setenv("CUFLASH_NUM_THREADS", text)
        assert settings.num_threads() == number


def computed(mask: Mask, length: int, parts: int = 8) -> int:
    """How many scores are computed of a head, by the backward of four parts."""
    scores, one = Scores(mask, length, length, 1.0), slice(0, 1)
    areas = (
        (tile.rows.stop - tile.rows.start) * (tile.keys.stop - tile.keys.start)
        for rows in scores.row_tiles(1, parts)
        for tile, _ in scores.kv_tiles(one, one, rows)
    )
    return sum(areas)


@pytest.mark.parametrize(("length", "share"), [(512, 0.7), (1024, 0.65), (4096, 0.55)])
def test_causal_masks_cost_little_more_than_what_they_show(length: int, share: float) -> None:
    assert computed(Mask(), length) == length * length
    assert computed(Mask(right=0), length) <= share * length * length
    assert computed(Mask(right=0), length, parts=4) <= share * length * length
    assert computed(Mask(left=127, right=0), length) <= 2 * 128 * length + 128 * 128


@pytest.mark.parametrize("mask", [Mask(), Mask(right=0), Mask(left=127, right=0)], ids=str)
@pytest.mark.parametrize("length", [1, 63, 256, 300, 512, 1024, 5000])
def test_jobs_have_every_row_once_and_are_alike_under_a_causal_mask(mask: Mask, length: int) -> None:
    scores = Scores(mask, length, length, 1.0)
    row_tiles = list(scores.row_tiles(1))
    shares = list(loops._shares(row_tiles, scores, heads=2))
    assert sorted((rows.start, rows.stop) for share in shares for rows in share) == [
        (rows.start, rows.stop) for rows in row_tiles
    ]
    if mask == Mask(right=0) and length in (512, 1024):
        keys = [sum(scores.keys_of(rows).stop for rows in share) for share in shares]
        assert len(set(keys)) == 1 < len(keys), "whoever takes the last job has as much to do as the others"
    assert list(loops._shares(list(Scores(mask, 0, 4, 1.0).row_tiles(1)), scores, heads=4)) == []


@pytest.mark.parametrize(("dtype", "brought_in_shape"), [(FP16, 2), (FP32, 0)])
def test_keys_and_values_are_read_once_a_head(
    dtype: type, brought_in_shape: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, turned, load, turn = [], [], tiles.load, tiles._turned

    def counted(x: np.ndarray, *rest: object) -> np.ndarray:
        tile = load(x, *rest)
        if x.shape[1] == 1200:  # keys' rows
            read.append(tile.shape[0] * tile.shape[1] * tile.shape[2])
        return tile

    def counted_turned(rows: np.ndarray, *rest: object) -> np.ndarray:
        turned.append(rows.shape[0] * rows.shape[1] * rows.shape[2])
        return turn(rows, *rest)

    monkeypatch.setattr(tiles, "load", counted)
    monkeypatch.setattr(tiles, "_turned", counted_turned)
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "3")
    q, k, v, *_ = arrays({"b": 2, "h": 4, "hk": 2, "sq": 2500, "sk": 1200, "d": 8, "dv": 8}, dtype)
    cuflash.flash_attn_func(q, k, v)
    assert sum(read) == 2 * 2 * 1200 * brought_in_shape  # of batch and heads, k and v
    assert sum(turned) == 2 * 2 * 1200


def test_one_visible_key_gives_its_value_exactly() -> None:
    q, k, v, *_ = arrays({"b": 1, "h": 2, "hk": 1, "sq": 700, "sk": 700, "d": 8, "dv": 8}, FP32)
    out = cuflash.flash_attn_func(q, k, v, causal=True)
    np.testing.assert_array_equal(out[:, 0], np.repeat(v[:, 0], 2, axis=1))


@pytest.mark.parametrize(("real", "exp2"), [(FP64, False), (FP32, sys.platform == "linux")])
def test_which_power_is_taken_is_no_matter_of_time(real: type, exp2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest_power.cache_clear()
    of_vectors = {"exp2": {"ff": {"current": "AVX512_SKX"}}}
    monkeypatch.setattr(np.lib.introspect, "opt_func_info", lambda func_name: of_vectors)
    assert fastest_power(np.dtype(real)) == (EXP2 if exp2 else EXP)
    fastest_power.cache_clear()
    monkeypatch.setattr(np.lib.introspect, "opt_func_info", lambda func_name: {})
    assert fastest_power(np.dtype(real)) == EXP
    fastest_power.cache_clear()


@pytest.mark.parametrize("power", [-120, -100, -60, 0, 60, 100])
@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("weight", [EXP, EXP2], ids=["exp", "exp2"])
def test_values_of_any_size_keep_their_digits_whatever_the_scores(
    weight: Power, dtype: type, power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "fastest_power", lambda real: weight)
    shape = {"b": 1, "h": 1, "hk": 1, "sq": 600, "sk": 700, "d": 16, "dv": 8}
    for scale in (0.05, 1.9, 40.0):  # the largest scores are about 1, 30 and 700
        q, k, v, dout, dlse = arrays(shape, dtype)
        k[:, :, :, 0] += 4  # most of a row far below 0, or far above
        v = (v * 2.0**power).astype(dtype)
        exact = oracle.attention(q, k, v, dout, dlse, scale=scale)
        actual = run(q, k, v, dout, dlse, scale=scale)
        size = np.abs(exact.out).max()
        tolerance = 1e-4 if dtype is FP32 else 1e-12
        np.testing.assert_allclose(actual.out / size, exact.out / size, atol=tolerance)
        np.testing.assert_allclose(actual.dv, exact.dv, atol=20 * tolerance)


def with_small_logits(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    q *= 0.5


def with_one_large_logit(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    k[:, 650] *= 100 / np.abs(np.vecdot(q, k[:, 650:651])).max()


def with_logits_far_below(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    q[..., 0], k[..., 0] = 6, -6


def with_values_near_the_largest(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    q[..., 0], k[..., 0] = 5, 5
    v *= 2.0**112


def with_the_smallest_values(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    q[..., 0], k[..., 0] = 5, -5
    v *= 2.0**-120


@pytest.mark.parametrize(
    ("change", "leaves_the_maximum_out"),
    [
        (with_small_logits, True),
        (with_one_large_logit, False),
        (with_logits_far_below, False),
        (with_values_near_the_largest, False),
        (with_the_smallest_values, False),
    ],
)
def test_where_weights_may_be_exp_of_logits_they_are(
    change: Callable[..., None], leaves_the_maximum_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"b": 1, "h": 2, "hk": 2, "sq": 600, "sk": 700, "d": 16, "dv": 8}
    q, k, v, dout, dlse = arrays(shape, FP32)
    q, k, v = (np.copy(x) for x in (q, k, v))
    change(q, k, v)
    raised, rise = [], softmax.RowSoftmax._rise_to

    def counted(self: softmax.RowSoftmax, s_max: np.ndarray) -> np.ndarray:
        raised.append(s_max.shape)
        return rise(self, s_max)

    monkeypatch.setattr(softmax.RowSoftmax, "_rise_to", counted)
    exact = oracle.attention(q, k, v, dout, dlse, scale=1.0)
    out, lse = cuflash.flash_attn_func(q, k, v, softmax_scale=1.0, return_lse=True)
    assert (not raised) == leaves_the_maximum_out
    np.testing.assert_allclose(out, exact.out, rtol=0, atol=3e-5 * np.abs(exact.out).max())
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-6, atol=2e-6)


def test_a_query_of_nan_changes_nothing_of_the_others() -> None:
    q, k, v, *_ = arrays({"b": 1, "h": 2, "hk": 2, "sq": 600, "sk": 700, "d": 16, "dv": 8}, FP32)
    clean = cuflash.flash_attn_func(q, k, v)
    q = np.copy(q)
    q[:, 7] = np.nan
    spoilt = cuflash.flash_attn_func(q, k, v)
    assert np.isnan(spoilt[:, 7]).all()
    np.testing.assert_array_equal(np.delete(spoilt, 7, axis=1), np.delete(clean, 7, axis=1))
