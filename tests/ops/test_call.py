"""What a call consists of: the names of its arrays, and that each door puts every argument where its name says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import jit, ops
from cuflash.ops.call import OUTPUTS, VOCABULARIES, Arrays, asked, new


def test_arrays_have_the_names_of_the_parameters() -> None:
    structs = ("FwdParams", "BwdParams", "Attention", "Pages", "Append")
    assert set(Arrays._fields) - {"captured"} <= {
        name for struct in structs for name in jit.params.members(jit.params.dtype(struct))
    }


def test_outputs_are_the_last_of_each_direction() -> None:
    arrays = Arrays(*range(len(Arrays._fields)))
    for direction, names in OUTPUTS.items():
        assert arrays.outputs(direction) == tuple(getattr(arrays, name) for name in names)
    assert Arrays._fields[-5:-1] == OUTPUTS["forward"] + OUTPUTS["backward"]


def test_arrays_are_the_same_made_fast() -> None:
    values = {name: object() for name in Arrays._fields}
    assert new(Arrays, **values) == Arrays(**values) and type(new(Arrays, **values)) is Arrays
    assert Arrays(1, 2, 3, lse=4).by_name() == {"q": 1, "k": 2, "v": 3, "lse": 4}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_vocabularies_rename_what_there_is(vocabulary: str) -> None:
    words, options = VOCABULARIES[vocabulary], asked(vocabulary=vocabulary)
    assert words.keys() <= {*Arrays._fields, *asked().values()}
    assert options.manner.names == tuple(options.name(name) for name in Arrays._fields)


DOORS: dict[Callable[..., Any], tuple[str, str]] = {
    cuflash.flash_attn_func: ("out", "flash"),
    cuflash.flash_attn_varlen_func: ("out", "flash"),
    cuflash.flash_attn_backward: ("backward", "flash"),
    cuflash.flash_attn_vjp: ("vjp", "flash"),
    cuflash.explain: ("explain", "flash"),
    cuflash.scaled_dot_product_attention: ("out", "sdpa"),
    cuflash.flex_attention: ("forward", "sdpa"),
    cuflash.mha_fwd: ("forward", "mha_fwd"),
    cuflash.mha_varlen_fwd: ("forward", "mha_fwd"),
    cuflash.mha_fwd_ck: ("forward", "mha_fwd"),
    cuflash.mha_varlen_fwd_ck: ("forward", "mha_fwd"),
    cuflash.mha_bwd: ("backward", "mha_bwd"),
    cuflash.mha_varlen_bwd: ("backward", "mha_bwd"),
    cuflash.mha_bwd_ck: ("backward", "mha_bwd"),
    cuflash.mha_varlen_bwd_ck: ("backward", "mha_bwd"),
    cuflash.mem_eff_forward: ("forward", "mem_eff_forward"),
    cuflash.mem_eff_backward: ("backward", "mem_eff_backward"),
}
SETTINGS = {
    "softmax_scale": 0.5, "causal": True, "softcap": 2.0, "dropout_p": 0.0, "max_seqlen_q": 5, "max_seqlen_k": 6,
    "deterministic": True, "validate": True, "num_splits": 3, "alignment": "top-left", "unbiased_dropout": True,
    "dropout_scheme": "word", "window_size": (4, 2), "enable_gqa": True, "bias_grad": True,
}  # fmt: skip


class Asked(Exception):
    """Raised where the floor below would begin."""


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_argument_arrives_where_its_name_says(door: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    operation, vocabulary = DOORS[door]

    def caught(options: ops.Options, arrays: Arrays, *_: Any) -> None:
        raise Asked(options, arrays)

    monkeypatch.setattr(ops, operation, caught)
    names = set(inspect.signature(door).parameters)
    fields = {VOCABULARIES[vocabulary].get(name, name): name for name in Arrays._fields}
    # A boolean mask and an additive one share an argument of PyTorch's.
    sent = {word: np.zeros((1, 2, 2, 16), np.float32) for word in fields.keys() & names - {"philox_seed"}}
    words = {VOCABULARIES[vocabulary].get(name, name): name for name in SETTINGS}
    settings = {word: SETTINGS[words[word]] for word in words.keys() & names}
    with pytest.raises(Asked) as raised:
        door(**sent, **settings, **{name: None for name in ("philox_seed", "philox_offset") if name in names})
    options, arrays = raised.value.args
    expected = {fields[word]: x for word, x in sent.items()}
    held = arrays.by_name()
    assert held.keys() == expected.keys() and all(held[name] is x for name, x in expected.items())
    assert options.manner.vocabulary == vocabulary and options.manner.layout == (
        "bhsd" if vocabulary == "sdpa" else "bshd"
    )
    assert {words[word]: options.values()[words[word]] for word in settings} == {
        words[word]: value for word, value in settings.items()
    }
