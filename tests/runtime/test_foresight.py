"""Foresight: the dense model's predictions at every depth, whatever the method does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import DEVICE
from gating import GivenPlan, RandomMask, plan_without
from test_attach import attached_and_failing, ids, incremental, padded
from test_flops import counted
from transformers import DynamicCache, StaticCache

from dyndepth.common.errors import UserError
from dyndepth.evaluation.forwards import rows_of
from dyndepth.evaluation.generation import Prompt, generate
from dyndepth.evaluation.scoring import Group, score
from dyndepth.models.blocks import Decoder, decoder
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.models.families import FAMILIES
from dyndepth.runtime.attach import attach
from dyndepth.runtime.flops import BlockCosts

LAYERS = 4


@dataclass(kw_only=True)
class Seer(RandomMask):
    """Random masks, and a record of what foresight said in each forward."""

    name = "seer"
    uses_labels = True
    foresees = True
    seen: Any = None

    def start(self, context):
        self.seen = [] if self.seen is None else self.seen
        self.seen.append(context.foresight().clone())
        assert torch.equal(context.foresight(), self.seen[-1])  # asked twice, run once
        return super().start(context)


@dataclass(kw_only=True)
class SeerWithPlan(GivenPlan):
    """Drops the first attention, so that its own cache is no measure of the past."""

    name = "seer_with_plan"
    uses_labels = True
    foresees = True
    seen: Any = None

    def start(self, context):
        self.seen = [] if self.seen is None else self.seen
        self.seen.append(context.foresight())
        return super().start(context)


def seers(phases="both"):
    plan = plan_without(LAYERS, (0, 0), (2, 0), (2, 1))
    return [Seer(phases=phases), SeerWithPlan(plan=plan, phases=phases)]


@torch.no_grad()
def expected(model, tokens, **kwargs):
    """Likeliest next tokens after each depth, from the stock model's hidden states."""
    states = model(tokens, output_hidden_states=True, **kwargs).hidden_states
    # The last one has been through the final norm.
    parts = Decoder.of(model)
    normed = [parts.norm(state) for state in states[:-1]] + [states[-1]]
    return torch.stack([parts.readout(state).argmax(-1) for state in normed])


families = pytest.mark.parametrize("family", FAMILIES)
every_seer = pytest.mark.parametrize("which", [0, 1])


@families
@every_seer
@pytest.mark.parametrize("backend", ["sparse", "masked"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_predictions_are_those_of_the_stock_model(tiny, family, which, backend, use_cache):
    model, method = tiny(family), seers()[which]
    tokens = ids(3, 12)
    with attach(model, method, backend=backend):
        logits = model(tokens, use_cache=use_cache).logits
    want = expected(model, tokens)
    assert want.shape == (LAYERS + 1, 3, 12)
    assert torch.equal(method.seen[0], want)
    assert torch.equal(method.seen[0][-1], model(tokens).logits.argmax(-1))
    assert (want[:-1] != want[-1]).any()
    blind = RandomMask() if which == 0 else GivenPlan(plan=method.plan)
    with attach(model, blind, backend=backend):
        assert torch.equal(model(tokens, use_cache=use_cache).logits, logits)


@families
@every_seer
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("phases", ["generation", "both"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_the_past_is_the_dense_models(tiny, family, which, attn, phases, chunk):
    """Steps over a cache that holds thinned keys and values see what one dense forward does."""
    model, method = tiny(family, attn), seers(phases)[which]
    tokens = ids(3, 14)
    with attach(model, method):
        incremental(model, tokens, prompt=6, chunk=chunk)
    want = expected(model, tokens)
    want = want if phases == "both" else want[:, :, 6:]
    assert torch.equal(torch.cat(method.seen, 2), want)


@every_seer
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_change_nothing(tiny, which, side):
    model, method = tiny(), seers()[which]
    tokens, mask, positions = padded(side)
    with attach(model, method):
        model(tokens, attention_mask=mask, position_ids=positions)
    for row in range(3):
        real = mask[row].bool()
        want = expected(model, tokens[row : row + 1, real])
        assert torch.equal(method.seen[0][:, row : row + 1, real], want)


@every_seer
@pytest.mark.parametrize("cache", [lambda _: DynamicCache(), lambda c: DynamicCache(config=c)])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_given_caches_may_be_cropped_selected_and_reordered(tiny, which, cache, family):
    windows = {"sliding_window": 64} if family == "mistral" else {}
    model, method = tiny(family, **windows), seers()[which]
    name, past = cache_argument(model), cache(model.config)
    tokens = ids(2, 9)
    with attach(model, method):
        model(tokens[:, :5], **{name: past})
        assert past.get_seq_length() == 5
        assert len(past.layers) == 2 * LAYERS
        model(ids(2, 3, seed=1), **{name: past})
        past.crop(-3)
        rows = torch.tensor([1, 0, 1], device=DEVICE)
        chosen = rows_of(past, rows)
        model(tokens[rows, 5:7], **{name: chosen})
        chosen.reorder_cache(torch.tensor([2, 1, 0]))
        model(tokens[rows, 7:], **{name: chosen})
        model(tokens[:, 5:], **{name: past})
    want = expected(model, tokens)
    assert torch.equal(method.seen[2], want[:, rows, 5:7])
    assert torch.equal(method.seen[3], want[:, rows, 7:])
    assert torch.equal(method.seen[4], want[:, :, 5:])


@every_seer
@pytest.mark.parametrize("phases", ["generation", "both"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_beams(tiny, which, phases, family):
    model, method = tiny(family), seers(phases)[which]
    with attach(model, method):
        out = model.generate(ids(2, 7), max_new_tokens=6, min_new_tokens=6, num_beams=3)
    # Which beam of the last step became the returned sequence is not known, but it is one of three.
    last = method.seen[-1]
    assert last.shape == (LAYERS + 1, 6, 1)
    for row, sequence in enumerate(out):
        beams = last[:, 3 * row : 3 * row + 3, 0].T.tolist()
        assert expected(model, sequence[None, :-1])[:, 0, -1].tolist() in beams


@every_seer
def test_a_window_that_slides(tiny, which):
    model, method = tiny("mistral", sliding_window=6), seers()[which]
    tokens = ids(2, 14)
    with attach(model, method):
        incremental(model, tokens, prompt=9)
    assert torch.equal(torch.cat(method.seen, 2), expected(model, tokens))


@every_seer
@pytest.mark.parametrize("phases", ["generation", "both"])
def test_scoring_and_generating(tiny, which, phases):
    """Batches of unequal rows, selected rows, sequences that leave: as one by one."""
    model, method = tiny(), seers(phases)[which]
    groups = [
        Group("a", [5, 6, 7, 8, 9], [[10, 11, 12], [13, 14]]),
        Group("b", [20, 21, 22], [[23, 24, 25, 26]]),
    ]
    prompts = [
        Prompt("a", [5, 6, 7, 8], 6, lambda done: False),
        Prompt("b", [20, 21], 3, lambda done: False),
    ]
    with attach(model, method) as trace:
        list(score(model, trace, groups, batch_size=4))
        continued = method.seen[-1]
        done = dict(generate(model, trace, prompts, batch_size=4))
        last = method.seen[-1]
    rows = [(group.context, tokens) for group in groups for tokens in group.continuations]
    rows.sort(key=lambda row: -len(row[1]))
    for row, (context, continuation) in enumerate(rows):
        tokens = torch.tensor([[*context, *continuation[:-1]]], device=DEVICE)
        want = expected(model, tokens)[:, 0, len(context) :]
        assert torch.equal(continued[:, row, : want.shape[1]], want)
    whole = torch.tensor([[*prompts[0].tokens, *done[0][:-1]]], device=DEVICE)
    assert last.shape == (LAYERS + 1, 1, 1)
    assert torch.equal(last[:, 0, 0], expected(model, whole)[:, 0, -1])


@pytest.mark.parametrize("phases", ["generation", "both"])
def test_rows_whose_prompts_end_at_different_steps(tiny, phases):
    """A forward that is prompt for all its real tokens still keeps the dense past in step."""
    model, method = tiny(), Seer(phases=phases)
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long, device=DEVICE)
    mask[0, 4:6] = 0
    name = cache_argument(model)
    with attach(model, method) as trace:
        trace.prompt_length = torch.tensor([2, 6])
        out = model(tokens[:, :4], use_cache=True)
        out = model(tokens[:, 4:6], attention_mask=mask[:, :6], **{name: cache_of(out)})
        model(tokens[:, 6:], attention_mask=mask, **{name: cache_of(out)})
    assert torch.equal(method.seen[-1], expected(model, tokens, attention_mask=mask)[:, :, 6:])


def test_none_for_methods_without_labels(tiny):
    model, asked = tiny(), []

    class Blind(RandomMask):
        def start(self, context):
            asked.append(context.foresight)
            return super().start(context)

    with attach(model, Blind()):
        cache = cache_of(model(ids(1, 5), use_cache=True))
    assert asked == [None]
    assert len(cache.layers) == LAYERS


def test_a_past_that_was_never_seen_is_refused(tiny):
    model = tiny()

    class Late(Seer):
        def start(self, context):
            return (super() if context.past_length else super(Seer, self)).start(context)

    name = cache_argument(model)
    with attach(model, Late()):
        cache = cache_of(model(ids(1, 5), use_cache=True))
        with pytest.raises(UserError, match="ask for it in start, in every forward"):
            model(ids(1, 1), **{name: cache})
    static = StaticCache(config=model.config, max_cache_len=16)
    with attach(model, Seer()), pytest.raises(UserError, match="StaticLayer of the cache"):
        model(ids(1, 5), **{name: static})


def test_it_is_for_those_that_say_that_they_use_labels(tiny):
    class Sly(RandomMask):
        foresees = True

    with pytest.raises(TypeError, match="does not say"), attach(tiny(), Sly()):
        pass


def test_it_is_for_start_alone(tiny):
    class TooLate(RandomMask):
        uses_labels = True
        foresees = True

        def gates(self, layer, hidden):
            self.context.foresight()

    model = tiny()
    with attach(model, TooLate()), pytest.raises(RuntimeError, match="in a method's start alone"):
        model(ids(1, 5))


def test_hooks_and_outputs_are_left_alone(tiny):
    model, calls = tiny(), []
    hook = decoder(model).register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = ids(2, 6)
    with attach(model, Seer()):
        out = model(tokens, output_hidden_states=True)
    hook.remove()
    assert calls == [1]
    assert len(out.hidden_states) == LAYERS + 1
    with attach(model, RandomMask()):
        blind = model(tokens, output_hidden_states=True)
    for one, other in zip(out.hidden_states, blind.hidden_states, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError):
        attached_and_failing(model)


@pytest.mark.parametrize("backend", ["sparse", "masked"])
@every_seer
def test_what_it_costs_is_padding(tiny, which, backend):
    model, method = tiny("llama", "eager"), seers()[which]
    costs = BlockCosts.of(model)
    blind = RandomMask() if which == 0 else GivenPlan(plan=method.plan)
    tokens, mask, positions = padded("left")
    runs = [
        lambda: model(ids(1, 24)),
        lambda: model(tokens, attention_mask=mask, position_ids=positions),
        lambda: model.generate(ids(3, 5), max_new_tokens=3, min_new_tokens=3, do_sample=False),
    ]
    for run in runs:
        with attach(model, method, backend=backend) as trace:
            assert counted(run) == sum(trace.flops.values())
            seen = trace.totals()
        with attach(model, blind, backend=backend) as trace:
            run()
            plain = trace.totals()
        paddings = [totals["by_cause"].pop("padding") for totals in (seen, plain)]
        assert seen == plain
        assert paddings[0] > paddings[1]
    with attach(model, method, backend=backend) as trace:
        model(ids(1, 24))
        padding = trace.flops["padding"]
    with attach(model, blind, backend=backend) as trace:
        model(ids(1, 24))
        ahead = 24 * (costs.block(24) + (LAYERS + 1) * costs.lm_head)
        assert padding == trace.flops["padding"] + ahead


def test_the_head_holds_few_logits_at_a_time(tiny, monkeypatch):
    from dyndepth.runtime import foresight

    model, method, rows = tiny(), Seer(), []
    monkeypatch.setattr(foresight, "_LOGITS", 96 * 7)
    hook = model.lm_head.register_forward_hook(lambda _, a, o: rows.append(o.numel() // 96))
    with attach(model, method):
        model.model(ids(3, 12))
    hook.remove()
    assert max(rows) == 7
    assert sum(rows) == 3 * 12 * (LAYERS + 1)
    assert torch.equal(method.seen[0], expected(model, ids(3, 12)))
