"""The time that dividing a call takes, on paper."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from cuflash.device import NAMED
from cuflash.dtypes import BF16, FP32
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.masks import Mask
from cuflash.parallel.model import Speeds, all_to_all, one_device, ring, speeds_of
from cuflash.problem import Problem

CAUSAL = Problem("forward", BF16, 2, 16, 4, 4096, 4096, 128, 64, mask=Mask(right=0))
GRADIENTS = replace(CAUSAL, direction="backward")
FULL = replace(CAUSAL, mask=Mask())
QUICK = Speeds(flops=1e15, link=inf, network=inf, memory=inf, latency=0.0)
"""Nothing takes time but kernels."""
KEYS = 2 * 4 * (128 + 64) * 2
"""Bytes of a key and its value: batch, heads, columns, bytes."""


@pytest.mark.parametrize("problem", [CAUSAL, GRADIENTS, FULL, replace(CAUSAL, len_q=2048, mask=Mask())], ids=str)
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_where_nothing_takes_time_but_kernels_devices_share_the_work(problem: Problem, devices: int) -> None:
    alone = one_device(problem, QUICK)
    assert alone.seconds == problem.flops() / 1e15
    # Diagonals are halved where a device has chunks to itself: row by row that is not an even share.
    computed = ring(problem, devices, "zigzag", QUICK)
    assert computed.seconds == pytest.approx(alone.seconds / devices) and computed.waits == pytest.approx(0)
    if problem.heads_kv >= devices or devices == 8:
        assert all_to_all(problem, devices, "zigzag", QUICK).seconds == pytest.approx(alone.seconds / devices)


def test_in_contiguous_order_the_last_device_has_causal_work_at_every_step() -> None:
    zigzag, contiguous = (ring(CAUSAL, 8, order, QUICK).seconds for order in ("zigzag", "contiguous"))
    assert contiguous / zigzag == pytest.approx(15 / 8, rel=1e-2)


def test_where_kernels_take_no_time_links_do() -> None:
    slow = Speeds(flops=inf, link=1e9, network=1e8, memory=inf, latency=1e-6)
    computed = ring(FULL, 4, "contiguous", slow)
    assert computed.nbytes == 3 * 1024 * KEYS and computed.transfers == 3
    assert computed.seconds == computed.waits == pytest.approx(3e-6 + computed.nbytes / 1e9)
    back = ring(replace(FULL, direction="backward"), 4, "contiguous", slow)
    assert back.nbytes == 2 * computed.nbytes and back.transfers == 5
    assert ring(FULL, 16, "contiguous", slow).seconds == pytest.approx(15e-6 + 15 * 256 * KEYS / 1e8)
    window = ring(replace(CAUSAL, mask=Mask(100, 0)), 4, "contiguous", slow)
    assert window.nbytes == 100 * KEYS and window.transfers == 1
    heads = all_to_all(FULL, 4, "contiguous", slow)
    assert heads.nbytes == (1024 * (16 + 4) * 2 * (128 + 64) * 2) * 3 / 4
    assert heads.waits == heads.seconds == pytest.approx(2e-6 + heads.nbytes / 1e9)


def test_of_many_key_heads_half_travels_beside_a_kernel() -> None:
    problem = replace(FULL, len_q=2**16, len_kv=2**16, heads_kv=8)
    slow = replace(QUICK, flops=1e12, link=1e9, latency=1e-6)
    computed, alone = all_to_all(problem, 4, "contiguous", slow), one_device(problem, slow)
    assert computed.transfers == 4
    exposed = 2e-6 + computed.nbytes / 2e9
    assert computed.waits == pytest.approx(exposed)
    assert computed.seconds == pytest.approx(alone.seconds / 4 + exposed)
    slowest = all_to_all(problem, 4, "contiguous", replace(slow, flops=inf))
    assert slowest.seconds == slowest.waits == pytest.approx(4e-6 + computed.nbytes / 1e9)


def test_keys_that_come_beside_a_kernel_are_not_waited_for() -> None:
    work = one_device(FULL, QUICK).seconds / 16  # a step of one of four devices
    link = 1024 * KEYS / work
    for share, waits in ((0.5, 0), (2.0, 3)):  # as long as half a step, and as two
        computed = ring(FULL, 4, "contiguous", replace(QUICK, link=link / share))
        assert computed.waits == pytest.approx(waits * work) and computed.seconds == pytest.approx((4 + waits) * work)


def test_speeds_are_known_or_asked_for() -> None:
    assert speeds_of(NAMED["h200"], CAUSAL).flops > speeds_of(NAMED["h200"], GRADIENTS).flops
    assert speeds_of(NAMED["h200"], CAUSAL, link=7).link == 7e9
    given = speeds_of(NAMED["t4"], CAUSAL, tflops=1, link=2, network=3, node=4)
    assert (given.flops, given.link, given.network, given.node) == (1e12, 2e9, 3e9, 4)
    for device, problem, words, match in (
        ("h200", replace(CAUSAL, dtype=FP32), {}, "tflops is None, and how fast"),
        ("a100", CAUSAL, {}, "tflops is None"),
        ("t4", CAUSAL, {"tflops": 9}, "link is None"),
        ("t4", CAUSAL, {"tflops": 9, "link": 9}, "network is None"),
    ):
        with pytest.raises(InvalidArgument, match=match):
            speeds_of(NAMED[device], problem, **words)


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="len_q is 4096; expected a multiple of 6"):
        ring(CAUSAL, 3, "zigzag", QUICK)
    with pytest.raises(InvalidArgument, match="len_q is 2048 and len_kv 4096; expected the same"):
        ring(replace(CAUSAL, len_q=2048), 2, "zigzag", QUICK)
    with pytest.raises(InvalidArgument, match="q has 16 heads for 32 devices"):
        all_to_all(CAUSAL, 32, "zigzag", QUICK)
    with pytest.raises(UnsupportedProblem, match="keys of a cache"):
        ring(replace(CAUSAL, layout="cache"), 2, "zigzag", QUICK)
