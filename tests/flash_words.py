"""Calls of `ops` in the words of the `flash_attn_*` functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cuflash.ops.call import VOCABULARIES, Arrays, Options, asked

FIELDS = {VOCABULARIES["flash"].get(name, name): name for name in Arrays._fields}


def options(keywords: Mapping[str, Any], **others: Any) -> Options:
    """Those of the keywords that are no arrays."""
    known = asked().values()
    return asked(**{name: x for name, x in keywords.items() if name in known}, **others)


def arrays(keywords: Mapping[str, Any], put: Callable[[Any], Any] = lambda x: x, **others: Any) -> Arrays:
    """Those of the keywords that are arrays, put somewhere."""
    every = {**keywords, **others}
    return Arrays(**{FIELDS[name]: put(x) for name, x in every.items() if name in FIELDS and x is not None})
