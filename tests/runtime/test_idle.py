"""Nobody takes a silent dense run for a fast one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields

import pytest
import torch
from gating import GivenPlan, RandomMask, plan_without
from recording import StandIn
from test_attach import ids, incremental
from toys import Drafting

from dyndepth.common.errors import NothingSkipped, UserError
from dyndepth.common.registry import load_method, method_class, methods
from dyndepth.method import DynamicDepthMethod
from dyndepth.runtime.attach import attach
from dyndepth.runtime.graphs import Graphs
from dyndepth.runtime.limits import ALWAYS, Limits

NEVER = Limits(attention=0.0, mlp=0.0, tokens=0)
PLAN = plan_without(4, (1, 0), (2, 1))


@dataclass(kw_only=True)
class Needy(DynamicDepthMethod):
    """Needs a fit, and lets everything run without one."""

    name = "needy"
    granularity = "static"
    paper = "test"

    def fit(self, model, corpus=None):
        self.tensors["plan"] = torch.tensor(PLAN)
        return self

    def start(self, context):
        return self.tensors.get("plan", torch.ones(context.layers, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (
            GivenPlan(plan=PLAN, phases="generation", target_speedup=1.5),
            "given_plan skipped nothing: its phases are 'generation' and every forward was a "
            "prompt",
        ),
        (
            RandomMask(rate=1.0, target_speedup=1.5),
            "random_mask skipped nothing: in all 2 forwards in which it was asked, every token",
        ),
        (GivenPlan(plan=plan_without(4), target_speedup=1.5), "look at its threshold"),
    ],
)
@pytest.mark.parametrize("backend", ["sparse", "masked"])
def test_a_with_in_which_nothing_was_skipped_says_why(tiny, method, reason, backend):
    model = tiny()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with attach(model, method, backend=backend):
            model(ids(2, 70))
            model(ids(2, 5))
    assert said[0].category is NothingSkipped
    assert reason in str(said[0].message)
    assert len(said) == 1
    assert said[0].filename == __file__


def test_padding_alone_is_named(tiny):
    model, method = tiny(attn="eager"), GivenPlan(plan=plan_without(4), target_speedup=1.5)
    with pytest.warns(NothingSkipped, match="every token was padding"), attach(model, method):
        model(ids(2, 4), attention_mask=torch.zeros_like(ids(2, 4)))


@dataclass(kw_only=True)
class Padding(DynamicDepthMethod):
    """Closes its gates on padding, and on the last tokens, so many."""

    more: int = 0
    phases: str = "both"

    name = "padding"
    granularity = "token"
    paper = "test"

    def gates(self, layer, hidden):
        gate = self.context.valid.clone()
        gate[:, gate.shape[1] - self.more :] = False
        return gate, gate


@pytest.mark.parametrize(("more", "gated"), [(0, 0), (1, 8)])
@pytest.mark.parametrize("phases", ["both", "generation"])
@pytest.mark.parametrize("backend", ["sparse", "masked"])
def test_gates_closed_on_padding_alone_skip_nothing(tiny, backend, phases, more, gated):
    """Neither backend warns of less, nor counts more, than the other."""
    model, tokens = tiny(attn="eager"), ids(2, 8)
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    method = Padding(target_speedup=1.5, more=more, phases=phases)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with attach(model, method, backend=backend, limits=ALWAYS, prompt_length=2) as trace:
            model(tokens, attention_mask=mask)
            assert trace.computed_for_all() == (gated * (backend == "masked"), gated)
            assert (trace.executed() < 1).all() == bool(gated)
    assert [each.category for each in said] == [NothingSkipped] * (not gated)


@pytest.mark.parametrize("without", [1, None])
@pytest.mark.parametrize("target", [1.0, 1.5])
def test_of_a_method_that_speculates_drafts_are_watched(tiny, without, target):
    """One of the whole model costs, whatever its target is."""
    model, method = tiny(), Drafting(without=without, target_speedup=target)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with attach(model, method):
            model(ids(1, 5))
        assert not said
        with attach(model, method):
            model.generate(ids(1, 5), max_new_tokens=6, do_sample=False)
    remedy = "target speedup above 1" if target == 1.0 else "name one"
    assert [remedy in str(each.message) for each in said] == [True] * (without is None)


@dataclass(kw_only=True)
class DraftedMask(RandomMask):
    """A mask whose tokens nobody has counted when the forward ends."""

    speculates = True
    phases: str = "generation"

    def more(self, draft):
        return draft.length < 3


def test_drafts_by_tokens_are_watched_too(tiny):
    model = tiny()
    for rate, count in ((0.5, 0), (1.0, 1)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with attach(model, DraftedMask(rate=rate), limits=ALWAYS):
                model.generate(ids(1, 5), max_new_tokens=9, do_sample=False)
        assert len(said) == count, [str(each.message) for each in said]


def failing(model, method, backend):
    with attach(model, method, backend=backend):
        model(ids(1, 3))
        raise ZeroDivisionError


@pytest.mark.parametrize("limits", [None, ALWAYS, NEVER])
@pytest.mark.parametrize("backend", ["sparse", "masked"])
def test_nothing_is_said_where_there_is_nothing_to_say(tiny, limits, backend):
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (
            RandomMask(target_speedup=1.5),
            GivenPlan(plan=PLAN, target_speedup=1.5),
            GivenPlan(plan=plan_without(4)),
            load_method("dense", target_speedup=1.5),
            load_method("uls", phases="generation"),
        ):
            with attach(model, method, limits=limits, backend=backend):
                model(ids(2, 9))
        late = GivenPlan(plan=PLAN, phases="generation", target_speedup=1.5)
        with attach(model, late, backend=backend):
            incremental(model, ids(1, 6), prompt=4)
        with attach(model, late, backend=backend):
            pass
        with attach(model, late, backend=backend, warn=False):
            model(ids(1, 3))
        with pytest.raises(ZeroDivisionError):
            failing(model, late, backend)


def test_unfitted_is_refused_before_anything_runs(tiny):
    model, method = tiny(), Needy(target_speedup=1.5)
    says = r"needy is not fitted.*\.fit\(model, corpus\)"
    with pytest.raises(UserError, match=says), attach(model, method):
        pass
    with attach(model, Needy()):  # at full depth there is nothing to fit
        model(ids(1, 3))
    with attach(model, method.fit(model)) as trace:
        model(ids(1, 3))
    assert trace.totals()["block_flops"] < trace.totals()["dense_block_flops"]


@pytest.mark.parametrize("phases", ["both", "generation"])
@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("target", [1.0, 1.5])
def test_an_unfitted_method_skips_by_rule_or_refuses(tiny, name, phases, target):
    cls, model = method_class(name), tiny()
    given = {"phases": phases} if "phases" in {f.name for f in fields(cls)} else {}
    method = load_method(name, target_speedup=min(target, cls().max_speedup(4)), **given)
    if not method.fitted:
        says = r"is not fitted.*\.fit\(model, corpus\)"
        with pytest.raises(UserError, match=says), attach(model, method):
            pass
        return
    with attach(model, method, documents=["a"], warn=False) as trace:
        incremental(model, ids(1, 12), prompt=4)
    totals = trace.totals()
    # One that speculates skips in drafts alone, and these steps are none.
    whole = method.target_speedup == 1.0 or method.speculates
    assert whole == (totals["block_flops"] == totals["dense_block_flops"])


def test_what_ran_for_all_tokens_although_gated_is_told(tiny):
    """Four blocks have eight sublayers; the mask gates them all, the plan two."""
    model, tokens = tiny(), ids(2, 70)
    cases = [
        (RandomMask(), "sparse", NEVER, (8, 8)),
        (RandomMask(), "sparse", ALWAYS, (0, 8)),
        (RandomMask(sublayers=(1,)), "sparse", NEVER, (4, 4)),
        (RandomMask(), "masked", None, (8, 8)),
        (GivenPlan(plan=PLAN), "sparse", None, (0, 2)),
        (GivenPlan(plan=PLAN), "masked", None, (2, 2)),
        (RandomMask(rate=1.0), "sparse", None, (0, 0)),
        (RandomMask(rate=1.0), "masked", None, (0, 0)),
    ]
    for method, backend, limits, wanted in cases:
        with attach(model, method, backend=backend, limits=limits, warn=False) as trace:
            assert trace.computed_for_all() == (0, 0)
            model(tokens)
            assert trace.computed_for_all() == wanted
            model(tokens)
            assert trace.computed_for_all() == tuple(2 * each for each in wanted)
            trace.reset()
            assert trace.computed_for_all() == (0, 0)


def test_recorded_steps_tell_it_too(tiny):
    """Three sublayers are gated, of which both sequences skip one: a step runs the other two for
    all, the prompt gathers."""
    model = tiny()
    plans = {"a": PLAN, "b": plan_without(4, (1, 0), (3, 1))}
    with (
        torch.inference_mode(),
        Graphs(StandIn()) as graphs,
        attach(
            model, GivenPlan(plan=plans), documents=["a", "b"], mode=graphs, limits=ALWAYS
        ) as trace,
    ):
        incremental(model, ids(2, 9), prompt=8)
        assert graphs.steps == 1
    assert trace.computed_for_all() == (2, 6)


def test_uncounted_nothing_is_known(tiny):
    with attach(tiny(), RandomMask(), count=False) as trace:
        pass
    with pytest.raises(RuntimeError, match="count=False"):
        trace.computed_for_all()
