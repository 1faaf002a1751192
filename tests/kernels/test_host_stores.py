"""Hopper's forward with its rows stored by threads, as a tile of rows that are no neighbours will ask for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from host import run as launches
from host.build import why_not
from host.cases import CAUSAL, HostCase, check_forward, dense, packed

from cuflash.plan import Step

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

ENTRY = """
#include "config.cuh"
#include "forward/sm90.cuh"

void fwd_sm90(const cuflash::FwdParams& params) {{
  cuflash::ForwardSm90<cuflash::Config, cuflash::OneHead, cuflash::RowStore<16>>::run(params);
}}
"""

CASES: dict[str, HostCase] = {
    "two-buffers": dense("fp16", (2, 1), (300, 290), (64, 64), batch=2, num_sms=3, mask=CAUSAL),
    "one-buffer": dense("bf16", (2, 1), (300, 90), (256, 256), batch=2, num_sms=3),
    "narrow": dense("fp16", (1, 1), (140, 200), (160, 24), softcap=1.5),
    "packed": packed("bf16", (2, 1), (70, 0, 1, 330), (130, 20, 0, 150), (64, 64), tail=70, num_sms=2, mask=CAUSAL),
}


@pytest.fixture(autouse=True)
def without_a_map_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes cannot be stored."""
    launch = launches.launch

    def without_map(step: Step, params: np.ndarray, seed: int) -> int:
        params["out_map"]["words"] = 0
        return launch(step, params, seed)

    monkeypatch.setattr(launches, "launch", without_map)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_threads_store_what_boxes_would(case: HostCase, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "UNIT", launches.UNIT.replace('#include "entry/{kernel}.cu"', ENTRY))
    check_forward(replace(case, family="sm90"), seed)


def test_boxes_need_a_map_of_the_output() -> None:
    with pytest.raises(launches.LaunchFailed, match="tma_store: the tensor map is empty"):
        check_forward(replace(CASES["two-buffers"], family="sm90"))
