"""What a bench found: rows, the environment they were measured in, tables with ratios, JSON and Markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rich import box
from rich.table import Table

from cuflash.bench.cases import Case
from cuflash.bench.timing import Runner, Timing
from cuflash.plan.families import needs


@dataclass(frozen=True, slots=True)
class Row:
    """One implementation's time for one case."""

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


def row(case: Case, runner: Runner, timing: Timing) -> Row:
    """Describe a case and what it took."""
    problem = case.problem
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
        features=[need for need in needs(problem) if need not in ("backward", "causal")],
        gpu_us=round(timing.gpu_us, 2),
        host_us=round(timing.host_us, 2),
        tflops=float(f"{case.flops() / timing.gpu_us * 1e-6:.4g}"),
        gbps=float(f"{case.nbytes() / timing.gpu_us * 1e-3:.4g}"),
    )


@dataclass(slots=True)
class Report:
    """All that one bench run writes."""

    device: str
    driver: str
    versions: dict[str, str]
    date: str
    clocks: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    host: list[dict[str, object]] = field(default_factory=list)
    """Host microseconds a call on a tiny problem, by implementation and phase."""
    start: dict[str, dict[str, float]] = field(default_factory=dict)
    """Seconds of a new process, by phase and state of the kernel cache."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    def write(self, path: Path) -> None:
        """Write JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        rows = ",\n".join("    " + json.dumps(each) for each in content.pop("rows"))  # a line each: diffs stay readable
        text = json.dumps(content, indent=2)
        path.write_text(
            f'{text[:-2]},\n  "rows": [\n{rows}\n  ]\n}}\n' if rows else f'{text[:-2]},\n  "rows": []\n}}\n'
        )

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read what ``write`` wrote."""
        content = json.loads(path.read_text())
        known = {f.name for f in fields(Row)}
        rows = [Row(**{name: value for name, value in each.items() if name in known}) for each in content.pop("rows")]
        return cls(**content, rows=rows)


_PACKAGES = (
    "cuflash",
    "numpy",
    "ml_dtypes",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "torch",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "fa3-fwd",
    "flash-attn-3",
    "jax",
    "flash-attn3-jax",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that bear on a measurement."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(phase, case) -> impl -> row, in the order measured."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for each in rows:
        groups.setdefault((each.phase, each.case), {})[each.impl] = each
    return groups


def _short(tflops: float) -> str:
    """One decimal, or two digits where that would leave nothing."""
    return f"{tflops:.1f}" if tflops >= 10 else f"{tflops:.2g}"


def _cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the result table: cuflash first, each peer with the speed of cuflash relative to it."""
    impls = list(dict.fromkeys(each.impl for each in report.rows))
    impls.sort(key=lambda impl: impl != "cuflash")
    header = ["phase", "case", *(f"{impl} TFLOP/s" for impl in impls)]
    lines = []
    for (phase, case), group in _grouped(report.rows).items():
        own = group.get("cuflash")
        line = [phase, case]
        for impl in impls:
            each = group.get(impl)
            if each is None:
                line.append("–")
            elif own is None or each is own:
                line.append(f"{_short(each.tflops)} ({each.gpu_us:,.1f} µs)")
            else:
                line.append(f"{_short(each.tflops)} ({each.gpu_us / own.gpu_us:.2f}x)")
        lines.append(line)
    return header, lines


def table(report: Report) -> Table:
    """The results for a terminal."""
    header, lines = _cells(report)
    result = Table(
        title=f"{report.device}, {report.date}; beside a peer, how many times faster cuflash is",
        title_justify="left",
        box=box.SIMPLE,
    )
    for i, name in enumerate(header):
        result.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for line in lines:
        result.add_row(*line)
    return result


def markdown(report: Report) -> str:
    """The results for a README: one table a phase, then host and start times."""
    header, lines = _cells(report)
    made_with = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    driver = f", driver {report.driver}" if report.driver else ""
    parts = [f"{report.device}{driver}, {report.date[:10]}; {made_with}."]
    for phase in dict.fromkeys(line[0] for line in lines):
        own = [line[1:] for line in lines if line[0] == phase]
        parts.append(f"{phase.capitalize()}; in brackets beside a peer, how many times faster cuflash is.")
        parts.append(markdown_table(header[1:], own))
    if report.host:
        parts.append("Host time of a call on a tiny problem, µs.")
        parts.append(markdown_table(["impl", "phase", "µs"], [[str(x) for x in each.values()] for each in report.host]))
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
