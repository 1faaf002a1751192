"""What counts as too much of a multiprocessor, and the record of accepted spills."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from cuflash.cases.table import CASES, WRITTEN
from cuflash.device import named
from cuflash.jit import Cubin
from cuflash.plan import choose
from cuflash.verify import resources
from cuflash.verify.resources import ALLOWANCES, Allowance, allowed_spills, complaints

A100 = named("a100")
CASE = CASES["fwd_sm80-bf16-d64"]
STEP = choose(CASE.problem, A100, CASE.family).steps[0]
STEP = replace(STEP, config=replace(STEP.config, threads=128, blocks_per_sm=2, smem_bytes=40 * 1024))
CUBIN = Cubin(
    Path("kernel.cubin"), "fwd_sm80", "sm_80", registers=255, stack=0, spill_stores=0, spill_loads=0, seconds=1.0
)


@pytest.fixture(autouse=True)
def no_allowances(monkeypatch):
    monkeypatch.setattr(resources, "ALLOWANCES", ())


def said(step=STEP, cubin=CUBIN) -> list[str]:
    return complaints(CASE.id, step, cubin, A100)


def test_nothing_is_wrong_with_a_kernel_that_fits():
    assert said() == []


def test_spills_count_in_both_directions():
    assert said(cubin=replace(CUBIN, spill_stores=8, spill_loads=12)) == ["spills 20 bytes, 0 are allowed"]


def test_a_missing_report_counts():
    assert said(cubin=replace(CUBIN, registers=0)) == ["the assembler reported no registers"]


def test_registers_of_all_resident_blocks_count():
    assert said(replace(STEP, config=replace(STEP.config, threads=129))) == ["2 blocks need 65790 registers of 65536"]


def test_shared_memory_of_a_block_and_of_all_resident_ones_counts():
    one = replace(STEP, config=replace(STEP.config, smem_bytes=164 * 1024, blocks_per_sm=1))
    assert said(one) == [
        "a block needs 167936 bytes of shared memory of 166912",
        "1 blocks need 168960 bytes of shared memory of 167936",
    ]
    two = replace(STEP, config=replace(STEP.config, smem_bytes=82 * 1024))
    assert said(two) == ["2 blocks need 169984 bytes of shared memory of 167936"]


def test_the_assembler_saying_it_serialised_something_counts_and_other_remarks_do_not():
    remarks = ("info : (C7510) wgmma is serialised", "warning #177-D: x was declared but never referenced")
    assert said(cubin=replace(CUBIN, warnings=remarks)) == [remarks[0]]


def test_an_allowance_holds_for_its_kernel_and_cases_up_to_its_bytes(monkeypatch):
    monkeypatch.setattr(resources, "ALLOWANCES", (Allowance("fwd_sm80", "*-d64*", 64, "measured"),))
    assert allowed_spills("fwd_sm80-bf16-d64-causal", "fwd_sm80") == 64
    assert allowed_spills("fwd_sm80-bf16-d128", "fwd_sm80") == 0
    assert allowed_spills("bwd_sm80-bf16-d64", "bwd_sm80") == 0
    assert said(cubin=replace(CUBIN, spill_loads=64)) == []
    assert said(cubin=replace(CUBIN, spill_loads=68)) == ["spills 68 bytes, 64 are allowed"]


@pytest.mark.parametrize("allowance", ALLOWANCES, ids=lambda a: f"{a.kernel} {a.case}")
def test_every_recorded_allowance_is_for_a_case_and_explained(allowance):
    assert any(fnmatchcase(case_id, allowance.case) for case_id in (*CASES, *WRITTEN))
    assert allowance.spill_bytes > 0
    assert len(allowance.reason.split()) >= 5
