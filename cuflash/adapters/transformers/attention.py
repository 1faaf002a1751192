"""The attention of a model, as transformers calls it, and the name by which a model asks for it."""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from cuflash import ops
from cuflash.adapters.transformers.masks import build, rule_of
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.masks import Alignment
from cuflash.ops import Arrays, asked, new

NAME = "cuattention"
"""transformers takes every name with "flash" in it for a package of FlashAttention that it looks for."""

_TAKEN = ("flash", "sdpa", "flex", "eager", "paged", "/", "|")
"""What transformers gives a meaning of its own in names."""

_OF_THE_MODEL = {
    "position_ids", "position_embeddings", "cache_position", "use_cache", "output_hidden_states", "return_dict",
    "output_router_logits", "num_items_in_batch", "logits_to_keep",
}  # fmt: skip
"""Arguments of a model's forward that reach its attention and say nothing that is not in the tensors and the mask."""


def register(name: str = NAME) -> str:
    """Let models of Hugging Face's transformers attend by cuflash, on the CPU and on CUDA devices.

    A model then takes it by name, like any other, in inference and in training::

        name = cuflash.adapters.transformers.register()
        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=name)
        model.set_attn_implementation(name)  # or one that exists

    With it goes the builder of its masks: without one transformers would hide from attention which tokens are padding.
    Padded batches and windows go by the lengths and the window rather than by the mask where that says no more. Fewer
    key heads than query heads are read as they are. Soft caps, sinks (``s_aux``), dropout and additive biases of
    positions are served, with gradients; a query that sees no key has output 0.

    Parameters
    ----------
    name : str
        What models are to call it. May hold none of the words to which transformers gives a meaning: "flash", "sdpa",
        "flex", "eager", "paged", "/" and "|".

    Returns
    -------
    str
        The name.

    Raises
    ------
    InvalidArgument
        If the name is not one that transformers would leave alone. From a model: if a layer gives its attention what
        is not served, by name, such as ``output_attentions=True``, ``cu_seq_lens_q`` or a cache in pages.
    """
    if not isinstance(name, str) or not name or any(word in name for word in _TAKEN):
        raise InvalidArgument(
            f"name is {name!r}; expected a string without {', '.join(map(repr, _TAKEN))}, "
            f"which transformers gives a meaning of its own. {NAME!r} is one."
        )
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, build)
    return name


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    **others: Any,
) -> tuple[Any, None]:
    """Attention of one layer, as transformers' ``AttentionInterface`` has it.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, asked for `is_causal` where the argument is None.
    query : torch.Tensor, (b, heads_q, len_q, dim_qk)
        In any type of `cuflash.flash_attn_func`.
    key : torch.Tensor, (b, heads_kv, len_kv, dim_qk)
        Keys; heads_q must be a multiple of heads_kv.
    value : torch.Tensor, (b, heads_kv, len_kv, dim_v)
        Values.
    attention_mask : torch.Tensor, optional
        Broadcasts to (b, heads_q, len_q, len_kv). bool: True where a query and a key take part. Numbers: added to the
        scores. It says all about who sees whom, whatever `is_causal` and `sliding_window` are.
    dropout : float
        Chance with which a probability is dropped; layers give 0 outside training.
    scaling : float, optional
        Factor of ``query @ key.T``; ``dim_qk ** -0.5`` by default.
    sliding_window : int, optional
        Without a mask: a query sees less than so many keys before its own, and after it, if not causal.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``.
    is_causal : bool, optional
        Without a mask: query ``i`` sees keys 0 to ``i``; a single query, all keys.
    s_aux : torch.Tensor, (heads_q,), optional
        Logits that take part in the softmax and have no value.
    position_bias : torch.Tensor, optional
        Broadcasts to (b, heads_q, len_q, len_kv); added to the scores.
    **others
        Those that say nothing of attention.

    Returns
    -------
    out : torch.Tensor, (b, len_q, heads_q, dim_v)
        In the dtype of query.
    weights : None
        Probabilities are never stored.

    Raises
    ------
    InvalidArgument
        If an argument is wrong, or is one that is not served; nothing has been launched then.
    UnsupportedProblem
        If no kernel runs this on the device.
    """
    try:
        _refuse(others)
        rule = None if attention_mask is None else rule_of(attention_mask)
        window_size, mask = (-1, -1), attention_mask
        alignment: Alignment = "bottom-right"
        if rule is not None:
            window_size, alignment, mask = rule.window_size, rule.alignment, rule.keys
        elif attention_mask is None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            reach = -1 if sliding_window is None else sliding_window - 1
            window_size = (reach, 0 if causal else reach)
            # Several queries without a mask start where the keys do, and a single one is the last.
            alignment = "bottom-right" if query.shape[2] == 1 else "top-left"
        bias = position_bias
        if mask is not None and mask.dtype.is_floating_point:
            bias, mask = mask if bias is None else bias + mask, None
        options = asked(
            softmax_scale=scaling, window_size=window_size, alignment=alignment, dropout_p=dropout,
            softcap=0.0 if softcap is None else softcap,
        )  # fmt: skip
        q, k, v = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (query, key, value))
        sink = None if s_aux is None else s_aux.float()
        return ops.forward(options, new(Arrays, q=q, k=k, v=v, mask=mask, bias=bias, sink=sink), None)[0], None
    except REFUSALS as error:
        shorten(error)
        raise


def _refuse(others: dict[str, Any]) -> None:
    """Raise for the first argument that asks attention for something."""
    for name, given in others.items():
        if name not in _OF_THE_MODEL and given is not None and given is not False:
            advice = "give the model another attn_implementation, such as 'eager'"
            if name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"):
                advice = "leave it out and give position_ids that start again with each packed sequence"
            raise InvalidArgument(f"{name} is not served by this attention; expected none: {advice}.")
