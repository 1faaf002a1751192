"""XLA's foreign calls by ctypes: call frames in, pointers and a stream out, errors back.

The layout of the structs is that of ``xla/ffi/api/c_api.h``, which jaxlib carries in ``jaxlib/include``; members are
only ever added to their ends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)

_METADATA = 1
"""XLA_FFI_Extension_Metadata."""
_COMMAND_BUFFER_COMPATIBLE = 1
_INVALID_ARGUMENT, _UNIMPLEMENTED, _INTERNAL = 3, 12, 13

_FRAME_WORDS = 22
"""XLA_FFI_CallFrame, in words of 8 bytes, with the arguments, results and attributes inside it."""
_EXTENSION, _API, _CONTEXT, _STAGE = 1, 2, 3, 4
_NUM_ARGUMENTS, _ARGUMENTS, _NUM_RESULTS, _RESULTS, _ATTRIBUTES = 7, 9, 12, 14, 20
_EXTENSION_TYPE, _EXTENSION_METADATA = 1, 3
_METADATA_VERSION, _METADATA_TRAITS = 24, 32  # in bytes
_API_VERSION, _API_ERROR_CREATE, _API_STREAM_GET = 4, 6, 10
_BUFFER_DATA = 3

_memory: Any = ctypes.cast(8, ctypes.POINTER(ctypes.c_uint64))
"""All of it, by words, the second one first: to index is a quarter of what any other way to read a word takes."""

INSTANTIATE, EXECUTE = 0, 3
"""Stages: once for a program, and once for each of its runs."""


class _ErrorCreate(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("message", ctypes.c_char_p), ("code", ctypes.c_int),
    )  # fmt: skip


class _StreamGet(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("context", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )  # fmt: skip


_create_error = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorCreate))
_get_stream = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_StreamGet))
_functions: dict[int, Any] = {}
"""XLA's functions by address."""


def handler(answer: Callable[[bytes, list[int], Callable[[], int]], None], refusals: tuple[type, ...]) -> Any:
    """The C function that has `answer` called with a call's text, its pointers, and what finds its stream.

    The pointers are those of the arguments, then of the results; there are none when a program is instantiated. An
    exception becomes the program's error, one of `refusals` with its own words. The function must be kept alive.
    """

    @_HANDLER
    def handle(frame: int) -> int | None:
        words = _words(frame, _FRAME_WORDS)
        api = words[_API]
        if words[_EXTENSION] and _word(words[_EXTENSION], _EXTENSION_TYPE) & 0xFFFFFFFF == _METADATA:
            _describe(words[_EXTENSION], api)
            return None
        try:
            pointers: list[int] = []
            if words[_STAGE] & 0xFFFFFFFF == EXECUTE:
                buffers = _words(words[_ARGUMENTS], words[_NUM_ARGUMENTS])
                buffers += _words(words[_RESULTS], words[_NUM_RESULTS])
                pointers = [_memory[buffer // 8 + _BUFFER_DATA - 1] for buffer in buffers]
            text = ctypes.string_at(*_words(_word(words[_ATTRIBUTES], 0), 2))
            answer(text, pointers, lambda: _stream(api, words[_CONTEXT]))
        except BaseException as error:  # none may get past this function
            return _error(api, error, refusals)
        return None

    return handle


def _word(address: int, index: int) -> int:
    return _memory[address // 8 + index - 1]


def _words(address: int, count: int) -> list[int]:
    first = address // 8 - 1
    return _memory[first : first + count] if count else []


def _describe(extension: int, api: int) -> None:
    """Fill the metadata in: the version of the interface, which is XLA's own, and that graphs may capture calls."""
    metadata = _word(extension, _EXTENSION_METADATA)
    version = _word(api, _API_VERSION) if api else 1 << 32  # major and minor, 0 and 1
    ctypes.c_uint64.from_address(metadata + _METADATA_VERSION).value = version
    ctypes.c_uint32.from_address(metadata + _METADATA_TRAITS).value = _COMMAND_BUFFER_COMPATIBLE


def _function(prototype: Any, address: int) -> Any:
    function = _functions.get(address)
    if function is None:
        function = _functions[address] = prototype(address)
    return function


_asked = _StreamGet(ctypes.sizeof(_StreamGet), None, None, None)
"""One for all calls: whoever asks keeps the interpreter's lock until it has read the answer."""
_asked_pointer: Any = ctypes.pointer(_asked)


def _stream(api: int, context: int) -> int:
    _asked.context = context
    error = _function(_get_stream, _word(api, _API_STREAM_GET))(_asked_pointer)
    if error:
        raise RuntimeError("XLA has no stream for a call of cuflash")
    return _asked.stream or 0


def _error(api: int, error: BaseException, refusals: tuple[type, ...]) -> int:
    refused = isinstance(error, refusals)
    code = _INVALID_ARGUMENT if isinstance(error, ValueError) else _UNIMPLEMENTED if refused else _INTERNAL
    message = str(error) if refused else f"{type(error).__name__}: {error}"
    asked = _ErrorCreate(ctypes.sizeof(_ErrorCreate), None, message.encode(), code)
    return _function(_create_error, _word(api, _API_ERROR_CREATE))(ctypes.byref(asked))
