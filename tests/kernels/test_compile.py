"""Every kernel of the case table compiles for every architecture and takes no more of it than is there or recorded."""

from __future__ import annotations

import os

import pytest
from covering import sampled
from nvrtc import needs_nvrtc

from cuflash import jit
from cuflash.cases.table import ARCHITECTURES, CACHES, CASES, FULL, MERGES, TANGENTS, WRITTEN, matrix, variants
from cuflash.device import named
from cuflash.plan import Step, choose
from cuflash.verify.resources import complaints

MOST_KERNELS = 1080
"""Two cores compile about four a second."""

GROUPS: dict[tuple[str, str], list[Step]] = {}
"""The kernels of the matrix by their architecture and the case that needs them first."""
for _arch, _case_id, _step in sorted(matrix(), key=lambda row: (row[1], row[0])):
    GROUPS.setdefault((_arch, _case_id), []).append(_step)


def kinds(arch: str, steps: list[Step]) -> set[tuple[bool, str]]:
    """The architecture, and every kernel on Hopper or elsewhere."""
    return {(arch == "sm_90a", what) for what in (arch, *(step.kernel for step in steps))}


def test_the_matrix_is_bounded_and_covers_the_table():
    rows = matrix()
    assert len(rows) <= MOST_KERNELS
    assert len({(arch, step.kernel, step.config) for arch, _, step in rows}) == len(rows)
    kernels = {arch: {step.kernel for target, _, step in rows if target == arch} for arch in ARCHITECTURES}
    cases = [*CASES.values(), *CACHES.values(), *TANGENTS.values(), *WRITTEN.values()]
    everything = {step.kernel for _, step in variants(cases, named("h100"))}
    everything |= {step.kernel for step in MERGES}
    assert kernels.pop("sm_90a") == everything
    hopper = {
        "fwd_sm90",
        "fwd_sm90_wide",
        "jvp_sm90",
        "bwd_prepare_sm90",
        "bwd_sm90",
        "bwd_sm90_wide",
        "bwd_sm90_sliced",
        "bwd_sm90_listed",
        "bwd_sm90_short",
    }
    hopper |= {"bwd_convert_sm90", "bwd_bias_sm90"}
    assert set(map(frozenset, kernels.values())) == {frozenset(everything - hopper)}
    for arch, families in FULL.items():
        cases = [case for case in CASES.values() if case.family in families]
        whole = {(step.kernel, step.config) for _, step in variants(cases, named(arch))}
        assert {(step.kernel, step.config) for target, _, step in rows if target == arch} >= whole
    assert {family for families in FULL.values() for family in families} == {case.family for case in CASES.values()}


def test_cases_that_share_a_kernel_compile_it_once():
    causal, top_left = (CASES[f"fwd_sm80-bf16-d64-{feature}"] for feature in ("causal", "top_left"))
    assert [case_id for case_id, _ in variants([causal, top_left], named("a100"))] == [causal.id]


def test_an_architecture_too_old_for_a_family_needs_none_of_its_kernels():
    assert variants([CASES["fwd_sm80-bf16-d64"]], named("t4")) == []
    assert [step.kernel for _, step in variants([CASES["fwd_simt-fp32-d64"]], named("t4"))] == ["fwd_simt"]


@needs_nvrtc
@pytest.mark.parametrize(
    "group", sampled({"-".join(group): (group, kinds(group[0], steps)) for group, steps in GROUPS.items()}, every=96)
)
def test_every_kernel_of_the_matrix(request, monkeypatch, group):
    """Cubins are kept between runs."""
    arch, case_id = group
    if "CUFLASH_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("CUFLASH_CACHE_DIR", str(request.config.cache.mkdir("cuflash_cubins")))
    for step in GROUPS[group]:
        cubin = jit.compile_kernel(step.kernel, step.config, step.params, arch)
        assert complaints(case_id, step, cubin, named(arch)) == [], step.kernel


@needs_nvrtc
@pytest.mark.parametrize(
    ("case_id", "checked"),
    [("fwd_sm80-bf16-d64-varlen", True), ("fwd_simt-fp32-d64-paged1", True), ("fwd_sm80-bf16-d64", False)],
)
def test_debug_compiles_checks_into_kernels_that_read_lengths(monkeypatch, tmp_path, case_id, checked):
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    case = CASES[case_id]
    step = choose(case.problem, named("h100"), case.family).steps[-1]
    cubins = []
    for debug in ("0", "1"):
        monkeypatch.setenv("CUFLASH_DEBUG", debug)
        cubins.append(jit.compile_kernel(step.kernel, step.config, step.params, "sm_90a").path.read_bytes())
    assert (cubins[0] != cubins[1]) == checked
