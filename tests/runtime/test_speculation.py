"""What is written by drafts is what the whole model writes, however the drafts are made."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass

import pytest
import torch
from conftest import DEVICE, make_tiny, variants
from gating import RandomMask, plan_without
from recording import StandIn
from speculating import ENDLESS, dense, drafted, gap, parts, prompts
from test_flops import counted
from toys import Drafting, Remembering
from transformers import DynamicCache, StaticCache
from updating import Reading, Scaled

from dyndepth.common.errors import MethodFault, UserError
from dyndepth.models.caches import cache_argument
from dyndepth.models.families import FAMILIES
from dyndepth.runtime.attach import attach, attached
from dyndepth.runtime.choosing import Choice
from dyndepth.runtime.flops import BlockCosts
from dyndepth.runtime.graphs import Graphs
from dyndepth.runtime.speculation import speculate

LAYERS, LIMIT = 4, 18
DRAFTS = {
    "a block": Drafting(),
    "the first": Drafting(without=0, length=2),
    "no block": Drafting(without=[0, 1, 2, 3], length=3),
    "all of it": Drafting(without=None),
    "no draft": Drafting(length=0),
}
WINDOWS = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "smollm3": {"use_sliding_window": True, "sliding_window": 8},
    "gemma2": {},
    "gemma3_text": {},
}


@functools.cache
def written(family, attn, count=3, limit=LIMIT):
    """A model, and for each prompt what it writes."""
    model = make_tiny(family, attn)
    return model, tuple((prompt, dense(model, prompt, limit)) for prompt in prompts(count))


@variants()
def test_texts_are_the_dense_ones(family, attn):
    """In float32: identical. The ledger is that of dense, drafts apart."""
    model, texts = written(family, attn)
    for name, method in DRAFTS.items():
        if attn == "eager" and name not in ("a block", "no block"):
            continue
        some = texts if attn == "sdpa" and name == "a block" else texts[:1]
        trace = parts(model, method, some, LIMIT)
        totals, found = trace.totals(), trace.speculation
        assert bool((trace.executed() == 1).all())
        assert totals["tokens"] == sum(len(prompt) + LIMIT - 1 for prompt, _ in some)
        assert totals["block_flops"] == totals["dense_block_flops"]
        assert all(each.accepted <= len(each.drafted) for each in found.rounds)
        if name == "all of it":
            assert found.acceptance == 1.0
            assert found.tokens_per_verification > 4
        assert (found.drafted == 0) == (name == "no draft")


@pytest.mark.slow
@variants()
def test_many_texts_are_the_dense_ones(family, attn):
    """200 prompts of 64 tokens."""
    model, texts = written(family, attn, 200, 64)
    parts(model, DRAFTS["a block"], texts, 64)
    for name in ("the first", "no block", "all of it"):
        parts(model, DRAFTS[name], texts[:20], 64)


def test_bfloat16_parts_at_ties_alone(tiny, record_property):
    """A verification reads several tokens at once, by other kernels than a step."""
    model = tiny("llama").bfloat16()
    given = prompts(6)
    with attach(model, Drafting(length=3)) as trace:
        found = [drafted(model, trace, Drafting(length=3), prompt, 24) for prompt in given]
    apart = []
    for prompt, text in zip(given, found, strict=True):
        differs = gap(model, prompt, dense(model, prompt, 24), text)
        if differs is not None:
            distance, size = differs
            apart.append(
                distance / 2.0 ** (math.floor(math.log2(size)) - 7)
            )  # in units of bfloat16
    record_property("parted", f"{len(apart)} of {len(given)}")
    assert all(each <= 8 for each in apart), apart


@pytest.mark.parametrize("family", WINDOWS)
def test_windows_reach_as_far_as_in_dense(tiny, family):
    """Beyond a window of 8; the cache keeps all tokens, the masks do not."""
    model = tiny(family, **WINDOWS[family])
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"]
    assert "sliding_attention" in kinds
    texts = [(prompt, dense(model, prompt, 24)) for prompt in prompts(2, 11)]
    parts(model, Drafting(without=0), texts, 24)


def rope(kind):
    return {
        "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "longrope": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 16,
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "short_factor": [1.0, 1.5, 1.0, 1.2],
            "factor": 4.0,
        },
    }[kind]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_tables_that_change_with_length_are_dense_ones(tiny, kind):
    """No draft lies across a change of tables; beyond it drafts go on where the table stays."""
    model = tiny("llama", rope_parameters=rope(kind), max_position_embeddings=16)
    texts = [(prompt, dense(model, prompt, 24)) for prompt in prompts(3, 6)]
    trace = parts(model, Drafting(), texts, 24)
    lengths = [len(each.drafted) for each in trace.speculation.rounds]
    assert 4 in lengths
    assert 0 in lengths


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_a_text_may_end_at_the_last_position(tiny, family):
    """No draft reads beyond it."""
    model = tiny(family, max_position_embeddings=24)
    prompt = prompts(1)[0]
    limit = 24 - len(prompt) + 1
    parts(model, Drafting(), [(prompt, dense(model, prompt, limit))], limit)


def test_a_model_that_keeps_no_logits_is_read_whole(tiny):
    model = tiny()
    texts = [(prompt, dense(model, prompt, 9)) for prompt in prompts(2)]
    stock = type(model)

    class Plain(stock):
        def forward(self, input_ids=None, past_key_values=None, use_cache=None):
            given = {cache_argument(stock_model): past_key_values, "use_cache": use_cache}
            return stock.forward(self, input_ids, **given)

    Plain.__name__, stock_model = stock.__name__, tiny()
    model.__class__ = Plain
    parts(model, Drafting(), texts, 9)


# --- caches -----------------------------------------------------------------------------------


def test_a_cache_may_hold_the_first_part(tiny):
    """Read before anything was attached, by the whole model."""
    model = tiny()
    prompt = prompts(1, 12)[0]
    want = dense(model, prompt, 15)
    for held in (1, 6, len(prompt) - 1):
        cache = DynamicCache()
        model(torch.tensor([prompt[:held]], device=DEVICE), **{cache_argument(model): cache})
        with attach(model, Drafting()) as trace:
            assert drafted(model, trace, Drafting(), prompt, 15, cache=cache) == want
            assert trace.totals()["tokens"] == len(prompt) - held + 14


def test_caches_that_cannot_give_up_tokens_are_refused(tiny):
    model = tiny("mistral")
    prompt = prompts(1)[0]
    full = DynamicCache()
    model(torch.tensor([prompt], device=DEVICE), **{cache_argument(model): full})

    class Quantised(type(full.layers[0])):
        def update(self, keys, values, *args, **kwargs):
            return super().update(keys, values)

    odd = DynamicCache()
    odd.layers.append(Quantised())
    cases = [
        (DynamicCache(config=model.config), "DynamicSlidingWindowLayer of the cache cannot give"),
        (StaticCache(config=model.config, max_cache_len=64), "of the cache cannot give up"),
        (odd, "Quantised of the cache cannot give up"),
        (full, "one at least must be left to read"),
    ]
    with attach(model, Drafting()) as trace:
        for cache, said in cases:
            with pytest.raises(UserError, match=said):
                next(speculate(model, trace, Drafting(), prompt, limit=4, cache=cache))
        assert list(speculate(model, trace, Drafting(), prompt, limit=0)) == []
        assert trace.totals()["tokens"] == 0


# --- ends and failures ------------------------------------------------------------------------


def test_a_text_ends_inside_a_draft_and_at_its_limit(tiny):
    """At each place; what stands is up to the end, and the cache is as long."""
    model = tiny()
    prompt = prompts(1)[0]
    want = dense(model, prompt, 14)
    with attach(model, Drafting(without=None)) as trace:
        for end in range(1, 15):
            trace.reset()
            ends = lambda text, end=end: len(text) == end  # noqa: E731
            assert drafted(model, trace, Drafting(), prompt, 14, ends=ends) == want[:end]
            assert trace.totals()["tokens"] == len(prompt) + end - 1
            assert drafted(model, trace, Drafting(), prompt, end) == want[:end]


class Interrupted(KeyboardInterrupt):
    pass


@dataclass(kw_only=True)
class Failing(Drafting):
    """Fails when it is asked the ``nth`` time for ``what``."""

    what: str = ""
    nth: int = 0

    def count(self, what):
        if what == self.what:
            self.nth -= 1
            if self.nth < 0:
                self.what = ""
                raise Interrupted

    def start(self, context):
        self.count("start")
        return super().start(context)

    def more(self, draft):
        self.count("more")
        return super().more(draft)

    def verified(self, verdict):
        self.count("verified")


def test_whatever_fails_a_round_leaves_nothing(tiny):
    """At any block of a draft or a verification, in the method, in an end, in a rule."""
    model = tiny()
    prompt = prompts(1)[0]
    want = dense(model, prompt, 16)
    layers = model.model.layers
    classes = [type(each) for each in layers]
    failing = [0]

    def fail(*_):
        failing[0] -= 1
        if failing[0] == 0:
            raise Interrupted

    def rules(written, logits):
        fail()
        return logits.clone()

    def ends(written):
        fail()
        return False

    def run(method, calls=0, hook=None, **how):
        handle = hook and hook.register_forward_hook(fail)
        cache, text = DynamicCache(), []
        failing[0] = 0
        with attach(model, method, documents=["d"]) as trace:
            try:
                for tokens in speculate(model, trace, method, prompt, limit=16, cache=cache, **how):
                    text += tokens
                    if len(text) == 1:
                        failing[0] = calls
            except Interrupted:
                pass
            else:
                raise AssertionError("it did not fail")
            finally:
                failing[0] = 0
                if handle:
                    handle.remove()
            assert {each.get_seq_length() for each in cache.layers} == {len(prompt) + len(text) - 1}
            assert (trace.drafting, trace.documents) == (False, ["d"])
            assert sum(len(each.tokens) for each in trace.speculation.rounds) == len(text) - 1
            more = drafted(model, trace, method, prompt + text, 16 - len(text), cache=cache)
            assert text + more == want
            assert trace.totals()["tokens"] == len(prompt) + 15
            assert sum(trace.flops.values()) == pytest.approx(trace.totals()["total_flops"])
        assert not attached(model)
        assert [type(each) for each in layers] == classes

    for layer in (0, 1, 3):
        for calls in (1, 2, 4, 5, 8):  # of drafts, whose block 1 runs in verifications alone
            run(Drafting(), calls if layer != 1 else min(calls, 2), layers[layer])
    for layer in (0, 3):
        run(Drafting(length=0), 3, layers[layer])
    for what in ("start", "more", "verified"):
        for nth in (0, 2):
            run(Failing(what=what, nth=nth))
    for calls in (1, 2, 3):
        run(Drafting(), calls, ends=ends)
        run(Drafting(), calls + 3, choice=Choice(rules=rules))


def test_a_reader_may_stop(tiny):
    model = tiny()
    prompt = prompts(1)[0]
    want, cache, text = dense(model, prompt, 16), DynamicCache(), []
    with attach(model, Drafting()) as trace:
        for tokens in speculate(model, trace, Drafting(), prompt, limit=16, cache=cache):
            text += tokens
            if len(text) > 4:
                break
        text += drafted(model, trace, Drafting(), prompt + text, 16 - len(text), cache=cache)
    assert text == want


def test_what_speculates_drafts_generated_tokens_and_evicts_nothing(tiny):
    model = tiny()
    for change in ({"phases": "both"}, {"kv_policy": "evict"}):

        class Wrong(Drafting):
            vars().update({"kv_policy": change.get("kv_policy", "prompt_only")})

        method = Wrong(phases=change.get("phases", "generation"))
        with pytest.raises(MethodFault, match="speculates"), attach(model, method):
            pass


# --- what is counted --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "backend"), [*((each, "sparse") for each in FAMILIES), ("llama", "masked")]
)
def test_ledger_equals_counter(tiny, family, backend):
    """Drafts and all; block FLOPs, heads and tokens are those of the whole model alone."""
    model = tiny(family, "eager")
    prompt = prompts(1)[0]
    ids = torch.tensor([prompt], device=DEVICE)
    with attach(model, RandomMask(rate=1.0), documents=["d"], warn=False) as trace:
        model.generate(ids, max_new_tokens=8, do_sample=False, **ENDLESS)
        want = [trace.totals(phase) for phase in ("prompt", "generation")]
    with attach(model, Drafting(), documents=["d"], backend=backend) as trace:
        flops = counted(lambda: drafted(model, trace, Drafting(), prompt, 8))
        assert flops == sum(trace.flops.values())
        found = [trace.totals(phase) for phase in ("prompt", "generation")]
        assert trace.by_document()["d"]["total_flops"] == trace.totals()["total_flops"]
        assert trace.gates().shape[2:] == (LAYERS, 2)
        assert bool(trace.gates().all())
    assert found[0] == want[0]
    drafts = found[1].pop("by_cause")["draft"]
    want[1].pop("by_cause")
    assert found[1].pop("total_flops") == want[1].pop("total_flops") + drafts
    assert found[1] == want[1]


def test_a_draft_costs_what_its_blocks_do(tiny):
    """One round by hand: two drafted tokens without block 1, and three that are verified."""
    model = tiny()
    costs, prompt = BlockCosts.of(model), prompts(1)[0]
    method = Drafting(length=2)
    with attach(model, method) as trace:
        rounds = speculate(model, trace, method, prompt, limit=9)
        next(rounds)
        before = trace.totals()
        next(rounds)
        after = trace.totals()
        stood = len(trace.speculation.rounds[0].tokens)
    past = len(prompt)

    def step(keys, without=None):
        blocks = costs.attention(keys) + costs.mlp
        return sum(v for n, v in enumerate(blocks) if n != without) + costs.lm_head

    spent = step(past + 1, 1) + step(past + 2, 1) + 3 * step(past + 3)
    standing = sum(step(past + n + 1) for n in range(stood))
    found = {key: after[key] - before[key] for key in ("tokens", "total_flops")}
    assert found == {"tokens": stood, "total_flops": spent}
    cause = after["by_cause"]["draft"] - before["by_cause"]["draft"]
    assert cause == spent - standing


def test_what_is_asked_of_a_prompt_is_a_drafts_cost(tiny):
    """A draft that reads its prompt by a router: nothing of that is the whole model's work."""

    @dataclass(kw_only=True)
    class Routed(Remembering):
        speculates = True

        def start(self, context):
            self.context = context
            return super().start(context)

        def gates(self, layer, hidden):
            self.context.bill("router", 100.0, None)
            return super().gates(layer, hidden)

    model, ids = tiny(), torch.tensor([prompts(1)[0]], device=DEVICE)
    with attach(model, Routed(phases="generation"), warn=False) as trace:
        model(ids)
    assert (trace.flops["router"], trace.flops["draft"]) == (0.0, LAYERS * 100.0 * ids.shape[1])


@pytest.mark.parametrize("what", ["the head fails", "a rule runs the model"])
def test_what_stands_is_said_of_the_verification_itself(tiny, what):
    model, prompt, method = tiny(), prompts(1)[0], Drafting(without=None, length=3)
    again = torch.tensor([[5, 6]], device=DEVICE)
    failing = [what == "the head fails"]

    def head(module, args, output):
        if failing[0] and args[0].shape[1] > 1:
            raise Interrupted

    def rule(tokens, logits):
        if what == "a rule runs the model":
            model(again)
        return logits.clone()

    with attach(model, method) as trace:
        rounds = speculate(model, trace, method, prompt, limit=9, choice=Choice(rule))
        next(rounds)
        handle = model.lm_head.register_forward_hook(head)
        try:
            next(rounds)
        except Interrupted:
            assert failing[0]
        finally:
            handle.remove()
        tokens = trace.totals("generation")["tokens"]
    # A rule's own forwards are of prompts.
    assert tokens == (0 if failing[0] else 4)


def test_uncounted_texts_are_the_same(tiny):
    model = tiny()
    prompt = prompts(1)[0]
    with attach(model, Drafting(), count=False) as trace:
        assert drafted(model, trace, Drafting(), prompt, 12) == dense(model, prompt, 12)
        assert trace.speculation.rounds
        trace.reset()
        assert not trace.speculation.rounds


def test_rounds_say_what_became_of_drafts(tiny):
    """Their tokens are the text; probabilities are the draft's own, if they were asked for."""
    model = tiny()
    prompt = prompts(1)[0]
    told = []

    @dataclass(kw_only=True)
    class Asking(Drafting):
        def more(self, draft):
            likely = draft.probabilities()
            assert len(likely) == draft.length
            return draft.length < 3 and all(each > 0.02 for each in likely)

        def verified(self, verdict):
            told.append((verdict.drafted, verdict.accepted))

    ticks = iter(range(10000))
    with attach(model, Asking()) as trace:
        text = drafted(model, trace, Asking(), prompt, 20, clock=lambda: float(next(ticks)))
    rounds = trace.speculation.rounds
    assert [token for each in rounds for token in each.tokens] == text[1:]
    assert told == [(len(each.drafted), each.accepted) for each in rounds if each.drafted]
    assert all(each.draft_s > 0 and each.verify_s > 0 for each in rounds)
    whole = [*prompt, text[0]]
    for each in rounds:  # by forwards of the draft alone, over what the stock model has read
        cache = DynamicCache()
        model(torch.tensor([whole[:-1]], device=DEVICE), **{cache_argument(model): cache})
        with attach(model, Drafting()) as trace:
            trace.drafting = True
            for n, likely in enumerate(each.probabilities):
                fed = torch.tensor([[[*whole, *each.drafted][len(whole) - 1 + n]]], device=DEVICE)
                logits = model(fed, **{cache_argument(model): cache}).logits[0, -1]
                assert float(logits.softmax(-1)[each.drafted[n]]) == pytest.approx(likely, abs=1e-5)
        whole += each.tokens


# --- drafts of any kind -----------------------------------------------------------------------


def drafting(base, **facts):
    """A method of the tests as a draft of three tokens."""

    @dataclass(kw_only=True)
    class Draft(base):
        speculates = True
        phases: str = "generation"

        def more(self, draft):
            return draft.length < 3

    for name, value in facts.items():
        setattr(Draft, name, value)
    return Draft


class Updated(Scaled):
    """A skipped sublayer multiplies the stream, and so are all MLPs' updates multiplied."""

    def weights(self, layer):
        return None, torch.full((self.context.batch, self.context.tokens), 0.7, device=DEVICE)


KINDS = {
    "sequence, of its prompt": drafting(Remembering)(),
    "token": drafting(RandomMask)(),
    "token, dropped": drafting(RandomMask, kv_policy="prompt_only")(),
    "token, updates": drafting(Reading)(),
    "plan, updates": drafting(Updated)(plan=plan_without(LAYERS, (1, 0), (2, 1))),
}


@pytest.mark.parametrize("mode", ["eager", "graphs"])
@pytest.mark.parametrize("name", KINDS)
def test_drafts_of_any_kind(tiny, name, mode):
    """What a draft leaves out, adds or weighs touches no verification, of one token either."""
    model, method = tiny(), copy.deepcopy(KINDS[name])
    texts = [(prompt, dense(model, prompt, LIMIT)) for prompt in prompts(2)]
    given = {}
    if mode == "graphs":
        given["mode"] = graphs = Graphs(StandIn() if DEVICE.type == "cpu" else None)
    trace = parts(model, method, texts, LIMIT, **given)
    rounds = trace.speculation.rounds
    assert bool((trace.executed() == 1).all())
    assert trace.speculation.acceptance < 1
    assert any(not each.drafted for each in rounds)  # the last token of a text, read alone
    if mode == "graphs":
        alone = trace.speculation.drafted + sum(not each.drafted for each in rounds)
        dropped = name == "token, dropped"  # may store a token in one layer and not in another
        steps = alone - trace.speculation.drafted if dropped else alone
        assert (graphs.steps, graphs.others) == (
            steps,
            len(rounds) + trace.speculation.drafted - steps,
        )
        graphs.close()


@pytest.mark.parametrize("name", ["token", "token, updates"])
def test_graphs_bill_drafts_as_eager_steps(tiny, name):
    model, prompt = tiny(), prompts(1)[0]
    found = []
    for mode in ("eager", Graphs(StandIn() if DEVICE.type == "cpu" else None)):
        with attach(model, copy.deepcopy(KINDS[name]), mode=mode) as trace:
            drafted(model, trace, KINDS[name], prompt, LIMIT)
            causes = trace.flops
            found.append((causes["draft"], trace.totals()["total_flops"]))
    assert found[0] == found[1]


def test_a_draft_knows_where_it_is(tiny):
    """Positions, and tokens since the prompt; the method is asked in drafts alone."""
    model, prompt, seen = tiny(), prompts(1)[0], []

    @dataclass(kw_only=True)
    class Looking(Drafting):
        def start(self, context):
            seen.append(
                (context.phase, int(context.positions), int(context.generated), context.past_length)
            )
            return super().start(context)

    method = Looking(length=3)
    with attach(model, method) as trace:
        drafted(model, trace, method, prompt, 12)
    want, text = [], 1
    for each in trace.speculation.rounds:
        for n in range(len(each.drafted)):
            past = len(prompt) + text - 1 + n
            want.append(("generation", past, text - 1 + n, past))
        text += len(each.tokens)
    assert seen == want


def test_two_texts_do_not_mix(tiny):
    """Rounds of two texts in turn, with memory of each."""
    model, method = tiny(), KINDS["sequence, of its prompt"]
    given = prompts(2, 9)
    want = [dense(model, prompt, 12) for prompt in given]
    with attach(model, method) as trace:
        texts = [speculate(model, trace, method, prompt, limit=12) for prompt in given]
        found = [[], []]
        alive = {0, 1}
        while alive:
            for n in sorted(alive):
                tokens = next(texts[n], None)
                if tokens is None:
                    alive.discard(n)
                else:
                    found[n] += tokens
    assert found == want
