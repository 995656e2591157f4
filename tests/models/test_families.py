"""Every family holds what the page says, and the page says what holds."""

from __future__ import annotations

import re
import textwrap

import pytest
import torch
from conftest import attentions, make_tiny, variants
from gating import RandomMask
from support import CHECKS, FAMILIES, PAGE, found, placed, table, version
from test_attach import ids

from dyndepth.common.errors import UserError
from dyndepth.models.blocks import Decoder, blocks, causal_lm, decoder
from dyndepth.models.families import supported
from dyndepth.runtime.attach import attach
from dyndepth.runtime.flops import BlockCosts


def test_all_families_hold_and_the_page_says_so():
    matrix = {family: found(family) for family in FAMILIES}
    for family, checks in matrix.items():
        for name, by_attention in checks.items():
            assert by_attention, (family, name)
            for attn, held in by_attention.items():
                assert held, (family, name, attn)
    page = PAGE.read_text(encoding="utf-8")
    if f"class in transformers {version()} " in page:
        assert page == placed(page, table(matrix)), "run `make docs`"
    assert re.findall(r"^\| (\w+) \| \w+ \| (?:sdpa|eager)", page, re.MULTILINE) == supported()
    assert "| llama | LlamaForCausalLM | sdpa, eager |" in page


def test_checks_can_fail():
    """A runtime that is off by a little is found out."""
    model = make_tiny("llama")
    block = blocks(model)[1]
    block.layer.register_forward_hook(lambda m, a, out: out + 1e-3 * torch.randn_like(out))
    assert not any(check(model) for name, check in CHECKS.items() if name != "generate")


def test_the_pages_example_adds_families(monkeypatch):
    page = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    before = set(FAMILIES)
    try:
        exec(compile(textwrap.dedent(code), str(PAGE), "exec"), {})
        added = set(FAMILIES) - before
        assert len(added) == 2
        for family in added:
            held = found(family)
            assert all(all(by.values()) for by in held.values()), (family, held)
    finally:
        for family in set(FAMILIES) - before:
            del FAMILIES[family]
    assert len(code.splitlines()) < 40


@variants()
def test_readout_is_the_models_own(tiny, family, attn):
    """Scoring reads logits off hidden states; caps and scales of the causal LM are not lost."""
    model, tokens = tiny(family, attn), ids(2, 7)
    hidden = decoder(model)(input_ids=tokens).last_hidden_state
    assert torch.equal(Decoder.of(model).readout(hidden), model(tokens).logits)


@variants()
def test_bfloat16(tiny, family, attn):
    """Sparse and masked differ by rounding alone: 3% of the logits' spread on average."""
    model = tiny(family, attn).bfloat16()
    tokens, logits = ids(3, 11), []
    for backend in ("sparse", "masked"):
        with attach(model, RandomMask(), backend=backend):
            logits.append(model(tokens).logits.float())
    gap, spread = (logits[0] - logits[1]).abs(), logits[1].std()
    assert gap.mean() < 0.03 * spread
    assert gap.max() < 0.5 * spread
    with attach(model, RandomMask(rate=1.0)):
        assert torch.equal(model(tokens).logits, model(tokens).logits)


@variants()
def test_layers_say_what_they_cost(tiny, family, attn):
    """The ledger's costs are all linear maps of the blocks, and no other."""
    from dyndepth.models.projections import linear_flops

    model = tiny(family, attn)
    costs = BlockCosts.of(model)
    layers = getattr(decoder(model), FAMILIES[family].layers)
    for index, layer in enumerate(layers):
        assert costs.projections[index] + costs.mlp[index] == linear_flops([layer])
        assert 0 < costs.key_value[index] < costs.projections[index]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"attention_bias": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
        ("phi3", {"num_key_value_heads": 4, "sliding_window": None}),
        ("opt", {"enable_bias": False}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ],
)
def test_variants_of_a_family(family, changes):
    for attn in attentions(family):
        model = make_tiny(family, attn, **changes)
        assert all(check(model) for check in CHECKS.values()), attn


@pytest.mark.parametrize(
    ("family", "changes", "matter"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False.*residual stream"),
        ("opt", {"_remove_final_layer_norm": True}, "no final norm"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "residual stream"),
        ("gpt2", {"add_cross_attention": True}, "third branch"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
    ],
)
def test_what_has_no_two_branches_is_refused(family, changes, matter):
    model = make_tiny(family, **changes)
    with (
        pytest.raises(UserError, match=f"this {family} is not supported.*{matter}"),
        attach(model, RandomMask()),
    ):
        pass


def test_an_unknown_family_is_refused_with_the_list():
    model = make_tiny("starcoder2")
    with pytest.raises(UserError) as caught, attach(model, RandomMask()):
        pass
    for name in supported():
        assert name in str(caught.value)
    assert "docs/families.md" in str(caught.value)
    assert causal_lm(model) is model
