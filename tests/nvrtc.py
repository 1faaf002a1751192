"""``@needs_nvrtc`` skips a test, with the reason, where kernels cannot be compiled."""

from __future__ import annotations

import pytest

from cuflash.errors import CompileError
from cuflash.jit import compile


def why_no_nvrtc() -> str | None:
    try:
        compile.version()
    except CompileError as error:
        return str(error)
    return None


needs_nvrtc = pytest.mark.skipif(why_no_nvrtc() is not None, reason=str(why_no_nvrtc()))
