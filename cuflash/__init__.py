"""Exact attention, forward and backward, for NumPy and CUDA arrays; kernels are compiled at run time."""

from typing import TYPE_CHECKING, Any

from cuflash.api.cache import flash_attn_with_kvcache
from cuflash.api.explain import Explanation, explain
from cuflash.api.flash import flash_attn_func, flash_attn_varlen_func
from cuflash.api.flex import flex_attention
from cuflash.api.gradients import CapturedGradients, Gradients, flash_attn_backward, flash_attn_vjp
from cuflash.api.keywords import FlashOptions, VarlenOptions
from cuflash.api.kvcache import KVCache
from cuflash.api.maps import AttentionMap, attention_map
from cuflash.api.merge import merge_attention, merge_attention_vjp
from cuflash.api.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from cuflash.api.prepare import BoundAttention, PreparedAttention, flash_attn_prepare
from cuflash.api.pytorch.backend import preferred_backend
from cuflash.api.pytorch.efficient import efficient_attention_backward, efficient_attention_forward
from cuflash.api.pytorch.mem_eff import mem_eff_backward, mem_eff_forward
from cuflash.api.pytorch.mha import mha_bwd, mha_fwd, mha_varlen_bwd, mha_varlen_fwd
from cuflash.api.pytorch.mha_ck import mha_bwd_ck, mha_fwd_ck, mha_varlen_bwd_ck, mha_varlen_fwd_ck
from cuflash.api.pytorch.validators import check_aligned, check_contiguous, check_last_contiguous, check_range
from cuflash.api.sdpa import scaled_dot_product_attention
from cuflash.api.tangents import flash_attn_jvp
from cuflash.errors import CompileError, InvalidArgument, UnsupportedProblem
from cuflash.generator import PhiloxGenerator, manual_seed
from cuflash.masks import Mask
from cuflash.problem import Problem

__all__ = [
    "AttentionMap",
    "BlockMask",
    "BoundAttention",
    "CapturedGradients",
    "CompileError",
    "Explanation",
    "FlashOptions",
    "Gradients",
    "InvalidArgument",
    "KVCache",
    "Mask",
    "PhiloxGenerator",
    "PreparedAttention",
    "Problem",
    "UnsupportedProblem",
    "VarlenOptions",
    "attention_map",
    "check_aligned",
    "check_contiguous",
    "check_last_contiguous",
    "check_range",
    "create_block_mask",
    "efficient_attention_backward",
    "efficient_attention_forward",
    "explain",
    "flash_attn_backward",
    "flash_attn_func",
    "flash_attn_jvp",
    "flash_attn_kvpacked_func",
    "flash_attn_prepare",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_vjp",
    "flash_attn_with_kvcache",
    "flex_attention",
    "manual_seed",
    "mem_eff_backward",
    "mem_eff_forward",
    "merge_attention",
    "merge_attention_vjp",
    "mha_bwd",
    "mha_bwd_ck",
    "mha_fwd",
    "mha_fwd_ck",
    "mha_varlen_bwd",
    "mha_varlen_bwd_ck",
    "mha_varlen_fwd",
    "mha_varlen_fwd_ck",
    "preferred_backend",
    "scaled_dot_product_attention",
]

__version__: str

if TYPE_CHECKING:
    from cuflash import parallel as parallel
    from cuflash.blocks import BlockMask, create_block_mask
else:  # a checker that saw it would believe in every name

    def __getattr__(name: str) -> Any:
        """What few programs ask for, when they do: to read the version takes longer than half of ``import cuflash``."""
        if name in ("BlockMask", "create_block_mask"):
            from cuflash import blocks

            return getattr(blocks, name)
        if name == "parallel":
            import cuflash.parallel

            return cuflash.parallel
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version(__name__)
        except PackageNotFoundError:  # run from its sources, without having been installed
            return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"])
