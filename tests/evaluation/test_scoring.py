"""Documents that share a beginning: the same scores, the same bills, less work; and the gate."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from gating import GivenPlan, RandomMask, plan_without
from reading import letters
from test_flops import counted
from test_foresight import LAYERS

from dyndepth.evaluation.agreement import MOST, agree, spread
from dyndepth.evaluation.forwards import padded, rows_of
from dyndepth.evaluation.scoring import LEAST, Group, score, score_alone, shared_prefixes
from dyndepth.methods.early_exit import EarlyExit
from dyndepth.methods.exit_oracle import ExitOracle
from dyndepth.methods.random_skip import RandomSkip
from dyndepth.runtime.attach import attach

HALF = plan_without(LAYERS, (0, 0), (1, 0), (1, 1), (3, 1))


def early_exit(phases):
    method = EarlyExit(target_speedup=1.5, first_exit=1, every=1, phases=phases)
    method.facts = {"threshold": 0.02}
    return method


METHODS = {
    "static": lambda phases: GivenPlan(plan=HALF, phases=phases),
    "sequence": lambda phases: RandomSkip(target_speedup=1.5, phases=phases),
    "token": lambda phases: RandomMask(rate=0.6, phases=phases),
    "early_exit": early_exit,
    "foresight": lambda phases: ExitOracle(target_speedup=1.5, phases=phases),
}
methods = pytest.mark.parametrize("name", METHODS)
phases = pytest.mark.parametrize("phases", ["both", "generation"])


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (count,), generator=generator).tolist()


def groups():
    """Five documents behind one beginning, two of them alike for longer, and two of their own."""
    shots, twin = tokens(30, 1), tokens(12, 2)
    rests = [[*twin, 5], [*twin, 6, 7, 8], tokens(4, 3), tokens(9, 4), tokens(1, 5)]
    contexts = [*(shots + rest for rest in rests), tokens(21, 6), tokens(3, 7)]
    return [
        Group(f"t/{n}", context, [tokens(1 + (n + k) % 4, 10 * n + k) for k in range(3)])
        for n, context in enumerate(contexts)
    ]


def scored(model, method, sharing, batch_size=4):
    with attach(model, method) as trace:
        found = dict(score(model, trace, groups(), batch_size, sharing=sharing))
        return [found[n] for n in range(len(found))], trace.totals(), trace.by_document(), trace


def logs(results):
    return torch.tensor([[log for log, _ in one] for one in results])


@phases
@methods
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "bloom"])
def test_batches_and_shared_beginnings_equal_documents_alone(tiny, family, name, phases):
    model = tiny(family)
    method = METHODS[name](phases)
    with attach(model, method) as trace:
        alone = [score_alone(model, trace, group) for group in groups()]
    for sharing in (False, not method.by_document):
        for batch_size in (1, 4, 32):
            results, *_ = scored(model, method, sharing, batch_size)
            torch.testing.assert_close(logs(results), logs(alone), atol=2e-4, rtol=0)
            assert [[g for _, g in one] for one in results] == [[g for _, g in o] for o in alone]


@phases
@methods
def test_a_document_costs_the_same_however_it_is_served(tiny, name, phases):
    model = tiny()
    method = METHODS[name](phases)
    one = scored(model, method, not method.by_document)
    two = scored(model, method, False, batch_size=1)
    assert one[2] == two[2]
    assert one[1]["by_cause"]["reused"] <= 0 == two[1]["by_cause"]["reused"]
    assert (one[1]["by_cause"]["reused"] < 0) is not method.by_document
    keys = ("tokens", "block_flops", "total_flops", "dense_block_flops", "dense_total_flops")
    assert [one[1][key] for key in keys] == [two[1][key] for key in keys]
    torch.testing.assert_close(one[3].executed(), two[3].executed())


@phases
@pytest.mark.parametrize("name", ["static", "token", "early_exit", "foresight"])
def test_the_ledger_equals_torchs_counter(tiny, name, phases):
    model = tiny(attn="eager")
    with attach(model, METHODS[name](phases)) as trace:
        seen = counted(lambda: list(score(model, trace, groups(), 4, sharing=True)))
        assert seen == sum(trace.flops.values())
        assert trace.flops["reused"] < 0


def test_shared_prefixes_hold_every_sequence_once():
    contexts = [group.context for group in groups()]
    found = shared_prefixes(contexts)
    assert sorted(index for _, members in found for index in members) == list(range(7))
    assert sorted((length, len(members)) for length, members in found) == [(0, 1), (0, 1), (30, 5)]
    same = tokens(LEAST + 1, 0)
    assert shared_prefixes([same, same]) == [(LEAST, [0, 1])], "the last token is left to read"
    assert shared_prefixes([same[:LEAST], same]) == [(0, [0]), (0, [1])]
    assert shared_prefixes([]) == []


# --- the gate -----------------------------------------------------------------------------------


def gate(method, *, flipped=(), dtype="float32"):
    """Compare, with some documents moved by half a nat; returns how many were looked at."""
    documents = [Group(f"t/{n}", tokens(5 + n, n), [[3]]) for n in range(20)]
    order = spread(documents)
    looked = []

    def together(chosen):
        looked.extend(chosen)
        return [[(-2.0 + 0.5 * (order.index(index) in flipped), True)] for index in chosen]

    agree("t", method, dtype, documents, together, lambda chosen: [[(-2.0, True)]] * len(chosen))
    return len(looked)


def test_the_gate_stops_a_plan_that_differs_once_and_a_gate_that_differs_often():
    static, token = GivenPlan(plan=HALF), RandomMask()
    assert gate(static) == gate(token) == 2
    with pytest.raises(
        RuntimeError, match=r"task t: GivenPlan.*1 of 2.*\(t/\d+\).*0.5 nats; .* it is the model"
    ):
        gate(static, flipped=[1])
    assert gate(token, flipped=[1]) == MOST
    assert gate(token, flipped=[0, 2, 4]) == MOST
    with pytest.raises(RuntimeError, match=r"4 of 6.*declares pooled"):
        gate(token, flipped=[0, 2, 3, 4])


def test_the_gate_looks_at_few_and_short_documents():
    many = [Group(f"t/{n}", tokens(1 + n, n), [[3]]) for n in range(40)]
    assert len(spread(many)) == MOST
    assert max(spread(many)) < 20
    assert sorted(spread(many[:2])) == [0, 1]
    assert spread(many[:1]) == [0]


@dataclass(kw_only=True)
class Pooled(RandomMask):
    """Keeps half of the tokens of a whole forward: the batch decides."""

    pooled = True

    def gates(self, layer, hidden):
        size = hidden[..., 0]
        keep = size >= size.median()
        return keep, keep


@dataclass(kw_only=True)
class Undeclared(Pooled):
    pooled = False


@dataclass(kw_only=True)
class ByDocument(RandomMask):
    """A token method that draws by the document and forgets to say so."""

    def start(self, context):
        documents = context.documents or [""] * context.batch
        self.seed = len(documents[0]) + ord(documents[0][-1]) if documents[0] else 0
        super().start(context)


@pytest.fixture
def reader(tiny):
    """``reader(method)``: scores ``groups()`` as a task's, gate included."""
    from dyndepth.evaluation.language_model import DyndepthLM

    def read(method, model=None):
        model = model or tiny()
        own = DyndepthLM(model, method, tokenizer=letters(), progress=False)
        own._check("t", groups())
        with own._attached("t") as trace:
            found = dict(own._results(trace, groups()))
        return logs([found[n] for n in range(len(found))]), own

    return read


def test_a_pooled_method_runs_one_document_a_forward(tiny, reader):
    model = tiny()
    found, own = reader(Pooled(), model)
    with attach(model, Pooled()) as trace:
        expected = logs([score_alone(model, trace, group) for group in groups()])
    assert torch.equal(found, expected)
    assert own.costs["t"].totals["all"]["by_cause"]["padding"] >= 0


@pytest.mark.parametrize("method", [Undeclared(), ByDocument()], ids=repr)
def test_a_method_that_does_not_say_what_it_depends_on_is_stopped(reader, method):
    with pytest.raises(RuntimeError, match=r"task t: .*in batches than alone"):
        reader(method)


def test_a_sabotaged_cache_is_stopped(reader, monkeypatch):
    def wrong(cache, rows):
        return rows_of(cache, torch.zeros_like(rows))

    assert reader(GivenPlan(plan=HALF))[0].isfinite().all()
    monkeypatch.setattr("dyndepth.evaluation.scoring.rows_of", wrong)
    with pytest.raises(RuntimeError, match="in batches than alone"):
        reader(GivenPlan(plan=HALF))


def test_the_gate_is_not_billed(tiny, reader):
    model = tiny()
    _, own = reader(GivenPlan(plan=HALF), model)
    _, totals, *_ = scored(model, GivenPlan(plan=HALF), True, 32)
    assert own.costs["t"].totals["all"] == totals


def test_a_text_is_tokenised_once(tiny, monkeypatch):
    from dyndepth.evaluation.language_model import DyndepthLM

    tokenizer, read = letters(), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda *a, **k: read.append(a) or encode(*a, **k))
    requests = [SimpleNamespace(args=("one context", choice)) for choice in (" choice", " other")]
    pairs = []
    for _ in range(2):
        own = DyndepthLM(tiny(), GivenPlan(plan=HALF), tokenizer, progress=False)
        pairs.append([own.pair(request) for request in requests])
        assert len(read) == 3
    assert pairs[0] == pairs[1]


def test_windows_that_padding_would_exhaust_are_not_shared(tiny):
    """Each sequence fits the window, a row of two of them does not."""
    model = tiny("mistral", sliding_window=64)
    shots = tokens(40, 1)
    two = [
        Group("a", shots + tokens(20, 2), [tokens(2, 3)]),
        Group("b", shots + tokens(2, 4), [tokens(19, 5)]),
    ]
    with attach(model, GivenPlan(plan=HALF)) as trace:
        found = dict(score(model, trace, two, 8, sharing=True))
        alone = [score_alone(model, trace, group) for group in two]
        assert not list(score(model, trace, [], 8, sharing=True))
    torch.testing.assert_close(logs([found[0], found[1]]), logs(alone), atol=2e-4, rtol=0)


def test_a_sequence_without_a_token_is_in_no_batch():
    with pytest.raises(ValueError, match="a sequence without a token can't be read"):
        padded([[5, 6], []], "left", torch.device("cpu"))
