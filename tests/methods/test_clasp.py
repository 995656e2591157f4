"""CLaSp against the recursion of its paper on blocks run by hand, and what it is good for."""

import copy
import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
from gating import plan_without
from test_attach import ids
from test_replay import reference
from transformers import DynamicCache

from dyndepth.common.errors import NothingSkipped, UserError
from dyndepth.fitting.drafting import COST
from dyndepth.methods.clasp import CLaSp, least_missed
from dyndepth.models.blocks import Decoder
from dyndepth.models.families import FAMILIES
from dyndepth.runtime.attach import attach
from dyndepth.runtime.speculation import speculate

LAYERS = 4
"""Of the tiny models."""


def written(model, method, limit=12, cache=None, length=7, seed=0):
    """A text, with its prompt, and its rounds."""
    text = ids(1, length, seed=seed)[0].tolist()
    with attach(model, method) as trace:
        for tokens in speculate(model, trace, method, list(text), limit=limit, cache=cache):
            text += tokens
    return text, trace.speculation.rounds


def mute(model, *layers):
    """Have blocks change next to nothing."""
    for layer in layers:
        block = Decoder.of(model).layers[layer]
        for name, parameter in block.named_parameters():
            if name.startswith(("self_attn.o_proj", "mlp.down_proj")):
                parameter.mul_(1e-4)
    return model


def by_recursion(states, block, count):
    """The set by the paper's equation as it stands: one block on one stream at a time."""

    def near(stream, layer):
        return torch.cosine_similarity(stream.double(), states[layer].double(), 0)

    @functools.cache
    def best(i, j):
        if j == 0:
            return states[i], ()
        if i == j:
            return states[0], tuple(range(i))
        stream, missed = best(i - 1, j)
        run = block(i - 1, stream)
        shorter, more = best(i - 1, j - 1)
        if near(run, i) > near(shorter, i):
            return run, missed
        return shorter, (*more, i - 1)

    return list(best(len(states) - 1, count)[1])


@dataclass(kw_only=True)
class Watched(CLaSp):
    """Keeps what each programme was made from, the cache as it was then, and the set."""

    def __post_init__(self):
        super().__post_init__()
        self.cache, self.seen = DynamicCache(), []

    def verified(self, verdict):
        super().verified(verdict)
        plan = verdict.memory["clasp.plan"][0]
        assert torch.equal(plan[:, 0], plan[:, 1])
        missed = (~plan[:, 0]).nonzero()[:, 0].tolist()
        self.seen.append((verdict.states, copy.deepcopy(self.cache), verdict.accepted, missed))


@pytest.mark.parametrize("target", [4 / 3, 2.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_programme_equals_the_recursion_on_single_blocks(tiny, family, target):
    model, method = tiny(family), Watched(target_speedup=target, length=2, stop=0.0, every=1)
    text, _ = written(model, method, limit=5, cache=method.cache, length=12)
    held = 12
    assert method.seen
    for states, cache, accepted, missed in method.seen:
        held += 1 + accepted
        block = functools.partial(reference, model, cache, text[held - 1])
        assert missed == by_recursion(states, block, method.skipped(LAYERS))
        assert len(missed) == method.skipped(LAYERS)


def test_no_more_blocks_are_run_than_can_come_to_the_count():
    calls, states = [], torch.randn(9, 4, generator=torch.Generator().manual_seed(0))

    def rerun(layer, rows):
        calls.append((layer, len(rows)))
        return rows

    least_missed(states, rerun, 5)
    assert calls == [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (6, 2), (7, 1)]


def test_blocks_that_do_nothing_are_found(tiny):
    """From the second draft on all of it stands; of most other sets it does not."""
    model, cache = mute(tiny(), 0, 2), DynamicCache()
    method = CLaSp(target_speedup=2.0, stop=0.0)
    _, (first, *rest) = written(model, method, limit=20, cache=cache)
    plan = method.start(Context(cache))
    assert plan[0].tolist() == [[False, False], [True, True]] * 2
    assert first.accepted < len(first.drafted)
    assert len(rest) > 2
    assert all(each.accepted == len(each.drafted) for each in rest)
    refused = []
    for others in ((0, 1), (0, 3), (1, 2), (1, 3), (2, 3)):
        fixed = CLaSp(target_speedup=2.0, stop=0.0, every=99)
        plan = torch.tensor(plan_without(LAYERS, *itertools.product(others, (0, 1))))
        fixed.start = lambda context, plan=plan: plan
        _, rounds = written(model, fixed, limit=12)
        refused.append(sum(len(each.drafted) - each.accepted for each in rounds))
    assert sum(map(bool, refused)) >= 3, refused


class Context:
    """Of a next draft."""

    layers = LAYERS

    def __init__(self, cache):
        self.memory = cache._dyndepth_kept.memory


def test_each_text_has_its_own_plan_and_the_first_draft_the_spaced_one(tiny):
    model, method = tiny(), CLaSp(target_speedup=4 / 3, stop=0.0, every=1)
    plans = []

    def start(context, stock=method.start):
        plans.append(stock(context))
        return plans[-1]

    method.start = start
    caches = [DynamicCache(), DynamicCache()]
    for seed, each in enumerate(caches):
        plans.append(None)
        written(model, method, cache=each, seed=seed)
        assert plans[-1].shape == (1, LAYERS, 2)
    for place in (index for index, plan in enumerate(plans) if plan is None):
        assert torch.equal(plans[place + 1], method._first(LAYERS))
    assert all(int((~plan[..., 0]).sum()) == 1 for plan in plans if plan is not None)


@pytest.mark.parametrize(("every", "want"), [(1, 5), (2, 3), (5, 1)])
def test_a_programme_every_so_many_verifications(tiny, monkeypatch, every, want):
    made = []

    def counted(*given):
        made.append(least_missed(*given))
        return made[-1]

    monkeypatch.setattr("dyndepth.methods.clasp.least_missed", counted)
    method = CLaSp(target_speedup=2.0, stop=0.0, length=1, every=every)
    _, rounds = written(tiny(), method, limit=12)
    rounds = [each for each in rounds if each.drafted]
    assert len(rounds) >= 5
    assert -(-5 // every) == want
    assert len(made) == -(-len(rounds) // every)


@pytest.mark.parametrize(("target", "count"), [(1.0, 0), (1.1, 2), (1.25, 6), (1.5, 10), (2, 15)])
def test_how_many_blocks_are_left_out(target, count):
    method = CLaSp(target_speedup=target)
    assert method.skipped(30) == count
    first = method._first(30)[:, 0]
    assert int((~first).sum()) == count
    assert first[0]
    assert first[29]


def test_a_target_of_one_drafts_with_all_blocks(tiny):
    with pytest.warns(NothingSkipped, match="target speedup above 1"):
        _, rounds = written(tiny(), CLaSp(stop=0.0))
    assert all(each.accepted == len(each.drafted) for each in rounds)


def test_more_than_all_blocks_is_refused(tiny):
    method = CLaSp(target_speedup=5.0)
    with pytest.raises(UserError, match="at most 4, not 5; ask for less"):
        written(tiny(), method)
    assert method.max_speedup(4) == 4
    assert CLaSp(target_speedup=4.0).skipped(4) == 3
    with pytest.raises(ValueError, match="every must be at least 1, not 0"):
        CLaSp(every=0)


def test_by_bytes_a_programme_costs_the_weights_of_all_blocks(tiny):
    model = tiny()
    one, four = (
        CLaSp(target_speedup=2.0, adaptive="bytes", every=every).fit(model) for every in (1, 4)
    )
    parts = Decoder.of(model)
    size = sum(each.numel() for layer in parts.layers for each in layer.parameters())
    rest = sum(each.numel() for part in (parts.norm, parts.head) for each in part.parameters())
    assert one.facts[COST]["verify"] == pytest.approx(1 + size / (size + rest))
    assert four.facts[COST]["verify"] == pytest.approx(1 + size / (size + rest) / 4)
    assert one.facts[COST]["draft"] == pytest.approx((size / 2 + rest) / (size + rest))
    assert CLaSp(adaptive="bytes").fit(model).facts[COST]["verify"] == 1
    assert written(model, one)


@pytest.mark.parametrize("every", [1, 2, 8])
def test_a_measured_cost_has_each_verification_bear_its_part_of_a_programme(
    tiny, monkeypatch, every
):
    """By a clock of blocks that have run: a programme runs all but one of them."""
    model, ran = tiny(), []
    for layer in Decoder.of(model).layers:
        layer.mlp.register_forward_pre_hook(lambda *_: ran.append(None))
    timed = functools.partial(speculate, clock=lambda: float(len(ran)))
    monkeypatch.setattr("dyndepth.fitting.drafting.speculate", timed)
    given = {"adaptive": "measured", "length": 3, "every": every}
    cost = CLaSp(target_speedup=2.0, **given).fit(model).facts[COST]
    assert cost["draft"] == pytest.approx(1 / 2)
    assert cost["verify"] == pytest.approx(1 + 3 / 4 / every)
    whole = CLaSp(target_speedup=1.0, **given).fit(model).facts[COST]
    assert whole == {"draft": 1.0, "verify": 1.0}
