"""Plans made for named devices: every case gets one that fits, or reasons."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from problems import BASE, DIMS, MASKS, PROBLEMS, plans, widest_copy

from cuflash import dtypes
from cuflash.cases.table import matrix
from cuflash.device import NAMED, Device, named
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.features import FEATURES
from cuflash.jit import sources
from cuflash.masks import Mask
from cuflash.mods import tanh, trace
from cuflash.plan import FAMILIES, Config, Plan, Step, choose, explain, why_not
from cuflash.plan.bias import needs_zeros
from cuflash.plan.families.sm90 import ForwardConfig, heads_per_section, key_heads_per_section
from cuflash.plan.splits import heads_in_step
from cuflash.problem import Blocks, Problem, visible_pairs

DIMS += [(16, 256), (256, 1), (512, 512), (257, 64), (1024, 1024)]


@pytest.mark.parametrize("device", NAMED.values(), ids=NAMED.keys())
def test_every_plan_fits_its_device(device: Device) -> None:
    for problem in PROBLEMS:
        made = plans(problem, device)
        assert made, f"no family runs {problem} on {device}"
        assert choose(problem, device) == made[0], "the first family in the catalogue comes first"
        for plan in made:
            assert (plan.problem, plan.device) == (problem, device)
            assert plan.reason
            for step in plan.steps:
                config = step.config
                where = f"{step.kernel} of {problem} on {device}: {config}"
                assert config.smem_bytes <= device.smem_per_block, where
                assert config.blocks_per_sm * (config.smem_bytes + 1024) <= device.smem_per_sm, where
                assert config.threads % 32 == 0 and 0 < config.threads <= 1024, where
                assert config.blocks_per_sm * config.threads <= 2048, where
                assert 0 < step.num_blocks < 2**31, where
                assert getattr(config, "copy_bytes", 16) % problem.dtype.itemsize == 0, where
                assert min(getattr(config, "tile_q", 1), getattr(config, "tile_kv", 1)) > 0, where


DIRECTIONS = [
    pytest.param(family, direction, id=f"{direction}-{family.name}")
    for direction in ("forward", "backward")
    for family in FAMILIES
    if direction == "forward" or family.backward
]


@pytest.mark.parametrize(("family", "direction"), DIRECTIONS)
def test_blocks_and_workspaces_cover_the_problem(family, direction: str) -> None:
    device = named("h100")
    for layout in ({}, {"layout": "varlen", "total_q": 931, "total_kv": 1300}):
        for len_q, len_kv in ((500, 700), (1, 1), (0, 10), (10, 0)):
            problem = replace(BASE, direction=direction, len_q=len_q, len_kv=len_kv, **layout)
            problem = replace(problem, deterministic=direction == "backward")
            plan = choose(problem, device, family.name)
            rows = problem.rows_q * problem.heads_q
            main = plan.steps[0 if direction == "forward" else 1]
            along_q = -(-max(1, len_q) // main.config.tile_q) * problem.heads_q
            along_kv = -(-max(1, len_kv) // main.config.tile_kv) * problem.heads_kv
            along_kv *= getattr(main.config, "dim_splits", 1)
            expected = (along_q if direction == "forward" else along_kv) * problem.batch
            persistent = family.name == "sm90" and direction == "forward"
            drawn = persistent and problem.layout == "varlen"  # as many tiles as there may be
            if drawn:
                expected = problem.heads_q * (931 // main.config.tile_q + problem.batch)
            assert main.num_blocks == (min(expected, device.num_sms) if persistent else expected)
            sizes = {w.name: w.nbytes for w in plan.workspaces}
            if direction == "forward":
                assert sizes == ({"tickets": 8} if drawn and expected > device.num_sms else {})
            else:
                assert sizes["delta"] * 2 == sizes["shift"] == 8 * rows
                assert sizes.get("dq_accum", 4 * rows * problem.dim_qk) >= 4 * rows * problem.dim_qk
            assert plan.workspace_bytes == sum(sizes.values())


def test_zeroed_workspaces_are_the_ones_that_are_added_to() -> None:
    plan = choose(replace(BASE, direction="backward", deterministic=True), named("h100"), "sm80")
    assert {w.name for w in plan.workspaces if w.zeroed} == {"dq_accum", "dq_turn"}
    turns = {w.name: w for w in plan.workspaces}["dq_turn"]
    assert turns.dtype == np.int32
    hopper = choose(plan.problem, named("h100"), "sm90")  # whose first kernel clears them
    assert {"dq_accum", "dq_turn"} <= {w.name for w in hopper.workspaces}
    assert not [w.name for w in hopper.workspaces if w.zeroed or w.kept]


@pytest.mark.parametrize(
    "changes",
    [
        {"len_q": 1, "len_kv": 9000, "batch": 7, "heads_q": 2, "heads_kv": 1},
        {"softmax_scale": 3.0},
        {"mask": Mask(left=7, right=300, alignment="top-left")},
        {"mask": Mask(left=7)},
    ],
    ids=["sizes", "scale", "window", "one side"],
)
@pytest.mark.parametrize(("family", "direction"), DIRECTIONS)
def test_run_time_values_do_not_make_variants(family, direction: str, changes: dict) -> None:
    problem = replace(BASE, direction=direction, mask=MASKS["window"])
    for device in (named("h100"), named("a10")):
        if family.why_not(problem, device):
            continue
        before = choose(problem, device, family.name)
        after = choose(replace(problem, **changes), device, family.name)
        assert [(s.kernel, s.config) for s in before.steps] == [(s.kernel, s.config) for s in after.steps]


def test_row_kernels_are_shared_between_variants() -> None:
    """delta and convert do not look at scores: one variant a dtype, size and layout."""
    device = named("h100")
    seen: dict[str, set[Config]] = {}
    for mask in MASKS.values():
        for changes in ({}, {"softcap": 2.0}, {"softmax_scale": -1.0}, {"deterministic": True}):
            problem = replace(BASE, direction="backward", mask=mask, **changes)
            for plan in plans(problem, device):
                for step in plan.steps:
                    seen.setdefault(step.kernel, set()).add(step.config)
    assert {kernel: len(configs) for kernel, configs in seen.items() if kernel in ("bwd_delta", "bwd_convert")} == {
        "bwd_delta": 1,
        "bwd_convert": 1,
    }
    assert len(seen["bwd_sm80"]) == 4 * (3 + 1)  # masks x (scores + another reduction)
    assert len(seen["bwd_simt_dq"]) == len(seen["bwd_simt_dkdv"]) == 4 * 3


@pytest.mark.parametrize("family", ["sm80", "simt"])
def test_a_sink_is_a_kernel_more_and_changes_no_other_gradient(family: str) -> None:
    problem = replace(BASE, direction="backward", bias=dtypes.BF16, bias_grad=True)
    plain, sink = (choose(replace(problem, sink=sink), named("h100"), family).steps for sink in (False, True))
    assert sink[: len(plain)] == plain
    assert [step.kernel for step in sink[len(plain) :]] == ["bwd_sink"]


def test_number_of_variants() -> None:
    """What one dtype and head size can compile to in all, over every mask, score, layout and reduction."""
    variants = set()
    for mask in MASKS.values():
        for layout in ({}, {"layout": "varlen", "total_q": 900, "total_kv": 1300}):
            for score in ({}, {"softcap": 2.0}, {"softmax_scale": -1.0}):
                for direction in ("forward", "backward"):
                    for deterministic in (False, True):
                        problem = replace(
                            BASE, direction=direction, deterministic=deterministic, mask=mask, **layout, **score
                        )
                        plan = choose(problem, named("h100"), "sm80")
                        variants |= {(step.kernel, step.config) for step in plan.steps}
    forward, backward, shared = 4 * 2 * 3, 4 * 2 * 3 * 2, 2 * 2
    assert len(variants) == forward + backward + shared


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "sm90"], ids=lambda family: family.name)
def test_pages_change_where_keys_are_read_and_nothing_else(family) -> None:
    packed = replace(BASE, layout="varlen", total_q=900, total_kv=4096)
    for device in (named("h100"), named("a10")):
        for mask in MASKS.values():
            plain, one, many = (
                choose(replace(packed, mask=mask, page_size=size), device, family.name).steps[-1] for size in (0, 1, 48)
            )
            assert one == many, "one kernel for every page size"
            assert one.config.sequence == "PagedSequence"
            assert replace(one, config=replace(one.config, sequence="VarlenSequence")) == plain


@pytest.mark.parametrize("device", ["h100", "a100", "l4", "t4"])
def test_no_tile_of_a_list_is_larger_than_a_block_of_128(device: str) -> None:
    """So that masks of such blocks that are full need no test (`BlockMask.tested`)."""
    rule, _ = trace("mask_mod", lambda b, h, q, k: k >= 0)
    kinds = product(dtypes.DTYPES.values(), ("forward", "backward"), DIMS, (False, True), (40, 5000))
    for dtype, direction, (dim_qk, dim_v), deterministic, length in kinds:
        problem = replace(
            BASE, dtype=dtype, direction=direction, dim_qk=dim_qk, dim_v=dim_v, len_q=length, len_kv=length,
            deterministic=deterministic and direction == "backward", block_mask=Blocks((128, 128), rule),
        )  # fmt: skip
        for plan in plans(problem, named(device)):
            walking = [step.config for step in plan.steps if step.walks]
            assert walking and all(128 % x.tile_q == 0 and 128 % x.tile_kv == 0 for x in walking), problem


@pytest.mark.parametrize(("size", "rows"), [(8, 8), (16, 16), (48, 16), (80, 16), (64, 64), (192, 64), (256, 64)])
def test_boxes_are_what_a_page_and_a_tile_have_in_common(size: int, rows: int) -> None:
    paged = replace(BASE, layout="varlen", total_q=900, total_kv=4096, dim_qk=64, dim_v=64, page_size=size)
    cache = replace(paged, layout="cache", total_q=0)
    for problem in (paged, cache, replace(paged, heads_q=16, len_q=8, num_splits=0)):
        step = next(step for step in choose(problem, named("h100"), "sm90").steps if step.kernel == "fwd_sm90")
        assert step.config.tile_kv == 64
        assert step.config.box_rows == rows
        assert [box.rows for box in step.boxes if box.tensor in "kv"] == [rows, rows]


def test_what_hopper_has_no_boxes_for() -> None:
    paged = replace(BASE, layout="cache", total_kv=4096, page_size=16)
    assert why_not(paged, named("h100"))["sm90"] == []
    assert why_not(replace(paged, leftpad=True), named("h100"))["sm90"] == [
        "no boxes of pages that a sequence begins in the middle of"
    ]
    assert why_not(replace(paged, leftpad=True, page_size=0), named("h100"))["sm90"] == []
    assert why_not(replace(paged, page_size=20), named("h100"))["sm90"] == [
        "no boxes of pages whose size, 20, is no multiple of 8"
    ]


def test_blocks_share_the_keys_of_caches_in_equal_ranges() -> None:
    sizes = {"batch": 64, "heads_q": 32, "heads_kv": 8, "len_q": 16, "len_kv": 4096, "dim_qk": 128, "dim_v": 128}
    cache = replace(BASE, layout="cache", num_splits=0, total_kv=64 * 4096, page_size=16, **sizes)
    device = named("h200")
    plan = choose(cache, device)
    assert [step.kernel for step in plan.steps] == ["fwd_sm90", "fwd_combine"]
    assert plan.steps[0].config.split == plan.steps[1].config.split == "KeyRanges"
    assert plan.steps[0].num_blocks == device.num_sms
    slots = 64 * 8 + device.num_sms
    assert {w.name: w.shape for w in plan.workspaces} == {
        "partial_out": (slots, 64, 128), "partial_state": (slots, 64, 2), "part_slots": (512, 2),
    }  # fmt: skip
    assert plan.num_splits == 2, "at most"
    assert plan.heads_in_step == 4, "33 teams, where 8 heads would leave four multiprocessors idle"
    few = choose(replace(cache, batch=8, total_kv=8 * 4096), device)
    assert (few.heads_in_step, few.steps[0].config.split) == (8, "KeyRanges")


def test_caches_that_are_appended_to_take_two_launches() -> None:
    sizes = {"batch": 64, "heads_q": 32, "heads_kv": 8, "len_q": 1, "len_kv": 4096, "dim_qk": 128, "dim_v": 128}
    cache = replace(BASE, layout="cache", num_splits=0, total_kv=64 * 4096, **sizes)
    for page_size, family in ((0, "sm90"), (64, "sm90"), (16, "sm80")):
        for batch in (1, 8, 64):
            of = replace(cache, page_size=page_size, batch=batch, len_kv=4096 if batch == 64 else 65536)
            assert [step.kernel for step in choose(replace(of, appended=1), named("h200")).steps] == [
                "cache_append", "fwd_sm80_few",
            ]  # fmt: skip
            plan = choose(of, named("h200"))
            assert plan.family == family and len(plan.steps) <= 2


@pytest.mark.parametrize(
    ("heads", "blocks", "in_step"),
    [(8, 132, 8), (4, 132, 4), (40, 132, 10), (3, 132, 3), (7, 6, 1), (1, 5, 1), (8, 264, 8)],
)
def test_heads_go_in_step_where_that_leaves_few_blocks_idle(heads: int, blocks: int, in_step: int) -> None:
    assert heads_in_step(heads, blocks) == in_step


def test_pages_have_no_gradients() -> None:
    paged = replace(BASE, direction="backward", layout="varlen", total_q=900, total_kv=4096, page_size=16)
    reason = "no gradients of pages: sequences may share them"
    assert why_not(paged, named("h100")) == {"sm90": [reason], "sm80": [reason], "simt": [reason]}
    with pytest.raises(UnsupportedProblem, match=reason):
        choose(paged, named("h100"))


@pytest.mark.parametrize(
    ("device", "changes", "reasons"),
    [
        ("h100", {}, {"sm90": [], "sm80": [], "simt": []}),
        ("h200", {"direction": "backward"}, {"sm90": [], "sm80": [], "simt": []}),
        ("h200", {"direction": "backward", "dim_v": 136}, {"sm90": [], "sm80": [], "simt": []}),
        (
            "h200",
            {"direction": "backward", "dim_v": 72},
            {"sm90": ["dim_v > 64 beside dim_qk <= 64"], "sm80": [], "simt": []},
        ),
        (
            "h200",
            {"direction": "backward", "dim_qk": 16, "dim_v": 128, "deterministic": True},
            {"sm90": ["dim_v > 64 beside dim_qk <= 64"], "sm80": [], "simt": []},
        ),
        (
            "h100",
            {"direction": "backward", "copy_bytes": 8, "ascending": False},
            {"sm90": ["no unaligned rows", "no zero or negative strides"], "sm80": [], "simt": []},
        ),
        (
            "h100",
            {"direction": "backward", "dtype": dtypes.FP32},
            {"sm90": ["no fp32 (has fp16, bf16)"], "sm80": [], "simt": []},
        ),
        (
            "a100",
            {"direction": "backward", "dim_v": 72},
            {"sm90": ["needs sm_90a"], "sm80": [], "simt": []},
        ),
        ("b200", {}, {"sm90": ["needs sm_90a"], "sm80": [], "simt": []}),
        ("v100", {}, {"sm90": ["needs sm_90a"], "sm80": ["needs sm_80"], "simt": []}),
        ("t4", {}, {"sm90": ["needs sm_90a"], "sm80": ["needs sm_80"], "simt": []}),
        (
            "h100",
            {"dtype": dtypes.FP32},
            {"sm90": ["no fp32 (has fp16, bf16)"], "sm80": [], "simt": []},
        ),
        ("h100", {"dim_qk": 300}, {"sm90": [], "sm80": ["dim_qk 300 > 256"], "simt": []}),
        ("h100", {"dim_v": 520}, {"sm90": ["dim_v 520 > 512"], "sm80": ["dim_v 520 > 256"], "simt": []}),
        (
            "h100",
            {"dim_qk": 600, "direction": "backward"},
            {"sm90": ["dim_qk 600 > 576"], "sm80": ["dim_qk 600 > 256"], "simt": []},
        ),
        (
            "h100",
            {"dim_qk": 300, "direction": "backward"},
            {"sm90": [], "sm80": ["dim_qk 300 > 256"], "simt": []},
        ),
        (
            "h100",
            {"dim_qk": 520, "direction": "backward"},
            {"sm90": ["no gradients of heads over 512"], "sm80": ["dim_qk 520 > 256"], "simt": []},
        ),
        (
            "h100",
            {"dim_qk": 300, "layout": "varlen", "total_q": 900, "total_kv": 900, "page_size": 20},
            {"sm90": ["no pages of 20 keys, but of multiples of 8"], "sm80": ["dim_qk 300 > 256"], "simt": []},
        ),
        (
            "h100",
            {"layout": "cache", "total_kv": 960, "page_size": 16, "num_splits": 2},
            {
                "sm90": ["no split keys"],
                "sm80": [],
                "simt": [],
            },
        ),
        (
            "h100",
            {"copy_bytes": 8, "ascending": False},
            {"sm90": ["no unaligned rows", "no zero or negative strides"], "sm80": [], "simt": []},
        ),
        (
            "v100",
            {"dtype": dtypes.FP64, "dim_qk": 300, "dim_v": 2000},
            {
                "sm90": ["needs sm_90a", "no fp64 (has fp16, bf16)", "dim_v 2000 > 576"],
                "sm80": ["needs sm_80", "dim_qk 300 > 256", "dim_v 2000 > 256"],
                "simt": ["dim_v 2000 > 1024"],
            },
        ),
    ],
)
def test_reasons(device: str, changes: dict, reasons: dict) -> None:
    assert why_not(replace(BASE, **changes), named(device)) == reasons


def test_a_feature_that_a_family_lacks_is_a_reason() -> None:
    family = replace(FAMILIES[0], features=("causal",))
    problem = replace(BASE, mask=MASKS["window"], softcap=1.0)
    assert family.why_not(problem, named("h100")) == ["no window", "no softcap", "no gqa"]
    gradients = replace(BASE, direction="backward", mask=MASKS["causal"], heads_kv=8)
    assert family.why_not(gradients, named("h100")) == ["no backward"]


def test_families_declare_known_features() -> None:
    for family in FAMILIES:
        assert set(family.features) <= set(FEATURES)
        assert set(family.dtypes) <= set(dtypes.KINDS)
        assert ("backward" in family.features) == (family.backward is not None)
        assert family.summary


def test_nothing_runs_it() -> None:
    with pytest.raises(UnsupportedProblem) as error:
        choose(replace(BASE, dim_qk=2000, mask=MASKS["causal"]), named("v100"))
    assert str(error.value) == (
        "no kernel runs this on NVIDIA V100 (sm_70):\n"
        "  forward bf16 b2 h8/2 s500x700 d2000x64 causal splits1\n"
        "  sm90    needs sm_90a; dim_qk 2000 > 576\n"
        "  sm80    needs sm_80; dim_qk 2000 > 256\n"
        "  simt    dim_qk 2000 > 1024\n"
        "`python -m cuflash explain` shows the choice for a problem without running it."
    )


def test_the_named_family_does_not_run_it() -> None:
    with pytest.raises(UnsupportedProblem) as error:
        choose(replace(BASE, dtype=dtypes.FP64, dim_v=200), named("h100"), "sm80")
    assert "sm80    heads of 200 > 128 in fp64" in str(error.value) and "simt" not in str(error.value)
    with pytest.raises(InvalidArgument, match=r"there is no kernel family 'sm75'; there are: sm90, sm80, simt"):
        choose(BASE, named("h100"), ("sm80", "sm75"))
    with pytest.raises(InvalidArgument, match="there is no kernel family 'nope'"):
        explain(BASE, named("h100"), "nope")


def test_one_of_the_named_families_runs_it() -> None:
    backward = replace(BASE, direction="backward")
    for order in (("sm90", "sm80"), ("sm80", "sm90")):  # which comes first is up to the catalogue
        assert choose(BASE, named("h100"), order).family == "sm90"
        assert choose(backward, named("h100"), order).family == "sm90"
        assert choose(replace(backward, dim_v=72), named("h100"), order).family == "sm80"
    with pytest.raises(UnsupportedProblem) as error:
        choose(replace(BASE, dim_v=300), named("a100"), ("sm90", "sm80"))
    reasons = ["  sm90    needs sm_90a", "  sm80    dim_v 300 > 256"]
    assert str(error.value).splitlines()[2:-1] == reasons
    with pytest.raises(UnsupportedProblem, match=r"\n  sm90    dim_v > 64 beside dim_qk <= 64\n`python"):
        choose(replace(backward, dim_v=72), named("h100"), "sm90")


def test_equal_problems_share_one_plan() -> None:
    assert choose(replace(BASE), named("h100")) is choose(BASE, named("h100"))


def test_explanation() -> None:
    problem = replace(BASE, direction="backward", mask=MASKS["causal"], num_splits=0)
    explanation = explain(problem, named("a100"))
    text, plan = str(explanation), choose(problem, named("a100"))
    assert explanation.plan == plan
    lines = text.splitlines()
    assert lines[0] == "backward bf16 b2 h8/2 s500x700 d64 causal on NVIDIA A100 (sm_80)"
    assert lines[1] == f"  FLOPs      {problem.flops() / 1e9:,.2f} G"
    assert lines[2] == f"  family     sm80: {plan.reason}"
    assert lines[3].startswith(f"  workspace  {plan.workspace_bytes:,} bytes (delta 32,000, shift 64,000, dq_accum ")
    assert [line.split()[:2] for line in lines[4:7]] == [
        ["kernel", f"{name}:"] for name in ("bwd_delta", "bwd_sm80", "bwd_convert")
    ]
    config = plan.steps[1].config
    assert f"bwd_sm80: {plan.steps[1].num_blocks} blocks of {config.threads} threads" in lines[5]
    assert f"tile {config.tile_q} x {config.tile_kv}, 16-byte accesses, {config.smem_bytes:,} bytes of" in lines[5]
    assert lines[7:] == ["  not sm90   needs sm_90a", "  not simt   sm80 comes first"]


def test_explanation_of_a_family_that_was_asked_for() -> None:
    explanation = explain(replace(BASE, num_splits=0, len_q=700), named("h100"), "sm80")
    assert str(explanation).splitlines()[-2:] == ["  not sm90   not asked for", "  not simt   sm80 comes first"]
    assert str(explain(replace(BASE, dtype=dtypes.FP64, dim_v=200), named("h100"), "sm80")).splitlines()[-1:] == [
        "  not simt   not asked for"
    ]


def test_explanation_without_a_plan() -> None:
    explanation = explain(replace(BASE, dim_v=1025), named("a100"))
    assert explanation.plan is None
    assert str(explanation).splitlines()[2:] == [
        "  not sm90   needs sm_90a; dim_v 1025 > 576", "  not sm80   dim_v 1025 > 256", "  not simt   dim_v 1025 > 1024"
    ]  # fmt: skip


# Rows and keys of a forward

DECODE = replace(BASE, batch=1, heads_q=32, heads_kv=8, len_q=1, len_kv=8192, dim_qk=128, dim_v=128, num_splits=0)


def main_step(plan: Plan) -> Step:
    return next(step for step in plan.steps if step.kernel.startswith(("fwd_sm80", "fwd_sm90", "fwd_simt")))


def kind(problem: Problem, family: str = "simt", device: str = "h100") -> tuple[str, int]:
    """Whose rows a tile holds, and the number of splits."""
    plan = choose(problem, named(device), family)
    heads, split = main_step(plan).config.heads, main_step(plan).config.split
    assert (plan.num_splits > 1) == (split == "KeySplits") == ("fwd_combine" in [step.kernel for step in plan.steps])
    return heads, plan.num_splits


@pytest.mark.parametrize("family", ["simt"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("HeadGroup", 15)),  # 8 blocks: 15 * 8 = 120 of 132 are 0.91, the best is 1 (33 * 8 = 2 * 132)
        ({"heads_kv": 32}, ("OneHead", 4)),  # 32 blocks: 4 * 32 = 128 leave 4 of 132 idle
        ({"heads_kv": 32, "batch": 4}, ("OneHead", 1)),  # 128 blocks fill 0.97
        ({"batch": 14}, ("HeadGroup", 1)),  # 112 blocks fill 0.85
        ({"batch": 13}, ("HeadGroup", 5)),  # 104 blocks fill 0.79
        ({"len_kv": 256}, ("HeadGroup", 1)),  # 4 tiles of keys
        ({"len_kv": 257}, ("HeadGroup", 5)),
        ({"len_kv": 0}, ("HeadGroup", 1)),
        ({"num_splits": 1}, ("OneHead", 1)),
        ({"num_splits": 7}, ("HeadGroup", 7)),
        ({"num_splits": 128, "len_kv": 1000}, ("HeadGroup", 16)),  # one for each tile
        ({"num_splits": 128, "len_kv": 0}, ("HeadGroup", 1)),
        ({"len_q": 4096}, ("OneHead", 1)),
    ],
)
def test_splits_fill_the_device(family: str, changes: dict, expected: tuple[str, int]) -> None:
    assert kind(replace(DECODE, **changes), family) == expected


@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_one_split_walks_a_rows_keys_alike_whatever_else_is_in_the_call(dims: tuple[int, int], device: str) -> None:
    """The longest sequences decide the lengths of a call, and whether a causal mask hides anything in it."""
    kernels = set()
    for len_q, batch in ((1, 1), (1, 300), (70, 2), (1024, 1), (5000, 7)):
        for mask in (Mask(), Mask(right=0).clipped(len_q, 700)):
            sizes = {"len_q": len_q, "batch": batch, "dim_qk": dims[0], "dim_v": dims[1], "num_splits": 1}
            plan = choose(replace(BASE, mask=mask, copy_bytes=widest_copy(2, dims), **sizes), named(device))
            config = next(step.config for step in plan.steps if step.kernel.startswith("fwd_s"))
            kernels.add((plan.family, config.tile_kv, *(getattr(config, name, None) for name in ("heads", "split"))))
    assert len(kernels) == 1


def test_the_number_of_splits_is_the_smallest_near_the_best() -> None:
    """By brute force, in whole numbers: waves of blocks over multiprocessors."""
    for device in ("a100", "h100", "l4"):
        sms = named(device).num_sms
        for heads_kv in (1, 2, 3, 5, 8, 13, 32, 60):
            for key_tiles in (5, 6, 17, 64, 200):
                problem = replace(DECODE, heads_q=heads_kv, heads_kv=heads_kv, len_kv=64 * key_tiles)
                used = {
                    s: Fraction(heads_kv * s, -(-heads_kv * s // sms) * sms) for s in range(1, min(128, key_tiles) + 1)
                }
                good = [s for s, part in used.items() if part >= Fraction(85, 100) * max(used.values())]
                expected = 1 if 10 * heads_kv >= 8 * sms else min(good)
                assert kind(problem, device=device) == ("OneHead", expected)


def test_splits_are_of_the_keys_a_window_shows() -> None:
    problem = replace(DECODE, heads_q=4, heads_kv=4, len_kv=100_000)
    assert kind(problem) == ("OneHead", 29)
    assert kind(replace(problem, mask=Mask(left=100, right=0))) == ("OneHead", 1)
    assert 4 <= kind(replace(problem, mask=Mask(left=500, right=0)))[1] <= 10
    assert kind(replace(problem, mask=Mask(right=0))) == ("OneHead", 29)
    assert kind(replace(problem, mask=Mask(left=100, right=0), num_splits=50)) == ("OneHead", 50)


@pytest.mark.parametrize(
    ("len_q", "group", "grouped"),
    [(1, 1, False), (1, 2, True), (16, 8, True), (115, 8, False), (128, 8, False), (129, 2, True), (700, 8, False)],
)
def test_heads_share_a_tile_where_that_fills_it(len_q: int, group: int, grouped: bool) -> None:
    sizes = {"len_q": len_q, "len_kv": 256, "dim_qk": 64, "dim_v": 64}  # 128 rows a tile
    problem = replace(DECODE, heads_q=4 * group, heads_kv=4, **sizes)
    assert (kind(problem, "sm80")[0] == "HeadGroup") is grouped
    rows = main_step(choose(problem, named("h100"), "sm80")).num_blocks // (4 if grouped else 4 * group)
    tile = main_step(choose(problem, named("h100"), "sm80")).config.tile_q
    assert rows == -(-len_q * (group if grouped else 1) // tile)


def test_a_split_plan_says_what_it_takes() -> None:
    problem = replace(DECODE, batch=3, num_splits=5, sink=True, len_q=9, dim_v=40)
    plan = choose(problem, named("h100"), "sm80")
    main, combine = plan.steps
    assert [main.kernel, combine.kernel] == ["fwd_sm80", "fwd_combine"]
    assert (main.config.sink, combine.config.sink) == ("NoSink", "LearnableSink"), "a sink counts once"
    assert (main.num_blocks, combine.num_blocks) == (5 * 3 * 8, 3 * 9 * 32 // 8)
    shapes = {w.name: (w.shape, w.dtype) for w in plan.workspaces}
    fp32 = np.dtype(np.float32)
    assert shapes == {"partial_out": ((5, 27, 32, 40), fp32), "partial_state": ((5, 27, 32, 2), fp32)}
    assert not any(w.zeroed for w in plan.workspaces)
    lines = str(explain(problem, named("h100"))).splitlines()
    assert lines[3] == "  splits     5: 4 heads share a tile; asked for"
    assert lines[4] == f"  workspace  {plan.workspace_bytes:,} bytes (partial_out 691,200, partial_state 34,560)"
    double = choose(replace(problem, dtype=dtypes.FP64), named("h100"), "simt")
    assert {w.dtype for w in double.workspaces} == {np.dtype(np.float64)}


@pytest.mark.parametrize(("family", "variants"), [("sm80", 10), ("simt", 4)])
def test_sizes_choose_between_few_variants(family: str, variants: int) -> None:
    """Heads together or not, split or not, few rows in clusters or not: all else about sizes is a run-time value."""
    problems = [
        replace(DECODE, batch=b, len_q=q, len_kv=kv, heads_q=8, heads_kv=h, num_splits=n)
        for b in (1, 50)
        for q in (1, 60, 300)
        for kv in (1, 300, 5000)
        for h in (1, 2, 8)
        for n in (0, 1, 3, 128)
    ]
    plans = [choose(problem, named("h100"), family) for problem in problems]
    assert len({main_step(plan).config for plan in plans}) == variants
    assert len({step.config for plan in plans for step in plan.steps if step.kernel == "fwd_combine"}) == 1


# Few rows over many keys


@pytest.mark.parametrize(
    ("changes", "few"),
    [
        ({}, True),
        ({"len_q": 4}, True),
        ({"len_q": 8}, True),  # 32 rows
        ({"len_q": 9}, False),
        ({"len_q": 8, "dim_v": 256}, False),  # out takes 256 registers
        ({"len_q": 4, "dim_v": 256}, True),
        ({"heads_kv": 32, "len_q": 32}, True),
        ({"len_kv": 256}, False),
        ({"len_kv": 257}, True),
        ({"num_splits": 1}, False),
        ({"num_splits": 2}, True),
        ({"dropout": "byte"}, False),
        ({"batch": 3000, "layout": "varlen", "total_q": 3000, "total_kv": 3000, "page_size": 16}, True),
        ({"batch": 2**20, "len_kv": 2**26}, False),  # more key tiles than an int counts
    ],
)
def test_few_rows_have_a_kernel_of_their_own(changes: dict, few: bool) -> None:
    for device in ("a100", "h100", "l4"):
        plan = choose(replace(DECODE, **changes), named(device), "sm80")
        assert (main_step(plan).kernel == "fwd_sm80_few") is few


@pytest.mark.parametrize(
    ("changes", "splits"),
    [
        ({"len_q": 16, "batch": 16}, 1),  # 128 tiles for 132 multiprocessors
        ({"len_q": 9}, 16),
        ({"len_q": 9, "len_kv": 600}, 2),  # four tiles of keys each
        ({"batch": 64, "len_kv": 4096}, 1),
        ({"batch": 8}, 2),
        ({"batch": 8, "mask": Mask(right=0), "sink": True}, 2),
        ({"len_kv": 4096}, None),  # sm80's kernel of few starts sooner
        ({"len_q": 16, "batch": 16, "num_splits": 1}, None),
        ({"len_q": 16, "batch": 16, "heads_q": 24}, None),  # three heads do not share 64 rows
        ({"len_q": 16, "batch": 16, "dropout": "byte"}, None),
        ({"len_q": 17, "batch": 16, "len_kv": 100}, None),
    ],
)
def test_a_group_of_heads_in_one_tile_of_hoppers(changes: dict, splits: int | None) -> None:
    plan = choose(replace(DECODE, **changes), named("h100"))
    step = next(step for step in plan.steps if step.kernel.startswith("fwd_s"))
    assert (getattr(step.config, "heads", None) == "HeadGroup" and plan.family == "sm90") is (splits is not None)
    if splits is not None:
        boxes = [("q", 64, 4, False), ("k", 64, 1, True), ("v", 64, 1, True), ("out", 64, 4, False)]
        assert [(box.tensor, box.rows, box.heads, box.once) for box in step.boxes] == boxes[: 4 if splits == 1 else 3]
        halves = splits % 2 == 0  # which two blocks of a cluster share
        assert (plan.num_splits, step.cluster) == ((splits // 2, 2) if halves else (splits, 1))
        assert step.config.split.startswith("Halves") is halves and step.num_blocks <= 132
        assert [s.kernel for s in plan.steps] == ["fwd_sm90", "fwd_combine"][: 1 + (plan.num_splits > 1)]


@pytest.mark.parametrize(
    ("changes", "heads", "splits", "blocks"),
    [
        ({"len_q": 17}, "HeadGroup", 16, 128),  # 68 rows of a group
        ({"len_q": 64}, "HeadGroup", 8, 128),
        ({"len_q": 64, "dim_qk": 256, "dim_v": 256}, "HeadGroup", 8, 128),
        ({"len_q": 17, "batch": 16}, "HeadGroup", 1, 128),
        ({"len_q": 64, "num_splits": 1}, "OneHead", 1, 32),
        ({"len_q": 65}, "OneHead", 4, 128),  # three tiles of a group instead of four
        ({"len_q": 140}, "HeadGroup", 13, 132),  # five instead of eight
        ({"len_q": 100}, "OneHead", 4, 128),
        ({"len_q": 100, "heads_q": 24}, "OneHead", 11, 132),  # three heads do not share 64 rows
        ({"len_q": 65, "mask": MASKS["tensor"]}, "OneHead", 4, 128),
        ({"len_q": 128}, "OneHead", 4, 128),
        ({"len_q": 512}, "OneHead", 1, 128),
        ({"len_q": 128, "len_kv": 2048}, "OneHead", 2, 64),
        ({"len_q": 128, "len_kv": 2047}, "OneHead", 2, 64),
        ({"len_q": 128, "len_kv": 1023}, "OneHead", 1, 32),  # fewer than eight keys a query
        ({"len_q": 128, "num_splits": 1}, "OneHead", 1, 32),
        ({"len_q": 200, "layout": "varlen", "total_q": 200, "total_kv": 32768}, "OneHead", 2, 128),
    ],
)
def test_idle_multiprocessors_get_a_part_of_long_keys(changes: dict, heads: str, splits: int, blocks: int) -> None:
    plan = choose(replace(DECODE, **{"len_kv": 32768} | changes), named("h100"))
    step = main_step(plan)
    assert plan.family == "sm90"
    assert (step.config.heads, plan.num_splits, step.num_blocks) == (heads, splits, blocks)
    assert step.config.split == ("KeySplits" if splits > 1 else "NoSplit")
    assert ("out" in [box.tensor for box in step.boxes]) is (splits == 1)
    assert [s.kernel for s in plan.steps] == ["fwd_sm90", "fwd_combine"][: 1 + (splits > 1)]
    assert {box.heads for box in step.boxes if box.tensor in ("q", "out")} == {4 if heads == "HeadGroup" else 1}


@pytest.mark.parametrize("batch", [1, 2, 16, 500])
@pytest.mark.parametrize("len_kv", [300, 4096, 100_000])
def test_ranges_fill_the_device_and_their_slots_do_not_grow(batch: int, len_kv: int) -> None:
    device = named("h100")
    plan = choose(replace(DECODE, batch=batch, len_kv=len_kv), device, "sm80")
    (step,) = plan.steps
    most = 2 * device.num_sms
    walked = -(-len_kv // 64)
    wanted = 8 * batch * min(8 if walked <= 32 else 32, max(min(16, walked), len_kv // 1024))
    assert step.num_blocks == min(most, wanted)
    evenly = wanted <= most  # in splits, of which all have a block at once
    assert step.config.split == ("KeySplits" if evenly else "KeyRanges")
    shapes = {w.name: w.shape for w in plan.workspaces}
    slots = step.num_blocks if evenly else 2 * step.num_blocks
    cluster = evenly and plan.num_splits <= 8  # whose parts stay in shared memory
    assert (step.cluster, step.config.cluster) == ((plan.num_splits, True) if cluster else (1, False))
    in_memory = {"partial_out": (slots, 16, 128), "partial_state": (slots, 16, 2), "tickets": (8 * batch,)}
    assert shapes == ({} if cluster else in_memory)
    assert [w.kept for w in plan.workspaces] == ([] if cluster else [False, False, True])
    assert 1 <= plan.num_splits <= -(-len_kv // 64)
    asked = choose(replace(DECODE, batch=batch, len_kv=len_kv, num_splits=20), device, "sm80")
    assert asked.steps[0].num_blocks == 8 * batch * min(20, -(-len_kv // 64))
    assert not asked.workspaces or asked.steps[0].num_blocks == asked.workspaces[0].shape[0]
    words = "blocks of 264 that there can be at once" if evenly else "share all tiles of keys alike"
    how = "asked for" if len_kv > 19 * 64 else "of 20: one for each tile of keys"
    assert words in plan.division and asked.division == f"4 heads share a tile; {how}"


def test_what_serves_one_sequence_serves_a_call_of_other_lengths() -> None:
    """A captured graph is launched again with other lengths: nothing but the longest decides a launch."""
    problem = replace(DECODE, layout="varlen", batch=3, total_q=3, total_kv=9000, page_size=16)
    plans = {choose(replace(problem, total_kv=n), named("h100")).steps for n in (100, 9000)}
    assert len(plans) == 1


def test_gradients_know_nothing_of_splits() -> None:
    problem = replace(DECODE, direction="backward", len_q=3)
    plans = [choose(replace(problem, num_splits=n), named("h100")) for n in (0, 1, 5)]
    assert len({(plan.steps, plan.workspaces, plan.num_splits) for plan in plans}) == 1
    assert not any(hasattr(step.config, name) for step in plans[0].steps for name in ("heads", "split"))
    assert "splits" not in str(explain(problem, named("h100")))


def test_flops_count_visible_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        len_q, len_kv = (int(n) for n in rng.integers(0, 30, 2))
        left, right = (None if rng.random() < 0.3 else int(rng.integers(0, 20)) for _ in range(2))
        mask = Mask(left, right, "top-left" if rng.random() < 0.5 else "bottom-right")
        diagonal = np.arange(len_q)[:, None] + (len_kv - len_q if mask.alignment == "bottom-right" else 0)
        keys = np.arange(len_kv)
        visible = np.ones((len_q, len_kv), bool)
        if left is not None:
            visible &= keys >= diagonal - left
        if right is not None:
            visible &= keys <= diagonal + right
        assert visible_pairs(mask, len_q, len_kv) == visible.sum()
        clipped = mask.clipped(len_q, len_kv)
        assert visible_pairs(clipped, len_q, len_kv) == visible.sum()
    n = 2**30  # as many rows as a sequence may have, counted without an array of them
    assert visible_pairs(Mask(right=0), n, n) == n * (n + 1) // 2
    assert visible_pairs(Mask(left=5, right=0), n, n) == 6 * n - 15
    causal = replace(BASE, len_q=4, len_kv=4, mask=Mask(right=0))
    assert causal.flops() == 2 * 2 * 8 * 10 * (64 + 64)
    assert replace(causal, direction="backward").flops() == 2.5 * causal.flops()


def test_problems_print_what_they_are() -> None:
    problem = replace(BASE, dim_v=32, softcap=1.0, layout="varlen", num_splits=3)
    assert str(problem) == "forward bf16 b2 h8/2 s500x700 d64x32 varlen softcap splits3"
    problem = replace(problem, direction="backward", deterministic=True, num_splits=0)
    assert str(problem) == "backward bf16 b2 h8/2 s500x700 d64x32 varlen softcap deterministic"


def test_config_members_are_plain() -> None:
    """``jit.render`` writes strings as types and integers as constants; else only what a caller wrote may appear."""
    for direction in ("forward", "backward"):
        for step in choose(replace(BASE, direction=direction), named("h100")).steps:
            for field in fields(step.config):
                value = getattr(step.config, field.name)
                assert type(value) in (str, int, bool) or (field.name == "written" and value is None), field.name


def test_a_config_has_nothing_that_its_kernel_does_not_read() -> None:
    """By name in the sources that its entry includes; but the host reads a launch's shared memory, and prints mods."""
    configs = {step.kernel: step.config for _, _, step in matrix()}
    assert configs.keys() == {path.stem for path in (sources.root() / "entry").iterdir()}
    for kernel, config in configs.items():
        text = b"".join(sources.gather(kernel, {sources.CONFIG: ""}).values()).decode()
        read = {name.removeprefix("k") for name in re.findall(r"\bConfig::(k?[A-Z]\w*)", text)}
        members = {"".join(word.capitalize() for word in field.name.split("_")) for field in fields(config)}
        assert members - read <= {"SmemBytes", "Written"}, kernel


# The Hopper forward

H100 = named("h100")
CAUSAL = MASKS["causal"]
LONG = replace(BASE, len_q=4096, len_kv=4096)


def hopper(**changes) -> ForwardConfig:
    config = main_step(choose(replace(LONG, **changes), H100, "sm90")).config
    assert isinstance(config, ForwardConfig)
    return config


@pytest.mark.parametrize(
    ("changes", "consumers", "tile_kv", "ping_pong"),
    [
        ({}, 4, 64, True),
        ({"mask": CAUSAL}, 4, 64, False),
        ({"mask": MASKS["window"]}, 4, 64, False),
        ({"dim_qk": 16, "dim_v": 8, "len_q": 500}, 4, 64, True),
        ({"softcap": 2.0, "mask": CAUSAL}, 4, 64, False),
        ({"alibi": True}, 4, 64, True),
        ({"sink": True, "softmax_scale": -1.0}, 4, 64, True),
        ({"bias": dtypes.BF16}, 4, 64, True),
        ({"bias": dtypes.FP32, "mask": CAUSAL}, 4, 64, True),
        ({"bias": dtypes.BF16, "bias_boxes": False}, 2, 128, True),
        ({"bias": dtypes.BF16, "dropout": "byte"}, 2, 128, True),
        ({"mask": MASKS["tensor"]}, 2, 128, True),
        ({"mask": replace(CAUSAL, tensor=True)}, 2, 128, True),
        ({"dropout": "word"}, 2, 128, True),
        ({"dropout": "byte", "mask": CAUSAL}, 2, 128, True),
        ({"dim_qk": 72, "dim_v": 72}, 3, 64, True),
        ({"dim_qk": 72, "dim_v": 72, "mask": CAUSAL}, 3, 64, False),
        ({"dim_qk": 40, "dim_v": 128}, 3, 64, True),
        ({"dim_qk": 128, "dim_v": 128, "batch": 64, "mask": CAUSAL, "num_splits": 0}, 3, 64, False),
        ({"dim_qk": 128, "dim_v": 128, "len_q": 500, "num_splits": 0}, 2, 128, True),  # many multiprocessors idle
        ({"dim_qk": 128, "dim_v": 128, "len_q": 500, "num_splits": 1}, 3, 64, True),
        (
            {"dim_qk": 128, "dim_v": 128, "batch": 512, "len_q": 128, "num_splits": 0},
            2,
            128,
            True,
        ),  # a third of 192 rows
        ({"dim_qk": 128, "dim_v": 128, "batch": 512, "len_q": 320, "num_splits": 0}, 3, 64, True),
        ({"dim_qk": 128, "layout": "varlen", "total_q": 500, "num_splits": 0}, 3, 64, True),
        ({"dim_qk": 128, "softcap": 2.0}, 3, 64, True),
        ({"dim_qk": 128, "sink": True}, 3, 64, True),
        ({"dim_qk": 128, "alibi": True}, 2, 128, True),
        ({"dim_qk": 128, "alibi": True, "mask": CAUSAL}, 2, 128, True),
        ({"dim_qk": 128, "dropout": "byte"}, 2, 128, True),
        ({"dim_v": 96, "bias": dtypes.BF16}, 2, 128, True),
        ({"dim_v": 96, "bias": dtypes.BF16, "bias_broadcast": (False, False, True, False)}, 2, 128, True),
        ({"dim_v": 96, "bias": dtypes.FP32}, 2, 64, True),
        ({"dim_qk": 192, "dim_v": 128}, 2, 64, True),
        ({"dim_qk": 256, "dim_v": 256}, 2, 64, True),
        ({"dim_qk": 256, "dim_v": 256, "mask": CAUSAL}, 2, 64, False),
        ({"dim_qk": 192, "mask": MASKS["tensor"]}, 2, 64, True),
        ({"dim_v": 256, "dropout": "byte", "mask": CAUSAL}, 2, 64, False),
        ({"dim_qk": 256, "bias": dtypes.FP32, "mask": CAUSAL}, 2, 64, True),
        ({"dim_qk": 256, "dim_v": 256, "bias": dtypes.FP32}, 2, 32, True),
    ],
)
def test_hopper_tiles(changes: dict, consumers: int, tile_kv: int, ping_pong: bool) -> None:
    config = hopper(**changes)
    assert (config.tile_q, config.tile_kv, config.ping_pong) == (64 * consumers, tile_kv, ping_pong)
    assert config.threads == 128 * (1 + consumers)
    assert config.producer_registers % 8 == config.consumer_registers % 8 == 0
    launched = 65536 // config.threads // 8 * 8 * config.threads  # a launch gives each thread the same eights
    registers = 128 * (config.producer_registers + consumers * config.consumer_registers)
    assert 0.9 * 65536 <= registers <= launched, "setmaxnreg shares out what the launch gave"


@pytest.mark.parametrize(
    ("changes", "stages", "row_buffers"),
    [
        # Of 227 KB: d 128 takes 48 KB a q and 32 KB a stage, d 192 + 128 48 + 40, d 192 48 + 48, d 256 64 + 64.
        ({}, 4, 2),
        ({"dim_qk": 128, "dim_v": 128}, 4, 2),
        ({"dim_qk": 192, "dim_v": 128}, 3, 2),
        ({"dim_qk": 192, "dim_v": 192}, 2, 2),
        ({"dim_qk": 256, "dim_v": 256}, 2, 1),
        # 128 x 128, 32 KB a q and 64 KB a stage; with a bias in fp32 half the keys, 32 KB and 32 + 32 KB.
        ({"dim_qk": 128, "dim_v": 128, "dropout": "byte"}, 2, 2),
        ({"dim_qk": 128, "dim_v": 128, "bias": dtypes.FP32}, 2, 1),
    ],
)
def test_hopper_stages(changes: dict, stages: int, row_buffers: int) -> None:
    config = hopper(**changes)
    assert (config.stages, config.row_buffers) == (stages, row_buffers)


def hopper_smem(
    config: ForwardConfig, dims: tuple[int, int], tile_kv: int, stages: int, row_buffers: int, bias_bytes: int = 0
) -> int:
    """Bytes that a Hopper forward uses, ``bias_bytes`` of them for each stage."""
    chunks = [-(-dim // 64) for dim in dims]
    rows = row_buffers * config.tile_q * max(chunks) * 128
    barriers = 2 * (row_buffers * config.tile_q // 64 + (3 if bias_bytes else 2) * stages)
    works = 2 * (2 * 8 + 4 * 4)
    return rows + stages * (tile_kv * sum(chunks) * 128 + bias_bytes) + 8 * barriers + works


def test_hopper_tiles_of_any_size_fit() -> None:
    sizes = set()
    for dims in product(range(8, 257, 8), repeat=2):
        for changes in ({}, {"len_q": 500}, {"softcap": 1.0}, {"dropout": "byte"}):
            config = hopper(dim_qk=dims[0], dim_v=dims[1], **changes)
            used = hopper_smem(config, dims, config.tile_kv, config.stages, config.row_buffers)
            assert 0 <= config.smem_bytes - used < 1024 and config.smem_bytes % 1024 == 0
            assert config.smem_bytes <= H100.smem_per_block
            assert config.tile_kv == (128 if config.tile_q == 128 and max(dims) <= 128 else 64)
            more = (config.stages + 1, 2) if config.row_buffers == 2 else (2, 2)
            assert config.stages == 4 or hopper_smem(config, dims, config.tile_kv, *more) > H100.smem_per_block
            sizes.add((config.stages, config.row_buffers))
    assert sizes == {(4, 2), (3, 2), (2, 2), (2, 1)}


@pytest.mark.parametrize("bias", [dtypes.BF16, dtypes.FP32])
@pytest.mark.parametrize("one_row", [False, True])
def test_hopper_tiles_with_a_bias_fit(bias: dtypes.DType, one_row: bool) -> None:
    broadcast = (True, False, one_row, False)

    def bias_bytes(config: ForwardConfig, tile_kv: int) -> int:
        return (8 if one_row else config.tile_q) * -(-tile_kv * bias.itemsize // 128) * 128

    for dims in product(range(8, 257, 8), range(8, 257, 24)):
        for changes in ({}, {"dropout": "byte"}):
            config = hopper(dim_qk=dims[0], dim_v=dims[1], bias=bias, bias_broadcast=broadcast, **changes)
            sizes, of_bias = (config.stages, config.row_buffers), bias_bytes(config, config.tile_kv)
            used = hopper_smem(config, dims, config.tile_kv, *sizes, of_bias)
            assert used <= config.smem_bytes < used + 2048 and config.smem_bytes <= H100.smem_per_block
            assert config.tile_kv % 32 == 0, "random bits are drawn for 32 keys"
            full = 128 if config.tile_q == 128 and max(dims) <= 128 else 64
            if config.tile_kv < full:
                assert hopper_smem(config, dims, full, 2, 1, bias_bytes(config, full)) + 2048 > H100.smem_per_block
            elif sizes != (4, 2):
                more = (config.stages + 1, 2) if config.row_buffers == 2 else (2, 2)
                assert hopper_smem(config, dims, full, *more, of_bias) + 2048 > H100.smem_per_block


@pytest.mark.parametrize(
    ("changes", "score", "copies", "rows"),
    [
        ({}, "NaturalScore<ScaledScore<float>>", "BiasTiles<bf16>", 256),
        ({"bias": dtypes.FP32, "softcap": 2.0}, "NaturalScore<SoftCapScore<float>>", "BiasTiles<float>", 256),
        ({"alibi": True}, "Plus<ScaledScore<float>, Alibi>", "BiasTiles<bf16>", 256),
        ({"bias_broadcast": (True, True, False, False)}, "NaturalScore<ScaledScore<float>>", "BiasTiles<bf16>", 256),
        ({"bias_broadcast": (True, True, True, False)}, "NaturalScore<ScaledScore<float>>", "BiasRow<bf16>", 1),
        ({"bias_broadcast": (True, True, True, True)}, "Plus<ScaledScore<float>, Bias<bf16>>", "NoBias", 0),
        ({"bias_boxes": False}, "Plus<ScaledScore<float>, Bias<bf16>>", "NoBias", 0),
        ({"bias": None}, "ScaledScore<float>", "NoBias", 0),
    ],
)
def test_how_hopper_comes_by_a_bias(changes: dict, score: str, copies: str, rows: int) -> None:
    step = choose(replace(LONG, **{"bias": dtypes.BF16} | changes), H100, "sm90").steps[-1]
    assert (step.config.score, step.config.bias_copies) == (score, copies)
    assert [box.rows for box in step.boxes if box.tensor == "bias"] == [rows][: bool(rows)]


def test_other_families_read_a_bias_element_by_element() -> None:
    problem = replace(LONG, bias=dtypes.BF16)
    for direction, family in (("forward", "sm80"), ("backward", "sm80"), ("forward", "simt")):
        for step in choose(replace(problem, direction=direction), H100, family).steps:
            assert not hasattr(step.config, "bias_copies") and step.boxes == ()


def test_hopper_blocks_and_boxes() -> None:
    many = {"batch": 64, "len_q": 4096}
    for changes, drawn in (({}, False), ({"mask": CAUSAL}, True), ({"layout": "varlen", "total_q": 4096}, True)):
        plan = choose(replace(LONG, **many, **changes), H100, "sm90")
        step = plan.steps[-1]
        assert step.num_blocks == 132
        assert [w.name for w in plan.workspaces] == ["tickets"] * drawn, "tiles of unequal length are drawn"
        kv = step.config.tile_kv
        assert [(box.tensor, box.rows) for box in step.boxes] == [("q", 64), ("k", kv), ("v", kv), ("out", 64)]
    few = choose(replace(LONG, batch=1, len_q=100, mask=CAUSAL), H100, "sm90")
    assert few.steps[-1].num_blocks == 8 and few.workspaces == (), "no tile is left to draw"
    assert [step.kernel for step in choose(replace(LONG, dropout="word"), H100).steps] == ["fwd_rng", "fwd_sm90"]


@pytest.mark.parametrize(
    ("changes", "cycles", "share"),
    [
        # 192 x 64: 2 * 192 * 64 * 256 FLOP at 4096 a cycle, 192 * 64 exponentials at 16, and at 128 bytes a cycle q
        # (48 KB), k and v (32 KB) by three readers and one writer.
        ({"dim_qk": 128, "dim_v": 128}, (1536, 768, 384 + 4 * 256), 1.0),
        ({}, (1024, 1024, 256 + 5 * 128), 1.0),  # 256 x 64
        ({"dim_qk": 24, "dim_v": 17}, (512, 1024, 128 + 5 * 64), 0.5),
        ({"dim_qk": 256, "dim_v": 256}, (2048, 512, 512 + 3 * 512), 1.0),  # 128 x 64
        # 32 KB of bias, written and read.
        ({"bias": dtypes.BF16}, (1024, 1024, 256 + 5 * 128 + 512), 1024 / 1408),
        ({"bias": dtypes.BF16, "bias_boxes": False}, (1024, 1024, 128 + 3 * 256), 1.0),  # 128 x 128
    ],
)
def test_ceiling_of_hopper_tiles(changes: dict, cycles: tuple[float, ...], share: float) -> None:
    ceiling = choose(replace(LONG, **changes), H100, "sm90").ceiling
    assert (ceiling.tensor_cores, ceiling.exponentials, ceiling.shared_memory) == cycles
    assert ceiling.share == share


def test_explanation_of_a_hopper_forward() -> None:
    lines = str(explain(replace(LONG, dim_qk=32, dim_v=32), H100)).splitlines()
    assert lines[2].startswith("  family     sm90: four consumers")
    assert lines[3] == (
        "  at most    50% of the tensor cores' peak: exponentials take 200% and shared memory 88% of the time of their "
        "products"
    )
    assert lines[5].endswith("bytes of shared memory, 112 registers to compute")
    assert lines[6:] == ["  not sm80   sm90 comes first", "  not simt   sm90 comes first"]


GRADIENTS = replace(LONG, direction="backward")


@pytest.mark.parametrize(
    ("changes", "cycles", "share"),
    [
        # 64 x 128: five products of 2 * 64 * 128 * 128 FLOP at 4096 a cycle, 64 * 128 exponentials at 16, and at 128
        # bytes a cycle q and dout (32 KB) twice by each of two readers and once by the writer, k and v (64 KB) once; dS
        # (16 KB) by a writer and two readers, and k (32 KB) once more for dQ.
        ({"dim_qk": 128, "dim_v": 128}, (2560, 512, 5 * 256 + 512 + 3 * 128 + 256), 1.0),
        # 128 x 128: two readers for dQ that share dS (32 KB), each with all of k (16 KB).
        ({}, (2560, 1024, 5 * 256 + 256 + 2 * 256 + 2 * 128), 1.0),
        ({"dim_qk": 24, "dim_v": 17}, (1280, 1024, 5 * 128 + 128 + 2 * 256 + 2 * 64), 1280 / 1408),
        # 64 x 64: one reader a product of q and dout (64 KB); P (16 KB in fp32) is written and read, too.
        ({"dim_qk": 256, "dim_v": 256}, (2560, 256, 3 * 512 + 512 + 3 * 64 + 256 + 2 * 128), 2560 / 2752),
        ({"dim_qk": 192, "dim_v": 128}, (1664, 256, 3 * 320 + 320 + 3 * 64 + 192 + 2 * 128), 1664 / 1920),
    ],
)
def test_ceiling_of_hopper_gradients(changes: dict, cycles: tuple[float, ...], share: float) -> None:
    ceiling = choose(replace(GRADIENTS, **changes), H100, "sm90").ceiling
    assert (ceiling.tensor_cores, ceiling.exponentials, ceiling.shared_memory) == cycles
    assert ceiling.share == share


@pytest.mark.parametrize(
    ("changes", "kernel", "tile", "workspaces"),
    [
        ({}, "bwd_sm90", (128, 128), {"row_tiles": 256 * 1552, "dq_accum": 256 * 128 * 64 * 4}),
        (
            {"dim_qk": 24, "dim_v": 40},
            "bwd_sm90",
            (128, 128),
            {"row_tiles": 256 * 1552, "dq_accum": 256 * 128 * 32 * 4},
        ),
        ({"dim_qk": 72, "dim_v": 24}, "bwd_sm90", (64, 128), {"row_tiles": 512 * 784, "dq_accum": 512 * 64 * 128 * 4}),
        (
            {"dim_qk": 40, "dim_v": 200},
            "bwd_sm90_wide",
            (64, 64),
            {"row_tiles": 512 * 784, "dq_accum": 512 * 64 * 64 * 4},
        ),
        (
            {"dim_qk": 256, "dim_v": 256, "deterministic": True},
            "bwd_sm90_wide",
            (64, 64),
            {"row_tiles": 512 * 784, "dq_accum": 512 * 64 * 256 * 4, "dq_turn": 512 * 4 * 4},
        ),
        (
            {"deterministic": True},
            "bwd_sm90",
            (128, 128),
            {"row_tiles": 256 * 1552, "dq_accum": 256 * 128 * 64 * 4, "dq_turn": 256 * 2 * 4},
        ),
        (  # each of three sequences may end within a tile
            {"layout": "varlen", "batch": 3, "total_q": 1000, "total_kv": 1200, "len_q": 600},
            "bwd_sm90",
            (128, 128),
            {"row_tiles": 8 * 10 * 1552, "dq_accum": 8 * 10 * 128 * 64 * 4},
        ),
    ],
)
def test_tiles_and_workspaces_of_hopper_gradients(changes: dict, kernel: str, tile: tuple, workspaces: dict) -> None:
    problem = replace(GRADIENTS, **{"batch": 2, "heads_q": 8, "heads_kv": 2, "len_q": 2048} | changes)
    plan = choose(problem, H100)
    assert [step.kernel for step in plan.steps] == ["bwd_prepare_sm90", kernel, "bwd_convert_sm90"]
    prepare, main, convert = (step.config for step in plan.steps)
    assert (main.tile_q, main.tile_kv) == tile and prepare.tile_q == convert.tile_q == main.tile_q
    boxes = [(box.tensor, box.rows) for box in plan.steps[1].boxes]
    assert boxes == [("q", tile[0]), ("k", 64), ("v", 64), ("dout", tile[0]), ("dk", 64), ("dv", 64)]
    sizes = {w.name: w.nbytes for w in plan.workspaces}
    rows = problem.heads_q * problem.rows_q
    assert sizes == {"delta": 4 * rows, "shift": 8 * rows} | workspaces


SHORT = {
    "s64": ({"len_q": 64, "len_kv": 64}, "fwd_sm80_short", "bwd_sm80_short"),
    "s128": ({"len_q": 128, "len_kv": 100}, "fwd_sm80_short", "bwd_sm90_short"),
    "few-keys": ({"len_q": 128, "len_kv": 64}, "fwd_sm80_short", "bwd_sm80_short"),
    "few-queries": ({"len_q": 32, "len_kv": 128}, "fwd_sm90", "bwd_sm80_short"),
    "longer": ({"len_q": 129, "len_kv": 128}, "fwd_sm90", "bwd_sm90"),
    "wider": ({"len_q": 128, "len_kv": 128, "dim_qk": 72, "dim_v": 72}, "fwd_sm90", "bwd_sm90"),
    "few": ({"len_q": 128, "len_kv": 128, "batch": 32}, "fwd_sm90", "bwd_sm90"),
    "one-split": ({"len_q": 128, "len_kv": 128, "num_splits": 1}, "fwd_sm90", "bwd_sm90_short"),
    "grouped": ({"len_q": 128, "len_kv": 128, "heads_kv": 4}, "fwd_sm80_short", "bwd_sm90"),
    "written": (
        {"len_q": 128, "len_kv": 100, "score_mod": trace("score_mod", lambda s, b, h, q, k: 2.0 * tanh(s)).mod},
        "fwd_sm80_short",
        "bwd_sm80_short",
    ),
    "own-bias": (
        {"len_q": 128, "len_kv": 128, "bias_broadcast": (False,) * 4, "bias_grad": True},
        "fwd_sm80_short",
        "bwd_sm80_short",
    ),
}


@pytest.mark.parametrize(("sizes", "forward", "backward"), SHORT.values(), ids=SHORT)
def test_many_short_sequences_have_kernels_of_their_own(sizes: dict, forward: str, backward: str) -> None:
    shared = {"bias": dtypes.BF16, "bias_broadcast": (True, False, False, False)}
    problem = replace(BASE, **{"batch": 40, "heads_q": 8, "heads_kv": 8, "num_splits": 0} | shared | sizes)
    kernels = []
    for direction in ("forward", "backward"):
        asked = {"num_splits": 0, "bias_grad": True} if direction == "backward" else {"bias_grad": False}
        plan = choose(replace(problem, direction=direction, **asked), H100)
        kernels.append([step.kernel for step in plan.steps])
    assert kernels[0] == [forward]
    assert backward in kernels[1] and (len(kernels[1]) <= 2) == backward.endswith("_short")


@pytest.mark.parametrize("broadcast", [(True, False, False, False), (True, True, False, False)], ids=["batch", "heads"])
def test_a_bias_shared_by_batch_or_heads_is_summed_by_wgmma(broadcast: tuple[bool, ...]) -> None:
    problem = replace(
        GRADIENTS, batch=3, dim_qk=64, dim_v=64, bias=dtypes.BF16, bias_grad=True, bias_broadcast=broadcast
    )
    names = [step.kernel for step in choose(problem, H100).steps]
    assert "bwd_bias_sm90" in names and "bwd_bias_sm80" not in names
    along_rows = replace(problem, bias_broadcast=(True, False, True, False))
    assert "bwd_bias_sm80" in [step.kernel for step in choose(along_rows, H100).steps]


@pytest.mark.parametrize("family", ["sm80", "simt"])
def test_what_two_share_is_added_in_place(family: str) -> None:
    """Then 0 + a + b does not depend on which of them comes first."""
    bias = {"bias": dtypes.BF16, "bias_grad": True, "bias_broadcast": (True, False, False, False)}
    problem = replace(GRADIENTS, dtype=dtypes.FP32, heads_q=2, heads_kv=2, dim_qk=64, dim_v=64, **bias)
    cases = [
        ({}, "Added"),
        ({"batch": 1}, "Stored"),
        ({"bias_broadcast": (False, True, False, False)}, "Added"),
        ({"bias_broadcast": (False,) * 4}, "Stored"),
        ({"batch": 3}, None),
        ({"bias_broadcast": (True, True, False, False)}, None),
        ({"len_q": 2, "bias_broadcast": (False, False, True, False)}, None),
        ({"softcap": 2.0}, None),
        ({"dtype": dtypes.BF16}, None),
    ]
    for changes, way in cases:
        changed = replace(problem, **changes)
        policies = {
            step.config.bias_gradient
            for step in choose(changed, H100, family).steps
            if "dq" in step.kernel or step.kernel in ("bwd_sm90", "bwd_sm80")
        }
        assert policies == {f"{way}BiasGradient<float>" if way else "NoBiasGradient"}, changes
        assert needs_zeros(changed) == (way == "Added")


def test_explanation_of_a_hopper_backward() -> None:
    summed = {"bias_grad": True, "bias_broadcast": (True, False, False, False)}
    problem = replace(GRADIENTS, batch=3, dim_qk=128, dim_v=128, bias=dtypes.BF16, sink=True, **summed)
    plan, lines = choose(problem, H100), str(explain(problem, H100)).splitlines()
    assert lines[2] == "  family     sm90: dk and dv take 128 registers, S and dP 64"
    assert lines[3].startswith(
        "  at most    100% of the tensor cores' peak: exponentials take 20% and shared memory 95% "
    )
    assert lines[4].startswith(f"  workspace  {plan.workspace_bytes:,} bytes (delta ")
    assert "row_tiles" in lines[4] and "dq_accum" in lines[4]
    kernels = ("bwd_prepare_sm90", "bwd_sm90", "bwd_convert_sm90", "bwd_bias_sm80", "bwd_sink")
    assert [line.split()[:2] for line in lines[5:10]] == [["kernel", f"{kernel}:"] for kernel in kernels]
    assert lines[6].endswith("tile 64 x 128, 217,088 bytes of shared memory, 240 registers to compute")
    assert lines[10:] == ["  not sm80   sm90 comes first", "  not simt   sm90 comes first"]


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({"heads_q": 32, "heads_kv": 32, "len_kv": 1024, "dim_qk": 128, "dim_v": 128}, 64),
        ({"heads_q": 32, "heads_kv": 8, "len_kv": 1024, "dim_qk": 128, "dim_v": 128}, 256),
        ({"heads_q": 6, "heads_kv": 2, "len_kv": 1025, "dim_qk": 128, "dim_v": 128}, 96),
        ({"heads_q": 2, "heads_kv": 2, "len_kv": 2**30}, 32),
        ({"heads_q": 3, "heads_kv": 1, "len_kv": 10**6, "dim_qk": 256, "dim_v": 256}, 96),
    ],
)
def test_heads_per_section(changes: dict, heads: int) -> None:
    problem = replace(BASE, mask=CAUSAL, batch=256, **changes)
    assert heads_per_section(problem) == heads
    kv_heads, head_bytes = heads // problem.group, problem.len_kv * (problem.dim_qk + problem.dim_v) * 2
    assert kv_heads & (kv_heads - 1) == 0
    assert kv_heads == 32 or kv_heads * head_bytes <= 2**25
    assert 2 * kv_heads * head_bytes > 2**25, "twice as many would fit"
    assert heads_per_section(replace(problem, mask=MASKS["full"])) == problem.group, "tiles of equal length"


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({"batch": 8, "heads_q": 16, "heads_kv": 16, "len_q": 2048, "len_kv": 2048}, 8),
        ({"batch": 2, "heads_q": 16, "heads_kv": 16, "len_q": 8192, "len_kv": 8192}, 2),
        ({"batch": 1, "heads_q": 16, "heads_kv": 16, "len_q": 16384, "len_kv": 16384}, 1),
        ({"batch": 1, "heads_q": 10, "heads_kv": 10, "len_q": 2048, "len_kv": 2048}, 5),  # not eight and two
        ({"batch": 1, "heads_q": 3, "heads_kv": 3, "len_q": 2048, "len_kv": 2048}, 3),
        ({"batch": 1, "heads_q": 16, "heads_kv": 4, "len_q": 2048, "len_kv": 2048}, 2),
        ({"batch": 32, "heads_q": 16, "heads_kv": 16, "len_q": 512, "len_kv": 512}, 1),
        ({"batch": 0, "heads_q": 16, "heads_kv": 16, "len_q": 2048, "len_kv": 2048}, 1),
        ({"batch": 2, "heads_q": 16, "heads_kv": 16, "len_q": 0, "len_kv": 2048}, 1),
        ({"batch": 8, "heads_q": 32, "heads_kv": 32, "len_q": 2048, "len_kv": 2048, "dim_qk": 64, "dim_v": 64}, 1),
        ({"batch": 2, "heads_q": 32, "heads_kv": 32, "len_q": 8192, "len_kv": 8192, "dim_qk": 64, "dim_v": 64}, 4),
        ({"mask": MASKS["full"], "batch": 8, "heads_q": 16, "heads_kv": 16, "len_q": 2048, "len_kv": 2048}, 1),
    ],
)
def test_key_heads_per_section(changes: dict, heads: int) -> None:
    problem = replace(BASE, **{"direction": "backward", "mask": CAUSAL, "dim_qk": 128, "dim_v": 128, **changes})
    assert key_heads_per_section(problem) == heads


@pytest.mark.parametrize("heads_q", [1, 64, 2**20])
@pytest.mark.parametrize(("batch", "len_q", "len_kv"), [(1, 128, 0), (2, 2**20, 1), (0, 5, 5)])
def test_a_section_has_no_more_heads_than_there_are(heads_q: int, batch: int, len_q: int, len_kv: int) -> None:
    problem = replace(BASE, mask=CAUSAL, batch=batch, heads_q=heads_q, heads_kv=1, len_q=len_q, len_kv=len_kv)
    assert 1 <= heads_per_section(problem) <= max(1, batch * heads_q)


WIDE = Problem("forward", dtypes.BF16, 2, 16, 16, 4096, 4096, 512, 512, num_splits=0)


def test_wide_heads_have_two_consumers_that_share_columns() -> None:
    plan = choose(WIDE, H100)
    (step,) = plan.steps
    assert (step.kernel, step.config.tile_q, step.config.threads) == ("fwd_sm90_wide", 64, 384)
    assert [box.tensor for box in step.boxes] == ["q", "k", "v", "out"]
    assert step.config.smem_bytes <= H100.smem_per_block


def test_gradients_of_wide_heads_are_those_of_two_blocks() -> None:
    plan = choose(replace(WIDE, direction="backward"), H100)
    step = plan.steps[1]
    assert [step.kernel for step in plan.steps] == ["bwd_prepare_sm90", "bwd_sm90_sliced", "bwd_convert_sm90"]
    assert (step.config.slices, step.num_blocks) == (2, 2 * 2 * 16 * 4096 // 64)
    assert max(s.config.smem_bytes for s in plan.steps) <= H100.smem_per_block
    assert {w.name: w.shape for w in plan.workspaces}["dq_accum"] == (32 * 64, 64, 512)


def test_values_that_lie_in_keys_are_copied_once() -> None:
    latent = replace(WIDE, heads_q=128, heads_kv=1, len_q=1, dim_qk=576, batch=64)
    apart, together = choose(latent, H100), choose(replace(latent, shared_kv=True), H100)
    assert [box.tensor for box in apart.steps[0].boxes] == ["q", "k", "v", "out"]
    assert [box.tensor for box in together.steps[0].boxes] == ["q", "k", "out"]
    assert together.steps[0].boxes[0].heads == 64, "half of the heads fill a tile"
    assert together.steps[0].num_blocks == 128 and "128 heads share tiles" in together.division
    # Halves of 320 columns have 192, which reach beyond keys of as many.
    assert not choose(replace(WIDE, dim_qk=320, dim_v=320, shared_kv=True), H100).steps[0].config.shared_kv


@pytest.mark.parametrize(
    ("changes", "splits"),
    [
        ({}, 8),
        ({"batch": 128}, 1),
        ({"num_splits": 3}, 3),
        ({"num_splits": 1}, 1),
        ({"num_splits": 3, "len_kv": 60}, 2),
        ({"len_kv": 0}, 1),
    ],
)
def test_few_wide_queries_share_their_keys(changes: dict, splits: int) -> None:
    few = replace(WIDE, batch=16, heads_kv=1, len_q=1, len_kv=1024)
    plan = choose(replace(few, **changes), H100)
    assert plan.num_splits == splits
    assert [s.kernel for s in plan.steps] == ["fwd_sm90_wide", "fwd_combine"][: 1 + (splits > 1)]


@pytest.mark.parametrize(("page_size", "rows"), [(8, 8), (16, 16), (48, 16), (64, 64), (256, 64)])
def test_boxes_of_wide_keys_lie_in_a_page(page_size: int, rows: int) -> None:
    paged = replace(WIDE, layout="cache", len_q=1, len_kv=4608, total_kv=9216, page_size=page_size)
    step = choose(paged, H100).steps[0]
    assert {box.rows for box in step.boxes if box.tensor in ("k", "v")} == {rows} == {step.config.box_rows}
    assert step.config.sequence == "PagedCacheSequence"
    assert choose(replace(paged, leftpad=True), H100).family == "simt"
