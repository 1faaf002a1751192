"""One device's share of a call that is divided: attention of some rows, and its gradients, on arrays of any library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cuflash import ops
from cuflash.ops import Arrays, Options, new
from cuflash.parallel.division import Call, Division, Packs


def rows_of(x: Any, rows: Any) -> Any:
    """Rows of (b, s, h, d) or (total, h, d)."""
    return x[..., rows, :, :]


class Device:
    """The calls of one device.

    `xp` is the library's module of functions on whole arrays, and `starts` the whole sequences' `cu_seqlens` there.
    """

    def __init__(
        self, division: Division, options: Options, xp: Any, starts: Any = None, longest: int | None = None
    ) -> None:
        self.division, self._options, self._xp = division, options, xp
        self._longest = longest
        self._starts: dict[Packs, dict[str, Any]] = {}
        if starts is not None:
            places = division.schedule.places * division.schedule.devices
            chunks = (starts[1:] - starts[:-1]) // places
            for packs in division.packs:
                starts_q, starts_kv = (self._cumulated(chunks, pieces) for pieces in packs)
                self._starts[packs] = {"cu_seqlens_q": starts_q, "cu_seqlens_kv": starts_kv}

    def attend(self, call: Call, q: Any, kv: Sequence[Any]) -> tuple[Any, Any]:
        """(out, lse) of the call's rows; `kv` are the device's own keys and values, or received ones."""
        q, k, v = rows_of(q, call.q), *(rows_of(x, call.kv) for x in kv)
        options, starts = self._asked(call)
        if not self._is_one_of_packed(call):
            out, lse, *_ = ops.forward(options, new(Arrays, q=q, k=k, v=v, **starts))
            return out, lse
        out, lse, *_ = ops.forward(options, new(Arrays, q=q[None], k=k[None], v=v[None]))
        return out[0], lse[0]

    def gradients(
        self, call: Call, q: Any, kv: Sequence[Any], out: Any, lse: Any, dout: Any, dlse: Any
    ) -> tuple[Any, Any, Any]:
        """(dq, dk, dv) of the call's rows; `out` and `lse` are those of all keys of all devices."""
        q, out, dout = (rows_of(x, call.q) for x in (q, out, dout))
        k, v = (rows_of(x, call.kv) for x in kv)
        lse, dlse = (None if x is None else x[..., call.q] for x in (lse, dlse))
        options, starts = self._asked(call)
        if not self._is_one_of_packed(call):
            arrays = new(Arrays, q=q, k=k, v=v, dout=dout, lse=lse, dlse=dlse, out=out, **starts)
            return ops.backward(options, arrays)[:3]
        one = (None if x is None else x[None] for x in (q, k, v, dout, lse, dlse, out))
        q, k, v, dout, lse, dlse, out = one
        dq, dk, dv, *_ = ops.backward(options, new(Arrays, q=q, k=k, v=v, dout=dout, lse=lse, dlse=dlse, out=out))
        return dq[0], dk[0], dv[0]

    def _is_one_of_packed(self, call: Call) -> bool:
        """Whether the rows are those of one of several packed sequences."""
        return self.division.packed and call.packs is None

    def _asked(self, call: Call) -> tuple[Options, dict[str, Any]]:
        """The options of a call, and the arrays that say where packed sequences lie."""
        window = tuple(-1 if side is None else side for side in (call.left, call.right))
        changes: dict[str, Any] = {"causal": False, "window_size": window, "alignment": "top-left"}
        if call.packs is None:
            return self._options.replace(**changes), {}
        places = self.division.schedule.places * self.division.schedule.devices
        longest = None if self._longest is None else -(-self._longest // places)
        for name, pieces in (("max_seqlen_q", call.packs.q), ("max_seqlen_k", call.packs.kv)):
            changes[name] = None if longest is None else longest * max(pieces)
        return self._options.replace(**changes), self._starts[call.packs]

    def _cumulated(self, chunks: Any, pieces: tuple[int, ...]) -> Any:
        """Where sequences start that have so many chunks of each sequence."""
        xp = self._xp
        ends = xp.cumsum(xp.stack([chunks * n for n in pieces], axis=1).reshape(-1))
        return xp.concatenate([xp.zeros(1, np.int32), ends.astype(np.int32)])
