"""Pictures of runs: recorded ones can be drawn, points lie where the numbers are, and what cannot be is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cuflash.bench import plots
from cuflash.bench.report import Report, beside_peers, by_case
from cuflash.cli import app
from cuflash.errors import InvalidArgument

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FORWARD, NUMPY = RESULTS / "2026-11-30-h200-forward.json", max(RESULTS.glob("*-cpu-numpy.json"))


@pytest.fixture(autouse=True)
def matplotlib() -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra viz)")


def test_points_are_the_ratios_and_the_rates_of_the_run() -> None:
    run = Report.read(FORWARD)
    left, right = plots.draw(run).figure.axes
    [cases] = by_case(run.rows).values()
    ratios = {case: beside_peers(group) for case, group in cases.items()}
    assert [label.get_text() for label in left.get_yticklabels()] == list(ratios)
    handles, labels = left.get_legend_handles_labels()
    assert [label.split()[0] for label in labels] == list(dict.fromkeys(x for of in ratios.values() for x in of))
    for handle, label in zip(handles, labels, strict=True):
        expected = [(of[label.split()[0]], y) for y, of in enumerate(ratios.values())]
        np.testing.assert_allclose(handle.get_offsets(), expected)
        mean = np.exp(np.mean([np.log(ratio) for ratio, _ in expected]))
        assert float(label.split()[1][:-1]) == pytest.approx(mean, abs=0.005)
    for handle, impl in zip(*right.get_legend_handles_labels(), strict=True):
        timed = [group[impl] for group in cases.values()]
        flops = [row.tflops * 1e12 * row.gpu_us * 1e-6 for row in timed]
        moved = [row.gbps * 1e9 * row.gpu_us * 1e-6 for row in timed]
        np.testing.assert_allclose(handle.get_offsets()[:, 0], np.divide(flops, moved))
        np.testing.assert_allclose(handle.get_offsets()[:, 1], [row.tflops for row in timed])
    words = [text.get_text() for text in right.texts]
    product = max(group["gemm"].tflops for group in cases.values())
    assert "datasheet: 989.4 TFLOP/s, 4.8 TB/s" in words and f"matrix product, {product:.0f} TFLOP/s" in words


def test_the_roof_is_that_of_the_datasheet() -> None:
    run = Report.read(FORWARD)
    run.rows = [replace(row, gbps=row.gbps * 200) for row in run.rows]  # so few FLOPs a byte that memory is the bound
    right = plots.draw(run).figure.axes[1]
    [roof] = [line.get_xydata() for line in right.lines if len(line.get_xydata()) == 3]
    np.testing.assert_allclose(roof[0, 1], roof[0, 0] * 4.8)
    assert (roof[:, 1] <= 989.4).all() and len(np.unique(roof[:, 0])) >= 2


def test_a_cpu_has_no_roof_and_a_panel_for_each_phase() -> None:
    axes = plots.draw(Report.read(NUMPY)).figure.axes
    assert len(axes) == 4
    assert not any("datasheet" in text.get_text() for ax in axes for text in ax.texts)


def test_every_recorded_run_can_be_drawn(tmp_path: Path) -> None:
    drawn = 0
    for path in sorted(RESULTS.glob("*.json")):
        try:
            run = Report.read(path)
        except InvalidArgument:
            continue
        if run.rows:
            figure = plots.draw(run).figure
            assert len(figure.axes) == 2 * len(by_case(run.rows)), path
            drawn += 1
    assert drawn >= 8


def bench(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    if isinstance(result.exception, InvalidArgument):
        assert status == 2
        return str(result.exception)
    assert result.exit_code == status, result.output
    return result.output


def test_the_command_writes_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "numpy.png"
    assert bench("--render", NUMPY, "--phase", "forward", "--plot", picture) == ""
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, exactness = tmp_path / "x.svg", RESULTS / "2026-11-30-h200-exactness.json"
    assert "ends in .pdf, .png, .svg" in bench("--render", NUMPY, "--plot", tmp_path / "x.txt", status=2)
    assert "the run has no times" in bench("--render", exactness, "--plot", picture, status=2)
    assert "--plot and --write exclude" in bench("--render", NUMPY, "--plot", picture, "--write", NUMPY, status=2)
    assert "--plot is for a measurement" in bench("--standing", RESULTS, "--plot", picture, status=2)
    assert "--plot is for timing" in bench("exactness", "--plot", picture, status=2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "extra viz" in bench("numpy", "--plot", picture, status=2)
    assert not picture.exists()
