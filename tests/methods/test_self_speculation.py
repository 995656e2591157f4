"""Self-speculation: drafts are what the named method runs, and what cannot draft is refused."""

from __future__ import annotations

import pytest
import torch
from test_attach import ids

import dyndepth
from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method
from dyndepth.fitting.drafting import COST
from dyndepth.method import Draft
from dyndepth.methods.prompt_router import PromptRouter
from dyndepth.methods.skipgpt import SkipGPT
from dyndepth.runtime.attach import attach
from dyndepth.runtime.draft_costs import by_bytes
from dyndepth.runtime.speculation import speculate

TARGET, PROMPT = 1.5, [5, 17, 3, 40, 22]


def quick(cls, **more) -> str:
    return f"{cls.name}({', '.join(f'{k}={v}' for k, v in (cls.quick | more).items())})"


DRAFTS = [
    "dense",
    "uls",
    "uls(scale=token, windows=2, length=16)",
    "static_pruning(windows=2, length=16, criterion=joint)",
    "early_exit(layer=2)",
    "early_exit",
    "random_skip",
    "random_mask(rates=uniform, length=48)",
    "skipdecode(positions=4)",
    "adaskip(windows=2, length=16)",
    quick(SkipGPT),
    quick(PromptRouter),
    "flexidepth(steps=4, batch=2, length=32)",
]


def dense(model, count: int) -> list[int]:
    """Steps of the whole model, each over all tokens before it."""
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def written(model, method, count: int = 24):
    with attach(model, method) as trace:
        rounds = speculate(model, trace, method, PROMPT, limit=count)
        return [token for each in rounds for token in each], trace.speculation


@pytest.mark.parametrize("draft", DRAFTS)
def test_whatever_drafts_the_text_is_the_whole_models(tiny, tiny_corpus, draft, tmp_path):
    model = tiny()
    spec = {"draft": draft, "target_speedup": TARGET, "stop": 0.0, "length": 3}
    method = load_method("self_speculation", **spec).fit(model, tiny_corpus)
    tokens, seen = written(model, method)
    assert tokens == dense(model, 24)
    assert seen.drafted > 6
    assert seen.acceptance == 1.0 if draft == "dense" else seen.acceptance < 1.0
    method.save(tmp_path / "fit", model)
    again, drafts = written(model, dyndepth.load_method(tmp_path / "fit"))
    assert again == tokens
    assert [each.drafted for each in drafts.rounds] == [each.drafted for each in seen.rounds]


@pytest.mark.parametrize(
    "draft",
    [
        "static_pruning(windows=2, length=16)",
        "random_mask(rates=uniform, length=48)",
        "early_exit(layer=1)",
    ],
)
def test_a_draft_is_what_the_method_alone_would_write(tiny, tiny_corpus, draft):
    """Attached alone with the prompt at full depth, it writes each draft after the same text."""
    model = tiny()
    method = load_method(
        "self_speculation", draft=draft, target_speedup=TARGET, seed=3, stop=0.0, length=3
    ).fit(model, tiny_corpus)
    alone = load_method(draft, target_speedup=TARGET, seed=3, phases="generation")
    alone.fit(model, tiny_corpus)
    tokens, seen = written(model, method)
    at, drafts = 1, 0
    for each in seen.rounds:
        so_far = [*PROMPT, *tokens[:at]]
        cut, found = len(so_far) - 1, []
        for _ in each.drafted:
            text = torch.tensor([so_far + found])
            # All but the drafted tokens, and the one before them, are read at full depth.
            with attach(model, alone, prompt_length=cut):
                found.append(int(model(text).logits[0, -1].argmax()))
        assert tuple(found) == each.drafted
        drafts += len(found)
        at += len(each.tokens)
    assert drafts > 6


def test_the_target_and_the_seed_are_the_drafts(tiny):
    method = load_method("self_speculation", draft="random_skip", target_speedup=1.25, seed=7)
    assert (method.drafter.target_speedup, method.drafter.seed) == (1.25, 7)
    named = load_method("self_speculation", draft="random_skip(seed=2)", seed=7)
    assert named.drafter.seed == 2
    exits = load_method("self_speculation", draft="early_exit(layer=8)")
    assert exits.max_speedup(32) == 4.0
    assert (exits.granularity, exits.kv_policy, exits.phases) == (
        "static",
        "prompt_only",
        "generation",
    )
    masks = load_method("self_speculation", draft="random_mask", target_speedup=1.25)
    assert (masks.granularity, masks.kv_policy) == ("token", "project")
    assert masks.needs_training
    assert not masks.by_document
    assert load_method("self_speculation", draft="prompt_router").reads_prompt
    assert load_method("self_speculation", draft="static_pruning(length=64)").window_length == 64
    assert load_method("self_speculation", length=64).window_length is None


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        ("oracle", "it is a bound"),
        ("exit_oracle", "it is a bound"),
        ("skipgpt(kv=evict)", "evicts.*kv=project"),
        ("mod", "evicts.*as it was; name another method"),
        ("d_llm", "evicts.*as it was; name another method"),
        ("self_speculation", "speculates itself"),
        ("uls(phases=both)", "asks for phases=both.*leave phases out"),
        ("uls(target_speedup=2.0)", "names its target; give it to self_speculation"),
        ("uls, dense", "draft names 2 methods; give one"),
        ("usl", "unknown method 'usl'.*did you mean uls"),
        ("uls(windows=2)", "windows is of the text that scales are measured on"),
        ("", "no method given"),
    ],
)
def test_what_cannot_draft_is_refused_in_one_sentence(draft, says):
    with pytest.raises(UserError, match=says):
        load_method("self_speculation", draft=draft)


def test_numbers_that_make_no_sense_are_refused():
    for given, says in (({"length": -1}, "at least 0"), ({"stop": 1.5}, "between 0 and 1")):
        with pytest.raises(UserError, match=says):
            load_method("self_speculation", **given)


def test_unfitted_drafts_are_refused(tiny):
    model = tiny()
    method = load_method("self_speculation", target_speedup=TARGET)
    with pytest.raises(UserError, match="self_speculation is not fitted"), attach(model, method):
        pass
    with attach(model, load_method("self_speculation", draft="early_exit(layer=2)")):
        model(ids(1, 4))  # an exit needs no fit


def test_recalibration_reaches_the_draft(tiny, tiny_corpus):
    method = load_method("self_speculation", draft="early_exit", target_speedup=TARGET)
    method.fit(tiny(), tiny_corpus)
    before = method.facts["threshold"]
    method.calibrate(tiny(seed=1), tiny_corpus)
    assert method.facts["threshold"] != before
    assert method.drafter.facts["threshold"] == method.facts["threshold"]


def test_the_cost_in_bytes_is_that_of_the_plan(tiny, tiny_corpus):
    model = tiny()
    method = load_method("self_speculation", draft="uls", target_speedup=2.0, adaptive="bytes")
    with pytest.raises(UserError, match="not fitted"), attach(model, method):
        pass
    method.fit(model)  # a plan needs no text
    plan = method.drafter.plan(4)
    assert method.facts[COST] == {"draft": by_bytes(model, plan).draft, "verify": 1.0}
    masks = load_method(
        "self_speculation",
        draft="random_mask(rates=uniform, length=48)",
        target_speedup=2.0,
        adaptive="bytes",
    )
    with pytest.raises(UserError, match="give fit a corpus"):
        masks.fit(model)
    masks.fit(model, tiny_corpus)
    half = by_bytes(model, torch.full((4, 2), 0.5), projected=True).draft
    assert masks.facts[COST]["draft"] == pytest.approx(half, rel=0.05)


def test_a_measured_cost_is_one(tiny):
    method = load_method(
        "self_speculation", draft="early_exit(layer=1)", adaptive="measured", length=2
    ).fit(tiny())
    cost = method.facts[COST]
    assert cost["verify"] == 1.0
    assert 0.0 <= cost["draft"] < 50
    assert method.more(Draft(0, lambda: [], {})) in (True, False)
