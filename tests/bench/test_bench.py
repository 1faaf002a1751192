"""The clock, the meter, the report: everything of the bench that needs no GPU."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from cuflash.bench import report, timing
from cuflash.bench.meter import Meter, Reading
from cuflash.bench.peers import PEERS, CuflashCpu, NumpyNaive, find
from cuflash.bench.run import Bench
from cuflash.bench.timing import Runner, Timing, interleave
from cuflash.cases import sets
from cuflash.cases.inputs import Normals, make
from cuflash.cases.table import CASES, Case
from cuflash.features import FEATURES
from cuflash.verify.verdict import verdicts

ROW_KEYS = ["case", "phase", "impl", "family", "dtype", "d", "dv", "b", "h", "hk", "sq", "sk"]
ROW_KEYS += ["causal", "features", "gpu_us", "host_us", "tflops", "gbps", "mode", "sm_mhz", "watts"]


class Clock:
    """Time that passes only in sleep, however busy the machine is."""

    now = busy_until = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        """Of threads that compute until `busy_until`, whatever sleeps."""
        return min(self.now, self.busy_until)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def sleeper(name: str, log: list[str], seconds: float = 0.0, sleep: Callable[[float], None] = time.sleep) -> Runner:
    def launch() -> None:
        log.append(name)
        sleep(seconds)

    return Runner(name, "sleep", launch, launch, clock="wall", wait=lambda: None)


def test_work_on_another_stream_is_timed_between_events(monkeypatch):
    """One launch is in front of the first event, so that the device need not wait for the host behind it."""
    log: list[str] = []
    event = SimpleNamespace(record=lambda stream: log.append("event"), synchronize=lambda: log.append("end"))
    cuda = SimpleNamespace(get_current_stream=object, Event=lambda: event, get_elapsed_time=lambda start, end: 6.0)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    runner = sleeper("launch", log)
    runner.clock, runner.join = "events", lambda: log.append("join")
    assert timing.measure(runner, 3) == 2000.0
    assert log == ["launch", "join", "event", *["launch"] * 3, "join", "event", "end"]


def test_what_the_hosts_clock_times_begins_when_all_threads_are_at_rest(clock):
    """OpenBLAS's threads spin for 100 ms after a product."""
    spun_at, begun_at = [], []

    def spin() -> None:
        spun_at.append(clock.now)
        clock.busy_until = clock.now + 0.1

    runners = [Runner("a", "x", spin, spin, "wall", lambda: None)]
    runners.append(sleeper("b", [], sleep=lambda seconds: begun_at.append((clock.now, clock.busy_until))))
    interleave(runners, seconds=10, rounds=2, slice_us=1)
    assert len(set(spun_at)) == 3  # it is prepared, and has two rounds
    assert all(begun >= busy_until for begun, busy_until in begun_at)
    clock.busy_until = math.inf
    assert not timing.settle(most_s=0.5)  # others may never rest


def test_none_always_follows_the_same_one():
    log: list[str] = []
    interleave([sleeper(name, log, 0.002) for name in "abc"], seconds=10, rounds=6, slice_us=1)
    rounds = "".join(log[-36::2])  # six rounds, three runners, one warm launch and one timed
    assert rounds == "abccbabcaacbcabbac"
    followed = {pair for pair in pairwise(rounds) if pair[0] != pair[1]}
    assert len(followed) == 6


def test_a_timing_is_the_time_taken(clock):
    runners = [sleeper("a", [], 0.004, clock.sleep), sleeper("b", [], 0.001, clock.sleep)]
    times = interleave(runners, seconds=10, rounds=3, slice_us=8_000)
    assert [times[name].gpu_us for name in "ab"] == pytest.approx([4_000, 1_000])
    assert [times[name].host_us for name in "ab"] == pytest.approx([4_000, 1_000])


def test_no_round_starts_after_the_time_is_up():
    log: list[str] = []
    interleave([sleeper("a", log, 0.002)], seconds=0, rounds=1000, slice_us=1)
    assert len(log) < 12


def test_a_runner_that_fails_is_noted_and_the_others_go_on():
    log: list[str] = []

    def broken() -> None:
        raise RuntimeError("no kernel for this")

    failed = []
    runners = [Runner("bad", "x", broken, broken, "wall", lambda: None), sleeper("good", log)]
    times = interleave(runners, 10, rounds=2, failed=lambda runner, error: failed.append((runner.impl, str(error))))
    assert list(times) == ["good"]
    assert failed == [("bad", "no kernel for this")]
    with pytest.raises(RuntimeError, match="no kernel"):
        interleave(runners, 10, rounds=2)


def test_a_runner_heats_the_card_before_each_of_its_slices(clock):
    log: list[str] = []
    runners = [sleeper(name, log, 0.002, clock.sleep) for name in "ab"]
    interleave(runners, seconds=10, rounds=2, slice_us=1, heat_s=0.02)
    turns = [(name, len(list(run))) for name, run in groupby(log)]
    assert "".join(name for name, _ in turns) == "ababa"  # both are prepared, then a, b and, the other way round, b, a
    assert all(length > 10 for _, length in turns[2:])


class FakeMeter:
    """Gives a reading each time something is watched."""

    def __init__(self, readings: list[Reading]) -> None:
        self.left = readings

    @contextmanager
    def watch(self, readings: list[Reading]) -> Iterator[None]:
        yield
        readings.append(self.left.pop(0))


def test_clock_and_power_are_medians_of_what_was_read():
    meter = FakeMeter([Reading(1500.0, 690.0), Reading(1300.0, 700.0), Reading(1400.0, 710.0)])
    taken = interleave([sleeper("a", [])], seconds=10, rounds=3, slice_us=1, meter=meter)["a"]
    assert (taken.sm_mhz, taken.watts) == (1400.0, 700.0)
    taken = interleave([sleeper("a", [])], seconds=10, rounds=3, slice_us=1)["a"]
    assert (taken.sm_mhz, taken.watts) == (None, None)


def test_the_meter_reads_as_long_as_it_watches(monkeypatch):
    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda bus_id: bus_id,
        nvmlDeviceGetClockInfo=lambda gpu, kind: {("0000:1b:00.0", 1): 1410}[gpu, kind],
        nvmlDeviceGetPowerUsage=lambda gpu: 698_500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    readings: list[Reading] = []
    meter = Meter("0000:1b:00.0", interval_s=0.001)
    with meter.watch(readings):
        while len(readings) < 3:
            time.sleep(0.001)
    count = len(readings)
    time.sleep(0.01)
    assert len(readings) == count
    assert set(readings) == {Reading(1410.0, 698.5)}


def test_calls_are_made_inside_the_scope():
    inside = []

    @contextmanager
    def scope():
        inside.append(True)
        yield
        inside.pop()

    seen = []
    runner = Runner("a", "x", *[lambda: seen.append(bool(inside))] * 2, "wall", lambda: None, scope)
    interleave([runner], 10, rounds=2)
    assert seen
    assert all(seen)


def test_a_ramp_scales_keys_along_the_sequence_and_nothing_else():
    plain = replace(CASES["fwd_simt-fp32-d64"])
    ramped = replace(plain, key_ramp=16.0)
    before, after = (make(each, Normals(np)) for each in (plain, ramped))
    ratio = after.k / before.k
    np.testing.assert_allclose(ratio, np.broadcast_to(np.linspace(16, 1, 331)[:, None, None], ratio.shape), rtol=1e-5)
    for name in ("q", "v", "dout"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert report.row(ramped, sleeper("a", []), Timing(1.0, 1.0)).features == ["key ramp 16"]
    assert all(verdict.passed for verdict in verdicts(ramped, after))


def test_peers_that_are_not_here_are_noted_by_name():
    peers = find(list(PEERS), gpu=False)
    assert [x.name for x in peers.implementations] == ["cuflash", "numpy-naive"]
    assert [note.partition(":")[0] for note in peers.notes] == [name for name in PEERS if name != "numpy-naive"]


def test_naive_numpy_refuses_what_it_cannot_express():
    assert NumpyNaive().why_not(CASES["fwd_simt-fp32-d64-varlen"].problem) == "no varlen"
    assert NumpyNaive().why_not(CASES["fwd_simt-fp32-d64-causal"].problem) is None
    assert set(FEATURES) >= {"varlen"}


@pytest.fixture(scope="module")
def measured() -> report.Report:
    bench = Bench([CuflashCpu(), NumpyNaive()], gpu=False, quick=True)
    small = sets.cpu()[0]
    varlen = CASES["fwd_simt-fp32-d64-varlen"]
    with threadpool_limits(1):  # where other processes keep the cores busy, threads of BLAS wait long for each other
        bench.run([small, small.turned("backward"), varlen], seconds=600, done=lambda case: None)
    return bench.report


def test_one_row_for_each_implementation_and_case(measured):
    assert [(row.case, row.phase, row.impl) for row in measured.rows] == [
        ("d64-s256", "forward", "cuflash"),
        ("d64-s256", "forward", "numpy-naive"),
        ("d64-s256", "backward", "cuflash"),
        ("d64-s256", "backward", "numpy-naive"),
        ("fwd_simt-fp32-d64-varlen", "forward", "cuflash"),
    ]
    assert measured.notes == ["numpy-naive (no varlen): forward fwd_simt-fp32-d64-varlen"]
    for row in measured.rows:
        assert row.gpu_us > 0
        assert row.host_us > 0
    first = measured.rows[0]
    assert first.tflops == pytest.approx(4 * 4 * 256**2 * 64 / first.gpu_us * 1e-6, abs=0.01)


def test_a_bench_stops_when_its_seconds_are_used_up():
    bench = Bench([CuflashCpu()], gpu=False, quick=True)
    bench.run(sets.cpu(), seconds=0, done=lambda case: None)
    assert bench.report.rows == []
    assert bench.report.notes == [
        "out of time (--seconds): forward d64-s256, forward d64-s1024, forward d64-s2048, "
        "forward d64-causal-s256 and 2 more"
    ]


def test_the_json_has_the_agreed_keys_and_reads_back(measured, tmp_path):
    path = tmp_path / "deep" / "out.json"
    measured.write(path)
    content = json.loads(path.read_text())
    assert {"device", "driver", "versions", "date", "clocks", "rows", "host", "start"} <= content.keys()
    assert [list(row) for row in content["rows"]] == [ROW_KEYS] * len(measured.rows)
    assert report.Report.read(path) == measured


def test_an_empty_report_is_json_too(tmp_path):
    empty = report.new(gpu=False)
    empty.write(tmp_path / "out.json")
    assert report.Report.read(tmp_path / "out.json") == empty


def test_markdown_shows_how_many_times_faster_cuflash_is():
    case = sets.prefill()[0]
    runners = [Runner(name, "x", print, print, "wall", print) for name in ("peer", "cuflash")]
    measurements = report.new(gpu=False)
    measurements.rows = [
        report.row(case, runner, Timing(gpu_us, 1.0)) for runner, gpu_us in zip(runners, (300.0, 200.0), strict=True)
    ]
    measurements.host = [{"impl": "cuflash", "phase": "forward", "host_us": 12.0}]
    measurements.start = {"forward, cold": {"import_s": 0.1, "first_call_s": 0.9}}
    text = report.markdown(measurements, "run.json")
    assert "| case | cuflash TFLOP/s | beside the best | peer TFLOP/s |" in text
    own, peer = case.flops() / 200e6, case.flops() / 300e6
    assert f"| {case.id} | {own:.1f} (200.0 µs) | 1.50x peer | {peer:.1f} (1.50x) |" in text
    assert "| cuflash | forward | 12.0 |" in text
    assert "| forward, cold | 0.100 | 0.900 |" in text


def rows_of(case: Case, us: dict[str, float], mode: report.Mode = "burst", **work: float) -> list[report.Row]:
    """A row for each implementation, with its time."""
    return [
        report.row(case, Runner(name, "x", print, print, "wall", print, **work), Timing(gpu_us, 1.0, 1410.0), mode)
        for name, gpu_us in us.items()
    ]


def test_a_table_compares_with_the_best_peer_with_the_product_and_over_a_set():
    first, second, third = sets.prefill()[:3]
    measurements = report.new(gpu=False)
    measurements.sets = {"small": [first.id, second.id], "single": [third.id]}
    for case, us in [
        (first, {"cuflash": 200.0, "slow": 400.0, "quick": 210.0}),
        (second, {"cuflash": 200.0, "slow": 180.0}),
        (third, {"cuflash": 200.0, "slow": 500.0}),
    ]:
        measurements.rows += rows_of(case, us) + rows_of(case, {"gemm": 1000.0}, flops=2 * 5 * case.flops())
    lines = report.markdown(measurements, "run.json").splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in lines}
    assert cells["case"][1:] == ["of gemm", "beside the best", "slow TFLOP/s", "quick TFLOP/s", "gemm TFLOP/s"]
    assert cells[first.id][1:3] == ["0.50", "1.05x quick"]
    assert cells[second.id][1:3] == ["0.50", "0.90x slow"]
    # sqrt(1.05 * 0.9) of the best, sqrt(2 * 0.9) of the slow one
    assert cells["small: geometric mean"] == ["", "0.50", "0.97x, least 0.90x", "1.34x", "1.05x", ""]
    assert "single: geometric mean" not in cells
    assert "1410 MHz" in cells[first.id][0]


def test_a_table_of_caches_says_how_fast_they_are_read():
    first, second = sets.decode()[:2]
    measurements = report.new(gpu=False)
    measurements.sets = {"decode": [first.id, second.id]}
    measurements.rows = rows_of(first, {"cuflash": 20.0, "peer": 10.0}) + rows_of(second, {"peer": 10.0})
    lines = report.markdown(measurements, "run.json").splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in lines}
    assert cells["case"][1:] == ["GB/s", "beside the best", "peer TFLOP/s"]
    assert cells[first.id][1:3] == [f"{first.nbytes() / 20e3:,.0f}", "0.50x peer"]
    assert cells[second.id][1:3] == ["–", "–"]
    assert cells["decode: geometric mean"][1:] == ["", "0.50x, least 0.50x", "0.50x"]


def test_a_table_compares_with_what_reads_the_same_bytes_and_nothing_else():
    first, second = sets.decode()[:2]
    measurements = report.new(gpu=False)
    measurements.sets = {"decode": [first.id, second.id]}
    for case, us in ((first, {"cuflash": 20.0, "peer": 18.0}), (second, {"cuflash": 16.0, "peer": 18.0})):
        measurements.rows += rows_of(case, us) + rows_of(case, {"read": 16.0}, nbytes=case.nbytes() // 2)
    lines = report.markdown(measurements, "run.json").splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in lines}
    assert cells["case"][1:] == ["GB/s", "of read", "beside the best", "peer TFLOP/s"]
    assert cells[first.id][2:4] == ["1.60", "0.90x peer"]
    assert cells["decode: geometric mean"][2:4] == ["1.79", "1.01x, least 0.90x"]


def test_burst_and_sustained_are_tables_of_their_own(tmp_path):
    case = sets.prefill()[0]
    measurements = report.new(gpu=False)
    measurements.rows = rows_of(case, {"cuflash": 200.0, "peer": 300.0}) + rows_of(
        case, {"cuflash": 250.0}, "sustained"
    )
    text = report.markdown(measurements, "run.json")
    assert "Forward; in brackets" in text
    assert "Forward, sustained; in brackets" in text
    measurements.write(tmp_path / "out.json")
    assert report.Report.read(tmp_path / "out.json") == measurements


def test_a_file_from_before_the_modes_is_burst(tmp_path, measured):
    path = tmp_path / "out.json"
    measured.write(path)
    content = json.loads(path.read_text())
    del content["sets"]
    content["rows"] = [{key: row[key] for key in ROW_KEYS[:-3]} for row in content["rows"]]
    path.write_text(json.dumps(content))
    assert report.Report.read(path).rows == measured.rows


def test_sustained_follows_burst_in_every_case(monkeypatch):
    monkeypatch.setattr("cuflash.bench.run.QUICK_SUSTAINED", {"rounds": 1, "slice_us": 1_000.0, "heat_s": 0.01})
    bench = Bench([CuflashCpu(), NumpyNaive()], gpu=False, quick=True, sustained=True)
    small = sets.latency()[0]
    bench.run([small, small.turned("backward")], seconds=20, done=lambda case: None)
    assert [(row.phase, row.mode, row.impl) for row in bench.report.rows] == [
        (phase, mode, impl)
        for phase in ("forward", "backward")
        for mode in ("burst", "sustained")
        for impl in ("cuflash", "numpy-naive")
    ]


def test_a_bench_keeps_what_it_has_when_the_device_no_longer_answers(monkeypatch):
    def broken(case: Case, normals: Normals) -> None:
        if case.problem.len_q > 256:
            raise RuntimeError("an illegal memory access was encountered")
        return make(case, normals)

    monkeypatch.setattr("cuflash.bench.run.make", broken)
    bench = Bench([CuflashCpu()], gpu=False, quick=True)
    bench.run(sets.cpu()[:2], seconds=20, done=lambda case: None)
    assert [row.case for row in bench.report.rows] == ["d64-s256"]
    assert bench.report.notes == [
        "stopped by RuntimeError: an illegal memory access was encountered: forward d64-s1024"
    ]
