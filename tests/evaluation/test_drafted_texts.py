"""Methods that speculate are scored as dense is: the same likelihoods, bit by bit, and the same
texts, written by drafts; what the drafts took is told apart."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from reading import byte_tokenizer
from test_evaluate import DOCUMENTS, TASKS
from toys import Drafting

from dyndepth.evaluation import generation
from dyndepth.evaluation.evaluate import evaluate
from dyndepth.evaluation.generation import Prompt
from dyndepth.evaluation.language_model import DyndepthLM
from dyndepth.methods.dense import Dense
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.runtime.attach import attach

LIMIT = 12


@pytest.fixture(scope="module")
def model():
    return make_tiny(vocab_size=259, max_position_embeddings=160)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        (path / f"{name}.yaml").write_text(text)
    (path / "tiny_documents.py").write_text(DOCUMENTS)
    return path


@pytest.fixture(scope="module")
def run(model, folder):
    def run(method, tasks="choice,rolling,written", **changes):
        settings: dict = {"progress": False, "include_path": folder, "batch_size": 4, "limit": 6}
        settings |= changes
        return evaluate(model, byte_tokenizer(), method, tasks, **settings)

    return run


@pytest.fixture(scope="module")
def dense(run):
    return run(Dense())


@pytest.fixture(scope="module")
def drafted(run):
    return run(Drafting())


@dataclass(kw_only=True)
class Together(Drafting):
    """One whose draft's facts would have other methods scored one by one."""

    name = "together"
    granularity = "sequence"
    pooled = True


def test_likelihoods_are_denses_bit_by_bit_and_texts_are_denses(run, dense, drafted):
    scored = ("task", "doc_id", "doc_hash", "outcomes", "loglikelihoods", "response", "tokens")
    wanted = [[row[key] for key in scored] for row in dense.samples]
    assert {row[5] is None for row in wanted} == {True, False}
    for found in (drafted, run(Together())):
        assert [[row[key] for key in scored] for row in found.samples] == wanted
        assert found.accuracy == dense.accuracy
        assert found.routing == dense.routing
    costs = ("block_flops", "total_flops", "dense_block_flops", "dense_total_flops")
    read = [row for row in dense.samples if row["task"] != "written"]
    mine = [row for row in drafted.samples if row["task"] != "written"]
    assert [[row[key] for key in costs] for row in mine] == [
        [row[key] for key in costs] for row in read
    ]


def test_neither_batch_nor_turn_changes_a_row(run, drafted):
    alone = run(Drafting(), "written", batch_size=1)
    assert alone.samples == [row for row in drafted.samples if row["task"] == "written"]
    assert alone.compute == [row for row in drafted.compute if row["task"] == "written"]


@torch.no_grad()
def by_hand(model, prompt, method, stop):
    """What was drafted, what stands, and passes, of one prompt: the whole model over whole
    sequences, without a cache."""

    def after(ids):
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())

    written = [after(prompt)]
    counts = {"drafted": 0, "accepted": 0, "verifications": 0, "written": 0}
    while len(written) < LIMIT and not stop(written):
        counts["verifications"] += 1
        draft = []
        while len(draft) < min(method.length, LIMIT - len(written) - 1):
            draft.append(drafted_next(model, prompt + written, draft, method.without))
        counts["drafted"] += len(draft)
        own = [after(prompt + written + draft[:n]) for n in range(len(draft) + 1)]
        accepted = next((n for n, token in enumerate(draft) if token != own[n]), len(draft))
        counts["accepted"] += accepted
        for token in own[: accepted + 1]:
            written.append(token)
            counts["written"] += 1
            if stop(written):
                break
    return counts


@torch.no_grad()
def drafted_next(model, text, draft, without):
    """The next token of a draft, its keys over those that the whole model has of the text."""
    out = model(torch.tensor([text[:-1]]), use_cache=True)
    cache = {cache_argument(model): cache_of(out)}
    ids = torch.tensor([[text[-1], *draft]])
    hook = model.model.layers[without].register_forward_hook(lambda module, given, out: given[0])
    try:
        logits = model(ids, **cache).logits
    finally:
        hook.remove()
    return int(logits[0, -1].argmax())


def test_counts_are_those_of_drafting_by_hand(model, drafted):
    lm = DyndepthLM(model, Drafting(), byte_tokenizer(), progress=False)
    total = {"drafted": 0, "accepted": 0, "verifications": 0, "written": 0}
    requests = [
        SimpleNamespace(
            args=(text, {"until": ["e", "\n"], "max_gen_toks": LIMIT}), task_name="t", doc_id=n
        )
        for n, text in enumerate(("red green", "old\nA:", "blue cold warm", "tall"))
    ]
    prompts, _ = lm.prompts(requests)
    for prompt in prompts:
        counts = by_hand(model, list(prompt.tokens), Drafting(), prompt.stop)
        total = {key: total[key] + counts[key] for key in total}
    lm.generate_until(requests, True)
    assert lm.costs["t"].drafts == total
    assert 0 < total["accepted"] < total["drafted"]


def test_drafts_are_told_apart_and_never_saved(drafted, dense):
    for row in drafted.compute:
        writes = row["task"] == "written"
        counted = {"drafted", "accepted", "verifications", "written"} <= set(row)
        assert counted == (writes and row["phase"] == "generation")
        assert row["block_speedup"] == 1.0
        assert (row["draft"] > 0) == (writes and row["phase"] != "prompt")
        assert (row["total_speedup"] < 1) == (row["draft"] > 0)
        causes = ("attention", "mlp", "kv_projection", "router", "readout", "lm_head", "draft")
        assert sum(row[each] for each in causes) == pytest.approx(row["total_flops_per_token"])
    for row in dense.compute:
        assert row["draft"] == 0
        assert "drafted" not in row


def test_a_text_whose_tables_change_is_written_without_drafts():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12}
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    model = make_tiny(max_position_embeddings=64, rope_parameters=rope | factors)
    prompts = [
        Prompt(f"t/{n}", list(range(5, 5 + n)), 8, lambda written: False) for n in (3, 7, 11, 14)
    ]
    with attach(model, Dense()) as trace:
        wanted = dict(generation.generate(model, trace, prompts, 4))
    with attach(model, Drafting()) as trace:
        found = dict(generation.generate_drafted(model, trace, Drafting(), prompts))
        rounds = trace.speculation.rounds
    assert found == wanted
    # Those of 3 and of 14 tokens stay on one side of the tables' end.
    assert sum(len(each.tokens) for each in rounds) == 2 * 7


def test_a_logit_that_is_no_number_stops_it_as_under_dense(model):
    broken = make_tiny(seed=3)
    broken.lm_head.weight[5] = float("nan")
    prompt = Prompt("t/0", [3, 4, 6], 5, lambda written: False)
    with attach(broken, Drafting()) as trace, pytest.raises(FloatingPointError):
        list(generation.generate_drafted(broken, trace, Drafting(), [prompt]))
    with attach(broken, Dense()) as trace, pytest.raises(FloatingPointError):
        list(generation.generate(broken, trace, [prompt], 1))
