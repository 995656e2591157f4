"""Rotary tables that depend on how long a text is: a result depends on its own tokens alone.

What is expected comes from stock forwards of models that have read nothing before.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import attentions, make_tiny
from gating import GivenPlan, RandomMask, plan_without
from packaging.version import Version
from test_scoring import METHODS

from dyndepth.common.errors import UserError
from dyndepth.evaluation import plan_scoring
from dyndepth.evaluation.agreement import agree
from dyndepth.evaluation.forwards import forward
from dyndepth.evaluation.generation import Prompt, generate
from dyndepth.evaluation.responses import completions
from dyndepth.evaluation.scoring import Group, score, score_alone
from dyndepth.fitting.calibration import measured
from dyndepth.fitting.routers import stream_statistics
from dyndepth.fitting.unit_scores import _dense_pass, _salience
from dyndepth.methods.dense import Dense
from dyndepth.models.blocks import blocks, decoder
from dyndepth.models.families import FAMILIES
from dyndepth.models.rotary import forget, one_table, tables
from dyndepth.routes.trace import _executed
from dyndepth.runtime import many_plans
from dyndepth.runtime.attach import attach
from dyndepth.studies.similarity import cosines
from dyndepth.timing.levels import Level, Shape
from dyndepth.timing.measure import measure

LAYERS = 4
EDGE = 24
"""Tokens up to which the tables of the tiny models do not depend on the length."""
TOLERANCE = 2e-4

_THETA = {"rope_theta": 10000.0}
_ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": EDGE, **_THETA}
ROPES = {
    "default": _THETA,
    "linear": {"factor": 4.0, **_THETA},
    "dynamic": {"factor": 4.0, **_THETA},
    "yarn": _ORIGINAL,
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 9.0, 12.0], **_ORIGINAL},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
}
CHANGING = ("dynamic", "longrope")
PART = {"gpt_neox": 0.5}
"""Share of a head that is rotated, where it is not all."""
ONLY = {"phi3": ("default", "longrope")}
"""Rope types that a family's configuration takes, where it does not take all."""
ROTARY = [name for name, record in FAMILIES.items() if record.rotary]


def made(family="llama", rope="longrope", attn="sdpa", **changes):
    """A tiny model whose tables change after ``EDGE`` tokens, if they do."""
    part = PART.get(family, 1.0)
    given = {"rope_type": rope, **ROPES[rope]}
    for name in ("short_factor", "long_factor"):
        if name in given:
            given[name] = given[name][: int(len(given[name]) * part)]
    if part != 1.0:
        given["partial_rotary_factor"] = part
    settings = {"rope_parameters": given, "max_position_embeddings": 4 * EDGE}
    if rope == "dynamic":
        settings["max_position_embeddings"] = EDGE
    if family == "phi3":
        settings["original_max_position_embeddings"] = EDGE
    if family == "gemma3_text":
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        settings["rope_parameters"] = {"full_attention": given, "sliding_attention": plain}
    return make_tiny(family, attn, **settings | changes)


OLD = Version(transformers.__version__) < Version("5.24")


def kinds(ropes, often=("llama", "phi3", "gemma3_text", "gpt_neox", "mistral")):
    """Every family, rope type and attention; of those that change, some families' are not slow."""
    found = []
    for family in ROTARY:
        for rope in [one for one in ropes if one in ONLY.get(family, ROPES)]:
            for attn in attentions(family):
                if OLD and family == "gemma3_text" and rope == "longrope":
                    continue  # its own forward raises there
                quick = family in often and rope in CHANGING and attn == attentions(family)[0]
                marks = () if quick else pytest.mark.slow
                found.append(pytest.param(family, rope, attn, marks=marks))
    return pytest.mark.parametrize(("family", "rope", "attn"), found)


changing = pytest.mark.parametrize("rope", CHANGING)
both_phases = pytest.mark.parametrize("phases", ["both", "generation"])


def tokens(count, seed):
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def some_groups():
    """Documents below, at, across and beyond the edge, some behind one beginning."""
    shots = tokens(10, 0)
    shapes = [(3, (2,)), (12, (3,)), (9, (4, 8)), (2, (1,)), (30, (4, 1)), (14, (1,)), (15, (1,))]
    return [
        Group(f"t/{n}", shots + tokens(more, n + 1), [tokens(k, 50 * n + k) for k in lengths])
        for n, (more, lengths) in enumerate(shapes)
    ]


@torch.no_grad()
def stock(model, context, continuation):
    """Log-likelihood by one forward of a model that has read nothing before."""
    ids = torch.tensor([[*context, *continuation]])
    logits = copy.deepcopy(model)(ids[:, :-1]).logits[0, len(context) - 1 :]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum())


def expected(model, groups):
    return [[stock(model, one.context, more) for more in one.continuations] for one in groups]


def found(model, groups, batch_size=8, sharing=False, method=None):
    with attach(model, method or Dense()) as trace:
        results = dict(score(model, trace, groups, batch_size, sharing=sharing))
    return [[log for log, _ in results[n]] for n in range(len(groups))]


def check(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


# --- which tables -------------------------------------------------------------------------------


def test_tables_are_named_by_what_they_depend_on():
    longrope, dynamic = made(), made(rope="dynamic")
    assert one_table(longrope, 1, EDGE)
    assert not one_table(longrope, EDGE, EDGE + 1)
    assert one_table(longrope, EDGE + 1, 9 * EDGE)
    assert one_table(dynamic, 1, EDGE)
    assert not one_table(dynamic, EDGE, EDGE + 1)
    assert not one_table(dynamic, EDGE + 1, EDGE + 2)
    for rope in set(ROPES) - set(CHANGING):
        assert one_table(made(rope=rope), 1, 9 * EDGE)
    for family in ("gpt2", "opt", "bloom"):
        assert one_table(make_tiny(family), 1, 9 * EDGE)
    assert not one_table(made("gemma3_text"), EDGE, EDGE + 1)
    assert tables(made("gemma3_text"), EDGE) == (0, 0)


@kinds(ROPES)
def test_tables_of_one_name_are_equal(family, rope, attn):
    """Which tables a model uses is read off the rotary modules themselves."""
    model = made(family, rope, attn)
    (module,) = [one for one in model.modules() if hasattr(one, "rope_type")]
    layered = isinstance(module.rope_type, dict)
    names = list(module.rope_type) if layered else [None]

    def turned(count):
        fresh, positions = copy.deepcopy(module), torch.arange(count)[None]
        given = [{} if name is None else {"layer_type": name} for name in names]
        return torch.cat([torch.cat(fresh(torch.ones(1), positions, **one)) for one in given])[
            :, :5
        ]

    lengths = (8, EDGE, EDGE + 1, EDGE + 2, 3 * EDGE)
    for one in lengths:
        for other in lengths:
            same = torch.equal(turned(one), turned(other))
            assert same == one_table(model, one, other)


# --- scores -------------------------------------------------------------------------------------


@kinds(ROPES)
def test_a_document_is_scored_alike_in_any_company_and_order(family, rope, attn):
    model, groups = made(family, rope, attn), some_groups()
    wanted = expected(model, groups)
    check(found(model, groups), wanted)
    check(found(model, groups[::-1], batch_size=3, sharing=True)[::-1], wanted)
    for number in (4, 5, 1, 6, 0):  # one after the other, shorter after longer
        check(found(model, [groups[number]]), [wanted[number]])


@pytest.mark.parametrize("rope", sorted(set(ROPES) - set(CHANGING)))
def test_constant_tables_likewise(rope):
    model, groups = made(rope=rope), some_groups()
    wanted = expected(model, groups)
    check(found(model, groups), wanted)
    check(found(model, groups[::-1], sharing=True)[::-1], wanted)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(ROTARY)))
def test_families_without_rotary_tables_likewise(tiny, family):
    for attn in attentions(family):
        model, groups = tiny(family, attn), some_groups()
        wanted = expected(model, groups)
        check(found(model, groups), wanted)
        check(found(model, groups[::-1], sharing=True)[::-1], wanted)


@changing
@both_phases
@pytest.mark.parametrize("name", METHODS)
def test_methods_too(rope, phases, name):
    model, groups, method = made(rope=rope), some_groups(), METHODS[name](phases)
    with attach(model, method) as trace:
        wanted = [[log for log, _ in score_alone(model, trace, one)] for one in groups]
    for sharing in {False, not method.by_document}:
        check(found(model, groups, sharing=sharing, method=method), wanted)


@changing
def test_the_gate_blames_no_method(rope):
    model, groups, method = made(rope=rope), some_groups(), Dense()

    def together(chosen):
        with attach(model, method) as trace:
            some = [groups[index] for index in chosen]
            return list(dict(sorted(score(model, trace, some, 8, sharing=True))).values())

    def alone(some):
        with attach(model, method) as trace:
            return [score_alone(model, trace, one) for one in some]

    agree("task", method, "float32", groups, together, alone)


@pytest.mark.parametrize("length", [10, 40])
def test_texts_of_one_table_still_share_their_forwards(length):
    model, sizes = made(), []
    groups = [Group(f"t/{n}", tokens(length, n), [tokens(3, n)]) for n in range(4)]
    with attach(model, Dense()) as trace:
        watch = decoder(model).register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        list(score(model, trace, groups, 8))
    watch.remove()
    assert sizes == [4, 4], "contexts, continuations"


# --- completions --------------------------------------------------------------------------------

PROMPTS = [(9, 5), (EDGE - 4, 7), (EDGE, 3), (EDGE - 3, 4), (30, 4), (EDGE - 4, 6)]
"""Tokens of prompts and of their completions."""


def some_prompts(never=lambda done: False):
    return [
        Prompt(f"t/{n}", tokens(length, n), limit, never)
        for n, (length, limit) in enumerate(PROMPTS)
    ]


@torch.no_grad()
def completed(model, prompt):
    """Each token by one stock forward over all before it."""
    done, model = [], copy.deepcopy(model)
    while len(done) < prompt.limit:
        ids = torch.tensor([[*prompt.tokens, *done]])
        done.append(int(model(ids).logits[0, -1].argmax()))
    return done


@kinds(CHANGING, ("llama", "gemma3_text", "phi3"))
def test_completions_are_those_of_whole_forwards(family, rope, attn):
    model, prompts = made(family, rope, attn), some_prompts()
    # First: at the edge itself, a stock model that has read beyond it goes on as it did there.
    wanted = [completed(model, prompt) for prompt in prompts]
    with attach(model, Dense()) as trace:
        got = dict(generate(model, trace, prompts, 8))
        again = dict(generate(model, trace, prompts[::-1], 2))
    assert [got[number] for number in range(len(prompts))] == wanted
    assert [again[number] for number in range(len(prompts))] == wanted[::-1]


@pytest.mark.skipif(OLD, reason="its generate writes another token at the edge")
def test_a_model_that_reads_anew_at_the_edge_writes_the_same():
    model, prompts = made("phi3"), some_prompts()
    with attach(model, Dense()) as trace:
        got = dict(generate(model, trace, prompts, 8))
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([list(prompt.tokens)])
        settings = {"max_new_tokens": prompt.limit, "min_new_tokens": prompt.limit}
        text = model.generate(ids, do_sample=False, eos_token_id=None, **settings)
        assert got[number] == text[0, ids.shape[1] :].tolist()


@torch.no_grad()
def thinned(model, method, prompt):
    """``completed`` under a method, whose prompt phase is the prompt."""
    done = []
    with attach(model, method, documents=[prompt.document]) as trace:
        trace.prompt_length = len(prompt.tokens)
        while len(done) < prompt.limit:
            ids = torch.tensor([[*prompt.tokens, *done]])
            hidden, _ = forward(model, ids, torch.ones_like(ids), keep=False)
            done.append(int(trace.readout(hidden[:, -1], torch.zeros(1).long()).argmax()))
    return done


@changing
@both_phases
@pytest.mark.parametrize("name", METHODS)
def test_completions_under_methods(rope, phases, name):
    model, method = made(rope=rope), METHODS[name](phases)
    prompts = some_prompts()[:3]
    with attach(model, method) as trace:
        got = dict(generate(model, trace, prompts, 8))
        assert trace.prompt_length is None
    for number, prompt in enumerate(prompts):
        assert got[number] == thinned(model, method, prompt)


@changing
@both_phases
def test_completions_of_many_plans(rope, phases):
    model, prompts = made(rope=rope), some_prompts()[:3]
    plans = torch.tensor([plan_without(LAYERS), plan_without(LAYERS, (0, 0), (1, 1), (2, 0))])
    for place, plan, text in list(completions(model, plans, prompts, phases=phases, batch_size=8)):
        method = GivenPlan(plan=tuple(map(tuple, plans[plan].tolist())), phases=phases)
        assert text == thinned(model, method, prompts[place])


# --- many plans at once -------------------------------------------------------------------------


@kinds(CHANGING, ("llama", "gemma3_text"))
@both_phases
def test_many_plans_at_once(family, rope, attn, phases):
    model, groups = made(family, rope, attn), some_groups()
    plans = torch.tensor([plan_without(LAYERS), plan_without(LAYERS, (0, 0), (1, 1), (2, 0))])
    seen = []
    for index, results in plan_scoring.score(model, plans, groups, phases=phases):
        seen.append(index)
        for number, plan in enumerate(plans):
            method = GivenPlan(plan=tuple(map(tuple, plan.tolist())), phases=phases)
            with attach(model, method) as trace:
                wanted = score_alone(model, trace, groups[index])
            logs = [float(log[number].sum()) for log, _ in results]
            check([logs], [[log for log, _ in wanted]])
    assert sorted(seen) == list(range(len(groups)))


@changing
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_of_texts_of_several_lengths(rope, side):
    model, plans = made(rope=rope), torch.tensor([plan_without(LAYERS, (1, 0))])
    lengths, width = (20, 40, EDGE, 31, 40), 40
    ids = torch.tensor([tokens(width, 3)] * 5)
    mask = torch.zeros(5, width).long()
    for row, length in enumerate(lengths):
        mask[row, slice(width - length, None) if side == "left" else slice(length)] = 1
    which, states = many_plans.streams(model, plans, ids, mask=mask)
    assert states.shape == (1, 5, width, 32)
    assert which.tolist() == [0]
    for row in range(5):
        real = mask[row].bool()
        with attach(model, GivenPlan(plan=plan_without(LAYERS, (1, 0)))):
            alone = decoder(model)(ids[row, real][None]).last_hidden_state[0]
        torch.testing.assert_close(states[0, row, real], alone, atol=1e-5, rtol=0)


# --- what a model keeps -------------------------------------------------------------------------


def kept(model):
    """The numbers that the modules of a model hold beside their parameters."""
    return {
        (name, key): torch.as_tensor(value).clone()
        for name, module in model.named_modules()
        for key, value in [*vars(module).items(), *module.named_buffers(recurse=False)]
        if isinstance(value, (int, float, torch.Tensor))
    }


def moved(before, after):
    """Names of the modules that hold something else than before."""
    return {
        key[0]
        for key in before.keys() | after.keys()
        if key not in before or key not in after or not torch.equal(before[key], after[key])
    }


@kinds(ROPES)
def test_models_keep_nothing_else_between_forwards(family, rope, attn):
    model = made(family, rope, attn)
    rotary = {name for name, module in model.named_modules() if hasattr(module, "rope_type")}
    before = kept(model)
    with torch.no_grad():
        model(torch.tensor([tokens(60, 1)]), use_cache=True)
        changed = moved(before, kept(model))
        assert changed == (rotary if rope in CHANGING else set())
        forget(model)
        short = torch.tensor([tokens(EDGE, 2)])
        assert torch.equal(model(short).logits, copy.deepcopy(model)(short).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_constant_tables_keep_nothing(tiny, family):
    model = tiny(family)
    before = kept(model)
    with torch.no_grad():
        model(torch.tensor([tokens(60, 1)]), use_cache=True)
    forget(model)
    assert not moved(before, kept(model))


WINDOWS = torch.tensor([tokens(EDGE + 6, n) for n in range(3)])
USES = {
    "stream_statistics": lambda m: stream_statistics(m, WINDOWS, normalise=True)[0],
    "streams": lambda m: torch.tensor(_dense_pass(m, WINDOWS, False)["sublayer"]),
    "gradients": lambda m: torch.tensor(_salience(m, WINDOWS, False)),
    "losses": lambda m: many_plans.losses(m, torch.ones(1, LAYERS, 2).bool(), WINDOWS),
    "states": lambda m: many_plans.streams(m, torch.ones(1, LAYERS, 2).bool(), WINDOWS)[1],
    "cosines": lambda m: torch.tensor(
        [
            one["cosine"]
            for one in cosines(
                m,
                GivenPlan(plan=plan_without(LAYERS, (0, 0), (2, 1))),
                {"long": tokens(80, 1), "short": tokens(70, 2)},
            ).values()
        ]
    ),
    "calibration": lambda m: torch.tensor(
        measured(m, METHODS["early_exit"]("both"), WINDOWS).speedup
    ),
    "attached": lambda m: attached_logits(m),
}


@torch.no_grad()
def attached_logits(model):
    with attach(model, RandomMask()):
        return model(WINDOWS).logits


@changing
@pytest.mark.parametrize("use", USES)
def test_what_a_model_has_read_changes_no_fit(rope, use):
    fresh, used = made(rope=rope), made(rope=rope)
    with torch.no_grad():
        used(torch.tensor([tokens(90, 1)]))
    first = USES[use](used)
    assert torch.equal(first, USES[use](fresh))
    assert torch.equal(first, USES[use](fresh)), "again"


@changing
def test_recorded_routes_do_not_depend_on_their_order(rope):
    texts = {"long": "x" * 80, "short": "y" * 30, "edge": "z" * EDGE}
    read = lambda text, **_: {"input_ids": [[3 + ord(letter) % 90 for letter in text[0]]]}  # noqa: E731
    method = METHODS["early_exit"]("both")

    def gates(order):
        given = {name: texts[name] for name in order}
        rows = _executed(made(rope=rope), read, method, given, None, None)
        return dict(zip(order, [gates.tolist() for _, gates in rows], strict=True))

    assert gates(["long", "short", "edge"]) == gates(["edge", "short", "long"])


# --- timed passes -------------------------------------------------------------------------------


@changing
def test_timed_passes_are_compared_where_one_table_serves(rope):
    model, groups = made(rope=rope), some_groups()
    logs = found(model, groups)
    scored = [
        (g.context, g.continuations[-1], log[-1]) for g, log in zip(groups, logs, strict=True)
    ]
    level = Level((Shape(1, 8, 2),), 2, 1, 1, 0, 1.0, 0.0)

    def row(some):
        return measure(model, Dense(), WINDOWS, level=level, check=some, progress=False)[0]

    assert row(scored)["reproduces_scores"] is True
    assert not one_table(model, *groups[2].read)
    assert row(scored[2:3])["reproduces_scores"] is None, "nothing to check"


def test_a_wrapped_model_has_the_tables_of_what_it_wraps():
    peft = pytest.importorskip("peft")
    model = made(rope="dynamic")
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"], r=2)
    )
    assert tables(wrapped, 40) == tables(model, 40) == (40,)
    assert len(blocks(wrapped)) == LAYERS
    groups = some_groups()[:6]
    check(found(wrapped, groups), expected(model, groups))


def test_types_that_are_not_known_are_refused():
    """What their tables depend on is not known either."""
    model = make_tiny()
    model.config.rope_parameters = {"rope_type": "spiral", "rope_theta": 10000.0}
    with pytest.raises(UserError, match="'spiral'"):
        tables(model, 4)
