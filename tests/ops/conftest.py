"""Every backend there is, in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from backends import FAMILIES, PLACES, Backend, on_gpu
from doubles.arrays import as_torch, to_numpy
from host import run

from cuflash import device, jit


@pytest.fixture(params=PLACES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    family, _, place = request.param.partition("-on-the-")
    if family == "numpy":
        yield Backend(None, lambda x: x, lambda x: x)
    elif place == "cpu":
        launches = request.getfixturevalue("launches")
        if family == "sm90":
            monkeypatch.setattr(device, "current", lambda ordinal: device.named("h100"))
            monkeypatch.setattr(jit.tensormap, "encoder", run.encoder)
        yield Backend(FAMILIES[family], as_torch, to_numpy)
        assert {f"fwd_{family}", f"fwd_{family}_few"} & {*launches.kernels}
    else:
        yield Backend(FAMILIES[family], on_gpu, lambda x: x.get())
