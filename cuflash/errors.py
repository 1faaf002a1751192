"""The three errors a user can meet."""

from __future__ import annotations

import sys

HOW_TO_GET_CUPY = (
    "In cuflash's checkout run `pip install -e '.[cuda13]'`, or with '.[cuda12]' where the driver is older than CUDA 13"
)
"""What a message says to do where CuPy or its compiler is missing."""


class InvalidArgument(ValueError):
    """An argument is wrong on its own or does not fit another; nothing was launched or written.

    The message names the argument, says what was given, what was expected and what to do.
    """


class UnsupportedProblem(NotImplementedError):
    """The arguments are sound, but no kernel family runs this combination on this device.

    The message lists, for every family, the reasons why not.
    """


class CompileError(RuntimeError):
    """The CUDA compiler refused a kernel; the message holds its log and the rendered ``config.cuh``."""


REFUSALS = (InvalidArgument, UnsupportedProblem)
"""What a public function raises about what it was given."""


def shorten(error: Exception) -> None:
    """Forget where in here an error was raised, unless ``CUFLASH_DEBUG`` is set: it is about the caller's line.

    Public functions do so where they re-raise, at no cost to calls that succeed.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_dynamo_compiling():
        return  # torch.compile tells the error by its message, and cannot trace how settings are read
    from cuflash import settings  # which raises errors of this module

    if not settings.read().debug:
        error.__traceback__ = None
