"""The case table, its sets, and the arrays of a case."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cuflash import dtypes
from cuflash.cases import calls, sets
from cuflash.cases.inputs import _DRAWN, Normals, make
from cuflash.cases.table import CASES, SMOKE, TANGENTS, WRITTEN, Case, select, widest_copy
from cuflash.device import named
from cuflash.errors import InvalidArgument
from cuflash.features import needs
from cuflash.masks import Mask
from cuflash.ops import on_numpy
from cuflash.plan import FAMILIES, choose
from cuflash.problem import Rotary

H100 = named("h100")


def test_the_id_names_the_kernel_that_runs_the_case():
    for case in CASES.values():
        kernel = case.id.partition("-")[0]
        steps = choose(case.problem, H100, case.family).steps
        assert any(step.kernel.startswith(kernel) for step in steps), case.id


def test_the_table_covers_every_family_dtype_and_feature():
    seen = Counter()
    for case in (*CASES.values(), *TANGENTS.values(), *WRITTEN.values()):
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
    problem = on_numpy.checked("forward", options, calls.arrays(inputs)).problem
    assert problem == replace(case.turned("forward").problem, deterministic=False)


def test_tensors_lie_apart_and_are_aligned_exactly_as_asked():
    numbers = Normals(np)
    for align in (2, 4, 8, 16):
        tensors = numbers.tensors(dtypes.BF16, [(3, 7), (5, 11), (1,)], align)
        addresses = sorted((x.__array_interface__["data"][0], x.nbytes) for x in tensors)
        assert all(start + size <= after for (start, size), (after, _) in pairwise(addresses))
        assert all(start % 16 == align % 16 for start, _ in addresses)


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
    members = sets.of("hopper")
    assert list(members) == ["gqa", "window", "varlen", "scores", "ramp"]
    ids = [case.id for cases in members.values() for case in cases]
    assert len(set(ids)) == len(ids) == 16
    assert sets.of("prefill") == {"prefill": sets.prefill()}
    with pytest.raises(InvalidArgument, match="problem set 'hopper9' is not known; expected one of: prefill, "):
        sets.of("hopper9")


def test_training_adds_what_no_other_set_has():
    cases = sets.of("training")["training"]
    others = [case for name in ("prefill", "gqa", "window", "varlen", "scores") for case in sets.SETS[name]()]
    news = [case.id for case in cases if all(case.problem != other.problem for other in others)]
    assert news == [case.id for case in cases if case.id != "d128-causal-s8192"]
    plain, ordered = (case.turned("backward").problem for case in cases[:2])
    assert ordered == replace(plain, deterministic=True)


def test_lengths_are_log_uniform_and_always_the_same():
    (case,) = sets.varlen()
    assert case == sets.varlen()[0]
    assert len(case.lens_q) == 32
    assert case.lens_q == case.lens_kv
    assert all(64 <= n <= 8192 for n in case.lens_q)
    octaves = Counter(int(np.log2(n / 64)) for n in case.lens_q)
    assert all(octaves[i] for i in range(7))
    assert case.problem.total_q == sum(case.lens_q)


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
        for direction in ("forward",) if name in sets.FORWARD_ONLY else ("forward", "backward"):
            assert choose(case.turned(direction).problem, H100, case.family).steps


def test_decode_reads_every_key_of_every_sequence_once():
    cases = {case.id: case for case in sets.decode()}
    assert len(cases) == len(sets.decode())
    dense, paged = cases["decode-b64-s16k"], cases["decode-paged64-b64-s16k"]
    keys, queries = 2 * 64 * 16_384 * 8 * 128 * 2, 2 * 64 * 32 * 128 * 2
    assert dense.nbytes() == paged.nbytes() == keys + queries
    latent = cases["decode-latent-h128-b8-s16k"]
    assert latent.nbytes() == 2 * (8 * 16_384 * 576 + 8 * 128 * (576 + 512))
    ragged, even = cases["decode-ragged-paged16"], cases["decode-even-paged16"]
    assert 0 <= sum(ragged.lens_kv) - sum(even.lens_kv) < 64
    assert all(64 <= n <= 65_536 for n in ragged.lens_kv) and max(ragged.lens_kv) > 30_000


def test_a_case_may_append_to_a_cache():
    problem = replace(sets.decode()[0].problem, batch=2, heads_q=4, heads_kv=2, len_kv=40, dim_qk=16, dim_v=16)
    rotary = Rotary(8, True, dtypes.FP32, False)
    problem = replace(problem, layout="cache", total_kv=80, appended=3, len_q=3, mask=Mask(right=0), rotary=rotary)
    case = Case("append", None, problem)
    inputs = make(case, Normals(np))
    k, v = inputs.k.copy(), inputs.v.copy()
    out, _ = calls.of(case, inputs)()
    again, _ = calls.of(case, inputs)()
    np.testing.assert_array_equal(out.view(np.uint16), again.view(np.uint16))
    np.testing.assert_array_equal(inputs.v.view(np.uint16), v.view(np.uint16))
    assert (inputs.k[:, 37:] != k[:, 37:]).any() and not (inputs.k[:, :37] != k[:, :37]).any()


def test_values_may_be_columns_of_the_keys():
    sizes = {"batch": 2, "heads_q": 4, "heads_kv": 1, "len_kv": 40, "dim_qk": 24, "dim_v": 16}
    small = replace(sets.decode()[0].problem, shared_kv=True, **sizes)
    case = Case("latent", None, small)
    inputs = make(case, Normals(np))
    assert np.shares_memory(inputs.k, inputs.v)
    np.testing.assert_array_equal(inputs.k[..., :16].view(np.uint16), inputs.v.view(np.uint16))
    assert on_numpy.checked("forward", calls.options(case), calls.arrays(inputs)).problem == small


def test_numbers_repeat_where_there_are_very_many(monkeypatch):
    monkeypatch.setattr("cuflash.cases.inputs._DRAWN", 1000)
    a, b = Normals(np).tensors(dtypes.BF16, [(1500,), (1500,)])
    np.testing.assert_array_equal(a[:500].view(np.uint16), a[1000:].view(np.uint16))
    assert not np.shares_memory(a, b)


def test_repeated_numbers_make_other_rows(monkeypatch):
    monkeypatch.setattr("cuflash.cases.inputs._DRAWN", 4096 + _DRAWN % 4096)
    q, k = Normals(np).tensors(dtypes.FP32, [(256, 128), (64, 128)])
    assert len(np.unique(np.concatenate([q, k]), axis=0)) == 256 + 64
