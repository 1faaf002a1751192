"""Arrays that torch.vmap maps, as those of one call with more heads."""

from __future__ import annotations

from typing import Any

from cuflash.errors import UnsupportedProblem
from cuflash.ops import Arrays, Options


class Folded:
    """Arrays of a mapped call as those of one call with as many more heads."""

    def __init__(self, size: int, options: Options, arrays: Arrays, dims: tuple[int | None, ...]) -> None:
        self._size, self._options, self._arrays = size, options, arrays
        self._dims = Arrays(*dims)
        varlen = arrays.cu_seqlens_q is not None
        self.heads, self.rows = options.axes(varlen).index("h"), options.row_axes(varlen).index("h")
        q, dim = arrays.q, self._dims.q
        shape = [n for axis, n in enumerate(q.shape) if dim is None or axis != dim % q.ndim]
        self._heads_q = shape[self.heads]
        axes = dict.fromkeys(("q", "k", "v", "dout", "out"), self.heads)
        self._axes = axes | dict.fromkeys(("lse", "dlse", "row_state"), self.rows) | {"sink": 0}

    def arrays(self) -> Arrays:
        """The arrays of the one call."""
        given = zip(Arrays._fields, self._arrays, self._dims, strict=True)
        return Arrays(*(None if x is None else self._folded(name, x, dim) for name, x, dim in given))

    def _folded(self, name: str, x: Any, dim: int | None) -> Any:
        if name in ("mask", "bias"):
            x, dim = self._pairs(name, x, dim)
            return x if dim is None else x.flatten(1, 2)
        axis = self._axes.get(name)
        if name == "alibi":
            axis = x.ndim - 1 if dim is None else x.ndim - 2
        if axis is None:
            if dim is not None:
                raise UnsupportedProblem(
                    f"{self._options.name(name)} is mapped by torch.vmap, and it belongs to a whole call. "
                    "Map over tensors alone, or pack the sequences."
                )
            return x
        if dim is None:
            x = x.unsqueeze(axis).expand(*x.shape[:axis], self._size, *x.shape[axis:])
        else:
            x = x.movedim(dim, axis)
        x = x.flatten(axis, axis + 1)
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

    def _pairs(self, name: str, x: Any, dim: int | None) -> tuple[Any, int | None]:
        """A tensor of pairs as (b, mapped, heads, rows, columns), and its mapped axis; as it is and None if it may."""
        gradient = name == "bias" and self._options.bias_grad
        if dim is None and not gradient and (x.ndim < 3 or x.shape[-3] == 1):
            return x, None
        x = x.movedim(dim, 0) if dim is not None else x.unsqueeze(0).expand(self._size, *x.shape)
        x = x.reshape(x.shape[0], *[1] * (5 - x.ndim), *x.shape[1:]).movedim(0, 1)
        x = x.expand(*x.shape[:2], self._heads_q, *x.shape[3:])
        return (x.contiguous() if gradient else x), 1

    def unfolded(self, x: Any, axis: int) -> Any:
        """A result of the one call, mapped along an axis in front of its heads."""
        return x.unflatten(axis, (self._size, -1))

    def bias_gradient(self, x: Any) -> Any:
        """The gradient of a bias, mapped along the first axis, summed over heads that shared it."""
        bias, dim = self._arrays.bias, self._dims.bias
        shape = [n for axis, n in enumerate(bias.shape) if dim is None or axis != dim % bias.ndim]
        x = x.unflatten(1, (self._size, -1)).movedim(1, 0)
        if len(shape) < 3 or shape[-3] == 1:
            x = x.sum(2, keepdim=True)
        return x.reshape(self._size, *shape)
