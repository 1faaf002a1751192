"""What a compiled kernel may take of a multiprocessor, and the spills that are known and accepted."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from cuflash.device import Device
from cuflash.jit import Cubin
from cuflash.plan import Step

_REGISTERS = 64 * 1024  # of a multiprocessor, every architecture from sm_70
_RESERVED_SMEM = 1024  # of each resident block, CUDA 11 and later, from sm_80


@dataclass(frozen=True, slots=True)
class Allowance:
    """Spills of a tile that is kept in spite of them."""

    kernel: str
    case: str
    """Glob of the case ids it holds for."""
    spill_bytes: int
    """Stores and loads together, a thread."""
    reason: str


_FORWARD_64 = "128 x 128 keeps 255 registers busy; on an H200 at 8k it runs 316 TFLOP/s, the next tile, 128 x 64, 298"
_COPY_2 = "rows at odd places pass through registers two bytes at a time, beside accumulators that fill them"
_FORWARD_128 = "128 x 64 keeps 255 registers busy; on an H200 at 8k it runs 349 TFLOP/s, the next tile, 128 x 32, 306"
_FORWARD_256 = "tiles of a list that need no test have code of their own, beside the 128 registers of out"
_TANGENTS_64 = "64 x 128 keeps 255 registers busy; on an H200 at 8k it runs 318 TFLOP/s, 64 x 64 without spills 292"
_TANGENTS_128 = "64 x 64 keeps 255 registers busy; on an H200 at 8k it runs 323 TFLOP/s"
_BACKWARD_64 = "32 x 128 keeps 255 registers busy; on an H200 at 8k it runs 280 TFLOP/s, 16 key rows a warp 236"
_BACKWARD_128 = "64 x 128 keeps 255 registers busy; on an H200 at 4k it runs 308 TFLOP/s, with 64 keys 277"
_BACKWARD_256 = "64 x 64 keeps 255 registers busy; on an H200 at 4k it runs 253 TFLOP/s, 32 x 32 without spills 173"
_GRADIENTS_90 = "S, dP, P, dk and dv fill the 240 registers of consumers; what else makes a score passes through memory"
_GRADIENTS_SHORT = (
    "dk, dv and the sums of a shared bias' gradient fill half of the registers, S and dP of some queries the rest"
)
_WALK_90 = "five words that a visit reads once, beside dk, dv, S and dP in the 240 registers of consumers"
_GRADIENTS_256 = "dk or dv, S or dP and a share of dQ fill the 240 registers of consumers, beside what a walk is at"
_HALVES = "halves of a tile of weights and sums of their own for its products, beside 255 busy registers"
_DOUBLES = "16 rows a warp: out, or dk and dv, take 128 registers, S and dP 64, operands and addresses the rest"
_SIMT_64 = "held to 168 registers so that three blocks share an SM; seven words do not fit"
_TANGENTS_SIMT = "held to 128 registers so that two blocks share a multiprocessor; on sm_100 one word does not fit"
_GROUP_256 = "NVRTC 13.0 keeps more alive beside the 128 registers of out than 13.5, which spills nothing"
_FEW_256 = "what the next query tile's keys are loaded by lives on while parts are merged, beside the registers of out"
_COMBINE = "held to 80 registers so that six blocks share a multiprocessor"
_WIDE = "NVRTC 12 keeps more alive beside the 128 registers of out than 13, which spills nothing"
_WORK = "consumers keep what belongs to a work in memory; in the loops over tiles only the softmax's rare branch spills"
_PAGES = "what finds pages passes through memory once a tile, in the one warp that loads, whose 32 registers are few"
_SCORES_90 = "the compiler keeps score terms, in the loops over tiles, for the rare branch that computes scores again"
_WRITTEN = "what the caller's function computes, beside accumulators that fill the registers"
_EVERYTHING = "all score features at once: addresses of mask and bias and random numbers beside full accumulators"

# Tiles and speeds are those of plan/families/; the bytes are the most of any architecture and feature.
ALLOWANCES: tuple[Allowance, ...] = (
    Allowance("fwd_sm90", "*-d64*", 16, _WORK),
    Allowance("fwd_sm90", "*-d64-alibi", 336, _SCORES_90),
    Allowance("fwd_sm90", "*-d64-paged*", 140, _PAGES),
    Allowance("fwd_sm90", "*-d256-paged*", 36, _WORK),
    Allowance("fwd_sm90", "*-d256-*causal", 28, _WORK),
    Allowance("fwd_sm90", "*-d256-window", 44, _WORK),
    Allowance("fwd_sm80", "*-d40", 80, _FORWARD_64),
    Allowance("fwd_sm80", "*-d64*", 324, _FORWARD_64),
    Allowance("fwd_sm80", "*-d64-copy2", 356, _COPY_2),
    Allowance("fwd_sm80", "*-d128*", 356, _FORWARD_128),
    Allowance("jvp_sm80", "*-d64*", 132, _TANGENTS_64),
    Allowance("jvp_sm80", "*-d128*", 96, _TANGENTS_128),
    Allowance("jvp_sm90", "*-d128*", 12, _WORK),
    Allowance("jvp_simt", "*-fp32-d64", 8, _TANGENTS_SIMT),
    Allowance("fwd_sm80", "*-fp64-*", 660, _DOUBLES),
    Allowance("bwd_sm80", "*-fp64-*", 1600, _DOUBLES),
    Allowance("fwd_sm80", "*-fp32-*", 512, _HALVES),
    Allowance("bwd_sm80", "*-fp32-*", 1004, _HALVES),
    Allowance("fwd_sm80", "*-tf32-*", 760, _HALVES),
    Allowance("bwd_sm80", "*-tf32-*", 528, _HALVES),
    Allowance("bwd_sm80", "*-d64*", 100, _BACKWARD_64),
    Allowance("bwd_sm80", "*-d128*", 188, _BACKWARD_128),
    Allowance("bwd_sm80", "*-d256*", 84, _BACKWARD_256),
    Allowance("bwd_sm90", "*-d64-*mask*", 300, _GRADIENTS_90),
    Allowance("bwd_sm90", "*-d64-softcap", 500, _GRADIENTS_90),
    Allowance("bwd_sm90", "*-d64-window", 56, _GRADIENTS_90),
    Allowance("bwd_sm90", "*-d64-alibi", 576, _GRADIENTS_90),
    Allowance("bwd_sm90", "*-d64-*bias", 92, _GRADIENTS_90),
    Allowance("bwd_sm90", "*-d64-bias384", 92, _GRADIENTS_90),
    Allowance("bwd_sm90", "*-d64-dbias_batch", 92, _GRADIENTS_90),
    Allowance("bwd_sm90", "*-d64-bias_apart", 956, _GRADIENTS_90),
    Allowance("bwd_sm90", "*-d64-dropout*", 200, _GRADIENTS_90),
    Allowance("bwd_sm90", "*-d128*", 160, _WALK_90),
    Allowance("bwd_sm90_short", "*", 56, _GRADIENTS_SHORT),
    Allowance("bwd_sm80_short", "*-d64-short100", 112, _GRADIENTS_SHORT),
    Allowance("bwd_sm90_wide", "*-d256*", 404, _GRADIENTS_256),
    Allowance("bwd_sm90_sliced", "*", 412, _GRADIENTS_256),
    Allowance("bwd_sm90_sliced", "*everything", 820, _EVERYTHING),
    Allowance("fwd_simt", "*-d64x128", 28, _SIMT_64),
    Allowance("fwd_sm90", "*-d64-written*", 52, _WRITTEN),
    Allowance("bwd_sm80", "*-d64-written*", 260, _WRITTEN),
    Allowance("bwd_sm80", "*-d128-written*", 208, _WRITTEN),
    Allowance("bwd_sm80", "*-d256-written", 224, _WRITTEN),
    Allowance("fwd_sm80", "*-d256-blocks", 48, _FORWARD_256),
    Allowance("fwd_sm80", "*-d256-written", 16, _WRITTEN),
    Allowance("fwd_sm90", "*-d256-written", 88, _WRITTEN),
    Allowance("bwd_sm90", "*-d64-written*", 592, _WRITTEN),
    Allowance("bwd_sm90", "*-d128-written*", 80, _WRITTEN),
    Allowance("fwd_sm90", "*-d256-blocks", 68, _WRITTEN),
    Allowance("bwd_sm90_listed", "*-d64-blocks", 16, _WRITTEN),
    Allowance("fwd_sm90", "*-d256-everything", 64, _EVERYTHING),
    Allowance("fwd_sm90_wide", "*-d512", 28, _WIDE),
    Allowance("fwd_sm90_wide", "*-d512-*everything", 72, _EVERYTHING),
    Allowance("fwd_sm90_wide", "*-d512-written", 16, _EVERYTHING),
    Allowance("fwd_sm80", "*-d256-everything", 40, _EVERYTHING),
    Allowance("bwd_bias_sm90", "*everything", 668, _EVERYTHING),
    Allowance("bwd_sm90", "*-d64-*everything", 1076, _EVERYTHING),
    Allowance("bwd_sm90", "*-d128-everything", 296, _EVERYTHING),
    Allowance("bwd_sm90_wide", "*-d256-everything", 888, _EVERYTHING),
    Allowance("bwd_sm80", "*-d128-everything", 96, _EVERYTHING),
    Allowance("bwd_sm80", "*-d256-everything", 132, _EVERYTHING),
    Allowance("fwd_simt", "*-d64-*everything", 420, _EVERYTHING),
    Allowance("fwd_sm80", "*-d256-decode", 100, _GROUP_256),
    Allowance("fwd_sm80_few", "*-d256-decode", 256, _FEW_256),
    Allowance("fwd_combine", "*-decode*", 100, _COMBINE),
)
"""Everything else must not spill."""


def complaints(case_id: str, step: Step, cubin: Cubin, device: Device) -> list[str]:
    """What is wrong with the resources of a compiled kernel; empty when nothing is."""
    config = step.config
    wrong = [warning for warning in cubin.warnings if "C75" in warning]  # the assembler serialised what should overlap
    if not cubin.registers:
        wrong.append("the assembler reported no registers")
    spills, allowed = cubin.spill_stores + cubin.spill_loads, allowed_spills(case_id, step.kernel)
    if spills > allowed:
        wrong.append(f"spills {spills} bytes, {allowed} are allowed")
    registers = cubin.registers * config.threads * config.blocks_per_sm
    if registers > _REGISTERS:
        wrong.append(f"{config.blocks_per_sm} blocks need {registers} registers of {_REGISTERS}")
    if config.smem_bytes > device.smem_per_block:
        wrong.append(f"a block needs {config.smem_bytes} bytes of shared memory of {device.smem_per_block}")
    smem = (config.smem_bytes + _RESERVED_SMEM) * config.blocks_per_sm
    if smem > device.smem_per_sm:
        wrong.append(f"{config.blocks_per_sm} blocks need {smem} bytes of shared memory of {device.smem_per_sm}")
    return wrong


def allowed_spills(case_id: str, kernel: str) -> int:
    """Bytes of spills that are accepted of a kernel for a case."""
    return max((a.spill_bytes for a in ALLOWANCES if a.kernel == kernel and fnmatchcase(case_id, a.case)), default=0)
