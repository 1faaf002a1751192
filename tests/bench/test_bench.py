"""The case table, its inputs, the clock, the report: everything of the bench that needs no GPU."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, pairwise
from types import SimpleNamespace

import numpy as np
import oracle
import pytest

from cuflash import dtypes, reference
from cuflash.bench import report, timing
from cuflash.bench.meter import Meter, Reading
from cuflash.bench.peers import PEERS, CuflashCpu, NumpyNaive, find
from cuflash.bench.run import Bench
from cuflash.bench.timing import Runner, Timing, interleave
from cuflash.cases import calls, sets
from cuflash.cases.inputs import Normals, make
from cuflash.cases.table import CASES, SMOKE, Case, select, widest_copy
from cuflash.device import named
from cuflash.errors import InvalidArgument
from cuflash.features import FEATURES, needs
from cuflash.masks import Mask
from cuflash.ops import on_numpy
from cuflash.ops.call import ARGUMENTS
from cuflash.plan import FAMILIES, choose
from cuflash.verify.naive import Extras, Naive, visible
from cuflash.verify.verdict import verdicts

H100 = named("h100")
ROW_KEYS = ["case", "phase", "impl", "family", "dtype", "d", "dv", "b", "h", "hk", "sq", "sk"]
ROW_KEYS += ["causal", "features", "gpu_us", "host_us", "tflops", "gbps", "mode", "sm_mhz", "watts"]


def test_the_id_names_the_kernel_that_runs_the_case():
    for case in CASES.values():
        kernel = case.id.partition("-")[0]
        steps = choose(case.problem, H100, case.family).steps
        assert any(step.kernel.startswith(kernel) for step in steps), case.id


def test_the_table_covers_every_family_dtype_and_feature():
    seen = Counter()
    for case in CASES.values():
        for feature in ("", *needs(case.problem)):
            seen[case.family, case.problem.dtype.name, feature] += 1
    for family in FAMILIES:
        for dtype in family.dtypes:
            assert seen[family.name, dtype, ""], (family.name, dtype)
        for feature in family.features:
            assert any(seen[family.name, dtype, feature] for dtype in family.dtypes), (family.name, feature)


def test_smoke_touches_every_kernel():
    def kernels(cases: list[Case]) -> set[str]:
        return {step.kernel for case in cases for step in choose(case.problem, H100, case.family).steps}

    assert kernels(select("smoke")) == kernels(select()) == kernels([CASES[case_id] for case_id in SMOKE])


def test_select_by_id_part_and_glob():
    assert [case.id for case in select("fwd_sm80-bf16-d64")] == ["fwd_sm80-bf16-d64"]
    assert {case.id for case in select("sm80-bf16-d64-window")} == {f"{x}wd_sm80-bf16-d64-window" for x in "fb"}
    assert all(case.id.startswith("bwd_simt") for case in select("bwd_simt*"))
    with pytest.raises(InvalidArgument, match="'nothing-like-it' matches none"):
        select("nothing-like-it")


@pytest.mark.parametrize(
    ("itemsize", "dims", "at_most", "expected"),
    [(2, (64, 64), 16, 16), (2, (33, 33), 16, 2), (2, (40, 36), 16, 8), (4, (64,), 8, 8)],
)
def test_widest_copy(itemsize, dims, at_most, expected):
    assert widest_copy(itemsize, dims, at_most) == expected


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_arrays_of_a_case_are_its_problem(case):
    """What the library derives from the arrays is what the table says, so that a check runs the variant it names."""
    inputs = make(case, Normals(np))
    options = calls.options(case)
    given = calls.arrays(inputs)
    problem = on_numpy.checked("forward", options, [given.get(name) for name in ARGUMENTS["forward"]]).problem
    assert problem == replace(case.turned("forward").problem, deterministic=False)


def test_tensors_lie_apart_and_are_aligned_exactly_as_asked():
    numbers = Normals(np)
    for align in (2, 4, 8, 16):
        tensors = numbers.tensors(dtypes.BF16, [(3, 7), (5, 11), (1,)], align)
        addresses = sorted((x.__array_interface__["data"][0], x.nbytes) for x in tensors)
        assert all(start + size <= after for (start, size), (after, _) in pairwise(addresses))
        assert all(start % 16 == align % 16 for start, _ in addresses)


@pytest.mark.parametrize(
    ("mask", "softcap", "heads_kv", "options"),
    [
        (Mask(), 0.0, 4, {}),
        (Mask(right=0), 0.0, 2, {"causal": True}),
        (Mask(left=3, right=2), 1.5, 1, {"window": (3, 2), "softcap": 1.5}),
        (Mask(right=0, alignment="top-left"), 0.0, 4, {"causal": True, "alignment": "top-left"}),
    ],
)
def test_naive_attention_is_attention(mask, softcap, heads_kv, options):
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        rng.standard_normal(shape) for shape in [(9, 4, 8), (13, heads_kv, 8), (13, heads_kv, 5), (9, 4, 5)]
    )
    dlse = rng.standard_normal((4, 9))
    exact = oracle.attention(q[None], k[None], v[None], dout[None], dlse[None], scale=0.3, **options)
    naive = Naive(dtypes.FP64, 0.3, softcap)
    q, k, v, dout = (x.swapaxes(0, 1) for x in (q, k, v, dout))
    keep = visible(mask, 9, 13)
    out, lse = naive.forward(q, k, v, keep)
    grads = naive.backward(dout, dlse, q, k, v, keep)[:3]
    np.testing.assert_allclose(out.swapaxes(0, 1), exact.out[0], atol=1e-13)
    np.testing.assert_allclose(lse, exact.lse[0], atol=1e-13)
    for grad, expected in zip(grads, (exact.dq, exact.dk, exact.dv), strict=True):
        np.testing.assert_allclose(grad.swapaxes(0, 1), expected[0], atol=1e-12)


def test_naive_attention_knows_every_score_feature():
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((n, 4, d)) for n, d in [(9, 8), (13, 8), (13, 5), (9, 5)])
    bias, sink = rng.standard_normal((1, 4, 9, 13)), rng.standard_normal(4)
    kept = np.array([oracle.flash_keep(3, 8, 0.3, 0, h, 4, np.arange(9)[:, None], np.arange(13)) for h in range(4)])
    exact = oracle.attention(
        q[None], k[None], v[None], dout[None],
        scale=0.3, causal=True, bias=bias, sink=sink, dropout_p=0.3, rng_state=(3, 8),
    )  # fmt: skip
    extras = Extras(bias[0], sink, kept / 0.7)
    q, k, v, dout = (x.swapaxes(0, 1) for x in (q, k, v, dout))
    naive, keep = Naive(dtypes.FP64, 0.3, 0.0), visible(Mask(right=0), 9, 13)
    out, lse = naive.forward(q, k, v, keep, extras)
    grads = naive.backward(dout, 0.0, q, k, v, keep, extras)
    np.testing.assert_allclose(out.swapaxes(0, 1), exact.out[0], atol=1e-13)
    np.testing.assert_allclose(lse, exact.lse[0], atol=1e-13)
    for grad, expected in zip(grads[:3], (exact.dq, exact.dk, exact.dv), strict=True):
        np.testing.assert_allclose(grad.swapaxes(0, 1), expected[0], atol=1e-12)
    np.testing.assert_allclose(grads.ds, exact.dbias[0], atol=1e-12)
    np.testing.assert_allclose(grads.dsink, exact.dsink, atol=1e-12)


@pytest.mark.parametrize(
    "case_id",
    [
        "fwd_sm80-bf16-d64-causal",
        "bwd_sm80-bf16-d64-softcap",
        "fwd_simt-fp32-d64-seqused",
        "bwd_simt-fp32-d64-varlen_causal",
        "fwd_simt-fp32-d64-mask",
        "fwd_simt-fp32-d64-window",
        "fwd_sm80-bf16-d64-everything",
        "bwd_sm80-bf16-d64-dbias_row",
        "bwd_sm80-bf16-d64-varlen_everything",
        "bwd_simt-fp64-d64-everything",
        "bwd_simt-fp32-d64-dropout_word",
        "bwd_sm80-bf16-d64-gqa",
    ],
)
def test_a_case_passes_on_numpy(case_id):
    case = CASES[case_id]
    judged = verdicts(case, make(case, Normals(np)))
    expected = ["out", "lse"] if case_id.startswith("fwd") else ["dq", "dk", "dv"]
    if case_id.startswith("bwd"):
        expected += ["dbias"] * ("dbias" in case_id or "everything" in case_id) + ["dsink"] * ("everything" in case_id)
    assert [v.tensor for v in judged] == expected
    for verdict in judged:
        assert verdict.passed, verdict


@pytest.mark.parametrize("damage", [lambda x: x * 1.05, lambda x: np.where(x > 0.5, np.nan, x), lambda x: x[::-1]])
def test_a_wrong_result_does_not_pass(monkeypatch, damage):
    case = CASES["fwd_simt-fp32-d64-causal"]
    real = calls.of

    def damaged(*arguments):
        call = real(*arguments)
        return lambda: (damage(call()[0]), call()[1])

    monkeypatch.setattr(calls, "of", damaged)
    out, lse = verdicts(case, make(case, Normals(np)))
    assert not out.passed
    assert lse.passed


def test_an_error_of_the_numpy_backend_itself_does_not_pass(monkeypatch):
    """What the NumPy backend is compared with is not its own, in whatever precision."""
    case = CASES["fwd_simt-fp32-d64-causal"]
    inputs, right = make(case, Normals(np)), reference.forward

    def wrong(*arguments, softmax_scale, **others):
        return right(*arguments, softmax_scale=1.01 * softmax_scale, **others)

    monkeypatch.setattr(reference, "forward", wrong)
    assert not any(verdict.passed for verdict in verdicts(case, inputs))


def test_a_single_key_too_few_does_not_pass(monkeypatch):
    """Of 331 random keys one hardly shows in a bf16 output, but in a log-sum-exp, as in the soak."""
    case = replace(CASES["fwd_sm80-bf16-d64"], family=None)
    inputs, real = make(case, Normals(np)), calls.of
    monkeypatch.setattr(calls, "of", lambda *_: real(case, replace(inputs, k=inputs.k[:, :-1], v=inputs.v[:, :-1])))
    _, lse = verdicts(case, inputs)
    assert not lse.passed


def test_a_gradient_of_the_log_sum_exp_is_taken_in():
    case = CASES["bwd_simt-fp32-d64-mask"]
    inputs = make(case, Normals(np))
    inputs.dlse = np.random.default_rng(4).standard_normal((2, 2, 203), np.float32)
    inputs.dlse[:, :, 3] = np.nan  # of a row that sees nothing
    assert all(verdict.passed for verdict in verdicts(case, inputs))
    without = calls.of(case, replace(inputs, dlse=None))()
    assert not any(np.allclose(x, y, atol=1e-3) for x, y in zip(calls.of(case, inputs)()[:2], without[:2], strict=True))


class Clock:
    """Time that passes only in sleep, however busy the machine is."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

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


def test_rounds_are_rotated():
    log: list[str] = []
    interleave([sleeper(name, log, 0.002) for name in "abc"], seconds=10, rounds=3, slice_us=1)
    rounds = log[-18:]  # three rounds, three runners, one warm launch and one timed
    assert "".join(rounds[::2]) == "abcbcacab"


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


def test_prefill_is_the_protocol():
    cases = sets.prefill()
    assert len({case.id for case in cases}) == len(cases) == 3 * 2 * 6
    for case in cases:
        problem = case.problem
        assert (problem.batch * problem.len_q, problem.heads_q * problem.dim_qk) == (16_384, 2_048)
        square = 4.0 * problem.batch * problem.heads_q * problem.len_q**2 * problem.dim_qk
        rows_seen = (problem.len_q + 1) / 2 / problem.len_q if problem.mask.right == 0 else 1
        assert case.flops() == square * rows_seen
        assert case.turned("backward").flops() == 2.5 * case.flops()
        assert case.nbytes() == 4 * 16_384 * 2_048 * 2


def test_a_union_of_sets_is_its_sets():
    found = sets.of("hopper")
    assert list(found) == ["gqa", "window", "varlen", "scores", "ramp"]
    ids = [case.id for cases in found.values() for case in cases]
    assert len(set(ids)) == len(ids) == 16
    assert sets.of("prefill") == {"prefill": sets.prefill()}
    with pytest.raises(InvalidArgument, match="problem set 'hopper9' is not known; expected one of: prefill, "):
        sets.of("hopper9")


def test_lengths_are_log_uniform_and_always_the_same():
    (case,) = sets.varlen()
    assert case == sets.varlen()[0]
    assert len(case.lens_q) == 32
    assert case.lens_q == case.lens_kv
    assert all(64 <= n <= 8192 for n in case.lens_q)
    octaves = Counter(int(np.log2(n / 64)) for n in case.lens_q)
    assert all(octaves[i] for i in range(7))
    assert case.problem.total_q == sum(case.lens_q)


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


def test_a_bias_is_drawn_once_for_cases_that_share_it():
    normals = Normals(np)
    bias = normals.bias(dtypes.FP32, (1, 2, 5, 8), apart=False)
    assert normals.bias(dtypes.FP32, (1, 2, 5, 8), apart=False) is bias
    assert np.isneginf(bias[:, :, 3, 4:]).all()
    assert np.isfinite(bias[:, :, :3]).all()
    assert normals.bias(dtypes.FP32, (1, 2, 5, 4), apart=False).shape == (1, 2, 5, 4)


@pytest.mark.parametrize("dtype", [dtypes.BF16, dtypes.FP32])
def test_rows_of_a_bias_are_aligned_unless_its_keys_lie_apart(dtype):
    bias, apart = (Normals(np).bias(dtype, (1, 2, 6, 9), apart) for apart in (False, True))
    assert bias.shape == apart.shape == (1, 2, 6, 9)
    assert not any(stride % 16 for stride in bias.strides[:3])
    assert bias.strides[3] == apart.strides[2] == dtype.itemsize < apart.strides[3]
    assert np.isneginf(bias[:, :, 3, 4:]).all() and np.isneginf(apart[:, :, 3, 4:]).all()


def test_flops_of_packed_sequences_count_their_own_lengths():
    case = next(case for case in sets.features() if case.problem.layout == "varlen")
    pairs = sum(n * (n + 1) // 2 for n in case.lens_q)
    assert case.flops() == 4 * 16 * 128 * pairs


@pytest.mark.parametrize("name", sets.SETS)
def test_every_set_has_a_plan_in_both_directions(name):
    for case in sets.SETS[name]():
        for direction in ("forward", "backward"):
            assert choose(case.turned(direction).problem, H100).steps


def test_peers_that_are_not_here_are_noted_by_name():
    found = find(list(PEERS), gpu=False)
    assert [x.name for x in found.implementations] == ["cuflash", "numpy-naive"]
    assert [note.partition(":")[0] for note in found.notes] == [name for name in PEERS if name != "numpy-naive"]


def test_naive_numpy_refuses_what_it_cannot_express():
    assert NumpyNaive().why_not(CASES["fwd_simt-fp32-d64-varlen"].problem) == "no varlen"
    assert NumpyNaive().why_not(CASES["fwd_simt-fp32-d64-causal"].problem) is None
    assert set(FEATURES) >= {"varlen"}


@pytest.fixture(scope="module")
def measured() -> report.Report:
    bench = Bench([CuflashCpu(), NumpyNaive()], gpu=False, quick=True)
    small = sets.cpu()[0]
    varlen = CASES["fwd_simt-fp32-d64-varlen"]
    bench.run([small, small.turned("backward"), varlen], seconds=20, done=lambda case: None)
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
    found = report.new(gpu=False)
    found.rows = [
        report.row(case, runner, Timing(gpu_us, 1.0)) for runner, gpu_us in zip(runners, (300.0, 200.0), strict=True)
    ]
    found.host = [{"impl": "cuflash", "phase": "forward", "host_us": 12.0}]
    found.start = {"forward, cold": {"import_s": 0.1, "first_call_s": 0.9}}
    text = report.markdown(found, "run.json")
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
    found = report.new(gpu=False)
    found.sets = {"small": [first.id, second.id], "single": [third.id]}
    for case, us in [
        (first, {"cuflash": 200.0, "slow": 400.0, "quick": 210.0}),
        (second, {"cuflash": 200.0, "slow": 180.0}),
        (third, {"cuflash": 200.0, "slow": 500.0}),
    ]:
        found.rows += rows_of(case, us) + rows_of(case, {"gemm": 1000.0}, flops=2 * 5 * case.flops())
    lines = report.markdown(found, "run.json").splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in lines}
    assert cells["case"][1:] == ["of gemm", "beside the best", "slow TFLOP/s", "quick TFLOP/s", "gemm TFLOP/s"]
    assert cells[first.id][1:3] == ["0.50", "1.05x quick"]
    assert cells[second.id][1:3] == ["0.50", "0.90x slow"]
    # sqrt(1.05 * 0.9) of the best, sqrt(2 * 0.9) of the slow one
    assert cells["small: geometric mean"] == ["", "0.50", "0.97x, least 0.90x", "1.34x", "1.05x", ""]
    assert "single: geometric mean" not in cells
    assert "1410 MHz" in cells[first.id][0]


def test_burst_and_sustained_are_tables_of_their_own(tmp_path):
    case = sets.prefill()[0]
    found = report.new(gpu=False)
    found.rows = rows_of(case, {"cuflash": 200.0, "peer": 300.0}) + rows_of(case, {"cuflash": 250.0}, "sustained")
    text = report.markdown(found, "run.json")
    assert "Forward; in brackets" in text
    assert "Forward, sustained; in brackets" in text
    found.write(tmp_path / "out.json")
    assert report.Report.read(tmp_path / "out.json") == found


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
