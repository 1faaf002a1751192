"""What PyTorch's explicit functions share: forward and backward with everything in and out said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cuflash import ops
from cuflash.api.padding import extended, longest, padded, sequences_of, unpadded
from cuflash.api.probabilities import check_drawn, random_values, signed_probabilities
from cuflash.api.pytorch import backend
from cuflash.arrays import Guest, Library, framework_in_memory, framework_of
from cuflash.errors import InvalidArgument
from cuflash.generator import PhiloxGenerator
from cuflash.numbers import flag, integer, is_array, shown
from cuflash.ops import Arrays, Options, check, overlap


@dataclass(frozen=True, slots=True)
class Convention:
    """How a version of PyTorch lays results out, and what it does without."""

    lacks: tuple[str, ...] = ()
    """Arguments that its functions do not have."""
    padded: bool = True
    """Row-wise results of packed sequences are (b, h, max_seqlen_q) instead of (h, total_q)."""
    scalars: bool = True
    """Seed and offset are two int64 numbers instead of one pair of uint64."""
    multiple: int = 1
    """What lengths of probabilities and row sums are rounded up to."""


CONVENTIONS = {
    "current": Convention(padded=False, scalars=False, multiple=128),
    "legacy": Convention(("softcap", "block_table_"), multiple=128),
    "rocm": Convention(),
    "aotriton": Convention(("softcap",)),
}
CK = Convention()

GAP = 128
"""Columns between the row sums of two packed sequences: the longest tile of PyTorch's kernels."""


class Forward(NamedTuple):
    """What the functions return, in this order."""

    out: Any
    q: Any
    k: Any
    v: Any
    lse: Any
    seed: Any
    offset: Any
    probabilities: Any


class Backward(NamedTuple):
    """What the functions return, in this order; those without a bias leave out the last."""

    dq: Any
    dk: Any
    dv: Any
    softmax_d: Any
    dbias: Any


def window(left: int | None, right: int | None) -> tuple[int, int]:
    """Both sides of a window, of which None and every negative number are unbounded."""
    sides = []
    for name, side in (("window_size_left", left), ("window_size_right", right)):
        number = -1 if side is None else integer(side)
        if number is None:
            raise InvalidArgument(f"{name} is {shown(side)}; expected an integer, or None or -1 for unbounded.")
        sides.append(max(number, -1))
    return sides[0], sides[1]


def require(**arrays: Any) -> None:
    """Refuse None for arrays that make a call what it is."""
    for name, x in arrays.items():
        if x is None:
            raise InvalidArgument(f"{name} is None; expected an array.")


def dense_lengths(options: Options, q: Any, k: Any) -> Options:
    """Check longest lengths of dense tensors, which are their lengths, and drop them."""
    for name, x in (("max_seqlen_q", q), ("max_seqlen_k", k)):
        length = getattr(options, name)
        shape: tuple[int, ...] = getattr(x, "shape", ())
        if length is not None and len(shape) == 4 and integer(length) != shape[1]:
            raise InvalidArgument(f"{name} is {shown(length)} but the tensor has {shape[1]} rows; pass that, or None.")
    return options.replace(max_seqlen_q=None, max_seqlen_k=None)


@contextmanager
def drawing_from(generator: Any) -> Iterator[Any]:
    """What ops draw from; a generator of torch moves on by what they drew."""
    if generator is None or isinstance(generator, PhiloxGenerator | tuple) or not hasattr(generator, "get_state"):
        yield generator
        return
    state = generator.get_state()
    stand_in = PhiloxGenerator.from_torch_state(state)
    yield stand_in
    moved = state.clone()
    moved.numpy()[:] = np.frombuffer(stand_in.torch_state(), np.uint8)
    generator.set_state(moved)


def library_of(name: str, x: Any) -> Library:
    """The library of an array, which is one of those whose arrays these functions take."""
    framework = framework_in_memory([name], [x])
    if isinstance(framework, Guest):
        raise InvalidArgument(
            f"{name} is a {framework.name} array; this function takes NumPy, CuPy and torch arrays. "
            "Pass cupy.from_dlpack of it, or call flash_attn_func."
        )
    return framework


def forward(
    convention: Convention,
    options: Options,
    choice: str | None,
    arrays: Arrays,
    generator: Any,
    return_softmax: bool,
    zero_tensors: bool = False,
    random: bool = False,
) -> Forward:
    """Run the forward and lay its results out."""
    q, k, v, starts_q = arrays.q, arrays.k, arrays.v, arrays.cu_seqlens_q
    library = library_of(options.name("q"), q)
    if flag("return_softmax", return_softmax):
        if arrays.table is not None:
            raise InvalidArgument(
                "return_softmax is True and block_table_ is given; probabilities of keys in pages are not returned. "
                "Gather the pages into packed k and v."
            )
        check_drawn(library, options)
    tail_lse = -np.inf if flag("zero_tensors", zero_tensors) else np.inf
    options = options.replace(empty_lse=np.inf, tail_lse=tail_lse)
    with drawing_from(generator) as source:
        out, lse, *drawn = backend.call(ops.forward, options, choice, arrays, source)
    rng_state = drawn[0] if drawn else None

    padded_lse = starts_q is not None and convention.padded
    if starts_q is not None and (padded_lse or return_softmax):
        lengths = longest(starts_q, options.max_seqlen_q), longest(arrays.cu_seqlens_kv, options.max_seqlen_k)
        options = options.replace(max_seqlen_q=lengths[0], max_seqlen_k=lengths[1])
        if padded_lse:
            with library.arithmetic(q):
                lse = padded(library, lse, starts_q, lengths[0], tail_lse)
    if return_softmax:
        with library.arithmetic(q):
            probabilities = signed_probabilities(
                library, _preferred(choice), options.replace(validate=False), rng_state, convention.multiple,
                arrays._replace(out=None),
            )  # fmt: skip
            probabilities = random_values(library, probabilities) if random else probabilities
    else:
        probabilities = library.full((0,), 0, library.xp.uint8 if random else q.dtype, q)
    return Forward(out, q, k, v, lse, *_state(library, convention, rng_state, q), probabilities)


def _preferred(choice: str | None) -> Callable[..., tuple[Any, ...]]:
    """`ops.forward` on the kernels that are preferred."""
    return lambda options, *arguments: backend.call(ops.forward, options, choice, *arguments)


def backward(convention: Convention, options: Options, choice: str | None, arrays: Arrays, **keywords: Any) -> Backward:
    """Run the backward and lay its results out; `keywords` are those of `gradients`."""
    results = gradients(convention, options.replace(keep_delta=True), choice, arrays, **keywords)
    library, starts_q = library_of(options.name("q"), arrays.q), arrays.cu_seqlens_q
    softmax_d = results.softmax_d
    with library.arithmetic(softmax_d):
        if options.dropout_p:
            softmax_d *= 1 - float(options.dropout_p)
        if starts_q is None:
            softmax_d = extended(library, softmax_d, _rounded(softmax_d.shape[-1], convention), 0.0)
        elif convention.padded:
            length = _rounded(longest(starts_q, options.max_seqlen_q), convention)
            softmax_d = padded(library, softmax_d, starts_q, length, 0.0)
        else:
            softmax_d = _spaced(library, softmax_d, starts_q)
    return results._replace(softmax_d=softmax_d)


def _rounded(length: int, convention: Convention) -> int:
    """A length of row sums."""
    return length + -length % convention.multiple


def _spaced(library: Library, sums: Any, starts_q: Any) -> Any:
    """(h, total) to (h, total + GAP * b), sequence e starting at column starts_q[e] + GAP * e; zeros between."""
    heads, total = sums.shape
    spaced = library.full((heads, total + GAP * (len(starts_q) - 1)), 0, sums.dtype, sums)
    rows = library.arange(total, sums)
    spaced[:, rows + GAP * sequences_of(library, starts_q, rows)] = sums
    return spaced


def gradients(
    convention: Convention,
    options: Options,
    choice: str | None,
    arrays: Arrays,
    *,
    philox_seed: Any,
    philox_offset: Any,
    grad_bias: Any = None,
    bias_requires_grad: bool = False,
    zero_tensors: bool = False,
) -> Backward:
    """Run the backward of arrays with the convention's lse.

    If the options keep delta it is the result's softmax_d, None otherwise.
    """
    library, q, bias = library_of(options.name("q"), arrays.q), arrays.q, arrays.bias
    framework_of([*options.manner.names, "grad_bias"], [*arrays, grad_bias])
    flag("zero_tensors", zero_tensors)
    if flag("bias_requires_grad", bias_requires_grad):
        arrays = arrays._replace(bias=_differentiated(options, bias))
        options = options.replace(bias_grad=True)
        if grad_bias is not None:
            _check_grad_bias(library, options, arrays, grad_bias)
    elif grad_bias is not None:
        raise InvalidArgument("grad_bias is given but bias_requires_grad is False; pass True to have it filled.")
    with library.arithmetic(q):
        if check.dropout_of(options):
            arrays = arrays._replace(rng_state=_rng_state(library, options, philox_seed, philox_offset, q))
        if convention.padded and arrays.cu_seqlens_q is not None:
            arrays = arrays._replace(lse=_without_padding(library, options, arrays))
        results = backend.call(ops.backward, options, choice, arrays)
        gradients, delta = results if options.keep_delta else (results, None)
        dbias = _stored(library, gradients[3], bias.dtype, grad_bias) if options.bias_grad else None
    dq, dk, dv = gradients[:3]
    return Backward(dq, dk, dv, delta, dbias)


def _differentiated(options: Options, bias: Any) -> Any:
    """The bias whose gradient is computed; one that is expanded gives way to what it was expanded from."""
    name = options.name("bias")
    if bias is None:
        raise InvalidArgument(f"bias_requires_grad is True but {name} is None; pass the bias whose gradient is wanted.")
    strides = bias.stride() if callable(getattr(bias, "stride", None)) else bias.strides
    sizes = zip(bias.shape, strides, strict=True)
    return bias[tuple(slice(0, 1) if n > 1 and stride == 0 else slice(None) for n, stride in sizes)]


def _check_grad_bias(library: Library, options: Options, arrays: Arrays, grad_bias: Any) -> None:
    """The caller's array for the gradient of the bias is an output like the others."""
    views = options.views(library, arrays) | {"grad_bias": library.view("grad_bias", grad_bias)}
    check.check_output(views["grad_bias"], views["bias"])
    num_outputs = 1 + sum(x is not None for x in arrays.outputs("backward"))
    overlap.check_separate([*map(overlap.extent, views.values())], [x.pointer for x in views.values()], num_outputs)


def _stored(library: Library, dbias: Any, dtype: Any, grad_bias: Any) -> Any:
    """The gradient of the bias in the dtype of the bias, in the caller's array if there is one."""
    if grad_bias is None:
        return library.cast(dbias, dtype)
    grad_bias[...] = library.cast(dbias, grad_bias.dtype)
    return grad_bias


def _rng_state(library: Library, options: Options, philox_seed: Any, philox_offset: Any, beside: Any) -> Any:
    """Seed and offset as `ops.backward` takes them: of a pair, of two numbers, or of two arrays of one number."""
    if philox_seed is None:
        raise InvalidArgument(
            f"philox_seed is None but {options.name('dropout_p')} is {options.dropout_p}; "
            "pass what the forward returned."
        )
    if is_array(philox_seed) and np.prod(philox_seed.shape) == 2:
        if philox_offset is not None and tuple(getattr(philox_offset, "shape", (0,))) != ():
            raise InvalidArgument(
                "philox_seed holds seed and offset, and philox_offset has dimensions; "
                "expected None or the placeholder that the forward returned."
            )
        return philox_seed
    if philox_offset is None:
        raise InvalidArgument("philox_offset is None and philox_seed is one number; pass what the forward returned.")
    halves = {"philox_seed": philox_seed, "philox_offset": philox_offset}
    if all(is_array(x) and "cpu" not in str(getattr(x, "device", "cpu")) for x in halves.values()):
        for name, x in halves.items():
            dtype = library.view(name, x).dtype
            if dtype not in ("int64", "uint64") or np.prod(x.shape) != 1:
                raise InvalidArgument(f"{name} is {dtype} of shape {tuple(x.shape)}; expected one int64.")
        return library.xp.concatenate([library.cast(x.reshape(1), library.xp.int64) for x in halves.values()])
    numbers = [_number(name, x) % 2**64 for name, x in halves.items()]
    return library.moved(np.array(numbers, np.uint64).view(np.int64), beside)


def _number(name: str, x: Any) -> int:
    """One number of the random state, in host memory."""
    number = integer(x.item() if is_array(x) and np.prod(x.shape) == 1 else x)
    if number is None:
        raise InvalidArgument(f"{name} is {shown(x)}; expected what the forward returned.")
    return number


def scalars(library: Library, state: Any, beside: Any) -> tuple[Any, Any]:
    """Seed and offset, int64 without dimensions; empty without dropout."""
    if state is None:
        seed, offset = (library.full((0,), 0, library.xp.int64, beside) for _ in range(2))
        return seed, offset
    numbers = state.view(library.xp.int64)
    return numbers[0:1].reshape(()), numbers[1:2].reshape(())


def _state(library: Library, convention: Convention, state: Any, beside: Any) -> tuple[Any, Any]:
    """The two results that hold the random state."""
    if convention.scalars:
        return scalars(library, state, beside)
    zeros = library.full((3 if state is None else 1,), 0, library.xp.int64, beside).view(library.xp.uint64)
    return zeros[:2] if state is None else state, zeros[-1:].reshape(())


def _without_padding(library: Library, options: Options, arrays: Arrays) -> Any:
    """A log-sum-exp that is padded to (b, h, at least max_seqlen_q), without its padding."""
    name, lse, starts_q, q = options.name("lse"), arrays.lse, arrays.cu_seqlens_q, arrays.q
    if lse is None:
        raise InvalidArgument(f"{name} is None; expected an array.")
    starts = library.view(options.name("cu_seqlens_q"), starts_q)
    if len(q.shape) != 3 or len(starts.shape) != 1 or starts.dtype != "int32":
        return lse  # what is wrong with those is said where all arrays are checked
    dtype = library.view(name, lse).dtype
    if dtype not in ("float32", "float64"):
        raise InvalidArgument(f"{name} is {dtype}; expected float32, or float64 for float64 tensors.")
    heads, length = q.shape[-2], longest(starts_q, options.max_seqlen_q)
    shape = tuple(lse.shape)
    if len(shape) != 3 or shape[:2] != (len(starts_q) - 1, heads) or shape[2] < length:
        raise InvalidArgument(
            f"{name} has shape {shape}; expected (b, heads_q, max_seqlen_q) = {(len(starts_q) - 1, heads, length)}."
        )
    return unpadded(library, lse, starts_q, q.shape[0])
