"""Models of Hugging Face's transformers: their attention, `attention`, and the masks they make for it, `masks`."""

from cuflash.adapters.transformers.attention import register

__all__ = ["register"]
