"""Attention of sequences that are longer than one device's memory: each of several devices has a part of them."""

from cuflash.parallel.attention import (
    all_to_all_attention,
    all_to_all_attention_vjp,
    ring_attention,
    ring_attention_vjp,
    token_order,
)
from cuflash.parallel.exchange import Exchange

__all__ = [
    "Exchange",
    "all_to_all_attention",
    "all_to_all_attention_vjp",
    "ring_attention",
    "ring_attention_vjp",
    "token_order",
]
