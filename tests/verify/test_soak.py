"""The soak: its draws, their surroundings and answers, what it finds, and how it outlives a hang."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate, pairwise
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from click.testing import CliRunner
from doubles.arrays import as_torch, to_numpy
from doubles.launch import Launches, needs_compiler
from host import run as run_on_host

from cuflash import device, jit
from cuflash.cases import calls
from cuflash.cases.table import CASES
from cuflash.cli import app
from cuflash.device import named
from cuflash.errors import InvalidArgument
from cuflash.ops import on_numpy
from cuflash.ops.call import Arrays, Options
from cuflash.plan import choose
from cuflash.verify import soak
from cuflash.verify.answers import Answers
from cuflash.verify.draws import GPU, HOST, Draw, Limits, draw
from cuflash.verify.soak import Job, Outcome, Soaker
from cuflash.verify.surroundings import Arena, Numbers, surround

IDS = tuple(CASES)


def job(*case_ids: str, seed: int = 0, first: int = 0, count: int = 1, patience_s: float = 60.0) -> Job:
    return Job(case_ids or IDS, seed, first, count, gpu=False, patience_s=patience_s)


@pytest.fixture(scope="module")
def arena() -> Arena:
    return Arena(np, 64 * 2**20)


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return Numbers(np, 2 * max(HOST.pairs, HOST.elements))


# Draws


def test_one_case_alone_gives_the_same_draw():
    for number in (0, 7, 1000):
        drawn = job().draw(number)
        alone = job(drawn.case.id).draw(number)
        assert str(alone) == str(drawn)
        assert alone == drawn
        assert alone.generator().random() == drawn.generator().random()


def test_every_case_takes_its_turn():
    assert {job().draw(number).case.id for number in range(len(IDS))} == set(IDS)


def test_seed_and_number_decide_the_draw():
    case_id = "fwd_sm80-bf16-d64-causal"
    draws = [job(case_id, seed=seed).draw(number) for seed in range(4) for number in range(4)]
    assert len({str(each) for each in draws}) == len(draws)


@pytest.mark.parametrize("limits", [GPU, HOST])
def test_draws_stay_within_their_limits(limits: Limits):
    for number in range(500):
        problem = draw([CASES[IDS[number % len(IDS)]]], 1, number, limits).case.problem
        dim = max(problem.dim_qk, problem.dim_v)
        assert problem.batch * problem.heads_q * problem.len_q * problem.len_kv <= limits.pairs
        for length, rows, heads in (
            (problem.len_q, problem.rows_q, problem.heads_q),
            (problem.len_kv, problem.rows_kv, problem.heads_kv),
        ):
            assert problem.batch * heads * length * dim <= limits.elements
            assert (
                rows * heads * dim <= 2 * limits.elements or rows == problem.page_size
            )  # one page, as large as must be
        assert max(problem.len_q, problem.len_kv) <= limits.length


def test_draws_reach_every_corner():
    draws = [job().draw(number) for number in range(1500)]
    problems = [each.case.problem for each in draws]
    for reached in (
        lambda p: p.len_q == 0, lambda p: p.len_kv == 0 < p.len_q, lambda p: p.len_q == 1, lambda p: p.len_q > 300,
        lambda p: p.len_q > p.len_kv, lambda p: p.batch > 40, lambda p: p.group == 8, lambda p: p.heads_kv == 7,
        lambda p: p.len_q % 64 == 63, lambda p: p.len_kv > 64 and p.len_kv % 64 == 1,
        lambda p: p.mask.alignment == "top-left", lambda p: p.mask.left is None and (p.mask.right or 0) > 0,
        lambda p: p.mask.left == 0, lambda p: p.softcap > 5, lambda p: p.softmax_scale < 0, lambda p: not p.ascending,
    ):  # fmt: skip
        assert any(reached(problem) for problem in problems)
    packed = [each for each in draws if each.case.lens_q]
    for reached in (
        lambda d: 0 in d.case.lens_q, lambda d: d.case.problem.total_q > sum(d.case.lens_q),
        lambda d: d.case.problem.len_q > max(d.case.lens_q), lambda d: d.case.seqused_q, lambda d: d.case.seqused_kv,
        lambda d: not d.case.seqused_kv, lambda d: len(d.case.lens_q) == 1,
    ):  # fmt: skip
        assert any(reached(each) for each in packed)
    turns = {(name, *turn) for each in draws for name, turn in each.turns.items()}
    assert {(name, -2, True) for name in ("q", "k", "v", "dout")} <= turns
    assert {
        (name, axis, False) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv") for axis in (-2, -3)
    } <= turns


def test_pages_reach_every_corner():
    paged = [case_id for case_id in IDS if "paged" in case_id]
    draws = [job(*paged).draw(number) for number in range(300)]
    shared, spare = 0, 0
    for each in draws:
        problem, table, counts = each.case.problem, each.block_table(), np.array(each.case.pages)
        used = table[np.arange(table.shape[1]) < counts[:, None]]
        assert used.size == counts.sum()
        assert ((used >= 0) & (used < problem.total_kv // problem.page_size)).all()
        shared += len(set(used.tolist())) < len(used)
        spare += problem.total_kv // problem.page_size > len(used)
    assert min(shared, spare) > 30
    behind = {n for each in draws for n in each.block_table()[:, max(each.case.pages) :].flat}
    assert {-(2**31), -1, 2**31 - 1} < behind
    sizes = {each.case.problem.page_size for each in draws}
    assert {1, 16, 48} < sizes and max(sizes) > 250 and len(sizes) > 40
    for reached in (
        lambda d: 0 in d.case.pages, lambda d: max(d.case.pages) > 40, lambda d: d.block_table().shape[1] == 0,
        lambda d: d.case.problem.len_kv > max(d.case.pages) * d.case.problem.page_size,
        lambda d: d.turns.get("k", (0,))[0] == -4, lambda d: d.turns.get("v", (0,))[0] == -3,
    ):  # fmt: skip
        assert any(reached(each) for each in draws)


def test_splits_reach_every_corner():
    """Few queries, so that the kernels are those of the cases: heads that share a tile, and blocks that share keys."""
    h100, decode = named("h100"), [case_id for case_id in IDS if "decode" in case_id]
    draws = [draw([CASES[case_id]], 2, number, GPU) for number, case_id in enumerate(decode * 10)]
    for each in draws:
        problem, table = each.case.problem, CASES[each.case.id].problem
        assert (problem.num_splits == 1) == (table.num_splits == 1)
        assert problem.num_splits == 1 or (problem.len_q < 120 and (problem.group == 1) == (table.group == 1))
    asked = {each.case.problem.num_splits for each in draws}
    assert {0, 1, 2} < asked and max(asked) > 100 and len(asked) > 20
    plans = [choose(each.case.problem, h100, each.case.family) for each in draws]
    chosen = {plan.num_splits for plan in plans}
    assert {1, 2, 3} < chosen and max(chosen) > 30
    assert sum(plan.num_splits > 1 for plan in plans) > len(plans) / 3
    main = {step.config for plan in plans for step in plan.steps if step.kernel in ("fwd_sm80", "fwd_simt")}
    assert {(config.heads, config.split) for config in main} == {
        (heads, split) for heads in ("OneHead", "HeadGroup") for split in ("NoSplit", "KeySplits")
    }


def test_a_forward_for_gradients_is_the_plain_kernel():
    """Else the kernels that draws need would be many times those of the table."""
    for number in range(20):
        case = job("bwd_sm80-bf16-d64-causal").draw(number).case
        assert case.turned("forward").problem.num_splits == calls.options(case).num_splits == 1


def test_arrays_make_the_problem_that_was_drawn(arena: Arena, numbers: Numbers):
    """So that the kernels that run are those that were counted, and all but those for other tiles are the table's."""
    h100 = named("h100")
    known = {(step.kernel, step.config) for step in soak.steps_of(list(CASES.values()), h100)}
    compared, beyond = 0, set()
    for number in range(400):
        drawn = job().draw(number)
        case, problem = drawn.case, drawn.case.problem
        if not (min(problem.rows_q, problem.rows_kv, problem.len_q, problem.len_kv)):
            continue
        arena.clear()
        arrays = surround(drawn, arena, numbers, np)
        given = calls.arrays(arrays.inputs)._replace(**arrays.outputs)
        options = calls.options(case)
        if problem.direction == "backward":
            options = options.replace(deterministic=problem.deterministic, bias_grad=problem.bias_grad)
            given = given._replace(dout=arrays.inputs.dout, lse=arrays.lse, dlse=arrays.inputs.dlse)
            given = given._replace(rng_state=np.array(drawn.rng_state, np.uint64) if problem.dropout else None)
        made = on_numpy.checked(problem.direction, options, given).problem
        for field in problem.__dataclass_fields__:
            if field in ("len_q", "len_kv") and problem.layout == "varlen":  # never more than there are packed rows
                assert getattr(made, field) <= getattr(problem, field)
            else:
                assert getattr(made, field) == getattr(problem, field), (field, number)
        steps = {(step.kernel, step.config) for step in choose(made, h100, case.family).steps}
        few = problem.len_q <= 64  # which may have a tile of their own
        biased = problem.bias is not None  # whose keys may be neighbours or not
        left = case.id.startswith(("fwd_sm90", "bwd_sm90")) and not any("sm90" in kernel for kernel, _ in steps)
        assert steps <= known or problem.num_splits != 1 or few or biased or left
        beyond |= steps - known
        compared += 1
    assert compared > 300
    assert len(beyond) < soak._MORE_VARIANTS


# Surroundings


@pytest.mark.parametrize("unit", [2, 4, 8, 16])
def test_strided_arrays_are_aligned_as_asked_and_apart(unit: int):
    arena, rng = Arena(np, 2**20), np.random.default_rng(0)
    orders = set()
    for _ in range(40):
        x = arena.cut("x", (3, 5, 2, 8), np.dtype(np.float16), unit, rng)
        assert x.shape == (3, 5, 2, 8)
        assert x.strides[-1] == 2
        assert np.isnan(x).all()
        addresses = [x.ctypes.data, *x.strides[:-1]]
        assert all(n % unit == 0 for n in addresses)
        assert unit == 16 or x.ctypes.data // unit % 2 == 1
        x[...] = np.arange(x.size).reshape(x.shape)
        assert (np.sort(x, axis=None) == np.arange(x.size)).all()  # no two elements are one
        orders.add(tuple(np.argsort(x.strides)))
    assert len(orders) == 6
    arena.clear()
    assert np.isnan(x).all()


def test_a_change_is_found_and_named_and_outputs_may_change():
    arena, rng = Arena(np, 2**20), np.random.default_rng(0)
    q, out = (arena.cut(name, (4, 3, 8), np.dtype(np.float32), 16, rng) for name in ("q", "out"))
    q[...] = 1
    before = arena.snapshot()
    out[...] = 2
    assert arena.change(before, [out]) == ""
    assert np.isnan(out).all()
    out[...] = 2
    assert "from the start of out" in arena.change(before, [])
    q[1, 2, 3] = 5
    assert "from the start of q" in arena.change(before, [])
    q[1, 2, 3] = 1
    arena._bytes[arena._end + 1000] = 0
    assert "from the start of out" in arena.change(before, [])


@pytest.mark.parametrize("unit", [2, 4, 8, 16])
@pytest.mark.parametrize("rotated", range(4))
def test_no_row_is_aligned_to_more_than_asked(unit: int, rotated: int):
    """Whatever the shape; with a gap behind each axis, so that a step too far meets NaN."""
    arena = Arena(np, 2**20)
    for shape in ((2, 7, 3, 64), (7, 3, 33), (1, 5, 2, 1), (3, 4, 16)):
        x = arena.cut("x", shape, np.dtype(np.float16), unit, rotated)
        assert all(n % unit == 0 for n in (x.ctypes.data, *x.strides[:-1]))
        pitch = min(x.strides[:-1])
        assert x.ctypes.data % (2 * unit) == unit and pitch % (2 * unit) == unit
        assert pitch >= shape[-1] * 2 + unit
        axes = [int(axis) for axis in np.roll(np.arange(len(shape) - 1), rotated)]
        for outer, inner in pairwise(axes):
            assert x.strides[outer] == x.strides[inner] * (shape[inner] + 1)


def test_an_arena_that_is_too_small_says_so():
    with pytest.raises(MemoryError, match="more than the 1024 bytes of the arena"):
        Arena(np, 1024).cut("q", (1024, 8), np.dtype(np.float32), 16)


def test_numbers_go_round_and_suffice_for_one_large_page():
    few = Numbers(np, 100)
    few.start(np.random.default_rng(0))
    real = np.dtype(np.float32)
    few.take((60,), real)
    first = few.take((60,), real)
    np.testing.assert_array_equal(first, np.random.default_rng(0).standard_normal(60, np.float32))
    page = few.take((3, 128), real)
    np.testing.assert_array_equal(page[0, :60], first)
    assert page.shape == (3, 128) and np.unique(page).size > 380


def test_rows_that_take_no_part_are_nan(arena: Arena, numbers: Numbers):
    seen = 0
    for number in range(60):
        drawn = job("bwd_sm80-bf16-d64-varlen_everything").draw(number)
        arena.clear()
        inputs = surround(drawn, arena, numbers, np).inputs
        for name, side in (("q", "q"), ("k", "kv"), ("v", "kv"), ("dout", "q")):
            finite = np.isfinite(getattr(inputs, name).astype(np.float32))
            np.testing.assert_array_equal(finite.all(axis=(1, 2)), drawn.taking_part(side))
            seen += (~drawn.taking_part(side)).any()
    assert seen > 60


def test_rows_of_pages_that_take_no_part_are_nan(arena: Arena, numbers: Numbers):
    strides = set()
    for number in range(60):
        drawn = job("fwd_sm80-bf16-d64-paged_everything").draw(number)
        arena.clear()
        inputs = surround(drawn, arena, numbers, np).inputs
        size, table = drawn.case.problem.page_size, inputs.block_table
        taking_part = np.zeros((drawn.case.problem.total_kv // size, size), bool)
        for pages, (_, len_kv) in zip(table, drawn.case.sequences, strict=True):
            for j in range(len_kv):
                taking_part[pages[j // size], j % size] = True
        for pages in (inputs.k, inputs.v):
            finite = np.isfinite(pages.astype(np.float32))
            np.testing.assert_array_equal(finite.all(axis=(2, 3)), taking_part)
        if min(table.shape) > 1:
            strides.add((table.strides[0] > table.strides[1], *np.sign(table.strides)))
    assert len(strides) >= 4, "tables in both orders, and with either axis reversed"


# Answers


FEATURES = (
    "", "window", "mask", "softcap", "everything", "varlen_everything", "dropout", "dropout_word", "dbias_row",
    "varlen_causal", "sink", "negative", "top_left", "alibi", "varlen", "seqused_q",
)  # fmt: skip


class AllAtOnce:
    """NumPy, but not by identity: all sequences are computed at once, as on a GPU."""

    def __getattr__(self, name: str) -> object:
        return getattr(np, name)


XP = [pytest.param(np, id="one by one"), pytest.param(AllAtOnce(), id="all at once")]


@pytest.mark.parametrize("xp", XP)
@pytest.mark.parametrize("feature", FEATURES)
def test_exact_answers_are_the_oracles(feature: str, xp: object, arena: Arena, numbers: Numbers):
    case = CASES["bwd_simt-fp32-d64" + (feature and f"-{feature}")]
    for number in range(8):
        names = compared_answers(draw([case], 5, number, Limits(2**13, 2**14, 200)), arena, numbers, xp)
        assert names >= {"out", "lse", "dq", "dk", "dv"}


@pytest.mark.parametrize("xp", XP)
@pytest.mark.parametrize("feature", ["paged48", "paged_everything", "decode_varlen"])
def test_exact_answers_without_gradients_are_the_oracles(feature: str, xp: object, arena: Arena, numbers: Numbers):
    for number in range(12):
        drawn = draw([CASES[f"fwd_simt-fp32-d64-{feature}"]], 5, number, Limits(2**13, 2**14, 200))
        assert compared_answers(drawn, arena, numbers, xp) == {"out", "lse"}


def compared_answers(drawn: Draw, arena: Arena, numbers: Numbers, xp: object) -> set[str]:
    """The names of the answers, once they are what they should be."""
    arena.clear()
    arrays = surround(drawn, arena, numbers, np)
    lse = Answers(drawn.case, arrays.inputs, xp, drawn.unbiased).answers()["lse"].exact
    if arrays.inputs.dlse is not None:
        arrays.inputs.dlse[np.isneginf(lse)] = np.nan
    answers = Answers(drawn.case, arrays.inputs, xp, drawn.unbiased).answers()
    exact = expected(drawn, arrays)
    for name, answer in answers.items():
        wanted = getattr(exact, name)
        assert answer.exact.shape == wanted.shape
        scale = np.abs(wanted[np.isfinite(wanted)]).max(initial=1.0)
        np.testing.assert_allclose(answer.exact, wanted, rtol=0, atol=1e-12 * scale, err_msg=f"{name} {drawn}")
    return set(answers)


def expected(drawn: Draw, arrays: object) -> oracle.Attention:
    case, problem, inputs = drawn.case, drawn.case.problem, arrays.inputs
    mask = problem.mask
    packed, tensors = {}, {name: getattr(inputs, name) for name in ("q", "k", "v", "dout")}
    if problem.page_size:
        tensors |= {name: in_sequence(drawn, tensors[name]) for name in ("k", "v")}
    if problem.layout == "varlen":
        packed = {
            "cu_seqlens_q": np.array([0, *accumulate(case.lens_q)]),
            "cu_seqlens_k": np.array([0, *accumulate(case.lens_kv)]),
            "seqused_q": np.array(case.seqused_q) if case.seqused_q else None,
            "seqused_k": np.array(case.seqused_kv) if case.seqused_kv else None,
            "max_seqlen_q": problem.len_q,
            "max_seqlen_k": problem.len_kv,
        }
    return oracle.attention(
        *(None if x is None else np.nan_to_num(x.astype(np.float64)) for x in tensors.values()),
        None if arrays.inputs.dlse is None else arrays.inputs.dlse.astype(np.float64),
        window=tuple(-1 if side is None else side for side in (mask.left, mask.right)),
        alignment=mask.alignment,
        softcap=problem.softcap,
        scale=problem.softmax_scale,
        mask=inputs.mask_tensor,
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes.astype(np.float64),
        bias=inputs.bias,
        sink=inputs.sink,
        dropout_p=case.dropout_p,
        dropout_scheme=problem.dropout or "byte",
        dropout_unbiased=drawn.unbiased,
        rng_state=drawn.rng_state or (0, 0),
        **packed,
    )


def in_sequence(drawn: Draw, pages: np.ndarray) -> np.ndarray:
    """Packed keys or values out of their pages; 0 where a sequence does not use them."""
    case, size, table = drawn.case, drawn.case.problem.page_size, drawn.block_table()
    packed = np.zeros((sum(case.lens_kv), *pages.shape[2:]), pages.dtype)
    for start, numbers, (_, len_kv) in zip(accumulate(case.lens_kv, initial=0), table, case.sequences, strict=False):
        for j in range(len_kv):
            packed[start + j] = pages[numbers[j // size], j % size]
    return packed


def test_a_single_key_too_few_shows_in_lse(arena: Arena, numbers: Numbers):
    """Naive 16-bit scores are too coarse for that; the limit of an lse is not."""
    drawn = next(d for d in map(job("fwd_sm80-bf16-d64").draw, range(200)) if d.case.problem.len_kv > 250)
    arena.clear()
    arrays = surround(drawn, arena, numbers, np)
    answer = Answers(drawn.case, arrays.inputs, np, drawn.unbiased).answers()["lse"]
    arrays.inputs.k = arrays.inputs.k[:, :-1]
    arrays.inputs.v = arrays.inputs.v[:, :-1]
    p = drawn.case.problem
    q, k = (x.astype(np.float64) for x in (arrays.inputs.q, arrays.inputs.k))
    without = oracle.attention(q, k, k, scale=p.softmax_scale).lse
    assert np.abs(without - answer.exact).max() > answer.most


# What it finds


@needs_compiler
@pytest.mark.parametrize(
    ("case_id", "kernels"),
    [
        ("bwd_sm80-bf16-d64-varlen_everything", {"bwd_sm80", "bwd_bias_sm80"}),
        ("bwd_simt-fp32-d64-causal", {"bwd_simt_dq"}),
        ("fwd_sm90-bf16-d64-causal", {"fwd_sm90"}),
        ("bwd_sm90-bf16-d64-everything", {"bwd_prepare_sm90", "bwd_sm90", "bwd_convert_sm90"}),
        ("bwd_sm90-bf16-d256-varlen_causal", {"bwd_prepare_sm90", "bwd_sm90_wide", "bwd_convert_sm90"}),
        ("fwd_sm90-bf16-d64-varlen_everything", {"fwd_sm90", "fwd_rng"}),
        ("fwd_sm80-bf16-d64-paged_everything", {"fwd_sm80"}),
        ("fwd_simt-fp32-d64-paged48", {"fwd_simt"}),
        ("fwd_sm80-bf16-d64-decode_causal", {"fwd_sm80", "fwd_combine"}),
        ("fwd_sm80-bf16-d64-decode_pairs", {"fwd_sm80", "fwd_combine"}),
    ],
)
def test_draws_pass_with_the_kernels_themselves(
    case_id: str,
    kernels: set[str],
    launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
):
    """As on a GPU, but that the kernels run on the CPU."""

    def on_host_memory(function: Callable) -> Callable:
        def call(options: Options, arrays: Arrays, *generator: object) -> list[np.ndarray]:
            wrapped = Arrays(*(None if x is None else as_torch(x) for x in arrays))
            return [to_numpy(x) for x in function(options, wrapped, *generator) if x is not None]

        return call

    monkeypatch.setattr(device, "current", lambda ordinal: named("h100"))
    monkeypatch.setattr(jit.tensormap, "encoder", run_on_host.encoder)
    for name in ("forward", "backward"):
        monkeypatch.setattr(soak, name, on_host_memory(getattr(soak, name)))
    few_queries = "decode" in case_id
    limits = Limits(2**15, 2**15, 512) if few_queries else Limits(pairs=2000, elements=2**14, length=160)
    monkeypatch.setattr(soak, "HOST", limits)
    soaker = Soaker(job(case_id))
    for number in range(8):
        outcome = soaker.run(number)
        assert (outcome.complaints, outcome.left_out) == ((), "")
    assert kernels <= set(launches.kernels)


def test_draws_pass_on_numpy():
    soaker = Soaker(job())
    outcomes = [soaker.run(number) for number in range(100)]
    assert [each for each in outcomes if each.complaints or each.left_out] == []


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["check", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout


def in_a_thread(job: Job, sees: Callable[[Job], None] = lambda job: None) -> tuple[object, object]:
    """What `soak.start` gives, but the draws run in a thread, where a monkeypatched module is what it is here."""
    sees(job)
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        with suppress(BrokenPipeError), sender:
            soak.work(sender, job)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return SimpleNamespace(kill=receiver.close, join=lambda timeout: None, exitcode=0), receiver


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "start", in_a_thread)
    monkeypatch.setattr("cuflash.cli.check.has_gpu", lambda: False)


def one_element(results: tuple, arrays: Arrays) -> tuple:
    out = results[0]
    if out.size > 20_000:
        out[(0,) * out.ndim] += 0.25
    return results


def no_lse(results: tuple, arrays: Arrays) -> tuple:
    results[1].flat[-1:] = np.nan
    return results


def beside_out(results: tuple, arrays: Arrays) -> tuple:
    out = arrays.out
    np.ndarray((1,), np.uint8, _memory_after(out), 0)[...] = 0
    return results


def an_input(results: tuple, arrays: Arrays) -> tuple:
    arrays.k.view(np.int16)[:1] = 3
    return results


def another_each_time(results: tuple, arrays: Arrays) -> tuple:
    results[1][...] *= 1 + 1e-7 * (time.perf_counter_ns() % 100)
    return results


def raises(results: tuple, arrays: Arrays) -> tuple:
    raise RuntimeError("the kernel is on fire")


def _memory_after(x: np.ndarray) -> memoryview:
    """The two bytes behind an array."""
    end = np.lib.array_utils.byte_bounds(x)[1]
    return (np.ctypeslib.ctypes.c_char * 2).from_address(end)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (one_element, "out is 0.25 off"),
        (no_lse, "lse is inf off"),
        (beside_out, "from the start of out"),
        (an_input, "from the start of k"),
        (another_each_time, "lse is another the second time"),
        (raises, "RuntimeError: the kernel is on fire"),
    ],
)
def test_a_wrong_call_is_found_and_the_printed_command_finds_it_again(
    damage: Callable, complaint: str, here: None, monkeypatch: pytest.MonkeyPatch
):
    real = soak.forward
    monkeypatch.setattr(
        soak, "forward", lambda options, arrays, *others: damage(real(options, arrays, *others), arrays)
    )
    printed = run("fwd_sm80-bf16-d64*", "--soak=60", "--seed=4", status=1)
    lines = printed.splitlines()
    assert complaint in printed
    assert "5 went wrong." in lines[-1]
    head = next(at for at, line in enumerate(lines) if line.startswith("draw "))
    command = next(line.strip() for line in lines[head:] if line.strip().startswith("python -m cuflash check "))
    assert "--seed=4" in command and "--numpy" in command
    again = run(*command.split()[4:], status=1).splitlines()
    assert again[:-1] == lines[head : head + len(again) - 1] or damage is another_each_time
    assert again[0] == lines[head]
    assert again[-1].startswith("1 draws around 1 cases on the NumPy backend") and "1 went wrong." in again[-1]


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch):
    real = soak.backward

    def damaged(options, arrays):
        grads = real(options, arrays)
        grads[2][..., -1:, :] = 0
        return grads

    monkeypatch.setattr(soak, "backward", damaged)
    soaker = Soaker(job("bwd_simt-fp32-d64-causal"))
    complaints = [complaint for number in range(6) for complaint in soaker.run(number).complaints]
    assert complaints and all(complaint.startswith("dv is ") for complaint in complaints)


def test_variants_beyond_the_table_are_bounded(monkeypatch: pytest.MonkeyPatch):
    soaker = Soaker(job())
    soaker._device, soaker._expected = named("h100"), set()
    monkeypatch.setattr(soak, "_MORE_VARIANTS", 5)
    outcomes = [soaker.run(number) for number in range(12)]
    left_out = [each for each in outcomes if each.left_out]
    assert left_out and "more than 5 variants beyond those of the cases" in left_out[0].left_out
    assert max(each.variants for each in outcomes) <= 5


# Hangs


class Silent:
    """A process that reports one draw and then hangs, first, and threads that work afterwards."""

    def __init__(self) -> None:
        self.process = None
        self.later: list[Job] = []

    def start(self, job: Job) -> tuple[object, object]:
        if self.process is not None:
            return in_a_thread(job, self.later.append)
        receiver, self.sender = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
        self.process.start()
        self.sender.send("ready")
        self.sender.send(Outcome(job.first, "fwd_simt-fp32-d33", "a problem"))
        return self.process, receiver


def test_a_hang_is_reported_and_the_rest_goes_on(here: None, monkeypatch: pytest.MonkeyPatch):
    silent = Silent()
    monkeypatch.setattr(soak, "start", silent.start)
    started_s = time.perf_counter()
    printed = run("fwd_simt-fp32-d33", "--soak=4", "--first=10", "--patience=1", status=1)
    assert time.perf_counter() - started_s < 60
    assert silent.process.exitcode == -9
    assert [(each.first, each.count) for each in silent.later] == [(12, 2)]
    assert "draw 11, fwd_simt-fp32-d33:" in printed
    assert "hangs: nothing came back within 1 s" in printed
    assert "python -m cuflash check fwd_simt-fp32-d33 --soak=1 --seed=0 --first=11 --numpy" in printed
    assert "4 draws around 1 cases" in printed and "1 went wrong." in printed


def test_a_process_that_dies_is_reported_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch):
    started = []

    def start(job: Job) -> tuple[object, object]:
        started.append(job.first)
        if len(started) > 1:
            return in_a_thread(job)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        sender.send("ready")
        sender.close()
        return SimpleNamespace(kill=lambda: None, join=lambda timeout: None, exitcode=-11), receiver

    monkeypatch.setattr(soak, "start", start)
    outcomes = list(soak.soak(job("fwd_simt-fp32-d33", first=3, count=2)))
    assert [(each.number, each.complaints) for each in outcomes] == [
        (3, ("ended its process with status -11",)),
        (4, ()),
    ]
    assert started == [3, 4]


# The command


def test_check_soaks_in_a_process_of_its_own():
    printed = run("fwd_sm*-d64*", "--soak=12", "--numpy", "--seed=1")
    assert "12 draws around" in printed and "on the NumPy backend" in printed
    assert "0 went wrong." in printed


def test_check_starts_no_draw_after_its_seconds(here: None):
    assert run("smoke", "--soak=100000", "--seconds=0.3").splitlines()[-1].endswith(" s: 0 went wrong.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--soak=3", "--sanitize=memcheck"], "--soak and --sanitize exclude each other"),
        (["--seconds=3"], "--seconds needs --soak"),
        (["--first=3"], "--first needs --soak"),
        (["--patience=3"], "--patience needs --soak"),
    ],
)
def test_check_names_the_option_that_does_not_go_with_it(arguments: list[str], message: str):
    with pytest.raises(InvalidArgument, match=message):
        run("smoke", *arguments)


@pytest.mark.gpu
def test_a_soak_on_the_gpu():
    import cupy

    assert cupy.cuda.is_available()
    printed = run("smoke", "--soak=400")
    assert "on the GPU" in printed and "0 went wrong." in printed


@pytest.mark.gpu
def test_allocations_of_a_call_lie_in_the_arena():
    import cupy

    arena = Arena(cupy, 2**20)
    before = arena.snapshot()
    with arena.allocations():
        x = cupy.empty(100, np.float32)
    assert cupy.isnan(x).all()
    x[...] = 1
    assert arena.change(before, []) == ""
    assert cupy.isnan(x).all()
    with arena.allocations():
        x = cupy.empty(100, np.uint8)
    cupy.ndarray((1,), np.uint8, x.data + 100)[...] = 0
    assert "from the start of an allocation" in arena.change(before, [])
