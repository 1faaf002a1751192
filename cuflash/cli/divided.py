"""``explain --devices``: what a problem takes that is divided over devices, by ring and by heads for sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import click

from cuflash.cli.console import options_written
from cuflash.cli.problem import Asked
from cuflash.device import Device
from cuflash.errors import REFUSALS, InvalidArgument
from cuflash.parallel import model
from cuflash.parallel.schedule import Order

_SPEED = click.FloatRange(min=1e-3, max=1e12)
OPTIONS: tuple[click.Parameter, ...] = (
    click.Option(
        ["--devices"],
        type=click.IntRange(1, 1024),
        help="Also what it takes if so many GPUs have a part of each sequence.",
    ),
    click.Option(
        ["--order"],
        type=click.Choice(get_args(Order)),
        default="zigzag",
        help="With --devices: which parts each of them has.",
    ),
    click.Option(["--tflops"], type=_SPEED, help="With --devices: the speed of one, where it was not measured."),
    click.Option(["--link"], type=_SPEED, help="With --devices: GB/s to another in its node, one way."),
    click.Option(["--network"], type=_SPEED, help="With --devices: GB/s to one of another node."),
    click.Option(["--node"], type=click.IntRange(1, 4096), default=8, help="With --devices: how many are in a node."),
)


def lines(
    asked: Asked, device: Device, devices: int | None, order: Order, tflops: float | None, link: float | None,
    network: float | None, node: int,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """A line for each way of dividing."""
    if devices is None:
        names = {name for option in OPTIONS for name in option.opts}
        if idle := [name for name in options_written() if name in names]:
            raise InvalidArgument(f"{idle[0]} does nothing here; it goes with --devices.")
        return
    speeds = model.speeds_of(device, asked.problem, tflops, link, network, node)
    alone = model.one_device(asked.problem, speeds)
    links = f"{speeds.link / 1e9:,.0f} GB/s in a node of {node}"
    links += f", {speeds.network / 1e9:,.0f} between nodes" if devices > node else ""
    yield "", ""
    yield "on paper", f"{speeds.flops / 1e12:,.0f} TFLOP/s, {links}; one device: {_time(alone.seconds)}"
    ways: dict[str, Any] = {"ring": model.ring, "all-to-all": model.all_to_all}
    estimates: dict[str, model.Estimate] = {}
    for name, estimate in ways.items():
        try:
            estimates[name] = took = estimate(asked.problem, devices, order, speeds)
        except REFUSALS as error:
            yield name, f"not possible: {error}"
            continue
        share = alone.seconds / devices / took.seconds if took.seconds else 1.0
        yield (
            name,
            f"{_time(took.seconds)} on {devices} devices, {share:.0%} of their speed: waits {_time(took.waits)} for "
            f"{took.transfers} transfers, {took.nbytes / 1e6:,.1f} MB to each device",
        )
    if estimates:
        best = min(estimates, key=lambda name: estimates[name].seconds)
        yield "choose", f"{best}, in {order} order"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms" if seconds < 1 else f"{seconds:,.2f} s"
