"""What dividing a call over devices takes, on paper: from the speed of one device's kernels and of what links devices.

A transfer overlaps what is computed beside it, and takes as long as its slowest pair of devices: within a node they are
linked, and between nodes each has a network of its own. Not in it are launches, the memory that transfers and kernels
share, and that short chunks run below the speed of long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cuflash.device import Device
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.parallel.division import Call, Division, rows_that_travel
from cuflash.parallel.heads import check_heads, shares_of
from cuflash.parallel.schedule import Band, Order, Schedule, places_of
from cuflash.problem import Problem

_BACKWARD = 2.5
"""Floating-point operations of the gradients for each of the forward, the usual convention."""


@dataclass(frozen=True)
class Speeds:
    """What one device does in a second."""

    flops: float
    """Floating-point operations of attention, in the direction that is asked about."""
    link: float
    """Bytes from each device to another in its node, and as many back."""
    network: float
    """The same to a device of another node."""
    memory: float
    """Bytes of its memory that are read and written."""
    node: int = 8
    """Devices that are linked."""
    latency: float = 1e-5
    """Seconds before the first byte of a transfer arrives."""

    def transfer(self, nbytes: float, devices: int) -> float:
        """Seconds until each of so many devices has so many bytes of one other."""
        if not nbytes:
            return 0.0
        return self.latency + nbytes / (self.link if devices <= self.node else self.network)


class Hardware(NamedTuple):
    """GB/s of links and memory of one kind of GPU, from the sheets of the vendor's systems with eight of them."""

    link: float
    network: float
    memory: float
    forward: float | None = None
    """TFLOP/s of 16-bit attention, at head dimension 128 over 16k keys, as `benchmarks/results` has them."""
    backward: float | None = None


HARDWARE: dict[tuple[str, tuple[int, int]], Hardware] = {
    ("A100", (8, 0)): Hardware(300, 25, 2039),
    ("H100", (9, 0)): Hardware(450, 50, 3350, 720, 550),
    ("H200", (9, 0)): Hardware(450, 50, 4800, 720, 550),
    ("B200", (10, 0)): Hardware(900, 50, 8000),
}
"""By a word of the name, and the compute capability; H100's speed is taken to be that of H200, which was measured."""

_ATTAINED = 0.75
"""Of a link's and a memory's speed on paper: NCCL moved 340 GB/s each way between two H200."""


def speeds_of(
    device: Device,
    problem: Problem,
    tflops: float | None = None,
    link: float | None = None,
    network: float | None = None,
    node: int = 8,
) -> Speeds:
    """The speeds of a GPU, in TFLOP/s and GB/s where they are given.

    Raises
    ------
    InvalidArgument
        If one is neither given nor known.
    """
    known = next((x for (name, of), x in HARDWARE.items() if name in device.name and of == device.capability), None)
    if tflops is None and known is not None and problem.dtype.itemsize == 2:
        tflops = known.backward if problem.direction == "backward" else known.forward
    if tflops is None:
        raise InvalidArgument(
            f"tflops is None, and how fast {device} computes {problem.dtype} attention has not been measured. Pass it."
        )
    if known is None and (link is None or network is None):
        name = "link" if link is None else "network"
        raise InvalidArgument(f"{name} is None, and what links {device} to others is not known. Pass it, in GB/s.")
    on_paper = [None if known is None else _ATTAINED * x for x in (known or Hardware(0, 0, 0))[:3]]
    link, network = (x if given is None else given for given, x in zip((link, network), on_paper, strict=False))
    memory = on_paper[2] or link
    assert link is not None and network is not None and memory is not None
    return Speeds(tflops * 1e12, link * 1e9, network * 1e9, memory * 1e9, node)


class Estimate(NamedTuple):
    """What one way of dividing takes, of the device that is busy longest."""

    seconds: float
    waits: float
    """Of these those in which nothing is computed, as keys have not arrived."""
    nbytes: float
    """That arrive at a device, in all."""
    transfers: int
    """One after the other."""


def one_device(problem: Problem, speeds: Speeds) -> Estimate:
    """The whole call on one device, as if its memory sufficed."""
    return Estimate(problem.flops() / speeds.flops, 0.0, 0.0, 0)


def ring(problem: Problem, devices: int, order: Order, speeds: Speeds) -> Estimate:
    """`ring_attention`, and its gradients.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        If the call cannot be divided so.
    """
    division, backward = _division(problem, devices, order), problem.direction == "backward"
    size, real = problem.dtype.itemsize, problem.dtype.accumulator.itemsize
    rows_q, dims = problem.batch * problem.heads_q, problem.dim_qk + problem.dim_v
    of_pair = rows_q * 2.0 * dims * (_BACKWARD if backward else 1) / speeds.flops
    # A sum is read and written, and so is what is added to it.
    of_row = rows_q * (problem.dim_qk if backward else problem.dim_v) * 2 * (real + size) / speeds.memory
    of_key = problem.batch * problem.heads_kv * dims * size
    # One of these is busy longest at any step: the ends have fewer neighbours, and the others are like each other.
    asked = sorted({0, 1 % devices, devices // 2, devices - 1})

    def computes(calls: Sequence[Call]) -> float:
        return sum(Band(*call[:4]).pairs * of_pair + (call.q.stop - call.q.start) * of_row for call in calls)

    work, arrive = [max(computes(division.own(device)) for device in asked)], []
    for shift in division.schedule.shifts:
        calls = [division.received(device, shift) for device in asked]
        moved = [rows_that_travel(x) for x in calls if x]
        work.append(max(map(computes, calls)))
        arrive.append(max((rows.stop - rows.start for rows in moved), default=0) * of_key)
    # Keys travel beside the step before theirs, and their gradients home beside the step after, or after the last one.
    steps = len(arrive)
    keys = [*arrive, 0.0, 0.0]
    home = [0.0, 0.0, *arrive] if backward else [0.0] * (steps + 2)
    beside = [a + b for a, b in zip(keys, home, strict=True)]
    moves = [speeds.transfer(nbytes, devices) for nbytes in beside]
    seconds = sum(map(max, zip([*work, 0.0], moves, strict=True)))
    return Estimate(seconds, seconds - sum(work), sum(beside), sum(nbytes > 0 for nbytes in beside))


def all_to_all(problem: Problem, devices: int, order: Order, speeds: Speeds) -> Estimate:
    """`all_to_all_attention`, and its gradients, which exchange as much.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        If the call cannot be divided so.
    """
    _division(problem, devices, order)
    check_heads(devices, problem.heads_q, problem.heads_kv)
    heads_kv = max(problem.heads_kv, devices)  # one that several devices work with goes to each of them
    of_q, of_kv = problem.len_q * problem.heads_q, problem.len_kv * heads_kv
    moved = of_q * problem.dim_qk + of_kv * (problem.dim_qk + problem.dim_v), of_q * problem.dim_v
    size = problem.batch * problem.dtype.itemsize
    there, back = (x * size * (devices - 1) / devices**2 for x in moved)
    shares = shares_of(devices, problem.heads_kv, size * of_q * problem.dim_qk / devices)
    computed = problem.flops() / devices / speeds.flops / shares
    # To every other device as much; a node's links and its networks are busy at the same time.
    inside = (min(devices, speeds.node) - 1) / max(devices - 1, 1)
    latency = speeds.latency if devices > 1 else 0.0
    rate = max(inside / speeds.link, (1 - inside) / speeds.network) / shares
    # A share of the heads travels before anything is computed and one after it, and the others beside what is.
    moves = [latency + nbytes * rate for nbytes in (there, back)]
    beside = [moves[0], moves[1]] if shares == 2 else [0.0]
    seconds = sum(moves) + sum(max(computed, move) for move in beside)
    transfers = 2 * shares if devices > 1 else 0
    return Estimate(seconds, seconds - shares * computed, there + back, transfers)


def _division(problem: Problem, devices: int, order: Order) -> Division:
    """The steps of dense sequences, or of packed ones of one length."""
    if problem.layout == "cache" or problem.page_size:
        raise UnsupportedProblem("the keys of a cache are not divided over devices. Ask about a call without one.")
    places = devices * places_of(order)
    mask = problem.mask.clipped(problem.len_q, problem.len_kv)
    for name, length in (("len_q", problem.len_q), ("len_kv", problem.len_kv)):
        if length % places:
            raise InvalidArgument(
                f"{name} is {length}; expected a multiple of {places}, as {devices} devices have {places // devices} "
                f"equal chunks of a sequence each in {order} order. Pad it."
            )
    if problem.len_q != problem.len_kv and mask.kind != "none":
        raise InvalidArgument(
            f"len_q is {problem.len_q} and len_kv {problem.len_kv}; expected the same where keys are masked."
        )
    schedule = Schedule(devices, order, mask, (problem.len_kv // places,))
    return Division(schedule, (problem.len_q // devices, problem.len_kv // devices))
