"""What a bench found: rows, the environment they were measured in, tables with ratios, JSON and Markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from rich import box
from rich.table import Table

from cuflash.bench import divided as divided_of
from cuflash.bench.divided import Divided
from cuflash.bench.peers.product import NAME as PRODUCT
from cuflash.bench.peers.reading import NAME as READ
from cuflash.bench.timing import Runner, Timing
from cuflash.cases.sets import BY_MEMORY
from cuflash.cases.table import Case
from cuflash.errors import InvalidArgument
from cuflash.features import needs
from cuflash.verify import deviations as deviations_of
from cuflash.verify.deviations import OWN, Deviation

Mode = Literal["burst", "sustained"]
"""How a row was timed: short slices, or longer ones after the implementation has heated the card itself."""


@dataclass(frozen=True, slots=True)
class Row:
    """One implementation's time for one case, or the matrix product's in the case's rotation."""

    case: str
    phase: str
    """``forward`` or ``backward``."""
    impl: str
    family: str
    dtype: str
    d: int
    dv: int
    b: int
    h: int
    hk: int
    sq: int
    sk: int
    causal: bool
    features: list[str]
    """What the problem needs beyond plain and causal attention."""
    gpu_us: float
    host_us: float
    tflops: float
    gbps: float
    """Tensors read and written once, a second; scratch memory and repeated reads are not counted."""
    mode: Mode = "burst"
    sm_mhz: float | None = None
    """SM clock while it was timed; None where it was not read."""
    watts: float | None = None
    """Power while it was timed, likewise."""


def row(case: Case, runner: Runner, timing: Timing, mode: Mode = "burst") -> Row:
    """Describe a case and what it took; the rate of an implementation with work of its own is of that work."""
    problem = case.problem
    flops, nbytes = runner.flops or case.flops(), runner.nbytes or case.nbytes()
    return Row(
        case=case.id,
        phase=problem.direction,
        impl=runner.impl,
        family=runner.family,
        dtype=problem.dtype.name,
        d=problem.dim_qk,
        dv=problem.dim_v,
        b=problem.batch,
        h=problem.heads_q,
        hk=problem.heads_kv,
        sq=problem.len_q,
        sk=problem.len_kv,
        causal=problem.mask.right == 0,
        features=[need for need in needs(problem) if need not in ("backward", "causal")]
        + ([f"key ramp {case.key_ramp:g}"] if case.key_ramp != 1 else []),
        gpu_us=round(timing.gpu_us, 2),
        host_us=round(timing.host_us, 2),
        tflops=float(f"{flops / timing.gpu_us * 1e-6:.4g}"),
        gbps=float(f"{nbytes / timing.gpu_us * 1e-3:.4g}"),
        mode=mode,
        sm_mhz=timing.sm_mhz,
        watts=timing.watts,
    )


@dataclass(slots=True)
class Report:
    """All that one bench run writes."""

    device: str
    driver: str
    versions: dict[str, str]
    date: str
    clocks: dict[str, str]
    sets: dict[str, list[str]] = field(default_factory=dict)
    """The ids of each set of cases, by its name."""
    rows: list[Row] = field(default_factory=list)
    deviations: list[Deviation] = field(default_factory=list)
    """How far results are from exact ones, where that was measured instead of times."""
    divided: list[Divided] = field(default_factory=list)
    """How long attention took that was divided over devices, where that was measured instead."""
    host: list[dict[str, object]] = field(default_factory=list)
    """Host microseconds a call on a tiny problem, by implementation and phase."""
    start: dict[str, dict[str, float]] = field(default_factory=dict)
    """Seconds of a new process, by phase and state of the kernel cache."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""
    timing: str = ""
    """What is to be known of how times were taken."""

    def write(self, path: Path) -> None:
        """Write JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        lists = {name: content.pop(name) for name in ("deviations", "divided", "rows")}
        text = json.dumps(content, indent=2)[:-2]
        for name, rows in lists.items():
            lines = ",\n".join("    " + json.dumps(row) for row in rows)  # a line each: diffs stay readable
            text += f',\n  "{name}": [\n{lines}\n  ]' if rows else f',\n  "{name}": []'
        path.write_text(text + "\n}\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read what ``write`` wrote.

        Raises
        ------
        InvalidArgument
            If the file holds anything else.
        """
        known = {f.name for f in fields(Row)}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(**{name: row[name] for name in known & row.keys()}) for row in content.pop("rows")]
            deviations = [Deviation(**deviation) for deviation in content.pop("deviations", [])]
            divided = [Divided(**row) for row in content.pop("divided", [])]
            return cls(**content, rows=rows, deviations=deviations, divided=divided)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"{path} is not what `bench --json` writes ({error}); name such a file.") from error

    def of(self, phase: Literal["forward", "backward"]) -> Report:
        """The same of one phase alone."""
        return replace(
            self,
            rows=[row for row in self.rows if row.phase == phase],
            deviations=[deviation for deviation in self.deviations if deviation.phase == phase],
            divided=[row for row in self.divided if row.phase == phase],
            host=[cost for cost in self.host if cost["phase"] == phase],
            start={name: times for name, times in self.start.items() if name.startswith(phase)},
        )


_PACKAGES = (
    "cuflash",
    "numpy",
    "ml_dtypes",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "torch",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "fa3-fwd",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "jax",
    "flash-attn3-jax",
    "nvidia-ml-py",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that bear on a measurement."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def new(gpu: bool) -> Report:
    """Start an empty report that says where and when it was made."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if not gpu:
        return Report(_cpu_name(), "", versions(), date, {})
    import cupy

    from cuflash.device import current

    seen = clocks()
    driver = seen.pop("driver_version", "") or str(cupy.cuda.runtime.driverGetVersion())
    return Report(current(cupy.cuda.Device().id).name, driver, versions(), date, seen)


_CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def clocks() -> dict[str, str]:
    """Clocks, power limit and driver of the current GPU as nvidia-smi tells them; empty where there is no such tool."""
    import cupy

    bus = cupy.cuda.runtime.deviceGetPCIBusId(cupy.cuda.Device().id)
    command = ["nvidia-smi", f"--id={bus}", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_CLOCKS, (part.strip() for part in line.splitlines()[0].split(",")), strict=False))


def _cpu_name() -> str:
    """The processor's marketing name where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


YARDSTICKS = (PRODUCT, READ)
"""Implementations that compute no attention."""

Group = dict[str, Row]
"""The rows of one case in one phase and mode, by implementation."""


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Group]]:
    """(phase, mode) -> case -> its rows, in the order measured."""
    groups: dict[tuple[str, str], dict[str, Group]] = {}
    for row in rows:
        groups.setdefault((row.phase, row.mode), {}).setdefault(row.case, {})[row.impl] = row
    return groups


def beside_peers(group: Group) -> dict[str, float]:
    """How many times faster cuflash is than each peer."""
    own = group.get(OWN)
    if own is None:
        return {}
    return {impl: row.gpu_us / own.gpu_us for impl, row in group.items() if impl not in (OWN, *YARDSTICKS)}


def _share(group: Group, yardstick: str) -> float | None:
    """The rate of cuflash over that of a yardstick in the same rotation."""
    own, other = group.get(OWN), group.get(yardstick)
    if own is None or other is None:
        return None
    return own.gbps / other.gbps if yardstick == READ else own.tflops / other.tflops


def _short(tflops: float) -> str:
    """One decimal, or two digits where that would leave nothing."""
    return f"{tflops:.1f}" if tflops >= 10 else f"{tflops:.2g}"


def _cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the result table: cuflash, its place beside product and best peer, then each peer."""
    impls = list(dict.fromkeys(row.impl for row in report.rows if row.impl != OWN))
    yardsticks = [impl for impl in impls if impl in YARDSTICKS]
    products = [impl for impl in yardsticks if impl == PRODUCT]
    peers = [impl for impl in impls if impl not in YARDSTICKS]
    by_memory = any(name in BY_MEMORY for name in report.sets)
    header = ["phase", "case", f"{OWN} TFLOP/s", *["GB/s"] * by_memory, *(f"of {impl}" for impl in yardsticks)]
    header += ["beside the best"] * bool(peers) + [f"{impl} TFLOP/s" for impl in [*peers, *products]]
    set_of = {case: name for name, cases in report.sets.items() for case in cases}
    lines = []
    for (phase, mode), cases in by_case(report.rows).items():
        label = phase if mode == "burst" else f"{phase}, {mode}"
        for name in dict.fromkeys(set_of.get(case, "") for case in cases):
            groups = {case: group for case, group in cases.items() if set_of.get(case, "") == name}
            for case, group in groups.items():
                faster = beside_peers(group)
                line = [label, case, _cell(group.get(OWN)), *[_bandwidth(group.get(OWN))] * by_memory]
                line += [times(_share(group, impl), "") for impl in yardsticks]
                best = min(faster, key=faster.__getitem__, default=None)
                line += ["–" if best is None else f"{times(faster[best])} {best}"] * bool(peers)
                line += [_cell(group.get(impl), faster.get(impl)) for impl in [*peers, *products]]
                lines.append(line)
            if peers and len(groups) > 1:
                means = _means(name, list(groups.values()), peers, yardsticks)
                lines.append([label, *means[:2], *[""] * by_memory, *means[2:]])
    return header, lines


def _means(name: str, groups: list[Group], peers: list[str], yardsticks: list[str]) -> list[str]:
    """The last line of a set: geometric means over the cases that have the ratio, and the least beside the best."""
    ratios = [beside_peers(group) for group in groups]
    shares = {impl: [share for group in groups if (share := _share(group, impl)) is not None] for impl in yardsticks}
    best = [min(of_peers.values()) for of_peers in ratios if of_peers]
    return [
        f"{name or 'all'}: geometric mean",
        "",
        *(times(geometric_mean(shares[impl]), "") for impl in yardsticks),
        f"{times(geometric_mean(best))}, least {times(min(best))}" if best else "–",
        *(times(geometric_mean([of_peers[impl] for of_peers in ratios if impl in of_peers])) for impl in peers),
        *("" for impl in yardsticks if impl == PRODUCT),
    ]


def geometric_mean(ratios: list[float]) -> float | None:
    """Their geometric mean; None of none."""
    return statistics.geometric_mean(ratios) if ratios else None


def times(ratio: float | None, unit: str = "x") -> str:
    """A ratio in two decimals."""
    return "–" if ratio is None else f"{ratio:.2f}{unit}"


def _cell(row: Row | None, faster: float | None = None) -> str:
    """A rate, then beside a peer how many times faster cuflash is and elsewhere the time; the clock where known."""
    if row is None:
        return "–"
    beside = [f"{row.gpu_us:,.1f} µs" if faster is None else times(faster)]
    beside += [f"{row.sm_mhz:.0f} MHz"] if row.sm_mhz else []
    return f"{_short(row.tflops)} ({', '.join(beside)})"


def _bandwidth(row: Row | None) -> str:
    """How fast the tensors were read and written, each once."""
    return "–" if row is None else f"{row.gbps:,.0f}"


def table(report: Report) -> Table:
    """The results for a terminal."""
    title = f"{report.device}, {report.date}; beside a peer, how many times faster cuflash is"
    return _on_screen(title, *_cells(report))


def _on_screen(title: str, header: list[str], lines: list[list[str]]) -> Table:
    """Two columns that stay whole, then numbers."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for i, name in enumerate(header):
        result.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2, overflow="fold")
    for line in lines:
        result.add_row(*line)
    return result


_DEVIATIONS = (
    "Root mean square errors against float64, in units of rounding the exact result once; beside the best, how many "
    "times the least error of the peers (torch-efficient and flex aside), or of FlashAttention on paper (model) where "
    "none computes the case"
)


def deviations_table(report: Report) -> Table:
    """How far results are from exact ones, for a terminal."""
    return _on_screen(f"{report.device}, {report.date}\n{_DEVIATIONS}", *deviations_of.cells(report.deviations))


_DIVIDED = (
    "Milliseconds of the device that is last, the lower median of the repetitions; kernels, the same program where "
    "nothing travels; transfers, its messages alone; of the larger, the time over the larger of both; apart, the root "
    "mean square of the difference from one device over that of its results"
)


def divided_table(report: Report) -> Table:
    """Times of several devices, for a terminal."""
    return _on_screen(f"{report.device}, {report.date}\n{_DIVIDED}", *divided_of.cells(report.divided))


def markdown(report: Report, name: str) -> str:
    """The results for a page, with the file they are from: a table for each phase and mode, errors, host and start."""
    header, lines = _cells(report)
    made_with = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    driver = f", driver {report.driver}" if report.driver else ""
    parts = [f"`{name}`: {report.device}{driver}, {report.date[:10]}; {made_with}."]
    if report.timing:
        parts.append(f"{report.timing}.")
    for phase in dict.fromkeys(line[0] for line in lines):
        own = [line[1:] for line in lines if line[0] == phase]
        parts.append(f"{phase.capitalize()}; in brackets beside a peer, how many times faster cuflash is.")
        parts.append(markdown_table(header[1:], own))
    if report.deviations:
        parts.append(f"{_DEVIATIONS}.")
        parts.append(markdown_table(*deviations_of.cells(report.deviations)))
    if report.divided:
        parts.append(f"{_DIVIDED}.")
        parts.append(markdown_table(*divided_of.cells(report.divided)))
    if report.host:
        parts.append("Host time of a call on a tiny problem, µs.")
        parts.append(markdown_table(["impl", "phase", "µs"], [[str(x) for x in cost.values()] for cost in report.host]))
    if report.start:
        names = list(next(iter(report.start.values())))
        parts.append("A new process, seconds.")
        parts.append(
            markdown_table(
                ["", *names],
                [[key, *(f"{value:.3f}" for value in times.values())] for key, times in report.start.items()],
            )
        )
    return "\n\n".join(parts) + "\n"


def markdown_table(header: list[str], lines: list[list[str]], numbers: bool = True) -> str:
    """A GitHub table; numbers are aligned right, but for the first column."""
    rule = [":--", *("--:" if numbers else ":--" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])
