"""Attention of sequences that are longer than one device's memory: each of several devices has a part of them."""

from cuflash.parallel.attention import (
    all_to_all_attention,
    all_to_all_attention_vjp,
    ring_attention,
    ring_attention_vjp,
    token_order,
)
from cuflash.parallel.exchange import Exchange
from cuflash.parallel.nccl import Nccl

__all__ = [
    "Exchange",
    "Nccl",
    "all_to_all_attention",
    "all_to_all_attention_vjp",
    "ring_attention",
    "ring_attention_vjp",
    "token_order",
]
