"""Which kernels are preferred: for all calls by environment or setter, or for one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from cuflash import settings
from cuflash.errors import REFUSALS, InvalidArgument, UnsupportedProblem, shorten
from cuflash.numbers import shown
from cuflash.ops import Options

BACKENDS = ("default", "flash", "mem_eff")
_ALIASES = {"aotriton": "flash", "ck": "mem_eff"}
_FAMILIES = {"flash": ("sm90", "sm80"), "mem_eff": ("simt",)}
"""The kernel families of a backend; ``default`` leaves the choice to the planner."""

_set = "default"
_warned: set[str] = set()


class Choice(NamedTuple):
    """A backend, and whether to do without it where it does not serve a call."""

    backend: str
    optional: bool


def preferred_backend(backend: str | None = None) -> str:
    """Say which kernels PyTorch's functions prefer, and return the choice.

    These are `scaled_dot_product_attention` and the `mha_*`, `mem_eff_*` and `efficient_attention_*` functions. It is
    the counterpart of ``torch.nn.attention.sdpa_kernel`` and ``torch.backends.cuda.preferred_rocm_fa_library``, and
    chooses among the kernels of GPUs alone, never what they compute: dropout draws the same mask in all of them. NumPy
    arrays are computed on the CPU either way. A ``backend=`` argument of a call goes before the preference that is set
    here, and that before the environment variable ``CUFLASH_ATTENTION_BACKEND``.

    The `flash_attn_*` functions have no such preference, as flash-attn has none: the planner chooses, and `explain`
    says what.

    Where the preferred kernels do not serve a call, a choice made here or in the call raises `UnsupportedProblem`. One
    from the environment warns once, and the call runs on the kernels that serve it.

    Parameters
    ----------
    backend : {"default", "flash", "mem_eff"}, optional
        ``flash`` is tensor cores: 16-bit types and fp32, heads up to 256. ``mem_eff`` is plain multiply-adds: any type,
        GPU and head size. ``default`` takes back what was set: the environment decides, and without it the planner.
        ``aotriton`` stands for ``flash`` and ``ck`` for ``mem_eff``. None changes nothing.

    Returns
    -------
    str
        The backend that calls prefer now.

    Raises
    ------
    InvalidArgument
        If there is no such backend.

    Examples
    --------
    >>> import cuflash
    >>> cuflash.preferred_backend("mem_eff")
    'mem_eff'
    >>> cuflash.preferred_backend("default")
    'default'
    """
    global _set
    try:
        if backend is not None:
            _set = _named("backend", backend)
        return resolve(None).backend
    except REFUSALS as error:
        shorten(error)
        raise


def resolve(backend: str | None) -> Choice:
    """The choice for a call with this ``backend=``."""
    if backend is not None:
        return Choice(_named("backend", backend), optional=False)
    if _set != "default":
        return Choice(_set, optional=False)
    return Choice(_named("CUFLASH_ATTENTION_BACKEND", settings.attention_backend()), optional=True)


def call(operation: Callable[..., Any], options: Options, backend: str | None, *arguments: Any) -> Any:
    """Run an operation of `cuflash.ops` on the kernels that are preferred; `arguments` come behind its options."""
    choice = resolve(backend)
    if choice.backend == "default":
        return operation(options, *arguments)
    try:
        return operation(options.replace(family=_FAMILIES[choice.backend]), *arguments)
    except UnsupportedProblem as error:
        if not choice.optional:
            raise
        if choice.backend not in _warned:
            _warned.add(choice.backend)
            warnings.warn(
                f"CUFLASH_ATTENTION_BACKEND is {choice.backend!r}, which does not serve this call; "
                f"others that it does not serve will run on other kernels without a warning. {error}",
                stacklevel=4,
            )
        return operation(options, *arguments)


def _named(source: str, backend: Any) -> str:
    """The backend of a name or an alias."""
    known = _ALIASES.get(backend, backend) if isinstance(backend, str) else None
    if known not in BACKENDS:
        names = ", ".join(map(repr, (*BACKENDS, *_ALIASES)))
        raise InvalidArgument(f"{source} is {shown(backend)}; expected one of {names}.")
    return known
