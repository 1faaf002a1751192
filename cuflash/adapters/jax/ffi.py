"""XLA's foreign calls by ctypes: call frames in, pointers and a stream out, errors back.

The layout of the structs is that of ``xla/ffi/api/c_api.h``, which jaxlib carries in ``jaxlib/include``; members are
only ever added to their ends.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)

_FRAME = struct.Struct("8xQQQi4x16xq8xQ16xq8xQ16xq16xQ")
"""XLA_FFI_CallFrame: extension, api, context and stage, then count and addresses of arguments, results, attributes."""
_METADATA = 1
"""XLA_FFI_Extension_Metadata."""
_COMMAND_BUFFER_COMPATIBLE = 1
_INVALID_ARGUMENT, _UNIMPLEMENTED, _INTERNAL = 3, 12, 13

# Offsets in bytes.
_EXTENSION_TYPE, _EXTENSION_METADATA = 8, 24
_METADATA_MAJOR, _METADATA_TRAITS = 24, 32
_API_MAJOR, _API_ERROR_CREATE, _API_STREAM_GET = 32, 48, 80
_BUFFER_DATA = 24

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


_create_error = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorCreate))
_get_stream = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_StreamGet))
_functions: dict[int, Any] = {}
"""XLA's functions by address."""


def handler(answer: Callable[[bytes, list[int], Callable[[], int]], None], refusals: tuple[type, ...]) -> Any:
    """The C function that has `answer` called with a call's text, its pointers, and what finds its stream.

    The pointers are those of the arguments, then of the results; there are none when a program is instantiated. An
    exception becomes the program's error, one of `refusals` with its own words. The function must be kept alive.
    """

    @_HANDLER
    def handle(frame: int) -> int | None:
        extension, api, context, stage, num_arguments, arguments, num_results, results, _, attributes = _FRAME.unpack(
            ctypes.string_at(frame, _FRAME.size)
        )
        if extension and _word(extension + _EXTENSION_TYPE) & 0xFFFFFFFF == _METADATA:
            _describe(extension, api)
            return None
        try:
            buffers = *_words(arguments, num_arguments), *_words(results, num_results)
            pointers = [_word(buffer + _BUFFER_DATA) for buffer in buffers] if stage == EXECUTE else []
            address, length = _words(_word(attributes), 2)
            answer(ctypes.string_at(address, length), pointers, lambda: _stream(api, context))
        except BaseException as error:  # none may get past this function
            return _error(api, error, refusals)
        return None

    return handle


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _words(address: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"{count}Q", ctypes.string_at(address, 8 * count)) if count else ()


def _describe(extension: int, api: int) -> None:
    """Fill the metadata in: the version of the interface, which is XLA's own, and that graphs may capture calls."""
    metadata = _word(extension + _EXTENSION_METADATA)
    version = ctypes.string_at(api + _API_MAJOR, 8) if api else struct.pack("2i", 0, 1)
    ctypes.memmove(metadata + _METADATA_MAJOR, version, 8)
    ctypes.c_uint32.from_address(metadata + _METADATA_TRAITS).value = _COMMAND_BUFFER_COMPATIBLE


def _function(prototype: Any, address: int) -> Any:
    function = _functions.get(address)
    if function is None:
        function = _functions[address] = prototype(address)
    return function


def _stream(api: int, context: int) -> int:
    asked = _StreamGet(ctypes.sizeof(_StreamGet), None, context, None)
    error = _function(_get_stream, _word(api + _API_STREAM_GET))(ctypes.byref(asked))
    if error:
        raise RuntimeError("XLA has no stream for a call of cuflash")
    return asked.stream or 0


def _error(api: int, error: BaseException, refusals: tuple[type, ...]) -> int:
    refused = isinstance(error, refusals)
    code = _INVALID_ARGUMENT if isinstance(error, ValueError) else _UNIMPLEMENTED if refused else _INTERNAL
    message = str(error) if refused else f"{type(error).__name__}: {error}"
    asked = _ErrorCreate(ctypes.sizeof(_ErrorCreate), None, message.encode(), code)
    return _function(_create_error, _word(api + _API_ERROR_CREATE))(ctypes.byref(asked))
