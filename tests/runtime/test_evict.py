"""The policy evict: who skips an attention is invisible in it, for good."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import DEVICE, TOLERANCE, variants
from gating import Evicted, EvictedPlan, GivenPlan, plan_without
from test_attach import ids, incremental, padded
from test_flops import counted
from test_foresight import Seer
from transformers import DynamicCache, StaticCache

from dyndepth.common.errors import MethodFault, UserError
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import Decoder
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.models.families import FAMILIES
from dyndepth.runtime import evicting_layer
from dyndepth.runtime.attach import attach
from dyndepth.runtime.graphs import Graphs
from dyndepth.runtime.limits import ALWAYS, Limits

NEVER = Limits(attention=0.0, mlp=0.0, tokens=10**9)
WAYS = {"gathered": (ALWAYS, "sparse"), "whole": (NEVER, "sparse"), "masked": (ALWAYS, "masked")}
every_variant = variants()
families = pytest.mark.parametrize("family", FAMILIES)
few = pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "bloom"])


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def step(model, cache, tokens):
    return model(tokens, **{cache_argument(model): cache}, use_cache=True)


@every_variant
def test_all_open_is_dense(tiny, family, attn):
    model, tokens = tiny(family, attn), ids(2, 9)
    with attach(model, Evicted(rate=1.0)):
        whole, steps = model(tokens).logits, incremental(model, tokens, prompt=5)
    assert torch.equal(whole, model(tokens).logits)
    assert torch.equal(steps, incremental(model, tokens, prompt=5))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_each_attention_is_the_stock_one_of_those_who_execute_it(tiny, attn):
    """The reference: each block's own modules, fed the tokens that execute them."""
    model, tokens, method = tiny("llama", attn), ids(1, 11), Evicted()
    with attach(model, method) as trace:
        found = model(tokens).logits
        gates = trace.gates()[0]
    hidden, places = model.model.embed_tokens(tokens), torch.arange(11, device=DEVICE)
    cosine, sine = model.model.rotary_emb(hidden, places[None])
    for layer, block in enumerate(model.model.layers):
        kept, fed = (places[gates[:, layer, sublayer].to(DEVICE)] for sublayer in (0, 1))
        causal = torch.full((len(kept), len(kept)), -torch.inf, device=DEVICE).triu(1)
        hidden[:, kept] += block.self_attn(
            block.input_layernorm(hidden[:, kept]),
            position_embeddings=(cosine[:, kept], sine[:, kept]),
            attention_mask=causal[None, None],
        )[0]
        hidden[:, fed] += block.mlp(block.post_attention_layernorm(hidden[:, fed]))
    close(found, model.lm_head(model.model.norm(hidden)))


@families
def test_a_token_that_skips_everything_is_as_if_it_were_not_there(tiny, family):
    """The reference: the stock model, fed the other tokens with their own position ids."""
    model, tokens, method = tiny(family), ids(1, 8), Evicted(whole=True, seed=1)
    if Decoder.of(model).record.bias is not None:
        pytest.skip("counts positions by itself")
    with attach(model, method) as trace:
        found = model(tokens).logits
        kept = trace.gates()[0, :, 0, 0].nonzero()[:, 0].to(DEVICE)
        cached = incremental(model, tokens, prompt=3)
    assert 2 < len(kept) < 7
    stock = model(tokens[:, kept], position_ids=kept[None]).logits
    close(found[:, kept], stock)
    close(cached[:, kept], stock)


@every_variant
def test_every_way_of_computing_gives_the_same(tiny, family, attn):
    """Also over a cache, in steps of one token and of three, past sliding windows."""
    model, tokens, found = tiny(family, attn), ids(3, 12), {}
    for name, (limits, backend) in WAYS.items():
        with attach(model, Evicted(), limits=limits, backend=backend):
            found[name] = model(tokens, use_cache=False).logits
            for chunk in (1, 3):
                found[name, chunk] = incremental(model, tokens, prompt=5, chunk=chunk)
    for each in found.values():
        close(each, found["masked"])


@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(tiny, family, attn, side):
    model, method, documents = tiny(family, attn), Evicted(), ["a", "b", "c"]
    tokens, mask, positions = padded(side)
    with attach(model, method, documents=documents) as trace:
        batch = model(tokens, attention_mask=mask, position_ids=positions).logits
        together = trace.by_document()
        trace.reset()
        for row, document in enumerate(documents):
            real, trace.documents = mask[row].bool(), [document]
            close(batch[row, real], model(tokens[row : row + 1, real]).logits[0])
        assert trace.by_document() == together


@few
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_over_the_cache_is_generating_without(tiny, family, beams):
    model, (tokens, mask, _) = tiny(family), padded("left")
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    with attach(model, Evicted()):
        found = [
            model.generate(tokens, attention_mask=mask, use_cache=cached, **how)
            for cached in (True, False, True)
        ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@few
@pytest.mark.parametrize("limits", [ALWAYS, NEVER])
def test_caches_are_cropped_reordered_and_interleaved(tiny, family, limits):
    model, tokens, more = tiny(family), ids(3, 12), ids(3, 4, seed=1)
    rows = torch.tensor([2, 0, 0, 1], device=DEVICE)
    with attach(model, Evicted(), limits=limits):
        whole = model(tokens).logits
        cache = cache_of(model(tokens[:, :4], use_cache=True))
        other = cache_of(model(more[:, :2], use_cache=True))
        step(model, cache, more[:, :3])
        cache.crop(-3)
        assert [layer.get_seq_length() for layer in cache.layers] == [4] * 4
        close(step(model, other, more[:, 2:3]).logits, model(more).logits[:, 2:3])
        close(step(model, cache, tokens[:, 4:6]).logits, whole[:, 4:6])
        for change in ("reorder_cache", "batch_select_indices"):
            now = copy.deepcopy(cache)
            getattr(now, change)(rows)
            close(step(model, now, tokens[rows, 6:]).logits, whole[rows, 6:])
        cache.batch_repeat_interleave(2)
        twice = tokens.repeat_interleave(2, 0)[:, 6:]
        close(step(model, cache, twice).logits, whole.repeat_interleave(2, 0)[:, 6:])
        close(step(model, other, more[:, 3:]).logits, model(more).logits[:, 3:])


def test_past_a_window_a_cache_is_cropped_where_it_was_told_to_remember(tiny):
    model, tokens = tiny("mistral"), ids(2, 14)
    with attach(model, Evicted(rate=0.6)):
        whole = model(tokens).logits
        cache = cache_of(model(tokens[:, :10], use_cache=True))
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-2)
        for layer in cache.layers:
            layer.activate_past_recording()
        step(model, cache, ids(2, 2, seed=1))
        cache.crop(-2)
        close(step(model, cache, tokens[:, 10:]).logits, whole[:, 10:])


@few
@pytest.mark.parametrize("phases", ["both", "generation"])
def test_a_layer_that_all_skip_counts_them(tiny, family, phases):
    """Who skips an attention always leaves nothing in it: as ``drop`` and ``prompt_only``."""
    model, tokens, found = tiny(family), ids(2, 10), []
    plan = plan_without(4, (0, 0), (2, 0), (2, 1))
    for method in (GivenPlan, EvictedPlan):
        with attach(model, method(plan=plan, phases=phases), documents=["a", "b"]) as trace:
            found.append((incremental(model, tokens, prompt=5), trace.by_document()))
    close(found[1][0], found[0][0])
    if phases == "both":
        assert found[1][1] == found[0][1]


@few
def test_prompts_at_full_depth_are_seen_by_all(tiny, family):
    model, tokens, method = tiny(family), ids(2, 10), Evicted(phases="generation")
    with attach(model, method) as trace:
        steps = incremental(model, tokens, prompt=5)
        trace.prompt_length = 5
        close(model(tokens).logits, steps)
    assert torch.equal(steps[:, :5], model(tokens[:, :5]).logits)


@families
@pytest.mark.parametrize("limits", [ALWAYS, NEVER])
def test_ledger_equals_counter(tiny, family, limits):
    model = tiny(family, "eager")

    def batches():
        yield lambda: model(ids(3, 10))
        tokens, mask, positions = padded("left")
        yield lambda: model(tokens, attention_mask=mask, position_ids=positions)
        yield lambda: model.generate(ids(3, 4), max_new_tokens=4, min_new_tokens=4, do_sample=False)

    for run in batches():
        with attach(model, Evicted(), limits=limits, documents=["a", "b", "c"]) as trace:
            assert counted(run) == sum(trace.flops.values())
    with attach(model, Evicted(), limits=limits) as trace:
        assert counted(lambda: model(ids(1, 10))) == sum(trace.flops.values())
        assert (trace.flops["padding"] == 0) == (limits is ALWAYS)


@pytest.mark.parametrize("prompt", [12, 4])
def test_scores_cost_the_keys_that_are_visible(tiny, prompt):
    """Counted by hand, from the gates of each forward."""
    model, tokens = tiny("llama"), ids(2, 12)
    with attach(model, Evicted(), documents=["a", "b"]) as trace:
        costs, gates, wanted = trace._ledger.costs, [], torch.zeros(2, dtype=torch.float64)
        out = model(tokens[:, :prompt], use_cache=True)
        for place in range(prompt - 1, 12):
            if place >= prompt:
                out = step(model, cache_of(out), tokens[:, place : place + 1])
            gates.append(trace.gates().double())
            seen = torch.cat(gates, 1).sum(1)[..., 0]
            mine = gates[-1].sum(1)
            each = torch.from_numpy(costs.projections) + torch.from_numpy(costs.score) * seen
            wanted += (mine[..., 0] * each + mine[..., 1] * torch.from_numpy(costs.mlp)).sum(1)
        found = [each["block_flops"] for each in trace.by_document().values()]
        kinds = trace.flops
    assert found == wanted.tolist()
    assert kinds["kv_projection"] == 0


def test_nothing_is_kept_of_who_skipped(tiny):
    model, tokens = tiny("llama"), ids(1, 12)
    # Elsewhere nobody asks how many execute a short forward that is computed whole.
    for limits in (ALWAYS, NEVER) if DEVICE.type == "cpu" else (ALWAYS,):
        with attach(model, Evicted(), limits=limits) as trace:
            cache = cache_of(model(tokens, use_cache=True))
            kept = trace.gates()[0, :, :, 0].sum(0).tolist()
        assert [layer.keys.shape[2] for layer in cache.layers] == kept
        assert cache.get_seq_length() == 12


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_gaps_between_rows_are_closed(tiny, family, monkeypatch):
    """Rows that execute at other steps leave gaps in each other's keys, which do not stay."""
    monkeypatch.setattr(evicting_layer, "_LEAST", 4)
    evicting_layer._evicting.cache_clear()
    model, (tokens, mask, _) = tiny(family), padded("left")
    with attach(model, Evicted(rate=0.4)):
        whole = model(tokens, attention_mask=mask).logits
        cache, found = DynamicCache(config=model.config), []
        for place in range(12):
            given = {"attention_mask": mask[:, : place + 1], cache_argument(model): cache}
            found.append(model(tokens[:, place : place + 1], **given, use_cache=True).logits)
    evicting_layer._evicting.cache_clear()
    real = mask.bool()
    close(torch.cat(found, 1)[real], whole[real])
    used = [(layer.positions >= 0).sum(1).max() for layer in cache.layers]
    assert all(
        layer.keys.shape[2] <= max(most * 1.25, 4) + 1
        for layer, most in zip(cache.layers, used, strict=True)
    )


def test_caches_that_cannot_leave_tokens_out_are_refused(tiny):
    model = tiny("llama")
    static = StaticCache(config=model.config, max_cache_len=16)
    told = DynamicCache(config=model.config)
    plan = plan_without(4, (0, 0))
    with attach(model, GivenPlan(plan=plan)):
        model(ids(1, 4), **{cache_argument(model): told})
    for cache in (static, told):
        with attach(model, Evicted()), pytest.raises(UserError, match="leave single tokens out"):
            step(model, cache, ids(1, 4))


def test_graphs_and_other_kernels_are_refused(tiny):
    model = tiny()
    with pytest.raises(UserError, match="evicts"), attach(model, Evicted(), mode=Graphs()):
        pass
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="masks"), attach(model, Evicted()):
        pass


def test_a_policy_that_is_none_is_refused(tiny):
    method = Evicted()
    method.__class__ = type("Misspelt", (Evicted,), {"kv_policy": "evicts"})
    with (
        pytest.raises(MethodFault, match="one of drop, project.*not 'evicts'"),
        attach(tiny(), method),
    ):
        pass


def test_looking_ahead_sees_the_dense_model(tiny):
    """Its keys and values are a lane of their own in the same cache."""
    model, tokens, found = tiny(), ids(2, 9), []
    for method in (Seer(), type("Evicting", (Seer,), {"kv_policy": "evict"})()):
        with attach(model, method) as trace:
            steps = incremental(model, tokens, prompt=4, chunk=2)
            trace.prompt_length = 4
            close(model(tokens).logits, steps)
        found.append(torch.cat(method.seen, -1))
    assert torch.equal(*found)


class Soft(DynamicDepthMethod):
    """Gates that are given, float ``[layers, batch, tokens]``, for attention alone."""

    name, granularity, paper, kv_policy = "soft", "token", "test", "evict"
    given: torch.Tensor

    def gates(self, layer, hidden):
        return self.given[layer], True


def test_gradients_reach_gates_by_their_output_and_by_being_seen(tiny):
    """By differences, of a reference in which an open gate weighs the token's key and its update;
    rows that nobody may see give no NaN. Of a model that computes all of it in double."""
    model, tokens = tiny("gpt2").double(), ids(1, 6)
    gates = torch.ones(4, 1, 6, dtype=torch.float64, device=DEVICE)
    gates[1, 0, :3] = gates[2, 0, 4] = 0.0
    method = Soft()

    def reference(weights):
        decoder = model.transformer
        hidden = decoder.wte(tokens) + decoder.wpe(torch.arange(6, device=DEVICE))
        for weight, block in zip(weights[:, 0], decoder.h, strict=True):
            mask = weight.clamp_min(1e-300).log().expand(6, 6)
            mask = torch.full_like(mask, -1e300).triu(1) + mask
            out = block.attn(block.ln_1(hidden), attention_mask=mask[None, None])[0]
            hidden = hidden + out * weight[None, :, None]
            hidden = hidden + block.mlp(block.ln_2(hidden))
        return model.lm_head(decoder.ln_f(hidden)).square().sum()

    method.given = gates.clone().requires_grad_()
    with attach(model, method, backend="masked"):
        loss = model(tokens).logits.square().sum()
    (gradient,) = torch.autograd.grad(loss, method.given)
    close(loss, reference(gates))
    assert gradient.isfinite().all()
    for place in ((0, 0, 1), (1, 0, 4), (2, 0, 3), (3, 0, 5)):
        moved = [gates.clone(), gates.clone()]
        for each, by in zip(moved, (1e-5, -1e-5), strict=True):
            each[place] += by
        slope = (reference(moved[0]) - reference(moved[1])) / 2e-5
        torch.testing.assert_close(gradient[place], slope, rtol=1e-5, atol=1e-6)
