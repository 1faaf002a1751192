"""The pages that people read first: what they quote is recorded, what they name exists, and the front page is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cuflash.bench import report, standing
from cuflash.bench.timing import Runner, Timing
from cuflash.cases import sets
from cuflash.cli import app
from cuflash.errors import InvalidArgument

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "cuflash/README.md", "kernels/README.md", "benchmarks/README.md", "CHANGELOG.md")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> dict[str, str]:
    """What stands between the markers of a page."""
    return dict(re.findall(r"<!-- ([\w-]+):begin -->\n(.*?)<!-- \1:end -->", text(page), flags=re.DOTALL))


def test_the_front_page_is_short_and_has_its_parts_in_order():
    assert len(text("README.md").splitlines()) <= 150
    parts = re.findall(r"^## (.*)$", text("README.md"), flags=re.MULTILINE)
    assert parts == [
        "Install", "What you get", "Where it stands", "A call, drawn twice", "Read the kernels", "Settings", "Licence",
    ]  # fmt: skip


def test_the_front_page_says_where_cuflash_stands():
    assert blocks("README.md")["standing"] == standing.markdown(standing.recorded(RESULTS)), (
        "run `python -m cuflash bench --standing benchmarks/results --write README.md`"
    )


def test_every_measured_table_is_that_of_the_file_it_names():
    tables = blocks("benchmarks/README.md")
    assert {"measurements-forward", "measurements-backward"} <= tables.keys()
    for marker, table in tables.items():
        name = re.match(r"`([\w.-]+\.json)`: ", table).group(1)
        whole = report.Report.read(RESULTS / name)
        renderings = [report.markdown(of, name) for of in (whole, whole.of("forward"), whole.of("backward"))]
        assert table in renderings, f"render {name} again, between the markers {marker}"


def test_how_to_add_a_kernel_is_told_once():
    assert [page for page in PAGES if "Add a `Family`" in text(page)] == ["cuflash/README.md"]
    assert "(../cuflash/README.md)" in text("kernels/README.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_are_there(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#]+)\)", text(page)):
        assert (folder / link).exists(), link
    for name in re.findall(r"`((?:cuflash|kernels|tests|examples|benchmarks)/[\w/.-]+\.\w+)`", text(page)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_are_there(page):
    for line in re.findall(r"python -m cuflash([^`]*)`", text(page).replace("\n", " ")):
        words = line.split()
        if words:
            options = {option for param in app.commands[words[0]].params for option in param.opts}
            assert {word for word in words if word.startswith("--")} <= options, line


def test_every_setting_is_in_the_table():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "cuflash").rglob("*.py")]
    read = {name for source in sources for name in re.findall(r'"(CUFLASH_\w+)"', source)}
    assert read and read == set(re.findall(r"^\| `(CUFLASH_\w+)` \|", text("README.md"), flags=re.MULTILINE))


def rows(phase: str, of: str, ratios: dict[str, dict[str, float]]) -> list[report.Row]:
    """Rows of cuflash at 100 µs and of peers that many times slower, for cases of a set."""
    cases = {case.id: case.turned(phase) for case in sets.SETS[of]()}
    return [
        report.row(cases[case], Runner(impl, "x", print, print, "wall", print), Timing(100.0 * times, 1.0))
        for case, peers in ratios.items()
        for impl, times in {"cuflash": 1.0, **peers}.items()
    ]


def test_standing_takes_each_case_from_the_newest_run_and_the_fastest_peer():
    old, new, host = (report.new(gpu=False) for _ in range(3))
    old.rows = rows("forward", "prefill", {"d64-s512": {"a": 9.0}, "d64-s1024": {"a": 2.0, "b": 4.5}})
    new.rows = rows("forward", "prefill", {"d64-s512": {"a": 0.5, "b": 3.0, "gemm": 0.1}})
    new.rows += rows("forward", "numpy", {"d64-s1024": {"numpy-naive": 1.5}})  # the id of another case of prefill
    costs = {"cuflash": 20.0, "a": 30.0, "b": 50.0}
    host.host = [{"impl": impl, "phase": "backward", "host_us": us} for impl, us in costs.items()]
    host.driver = "580.1"
    new.host = [{**cost, "host_us": 900.0} for cost in host.host]  # of a run without a GPU
    for phase in ("forward", "backward"):
        host.start |= {f"{phase}, cold": {"first_call_s": 1.0}, f"{phase}, cached": {"first_call_s": 0.1}}
    runs = [standing.Recorded(name, run) for name, run in (("new.json", new), ("host.json", host), ("old.json", old))]
    cells = [line.strip("| ").split(" | ") for line in standing.markdown(runs).splitlines()[2:]]
    assert [line[:3] for line in cells] == [
        ["forward, 2 of 36 cases", "1.00x", "0.50x a (d64-s512)"],
        ["NumPy backend, forward, 1 of 6 cases", "1.50x", "1.50x numpy-naive (d64-s1024)"],
        ["host time of a tiny backward", "1.50x", "20.0 µs, 30.0 a"],
        ["first call, forward and backward", "1.00 and 1.00 s", "0.10 and 0.10 s once it was compiled"],
    ]
    assert cells[0][3] == "[new](benchmarks/results/new.json), [old](benchmarks/results/old.json)"


def test_a_folder_without_runs_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InvalidArgument, match="has no file that `bench --json` wrote"):
        standing.recorded(tmp_path)
