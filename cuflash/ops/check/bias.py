"""What is added to the scores: a tensor, ALiBi's slopes, and a sink beside them."""

from __future__ import annotations

from collections.abc import Mapping

from cuflash.arrays import View
from cuflash.dtypes import BY_NUMPY_NAME, DType
from cuflash.errors import InvalidArgument
from cuflash.numbers import flag
from cuflash.ops.call import Options
from cuflash.ops.check.array import check_alignment, check_like, check_pairs, check_rows, pair_strides


def bias_of(
    options: Options, views: Mapping[str, View], dtype: DType, scores: tuple[int, int, int, int]
) -> tuple[DType | None, tuple[bool, bool, bool, bool], bool]:
    """The members of Problem that speak of the additive tensor but for its gradient, in their order."""
    wants_gradient = flag("bias_grad", options.bias_grad)
    view = views.get("bias")
    if view is None:
        if wants_gradient:
            name = options.name("bias")
            raise InvalidArgument(f"bias_grad is True but {name} is None; pass the bias whose gradient is wanted.")
        return None, (False, False, False, False), True
    allowed = [dtype.numpy.name] + (["float32"] if dtype.numpy.name != "float32" else [])
    if view.dtype not in allowed:
        raise InvalidArgument(f"{view.name} is {view.dtype}; expected {' or '.join(allowed)}. Convert it.")
    check_pairs(view, scores)
    check_alignment(view)
    batch, head, row, column = pair_strides(view)
    expanded = [n > 1 and stride == 0 and not view.empty for n, stride in zip(view.shape, view.strides, strict=True)]
    if wants_gradient and any(expanded):
        raise InvalidArgument(
            f"{view.name} has shape {view.shape} with strides of {view.strides} bytes, and its gradient is wanted; "
            "expected size 1 along axes that are broadcast. Pass it before it is expanded."
        )
    outer = batch, head, row
    ascending = column in (0, 1) and all(stride >= 0 for stride in outer)
    boxes = ascending and not any(n % 16 for n in (view.pointer, *(stride * view.itemsize for stride in outer)))
    broadcast = [n == 1 or wide for n, wide in zip(view.shape, expanded, strict=True)]
    along_batch, along_heads, along_rows, along_keys = [True] * (4 - len(broadcast)) + broadcast
    return BY_NUMPY_NAME[view.dtype], (along_batch, along_heads, along_rows, along_keys), boxes


def check_sink(view: View, heads: int) -> None:
    """One logit for each query head."""
    check_like(view, (heads,), "float32")
    check_rows(view)


def check_alibi(view: View, batch: int, heads: int) -> None:
    """One slope for each query head, or for each of each batch element."""
    if view.shape not in ((heads,), (batch, heads)):
        raise InvalidArgument(
            f"{view.name} has shape {view.shape}; expected (heads_q,) or (b, heads_q), here ({heads},) or "
            f"({batch}, {heads})."
        )
    check_like(view, view.shape, "float32")
    check_rows(view)
