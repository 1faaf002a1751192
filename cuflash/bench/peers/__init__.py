"""Everything the bench can time: cuflash itself, and the peers that this Python has, imported by name when asked for.

A peer refuses problems whose meaning it cannot express (``why_not``); what it cannot run it says itself by raising.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cuflash.bench.peers.flash_attention import FlashAttention3, FlashAttention4
from cuflash.bench.peers.implementation import Implementation
from cuflash.bench.peers.jax import JaxCudnn, JaxCuflash, JaxFlashAttention3
from cuflash.bench.peers.own import BuiltIn, CuflashCpu, CuflashGpu, NumpyNaive
from cuflash.bench.peers.product import product
from cuflash.bench.peers.reading import Read
from cuflash.bench.peers.torch import FlexAttention, TorchCpu, TorchCuflash, TorchJvp, TorchSdpa, TorchVarlen
from cuflash.errors import InvalidArgument

PEERS: dict[str, Callable[[], Implementation]] = {
    "torch-flash": lambda: TorchSdpa("flash"),
    "torch-efficient": lambda: TorchSdpa("efficient"),
    "torch-cudnn": lambda: TorchSdpa("cudnn"),
    "torch-math": lambda: TorchSdpa("math"),
    "torch-varlen": TorchVarlen,
    "torch-jvp": TorchJvp,
    "fa3": FlashAttention3,
    "fa4": FlashAttention4,
    "flex": FlexAttention,
    "jax-cudnn": JaxCudnn,
    "jax-fa3": JaxFlashAttention3,
    "gemm": product,
    "read": Read,
    "built-in": BuiltIn,
    "numpy-naive": NumpyNaive,
    "torch-cpu": TorchCpu,
    "cuflash-jax": JaxCuflash,
    "cuflash-torch": TorchCuflash,
}
"""What ``--peers`` may name; ``torch``, ``jax`` and ``numpy`` name all that begin so."""

_ON_CPU = {"numpy-naive", "torch-cpu"}
_IF_NAMED = {"cuflash-jax", "cuflash-torch"}
"""No peers, but the same kernels."""


def chosen(text: str | None, gpu: bool) -> list[str]:
    """The peers that ``--peers`` names, in the order of the table; without a text all real ones of the device.

    Raises
    ------
    InvalidArgument
        If one of the names is neither a peer's nor the beginning of one's.
    """
    if text is None:
        return [name for name in PEERS if gpu != (name in _ON_CPU) and name not in _IF_NAMED]
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if not any(_names(word, name) for name in PEERS):
            raise InvalidArgument(f"--peers names {word!r}; expected some of: torch, jax, numpy, {', '.join(PEERS)}.")
    return [name for name in PEERS if any(_names(word, name) for word in words)]


def _names(word: str, name: str) -> bool:
    return name == word or name.startswith(f"{word}-")


@dataclass(frozen=True, slots=True)
class Installed:
    """The implementations of this machine."""

    implementations: list[Implementation]
    notes: list[str]
    """Why others are missing."""


def find(names: list[str], gpu: bool) -> Installed:
    """Cuflash and those of the named peers that run on the device and can be imported."""
    peers = Installed([CuflashGpu() if gpu else CuflashCpu()], [])
    for name in names:
        if gpu == (name in _ON_CPU):
            peers.notes.append(f"{name}: runs {'without' if gpu else 'only with'} a GPU")
            continue
        try:
            peers.implementations.append(PEERS[name]())
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            peers.notes.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return peers
