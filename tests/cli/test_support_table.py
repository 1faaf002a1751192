"""The support table of cuflash/README.md is what signatures and the catalogue say, and what it says holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import cuflash
from cuflash.cli.support import (
    ALL,
    CK,
    EFFICIENT,
    FLASH,
    GROUPS,
    MEM_EFF,
    MHA,
    ROWS,
    SDPA,
    Row,
    cell,
    families_of,
    table,
    taken,
    write_between,
)
from cuflash.dtypes import DTYPES
from cuflash.errors import InvalidArgument
from cuflash.features import FEATURES

PAGE = Path(__file__).parents[2] / "cuflash" / "README.md"
IDS = [row.what for row in ROWS]
PACKED = {FLASH, MHA, CK, MEM_EFF, EFFICIENT}
"""The groups with packed sequences, and with gradients."""
SERVED: list[tuple[set[str], list[str]]] = [
    (set(ALL), [
        "fp16 and bf16", "fp32", "fp64", "every head dimension up to 256", "head dimensions up to 1024",
        "head dimensions above 1024", "dim_v != dim_qk", "gqa", "causal", "dropout",
        "unaligned rows", "zero or negative strides", "empty batches, no queries, no keys, rows that see no key",
        "dropout from a generator of your own", "log-sum-exp returned", "capture in a CUDA graph", "split keys",
        "query heads of one key head packed into a tile when queries are few",
    ]),
    (PACKED, [
        "varlen", "how many keys of a sequence are in use", "longest lengths given, or None to read them", "backward",
        "values of cu_seqlens and the like checked on a GPU", "seed and offset returned", "deterministic",
        "seed and offset given to the gradients",
    ]),
    ({FLASH, MHA}, ["softcap", "soft cap and dropout together", "alibi", "paged"]),
    ({FLASH, MHA, CK, EFFICIENT}, ["window", "gradients of a window where len_q != len_kv"]),
    ({FLASH, SDPA, EFFICIENT}, ["masks aligned top-left"]),
    ({FLASH, SDPA, EFFICIENT}, ["dropout by 32 bits, as PyTorch's memory-efficient kernels draw it"]),
    ({FLASH, SDPA}, ["boolean mask"]),
    ({FLASH, SDPA, CK, MEM_EFF, EFFICIENT}, ["bias"]),
    ({FLASH, CK, MEM_EFF, EFFICIENT}, ["bias gradient"]),
    ({FLASH}, ["written score", "written mask", "block mask", "captured gradient", "fp32 in products of TF32"]),
    ({FLASH}, ["sink", "gradient of the log-sum-exp taken in", "tangents"]),
    ({FLASH, MHA, CK, MEM_EFF}, ["probabilities, and which were dropped", "gradients written into your arrays"]),
    ({FLASH, SDPA, MHA, CK, MEM_EFF}, ["output written into your array"]),
    ({MHA, CK, MEM_EFF}, ["what rows of no sequence hold"]),
    ({MHA, CK, MEM_EFF}, ["results as PyTorch's older CUDA and its ROCm functions lay them out"]),
    ({EFFICIENT}, ["gradients as slices of one new array", "number of key splits of the gradients"]),
    ({MHA, CK}, ["row sums of dout * out returned"]),
    ({SDPA, MHA, CK, MEM_EFF, EFFICIENT}, ["kernels by preference"]),
    ({FLASH}, [
        "a cache whose lengths the GPU alone knows, with left padding, dense or in pages",
        "keys appended to it in place, and turned by rotary embeddings",
    ]),
]  # fmt: skip
"""Which functions must serve what: those of PyTorch what theirs have, flash-attn's everything they can."""


def test_the_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    between = text.partition("<!-- support-table:begin -->\n")[2].partition("<!-- support-table:end -->")[0]
    assert between == table(), "run `python -m cuflash support --write cuflash/README.md`"


def test_every_feature_of_the_catalogue_has_a_row() -> None:
    assert len(set(IDS)) == len(IDS)
    assert set(FEATURES) <= set(IDS)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_functions_serve_what_they_must(row: Row) -> None:
    (must,) = (groups for groups, rows in SERVED if row.what in rows)
    assert {group for group in GROUPS if cell(row, group) not in ("–", row.instead)} == must


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_an_argument_is_that_of_all_functions_of_a_direction(row: Row) -> None:
    for group in set(GROUPS) - set(row.always):
        for backward in (False, True):
            names = [
                name
                for function, name in taken(row, group).items()
                if ("bwd" in function or "backward" in function) is backward
            ]
            assert all(names) or not any(names), group


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_flash_attn_has_an_answer_to_every_row(row: Row) -> None:
    """A note says what there is instead, and goes when the argument comes."""
    assert cell(row, FLASH) != "–"
    assert not row.instead or cell(row, FLASH) == row.instead


def test_what_a_family_does_not_run() -> None:
    lines = dict(line.split(" | ")[:2] for line in table().splitlines() if line.startswith("| "))
    lines = {what.removeprefix("| "): runs_on for what, runs_on in lines.items()}
    assert lines["fp16 and bf16"] == "all"
    assert lines["every head dimension up to 256"] == "`sm80`, `simt`, NumPy"
    assert lines["fp32"] == lines["fp64"] == "`sm80`, `simt`, NumPy"
    assert lines["head dimensions up to 1024"] == "`simt`, NumPy"
    assert lines["head dimensions above 1024"] == "NumPy"
    assert lines["capture in a CUDA graph"] == "`sm90`, `sm80`, `simt`"
    assert lines[f"split keys: {FEATURES['split keys'].words}"] == "`sm80`, `simt`"
    assert lines["keys appended to it in place, and turned by rotary embeddings"] == "all"
    assert lines["fp32 in products of TF32"] == "`sm80`, NumPy"
    wide = "with gradients of heads up to 512; fp16 and bf16, head dimensions up to 576, sm_90a alone.\n"
    assert f"wgmma, fed by bulk copies, {wide}" in table()
    assert (
        "of fp32 in halves, of fp64 up to head dimension 128; fp16, bf16, fp32, tf32 and fp64, head dimensions up to "
        in table()
    )


def test_everything_but_size_and_precision_runs_on_sm80_and_simt() -> None:
    """In each direction that a row is about; a family that lacks a feature is not in the row."""
    runs_on = {row.what: families_of(row) for row in ROWS}
    assert {what for what, families in runs_on.items() if families != "all" and "`sm80`, `simt`" not in families} == {
        "head dimensions up to 1024", "head dimensions above 1024", "fp32 in products of TF32",
    }  # fmt: skip


def random(*shape: int, dtype: str = "fp32") -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(DTYPES[dtype].numpy)


def tensors(dtype: str = "fp32", b: int = 2, sq: int = 5, sk: int = 7, d: int = 8, dv: int = 8, hk: int = 4) -> tuple:
    """q, k, v."""
    return random(b, sq, 4, d, dtype=dtype), random(b, sk, hk, d, dtype=dtype), random(b, sk, hk, dv, dtype=dtype)


def shifted(x: np.ndarray) -> np.ndarray:
    """A copy that starts one element behind a multiple of 16 bytes."""
    memory = np.zeros(x.size + 16, x.dtype)
    first = -memory.ctypes.data % 16 // x.itemsize + 1
    view = memory[first : first + x.size].reshape(x.shape)
    view[...] = x
    return view


INPUTS = {
    **{dtype: tensors(dtype) for dtype in DTYPES},
    "d255": tensors(d=255, dv=255),
    "d1024": tensors(d=1024, dv=1024, b=1),
    "d1500": tensors(d=1500, dv=1500, b=1),
    "dim_v": tensors(dv=3),
    "gqa": tensors(hk=2),
    "strides": tuple(np.broadcast_to(x[:1, ::-1], x.shape) for x in tensors()),
    "address": tuple(map(shifted, tensors("fp16"))),
    "no-batch": tensors(b=0),
    "no-queries": tensors(sq=0),
    "no-keys": tensors(sk=0),
    "rows-that-see-nothing": tensors(sq=9, sk=4),
}


def gradients(group: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, p: float = 0.0) -> tuple:
    """(out, lse, seed, dq, dk, dv) of causal attention by the functions of a group; fewer of one without gradients."""
    p_dropout, gen = {"p_dropout": p}, {"gen_": (3, 4)}
    if group == FLASH:
        options = {"dropout_p": p, "causal": True}
        out, lse, state = cuflash.flash_attn_func(
            q, k, v, **options, generator=(3, 4), return_lse=True, return_rng_state=True
        )
        return out, lse, state, *cuflash.flash_attn_backward(dout, q, k, v, out, lse, **options, rng_state=state)[:3]
    if group == EFFICIENT:
        out, lse, seed, offset, *lengths = cuflash.efficient_attention_forward(
            q, k, v, None, None, None, None, None, p, 2, True, **gen
        )
        results = cuflash.efficient_attention_backward(
            dout, q, k, v, None, out, None, None, *lengths, lse, p, seed, offset, 2, False
        )
        return out, lse[..., : q.shape[1]], seed, *results[:3]
    functions: dict[str, tuple[Callable, Callable]] = {
        MHA: (cuflash.mha_fwd, cuflash.mha_bwd),
        CK: (cuflash.mha_fwd_ck, cuflash.mha_bwd_ck),
        MEM_EFF: (cuflash.mem_eff_forward, cuflash.mem_eff_backward),
    }
    forward, backward = functions[group]
    out, _, _, _, lse, seed, offset, _ = forward(q, k, v, is_causal=True, **p_dropout, **gen)
    state = {"philox_seed": seed, "philox_offset": offset}
    nothing = {"dq_": None, "dk_": None, "dv_": None}
    results = backward(dout, q, k, v, out, lse, **nothing, is_causal=True, **p_dropout, **state)
    assert len(results) == {MHA: 4, CK: 5, MEM_EFF: 4}[group]
    return out, lse, seed, *results[:3]


@pytest.mark.parametrize("name", INPUTS)
def test_every_function_takes_what_the_rows_of_shapes_and_types_say(name: str) -> None:
    q, k, v = INPUTS[name]
    dout = random(*q.shape[:3], v.shape[3]).astype(q.dtype)
    expected = gradients(FLASH, *map(np.ascontiguousarray, (q, k, v)), dout)
    for group in PACKED:
        out, lse, _, *results = gradients(group, q, k, v, dout)
        for one, other in zip((out, *results), (expected[0], *expected[3:]), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=group)
        np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(expected[1]), err_msg=group)
    in_heads = [x.swapaxes(1, 2) for x in (q, k, v)]
    alike = in_heads[0].shape[2] == in_heads[1].shape[2]
    out, lse = cuflash.scaled_dot_product_attention(*in_heads, enable_gqa=True, is_causal=alike, return_lse=True)
    other = cuflash.flash_attn_func(q, k, v, causal=alike, return_lse=True)
    np.testing.assert_array_equal(out.swapaxes(1, 2), other[0])
    np.testing.assert_array_equal(lse, other[1])


@pytest.mark.parametrize("group", sorted(PACKED))
def test_seed_and_offset_go_from_the_forward_to_the_gradients(group: str) -> None:
    q, k, v = tensors("fp64")
    dout = random(*q.shape, dtype="fp64")
    out, _, seed, _, _, dv = gradients(group, q, k, v, dout, p=0.5)
    assert seed.size > 0 and (out != gradients(group, q, k, v, dout)[0]).any()
    np.testing.assert_allclose((dv * v).sum(), (dout * out).sum(), rtol=1e-12)


def test_rows_are_about_functions_that_are_public() -> None:
    functions = {x for group in GROUPS.values() for x in group}
    public = {x for x in vars(cuflash).values() if inspect.isfunction(x) and "q" in inspect.signature(x).parameters}
    follows = {cuflash.flash_attn_vjp, cuflash.flash_attn_kvpacked_func, cuflash.flash_attn_varlen_kvpacked_func}
    follows |= {cuflash.flash_attn_jvp}
    about = {cuflash.attention_map, cuflash.explain, cuflash.flash_attn_prepare}
    assert public - about <= functions | follows


def test_writing_replaces_only_what_is_between_the_markers(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n")
    write_between(file, "x", "new\n")
    assert file.read_text() == "before\n<!-- x:begin -->\nnew\n<!-- x:end -->\nafter\n"
    with pytest.raises(InvalidArgument, match="y:begin"):
        write_between(file, "y", "new\n")
