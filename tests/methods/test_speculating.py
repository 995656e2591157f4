"""What every registered method that speculates must hold, on every family.

It is dense wherever it does not draft, what it writes is what the whole model writes, its drafts
skip in truth, and what it found is found again from a file. Methods are fitted on tiny models with
the parameters that they declare as ``quick``.
"""

from __future__ import annotations

import functools

import pytest
import torch
from test_attach import ids, incremental, padded
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import dyndepth
from dyndepth.common.registry import load_method, method_class, methods
from dyndepth.models.families import FAMILIES
from dyndepth.runtime import speculation
from dyndepth.runtime.attach import attach
from dyndepth.runtime.flops import BlockCosts
from dyndepth.runtime.speculation import speculate

TARGET, LENGTH, TOKENS = 1.5, 3, 10
SPECULATING = [name for name in methods() if method_class(name).speculates]

conforming = pytest.mark.parametrize("name", SPECULATING)
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def model_of(tiny):
    return functools.cache(tiny)


@pytest.fixture(scope="module")
def fitted(model_of, tiny_corpus):
    """A method that always drafts ``LENGTH`` tokens; each combination fitted once."""

    @functools.cache
    def fit(name: str, family: str, attn: str = "sdpa"):
        given = {"target_speedup": TARGET, "length": LENGTH, "stop": 0.0}
        method = load_method(name, **given, **method_class(name).quick)
        return method.fit(model_of(family, attn), tiny_corpus)

    return fit


def written(model, trace, method, prompt, **given) -> list[int]:
    return [one for each in speculate(model, trace, method, prompt, **given) for one in each]


def steps_of(model, prompt, count: int) -> list[int]:
    """Greedy steps of the stock model, each over all tokens before it, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_there_are_some():
    assert SPECULATING
    for name in SPECULATING:
        method = method_class(name)()
        assert (method.phases, method.by_document) == ("generation", False)
        assert method.kv_policy in ("project", "prompt_only")
        assert not method.uses_labels


@conforming
@families
def test_where_nothing_is_drafted_it_is_dense_to_the_last_bit(model_of, fitted, name, family):
    """In one forward, padded, and step by step: what likelihood tasks read."""
    model, method = model_of(family), fitted(name, family)
    tokens, mask, positions = padded("left")
    reads = {"attention_mask": mask, "position_ids": positions}
    plain = [model(ids(2, 12)).logits, model(tokens, **reads).logits]
    plain.append(incremental(model, ids(2, 12), prompt=5))
    with attach(model, method, prompt_length=4) as trace:
        found = [model(ids(2, 12)).logits, model(tokens, **reads).logits]
        trace.prompt_length = None
        found.append(incremental(model, ids(2, 12), prompt=5))
        totals = trace.totals()
        assert trace.flops["draft"] == 0
    assert all(map(torch.equal, found, plain))
    assert totals["block_flops"] == totals["dense_block_flops"]


@conforming
@families
def test_it_writes_what_the_whole_model_writes(model_of, fitted, name, family, tmp_path):
    """And so does what was saved, by the same drafts; and a text in two parts over one cache."""
    model, method = model_of(family), fitted(name, family)
    prompt = ids(1, 6)[0].tolist()
    want = steps_of(model, prompt, TOKENS)
    method.save(tmp_path / "fit", model)
    drafts = []
    for each in (method, dyndepth.load_method(tmp_path / "fit")):
        with attach(model, each) as trace:
            assert written(model, trace, each, prompt, limit=TOKENS) == want
        drafts.append([one.drafted for one in trace.speculation.rounds])
    assert drafts[0] == drafts[1]
    assert max(map(len, drafts[0])) == LENGTH
    cache = DynamicCache()
    with attach(model, method) as trace:
        first = written(model, trace, method, prompt, limit=TOKENS // 2, cache=cache)
        left = {"limit": TOKENS - len(first), "cache": cache}
        assert first + written(model, trace, method, prompt + first, **left) == want


@conforming
@families
def test_drafts_skip_in_truth_and_are_billed(model_of, fitted, monkeypatch, name, family):
    """Of each forward, torch's counter: a draft costs less than a step of the whole model, a
    verification as much as that for each token; and all of it is in the ledger."""
    model, method = model_of(family, "eager"), fitted(name, family, "eager")
    costs, seen, run = BlockCosts.of(model), [], speculation._Loop._run

    def counting(loop, fed, rows):
        with FlopCounterMode(display=False) as counter:
            logits = run(loop, fed, rows)
        keys = loop.cache.get_seq_length()
        tokens = fed.shape[1]
        whole = tokens * costs.block(keys) + rows * costs.lm_head
        seen.append((loop.trace.drafting, counter.get_total_flops(), whole))
        return logits

    prompt = ids(1, 6)[0].tolist()
    want = steps_of(model, prompt, TOKENS)
    monkeypatch.setattr(speculation._Loop, "_run", counting)
    with attach(model, method) as trace, FlopCounterMode(display=False) as counter:
        assert written(model, trace, method, prompt, limit=TOKENS) == want
    drafted = [(counted, whole) for drafting, counted, whole in seen if drafting]
    assert len(drafted) == trace.speculation.drafted > 0
    assert all(counted < whole for counted, whole in drafted)
    assert all(counted == whole for drafting, counted, whole in seen if not drafting)
    totals = trace.totals()
    assert counter.get_total_flops() == sum(trace.flops.values())
    assert totals["block_flops"] == totals["dense_block_flops"]
    assert trace.flops["draft"] >= sum(counted for counted, _ in drafted)


@conforming
def test_generate_of_a_batch_is_that_of_the_stock_model(model_of, fitted, name):
    model, method = model_of("llama"), fitted(name, "llama")
    tokens, mask, _ = padded("left")
    asked = {"attention_mask": mask, "max_new_tokens": TOKENS, "do_sample": False}
    want = model.generate(tokens, **asked)
    with attach(model, method):
        assert torch.equal(model.generate(tokens, **asked), want)
