"""The bench of attention that is divided over devices: on threads of the CPU, whose times mean nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from doubles.arrays import needs_cupy
from doubles.nccl import OfHostMemory, communicators, in_threads

from cuflash import device
from cuflash.bench import parallel, report
from cuflash.bench.divided import ALONE, Divided, cells
from cuflash.cases import sets
from cuflash.cases.inputs import Normals
from cuflash.cli import app
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.parallel.nccl import Nccl


class Member(parallel._Member):
    """One of several threads, on host memory."""

    def __init__(self, rank: int, exchange: Any, barrier: threading.Barrier, numbers: list[float]) -> None:
        self._cupy, self._rank, self._size = np, rank, len(numbers)
        self._exchange, self._barrier, self._numbers = exchange, barrier, numbers
        self._stream, self._normals = SimpleNamespace(synchronize=lambda: None), Normals(np)

    def _latest(self, number: float) -> float:
        self._numbers[self._rank] = number
        self._barrier.wait(30)
        computed = max(self._numbers)
        self._barrier.wait(30)
        return computed


@needs_cupy
def test_every_way_is_timed_and_gives_what_one_device_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "current", lambda ordinal: device.named("h200"))
    monkeypatch.setattr(parallel, "_BACKWARDS", 64.0**2)  # so that only the first time there is one
    case = sets._dense("short", "bf16", 1, 4, 64, 16, heads_kv=2, mask=sets._CAUSAL)
    barrier, numbers = threading.Barrier(2), [0.0, 0.0]
    with communicators(monkeypatch, 2) as devices:
        computed = in_threads(
            2, lambda rank: Member(rank, OfHostMemory(Nccl(devices[rank])), barrier, numbers).case(case)
        )
    assert computed[0] == computed[1]
    assert [(row.way, row.phase) for row in computed[0]] == [
        (way, phase) for way in (ALONE, "ring", "all-to-all") for phase in ("forward", "backward")
    ]
    for row in computed[0]:
        assert row.seconds > 0 and row.on_paper > 0 and row.case == "short"
        if row.way == ALONE:
            assert row.kernels is row.transfers is row.nbytes is row.apart is None and row.devices == 1
        else:
            assert row.kernels and row.transfers and row.devices == 2 and row.nbytes
            assert (1e-4 if row.way == "ring" else 0) <= row.apart < 1e-2, row
    keys = 2 * 32 * 2 * 16 * 2  # bytes of half the keys and values
    assert computed[0][2].nbytes == keys and computed[0][3].nbytes == 3 * keys // 2
    assert computed[0][4].nbytes == 32 * (2 * 2 * 16 * 2 + 2 * 1 * 16 * 2 + 2 * 4)


ROWS = [
    Divided("a", "forward", ALONE, 1, 0.2, 0.19),
    Divided("a", "backward", ALONE, 1, 0.6, 0.5),
    Divided("a", "forward", "ring", 2, 0.1, 0.095, 0.099, 0.001, 10, 1e-3),
    Divided("a", "backward", "ring", 2, 0.4, 0.25, 0.32, 0.002, 20, 2e-3),
]


def test_the_table_joins_both_phases() -> None:
    header, lines = cells(ROWS)
    assert len(header) == len(lines[0]) and [line[2] for line in lines] == ["forward", "backward", "both"] * 2
    assert lines[2][1:6] == [ALONE, "both", "800.00", "690.00", "–"]
    assert lines[3][1:] == ["ring, 2", "forward", "100.00", "95.00", "2.00x", "99.00", "1.00", "1.010", "1.0e-03"]
    assert lines[5][1:] == ["ring, 2", "both", "500.00", "345.00", "1.60x", "419.00", "3.00", "1.193", "2.0e-03"]


def test_a_report_keeps_and_renders_them(tmp_path: Path) -> None:
    computed = report.new(gpu=False)
    computed.divided = ROWS
    path = tmp_path / "run.json"
    computed.write(path)
    again = report.Report.read(path)
    assert again.divided == ROWS and again.of("forward").divided == ROWS[::2]
    assert "| a | ring, 2 | both | 500.00 | 345.00 | 1.60x |" in report.markdown(again, path.name)


@pytest.mark.parametrize("name", ["parallel", "guests"])
def test_it_needs_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuflash.cli.bench.has_gpu", lambda: False)
    result = CliRunner().invoke(app, ["bench", name], standalone_mode=False)
    assert isinstance(result.exception, UnsupportedProblem)
    assert str(result.exception) == f"{name} is measured on GPUs, and here is none. Name another set."


def test_what_it_does_not_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuflash.cli.bench.has_gpu", lambda: True)
    result = CliRunner().invoke(app, ["bench", "parallel", "--quick"], standalone_mode=False)
    assert isinstance(result.exception, InvalidArgument)
    assert str(result.exception).startswith("--quick does nothing with parallel")
