"""Masks as lists of the blocks of scores that hold a visible pair: how they are found, held, composed and shown."""

from cuflash.blocks.create import create_block_mask
from cuflash.blocks.mask import BlockMask

__all__ = ["BlockMask", "create_block_mask"]
