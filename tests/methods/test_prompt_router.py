"""Routers that read a prompt: the rule, who keeps what, what is read, the budget, the control."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, TOLERANCE
from test_attach import ids, incremental, padded

from dyndepth.common.errors import UserError
from dyndepth.fitting.calibration import block_speedup
from dyndepth.fitting.recovery.training import window_loss
from dyndepth.fitting.routers import Routed, Tuning, budget_shares, next_token_loss
from dyndepth.methods.mindskip import MindSkip
from dyndepth.methods.prompt_router import PromptRouter
from dyndepth.methods.prompt_router.tuning import PooledRouter, initial_router
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.runtime.attach import attach

LAYERS = 6
KINDS = (PromptRouter, MindSkip)
every_kind = pytest.mark.parametrize("kind", KINDS)
PHASES = pytest.mark.parametrize("phases", ["generation", "both", None])


@pytest.fixture
def model(tiny):
    return tiny(num_hidden_layers=LAYERS)


def given(kind, spread=1.0, **changes):
    """A method with random routers, whose decisions differ between sequences."""
    generator = torch.Generator().manual_seed(3)
    method = kind(**{"target_speedup": 1.05, "least": 3} | changes)
    method.tensors = {
        "weight": torch.randn(LAYERS, 1, 32, generator=generator) * spread,
        "bias": torch.randn(LAYERS, 1, generator=generator) * 0.1,
        "constant": torch.randn(LAYERS, 1, generator=generator),
    }
    method.facts = {"threshold": 0.05}
    return method


def kinds(phases):
    if phases is None:
        return given(MindSkip)
    return given(PromptRouter, phases=phases)


def routes(trace):
    return trace.gates()[:, -1]


@every_kind
def test_rule_is_the_formula(model, kind):
    """Against streams that hooks see, row by row, with padding on the left."""
    method = given(kind)
    tokens, mask, positions = padded("left")
    streams = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad(), attach(model, method) as trace:
        model(tokens, attention_mask=mask, position_ids=positions)
        found = routes(trace)
    for hook in hooks:
        hook.remove()
    routed = range(1, LAYERS - 1) if kind is PromptRouter else range(3, LAYERS - 1)
    assert method.routed(LAYERS) == routed
    for layer in range(LAYERS):
        for row in range(3):
            stream = streams[layer][row, mask[row].bool()]
            pooled = (stream / stream.square().mean(-1, keepdim=True).sqrt()).mean(0)
            logit = pooled @ method.tensors["weight"][layer, 0] + method.tensors["bias"][layer, 0]
            runs = bool(logit >= 0.05) or layer not in routed
            assert found[row, layer].tolist() == [runs, runs or kind is MindSkip]
    assert trace.flops["router"] == int(mask.sum()) * len(routed) * 2 * 32
    assert (found[0] != found[1:]).any()


@PHASES
def test_routes_of_the_prompt_are_those_of_one_forward(model, phases):
    """Decided in the prompt, kept in steps and chunks; as pooled over the marked prompt."""
    method, tokens = kinds(phases), ids(4, 15)
    with attach(model, method) as trace:
        steps = incremental(model, tokens, prompt=6)
        kept = routes(trace)
        chunks = incremental(model, tokens, prompt=6, chunk=4)
        trace.prompt_length = 6
        whole = model(tokens).logits
        assert torch.equal(routes(trace), kept)
        assert trace.gates()[:, :6].all() == (phases == "generation")
        alone = torch.cat([model(row[None]).logits for row in tokens])
    for other in (steps, chunks, alone):
        torch.testing.assert_close(other, whole, atol=TOLERANCE, rtol=0)
    assert (kept[0] != kept[1:]).any()
    assert not kept.all()


@PHASES
def test_what_comes_after_the_prompt_changes_nothing_before_it(model, phases):
    """No likelihood depends on a token that follows; on the prompt, routes do depend."""
    method, tokens = kinds(phases), ids(6, 14)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 7) % 90 + 3
    with attach(model, method, prompt_length=6) as trace:
        before = model(tokens).logits
        kept = routes(trace)
        after = model(changed).logits
        assert torch.equal(routes(trace), kept)
        torch.testing.assert_close(before[:, :10], after[:, :10], atol=1e-6, rtol=0)
        assert (before[:, 10:] - after[:, 10:]).abs().max() > 1e-3
        model(ids(6, 14, seed=9))
        assert not torch.equal(routes(trace), kept)


@PHASES
def test_generations_that_take_turns_keep_their_routes(model, phases):
    method, name = kinds(phases), cache_argument(model)
    texts = [ids(5, 9), ids(5, 9, seed=1)]
    with attach(model, method) as trace:
        alone = [incremental(model, text, prompt=6)[:, 6:] for text in texts]
        caches = [cache_of(model(text[:, :6], use_cache=True)) for text in texts]
        for place in range(6, 9):
            found = []
            for text, past, want in zip(texts, caches, alone, strict=True):
                logits = model(text[:, place : place + 1], **{name: past}).logits
                found.append(routes(trace))
                torch.testing.assert_close(logits[:, 0], want[:, place - 6], atol=TOLERANCE, rtol=0)
    assert not torch.equal(*found)


@PHASES
def test_beams_keep_the_route_of_their_row(model, phases):
    method = kinds(phases)
    tokens, mask, _ = padded("left")
    how = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5}
    with attach(model, method) as trace:
        together = model.generate(tokens, attention_mask=mask, **how)
        rows = routes(trace).unflatten(0, (3, 3))
        assert (rows == rows[:, :1]).all()
        for row in range(3):
            own = tokens[row : row + 1, mask[row].bool()]
            alone = model.generate(own, **how)
            assert torch.equal(together[row, 12:], alone[0, own.shape[1] :])
            assert torch.equal(routes(trace)[0], rows[row, 0])


@every_kind
def test_a_prompt_that_says_too_little_is_not_read(model, kind):
    """Nor one that was read before anything was attached."""
    method = given(kind, least=5)
    plan = method.tensors["constant"][:, 0] >= 0.05
    routed = list(method.routed(LAYERS))
    name = cache_argument(model)
    filled = cache_of(model(ids(2, 8), use_cache=True))
    with attach(model, method, warn=False) as trace:
        for tokens in (ids(2, 4), ids(2, 4, seed=1)):
            model(tokens)
            assert torch.equal(routes(trace)[0, routed, 0], plan[routed])
        model(ids(2, 1), **{name: filled})
        assert torch.equal(routes(trace)[1, routed, 0], plan[routed])
    assert not plan[routed].all()


@every_kind
@pytest.mark.parametrize("reads", ["prompt", "constant", "frequent"])
def test_fit_meets_the_target(model, tiny_corpus, kind, reads):
    target = 1.4 if kind is PromptRouter else 1.1
    changes = {"length": 24, "reads": reads, "weight_rate": 0.1, "target_speedup": target}
    method = kind(**kind.quick | changes).fit(model, tiny_corpus)
    near = 0.03 if reads == "prompt" else 0.15
    assert method.facts["achieved_speedup"] == pytest.approx(target, rel=near)
    windows = tiny_corpus.windows(48, 16, 0, split="calibration").to(DEVICE)
    assert block_speedup(model, method, windows) == method.facts["achieved_speedup"]
    with attach(model, method, prompt_length=24) as trace:
        model(windows)
    found = routes(trace)
    assert (found[:1] != found).any() == (reads == "prompt")
    assert method.granularity == ("sequence" if reads == "prompt" else "static")
    fixed = torch.ones(LAYERS, dtype=torch.bool)
    fixed[list(method.routed(LAYERS))] = False
    assert found[:, fixed].all()
    assert found[..., 1].all() == (kind is MindSkip)


@every_kind
def test_frequent_is_what_the_routers_choose_most_often(model, tiny_corpus, kind):
    """Counted in the routes of the same routers, reading the calibration prompts."""
    target = 1.4 if kind is PromptRouter else 1.1
    changes = {"length": 24, "weight_rate": 0.1, "target_speedup": target}
    reader = kind(**kind.quick | changes).fit(model, tiny_corpus)
    control = kind(**kind.quick | changes, reads="frequent").fit(model, tiny_corpus)
    assert torch.equal(reader.tensors["weight"], control.tensors["weight"])
    with attach(model, reader, prompt_length=24) as trace:
        model(tiny_corpus.windows(48, 16, 0, split="calibration").to(DEVICE))
    routed = list(control.routed(LAYERS))
    often = routes(trace)[:, routed, 0].sum(0)
    with attach(model, control) as trace:
        model(ids(1, 8))
    plan = routes(trace)[0, routed, 0]
    assert not plan.all()
    assert min(often[plan].tolist(), default=16) >= often[~plan].max()


@every_kind
@pytest.mark.parametrize("estimator", ["deterministic", "gumbel", "soft"])
def test_training_reads_the_first_half_alone(model, kind, tiny_corpus, estimator):
    """The router of training decides as the method does; the budget has a gradient."""
    method = kind(**kind.quick | {"initial": "random", "least": 1, "target_speedup": 1.05})
    router = initial_router(method, model, tiny_corpus).to(DEVICE)
    tuning = Tuning(target_speedup=1.05, estimator=estimator, prompt=True)
    routed = Routed(router, tuning)
    tokens = ids(4, 16)
    with attach(model, routed, backend="masked", prompt_length=8) as trace:
        hard = model(tokens).logits
        gates = routes(trace)
        share = routed.executed(budget_shares(model, 16).to(DEVICE))
    share.backward()
    inside = list(method.routed(LAYERS))
    assert (router.bias.grad[inside] > 0).all()
    outside = [layer for layer in range(LAYERS) if layer not in inside]
    assert (router.bias.grad[outside] == 0).all()
    if estimator != "deterministic":
        return
    method.tensors, method.facts = router.folded(), {"threshold": 0.0}
    with attach(model, method, prompt_length=8) as trace:
        found = model(tokens).logits
        assert torch.equal(routes(trace), gates)
    torch.testing.assert_close(found, hard, atol=TOLERANCE, rtol=0)


def test_pooling_commutes_with_the_map():
    """Statistics are of means over tokens; the folded router is the plain one."""
    generator = torch.Generator().manual_seed(0)
    statistics = (torch.randn(LAYERS, 8, generator=generator), torch.rand(LAYERS, 8) + 0.1)
    weight = torch.randn(LAYERS, 1, 8, generator=generator)
    bias = torch.randn(LAYERS, 1, generator=generator)
    router = PooledRouter(weight, bias, statistics, range(1, 5), False)
    hidden = torch.randn(3, 10, 8, generator=generator)
    normed = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    pooled = (normed[:, :5].mean(1) - statistics[0][2]) / statistics[1][2]
    want = pooled @ weight[2, 0] + bias[2, 0]
    torch.testing.assert_close(router(2, hidden)[:, 7, 0], want, atol=1e-4, rtol=1e-4)
    assert (router(0, hidden) == 1e4).all()
    both = PooledRouter(weight, bias, statistics, range(1, 5), True)(2, hidden)
    assert both.shape == (3, 10, 2)
    assert (both[..., 1] == 1e4).all()


def test_what_is_out_of_reach_is_said(model, tiny_corpus):
    with pytest.raises(UserError, match=r"leave out 2 attentions of this model: a speedup of at"):
        MindSkip(target_speedup=1.5, **MindSkip.quick).fit(model, tiny_corpus)
    with pytest.raises(UserError, match="can leave out 4 blocks of this model"):
        PromptRouter(target_speedup=4.0, **PromptRouter.quick).fit(model, tiny_corpus)
    with pytest.raises(UserError, match="give fit a corpus"):
        PromptRouter(target_speedup=1.5).fit(model)
    assert MindSkip().routed(30) == range(15, 29)
    assert MindSkip().routed(40) == range(24, 39)
    for bad in ({"least": 0}, {"penalty": 0.0}, {"ramp": 2.0}):
        with pytest.raises(ValueError, match="least|penalty|ramp"):
            PromptRouter(**bad)
    short = given(PromptRouter)
    short.tensors["constant"] = short.tensors["constant"][:3]
    with attach(model, short, warn=False), pytest.raises(UserError, match="of 3 blocks, not 6"):
        model(ids(1, 4))
    narrow = given(PromptRouter)
    narrow.tensors["weight"] = narrow.tensors["weight"][..., :16]
    with attach(model, narrow, warn=False), pytest.raises(UserError, match="16 dimensions, not 32"):
        model(ids(1, 4))


@PHASES
def test_recovery_learns_what_follows_the_prompt(model, phases):
    """Half of a window is its prompt; where that skips, too, the other half alone counts."""
    method, tokens = kinds(phases), ids(3, 14)
    with attach(model, method) as trace:
        nats, row = window_loss(model, method, trace, tokens)
    with attach(model, method, prompt_length=7) as trace:
        logits = model(tokens).logits
        totals = trace.totals("generation" if phases == "generation" else None)
    first = 0 if phases == "generation" else 7
    torch.testing.assert_close(nats, next_token_loss(logits, tokens, first))
    assert row["executed"] == totals["block_flops"] / totals["dense_block_flops"] < 1
