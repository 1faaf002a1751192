"""Models of transformers that attend by cuflash, made from configs, beside PyTorch's attention or the eager one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import cuflash
from cuflash.errors import InvalidArgument

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from cuflash.adapters.transformers import attention as adapter  # noqa: E402
from cuflash.adapters.transformers import masks, register  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function:UserWarning"),
]

SIZES = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**others: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **others))


def mistral(**others: Any) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=4, **others))


def bert(**others: Any) -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **others))


def gemma(**others: Any) -> Any:
    """Soft caps, and windows in every other layer."""
    config = transformers.Gemma2Config(
        **GROUPED, sliding_window=4, attn_logit_softcapping=0.5, query_pre_attn_scalar=12, **others
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss(**others: Any) -> Any:
    """Sinks, and windows in every other layer."""
    config = transformers.GptOssConfig(
        **GROUPED, sliding_window=4, num_local_experts=2, num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **others,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def batch(padding: str, length: int = 11) -> tuple[Any, Any]:
    """Ids of three sequences, and which are of no padding."""
    ids = torch.randint(3, 61, (3, length))
    real = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 7)):
        if padding == "left":
            real[row, :pad] = 0
        elif padding == "right":
            real[row, length - pad :] = 0
    return ids, real


def learned(model: Any, implementation: str, ids: Any, real: Any, **others: Any) -> list[Any]:
    """Logits where there is no padding, and the gradient of every weight."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(ids, **{"attention_mask": real} | others).logits[real.bool()]
    loss = torch.nn.functional.cross_entropy(logits, ids[real.bool()])
    loss.backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def apart(computed: list[Any], expected: list[Any]) -> float:
    """The largest difference of two tensors beside the largest number of all gradients, or of the logits."""
    assert len(computed) == len(expected) > 5
    scales = [expected[0].abs().max(), *[max(x.abs().max() for x in expected[1:])] * (len(expected) - 1)]
    return max(float((x - y).abs().max() / s) for x, y, s in zip(computed, expected, scales, strict=True))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("make", "beside"),
    [(llama, "sdpa"), (mistral, "sdpa"), (bert, "sdpa"), (gemma, "eager"), (gpt_oss, "eager")],
)
def test_a_model_learns_what_it_learns_without(make: Callable[[], Any], beside: str, padding: str) -> None:
    model, (ids, real) = make().eval(), batch(padding)
    expected = learned(model, beside, ids, real)
    assert apart(learned(model, register(), ids, real), expected) < 1e-6
    if padding != "none":
        assert apart(learned(model, register(), ids, torch.ones_like(real))[1:], expected[1:]) > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("make", [llama, bert])
def test_a_model_on_a_gpu_is_as_exact_as_without(make: Callable[[], Any], padding: str) -> None:
    """Beside PyTorch's attention in the same 16 bits, by the errors of both: they round at other places."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    model, (ids, real) = make().eval().cuda(), [x.cuda() for x in batch(padding)]
    exact = learned(model.double(), "sdpa", ids, real)
    model.bfloat16()
    computed, peer = ([x.double() for x in learned(model, name, ids, real)] for name in (register(), "sdpa"))
    error, error_of_peer = apart(computed, exact), apart(peer, exact)
    assert error <= 1.5 * error_of_peer < 0.1, f"{error:.1e}, beside {error_of_peer:.1e} of PyTorch"


def t5(**others: Any) -> Any:
    """Biases of positions, an encoder, a decoder, and attention between them."""
    config = transformers.T5Config(
        vocab_size=61, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **others
    )
    return transformers.T5ForConditionalGeneration(config)


def modern_bert(**others: Any) -> Any:
    """Windows on both sides."""
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    config = transformers.ModernBertConfig(**SIZES, pad_token_id=0, local_attention=4, **dict.fromkeys(names, 1))
    return transformers.ModernBertForMaskedLM(config)


def llama4(**others: Any) -> Any:
    """Chunks, for which no rule stands."""
    config = transformers.Llama4TextConfig(
        **GROUPED, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=64, **others
    )
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("make", [t5, modern_bert, llama4])
def test_a_model_of_another_kind_says_what_it_says_without(make, padding):
    model, (ids, real) = make().eval(), batch(padding)
    others = {"decoder_input_ids": ids} if make is t5 else {}
    rows = ... if make is t5 else real.bool()
    logits = []
    for implementation in ("sdpa", register()):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        computed = model(input_ids=ids, attention_mask=real, **others).logits[rows]
        computed.square().sum().backward()
        logits.append([computed.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert apart(logits[1], logits[0]) < 1e-5


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("make", [llama, mistral, bert])
def test_the_mask_itself_says_what_its_rule_says(make, padding, monkeypatch):
    model, (ids, real) = make().eval(), batch(padding)
    rules = []
    monkeypatch.setattr(adapter, "rule_of", lambda mask: rules.append(masks.rule_of(mask)) or rules[-1])
    expected = learned(model, register(), ids, real)
    assert rules and all(rule is not None and rule.keys.shape == (3, 1, 1, 11) for rule in rules)
    monkeypatch.setattr(adapter, "rule_of", lambda mask: None)
    assert apart(learned(model, register(), ids, real), expected) < 1e-6


def test_a_mask_that_a_model_writes_to_is_gone_by():
    mask = masks.build(batch_size=1, q_length=5, kv_length=5, allow_is_causal_skip=False)
    assert masks.rule_of(mask).window_size == (-1, 0)
    mask = mask.clone()
    assert masks.rule_of(mask) is None
    mask = masks.build(batch_size=1, q_length=5, kv_length=5, allow_is_causal_skip=False)
    mask[:, :, 3, 1] = False
    assert masks.rule_of(mask) is None


def test_functions_that_say_more_have_no_rule():
    from transformers import masking_utils

    plain = masking_utils.causal_mask_function
    more = masking_utils.and_masks(plain, lambda b, h, i, j: (i + j) % 3 > 0)
    chunks = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=int))
    for function in (more, chunks, masking_utils.sliding_window_causal_mask_function(3)):
        mask = masks.build(
            batch_size=1, q_length=6, kv_length=6, mask_function=function, local_size=4, allow_is_causal_skip=False
        )
        assert masks.rule_of(mask) is None


@pytest.mark.parametrize("q_offset", [0, 3, 6])
@pytest.mark.parametrize("kind", ["causal", "window", "both sides"])
def test_a_rule_makes_the_mask_it_stands_for(kind, q_offset):
    from transformers import masking_utils

    function = {
        "causal": masking_utils.causal_mask_function,
        "window": masking_utils.sliding_window_causal_mask_function(3),
        "both sides": masking_utils.sliding_window_bidirectional_mask_function(3),
    }[kind]
    real = torch.rand(2, 11) > 0.3
    mask = masks.build(
        batch_size=2, q_length=5, kv_length=11, q_offset=q_offset, mask_function=function, attention_mask=real,
        local_size=3, allow_is_causal_skip=False,
    )  # fmt: skip
    rule = masks.rule_of(mask)
    if q_offset == 3:  # neither aligned with the first key nor with the last
        assert rule is None
        return
    (left, right), last = rule.window_size, rule.alignment == "bottom-right"
    i, j = torch.arange(5)[:, None] + (6 if last else 0), torch.arange(11)
    seen = torch.ones(5, 11, dtype=torch.bool)
    seen &= (j >= i - left) if left >= 0 else True
    seen &= (j <= i + right) if right >= 0 else True
    assert torch.equal(seen & rule.keys, mask)


@pytest.mark.parametrize("kind", [None, "static"])
@pytest.mark.parametrize("make", [llama, mistral])
def test_a_cache_grows_as_it_does_without(make, kind):
    model, (ids, real) = make().eval(), batch("left")
    words = {}
    for implementation in ("sdpa", register()):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            words[implementation] = model.generate(
                ids, attention_mask=real, max_new_tokens=9, do_sample=False, output_logits=True,
                return_dict_in_generate=True, cache_implementation=kind, disable_compile=True,
            )  # fmt: skip
    theirs, ours = words.values()
    assert torch.equal(ours.sequences, theirs.sequences)
    for x, y in zip(ours.logits, theirs.logits, strict=True):
        assert (x - y).abs().max() < 1e-5 * y.abs().max()


@pytest.mark.parametrize("make", [llama, mistral, gemma])
def test_packed_sequences_do_not_see_each_other(make):
    model, (ids, real) = make().eval(), batch("none")
    packed = {"position_ids": torch.tensor([[*range(5), *range(6)]] * 3), "use_cache": False}
    expected = learned(model, "eager" if make is gemma else "sdpa", ids, real, attention_mask=None, **packed)
    assert apart(computed := learned(model, register(), ids, real, attention_mask=None, **packed), expected) < 1e-6
    assert apart(learned(model, register(), ids, real, attention_mask=None, use_cache=False), expected) > 1e-3
    alone = model(ids[:, 5:], use_cache=False).logits
    assert (computed[0].unflatten(0, (3, 11))[:, 5:] - alone).abs().max() < 1e-6 * alone.abs().max()


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_checkpointed_model_learns_the_same(padding):
    model, (ids, real) = llama(), batch(padding)
    expected = learned(model, "sdpa", ids, real)
    model.gradient_checkpointing_enable()
    assert apart(learned(model, register(), ids, real, use_cache=False), expected) < 1e-6


@pytest.mark.parametrize("make", [llama, bert])
def test_a_compiled_model_says_the_same(make):
    model, (ids, real) = make().eval(), batch("left")
    model.set_attn_implementation(register())
    expected = model(ids, attention_mask=real).logits[real.bool()]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    others = {"use_cache": False} if make is llama else {}
    computed = compiled(ids, attention_mask=real, **others).logits[real.bool()]
    assert (computed - expected).abs().max() < 1e-5 * expected.abs().max()


def test_dropout_drops_and_a_seed_repeats_it():
    model, (ids, real) = llama(attention_dropout=0.5).train(), batch("left")
    model.set_attn_implementation(register())
    logits = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        logits.append(model(ids, attention_mask=real).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_biases_of_positions_and_masks_of_numbers_are_added():
    q, k, v = (torch.randn(2, heads, 6, 8, requires_grad=True) for heads in (4, 2, 2))
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    hidden = torch.zeros(2, 1, 6, 6).masked_fill(torch.rand(2, 1, 6, 6) > 0.7, -1e9)
    for mask, causal in ((None, True), (None, False), (hidden, True)):
        out, weights = adapter.attention(torch.nn.Module(), q, k, v, mask, is_causal=causal, position_bias=bias)
        added = bias if mask is None else bias + mask
        if mask is None and causal:
            added = added.masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, added, enable_gqa=True).transpose(1, 2)
        assert weights is None
        assert torch.allclose(out, expected, atol=1e-5)
        for x, y in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v, bias)) for o in (out, expected)),
                        strict=True):  # fmt: skip
            assert torch.allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("len_q", [1, 7])
def test_a_window_without_a_mask_is_kept(len_q, causal):
    q, k, v = (torch.randn(1, 2, n, 8) for n in (len_q, 7, 7))
    out, _ = adapter.attention(torch.nn.Module(), q, k, v, None, is_causal=causal, sliding_window=3)
    i, j = torch.arange(7 - len_q, 7)[:, None], torch.arange(7)
    seen = (i - j < 3) & ((j <= i) if causal else (j - i < 3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    assert torch.allclose(out.transpose(1, 2), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_attentions": True}, "output_attentions is not served"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "cu_seq_lens_q is not served by this attention; .* position_ids"),
        ({"head_mask": torch.ones(4)}, "head_mask is not served"),
        ({"cache": object()}, "cache is not served"),
        ({"sinks": torch.zeros(1, 4, 6, 1)}, "sinks is not served"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"dropout": 1.0}, "dropout_p is 1.0"),
    ],
)
def test_what_is_not_served_is_refused_by_name(given, message):
    q, k, v = (torch.randn(1, 4, 6, 8) for _ in range(3))
    with pytest.raises(InvalidArgument, match=message):
        adapter.attention(torch.nn.Module(), q, k, v, None, **given)


def test_arguments_that_ask_for_nothing_are_taken():
    q, k, v = (torch.randn(1, 4, 6, 8) for _ in range(3))
    out, _ = adapter.attention(
        torch.nn.Module(), q, k, v, None, output_attentions=False, sinks=None, position_ids=torch.arange(6)[None]
    )
    assert torch.equal(out, cuflash.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True))


@pytest.mark.parametrize("name", ["", "cuflash", "my_sdpa", "flex_attention", "eager", "paged|x", "me/attention", 7])
def test_names_with_a_meaning_of_their_own_are_refused(name):
    with pytest.raises(InvalidArgument, match="name is"):
        register(name)


def test_a_name_of_ones_own():
    assert register("attention_of_ours") == "attention_of_ours"
    model = llama().eval()
    model.set_attn_implementation("attention_of_ours")
    assert model(batch("none")[0]).logits.isfinite().all()
