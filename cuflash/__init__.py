"""Exact attention, forward and backward, for NumPy and CUDA arrays; kernels are compiled at run time."""

from cuflash.api.explain import explain
from cuflash.api.flash import (
    Gradients,
    flash_attn_backward,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_vjp,
)
from cuflash.api.sdpa import scaled_dot_product_attention
from cuflash.errors import CompileError, InvalidArgument, UnsupportedProblem
from cuflash.generator import PhiloxGenerator, manual_seed

__all__ = [
    "CompileError",
    "Gradients",
    "InvalidArgument",
    "PhiloxGenerator",
    "UnsupportedProblem",
    "explain",
    "flash_attn_backward",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_vjp",
    "manual_seed",
    "scaled_dot_product_attention",
]
