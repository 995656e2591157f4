"""The ledger equals torch's counter to the last FLOP, and bills every cause."""

from __future__ import annotations

import pytest
import torch
from gating import GivenPlan, RandomMask, plan_without
from test_attach import ids, padded
from torch.utils.flop_counter import FlopCounterMode

from dyndepth.models.families import FAMILIES
from dyndepth.runtime.attach import attach
from dyndepth.runtime.flops import BlockCosts

LAYERS = 4
CASES = {
    "dense": RandomMask(rate=1.0),
    "static": GivenPlan(plan=plan_without(LAYERS, (0, 0), (1, 1), (3, 0), (3, 1))),
    "static_generation": GivenPlan(plan=plan_without(LAYERS, (0, 0), (2, 1)), phases="generation"),
    "masks": RandomMask(),
    "masks_generation": RandomMask(phases="generation"),
    "sparse_masks": RandomMask(rate=0.05),
    "by_document": GivenPlan(
        plan={
            "a": plan_without(LAYERS, (0, 0)),
            "b": plan_without(LAYERS),
            "c": plan_without(LAYERS, (1, 1)),
        }
    ),
}


def counted(run) -> int:
    """What torch counts, rotary tables apart: they belong to no sublayer."""
    with FlopCounterMode(display=False) as counter:
        run()
    tables = [v for k, v in counter.get_flop_counts().items() if k.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(sum(table.values()) for table in tables)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ledger_equals_counter(tiny, family, name):
    model = tiny(family, "eager")
    documents = ["a", "b", "c"]

    def batches():
        yield lambda: model(ids(3, 10))
        for side in ("left", "right"):
            tokens, mask, positions = padded(side)
            yield lambda t=tokens, m=mask, p=positions: model(t, attention_mask=m, position_ids=p)
        yield lambda: model.generate(ids(3, 5), max_new_tokens=3, min_new_tokens=3, do_sample=False)

    for run in batches():
        with attach(model, CASES[name], documents=documents) as trace:
            assert counted(run) == sum(trace.flops.values())
    with attach(model, CASES[name], documents=["a"], prompt_length=4) as trace:
        assert counted(lambda: model(ids(1, 10))) == sum(trace.flops.values())
        if name not in ("static_generation", "masks_generation"):
            assert trace.flops["padding"] == 0


def test_masked_backend_counts_all_work(tiny):
    model = tiny("llama", "eager")
    with attach(model, RandomMask(), backend="masked") as trace:
        assert counted(lambda: model(ids(2, 9))) == sum(trace.flops.values())
        totals = trace.totals()
    assert totals["block_flops"] == totals["dense_block_flops"]
    assert trace.executed().mean() < 0.8


def test_phases_and_documents_add_up(tiny):
    model = tiny("llama", "sdpa")
    with attach(model, RandomMask(phases="generation"), documents=["a", "b"]) as trace:
        model.generate(ids(2, 6), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        whole = trace.totals()
        prompt, generation = trace.totals("prompt"), trace.totals("generation")
        parts = trace.by_document()
        executed = trace.executed("prompt")
    for key in ("tokens", "block_flops", "total_flops", "dense_block_flops", "dense_total_flops"):
        assert whole[key] == prompt[key] + generation[key]
        assert whole[key] == sum(document[key] for document in parts.values())
    assert (whole["tokens"], prompt["tokens"]) == (20, 12)
    assert bool((executed == 1).all())
    assert float(trace.executed("generation").mean()) < 0.9
    assert prompt["block_flops"] == prompt["dense_block_flops"]
    assert generation["block_flops"] < generation["dense_block_flops"]


def test_heads_called_by_hand_are_counted(tiny):
    """Rows of all tokens in order are their sequences', those of a part of them nobody's."""
    model = tiny("llama", "eager")
    head = BlockCosts.of(model).lm_head

    def found(split):
        with attach(model, RandomMask(), documents=["a", "b"]) as trace:
            hidden = model.model(ids(2, 5)).last_hidden_state
            before = trace.flops["padding"]
            flops = counted(lambda: [model.lm_head(part) for part in split(hidden)])
            assert flops == 10 * head
            parts = [each["total_flops"] for each in trace.by_document().values()]
            assert trace.flops["lm_head"] + trace.flops["padding"] - before == flops
            return trace.flops["lm_head"], parts

    whole, parts = found(lambda hidden: [hidden])
    assert whole == 10 * head
    assert len(parts) == 2
    for same in (lambda hidden: [hidden.flatten(0, 1)], lambda hidden: hidden.view(1, 1, 10, -1)):
        assert found(same) == (whole, parts)
    assert found(lambda hidden: hidden.split(2, dim=1))[0] == whole
    assert found(lambda hidden: hidden.flatten(0, 1).split(4))[0] == 0


def test_routers_readouts_and_heads_are_billed(tiny):
    model = tiny("llama", "eager")
    costs = BlockCosts.of(model)

    class Billing(RandomMask):
        def gates(self, layer, hidden):
            self.context.bill("router", 10.0, None)
            chosen = torch.zeros(hidden.shape[:2], dtype=torch.bool)
            chosen[0, 0] = True
            logits = self.context.readout(hidden, chosen)
            assert logits.shape == (1, model.config.vocab_size)
            return super().gates(layer, hidden)

    with attach(model, Billing(rate=1.0)) as trace:
        hidden = model.model(ids(2, 7)).last_hidden_state
        logits = trace.readout(hidden[:, -1], torch.tensor([0, 1]))
    torch.testing.assert_close(logits, model(ids(2, 7)).logits[:, -1], atol=1e-5, rtol=0)
    assert trace.flops["router"] == 10 * 14 * LAYERS
    assert trace.flops["readout"] == costs.lm_head * LAYERS
    assert trace.flops["lm_head"] == costs.lm_head * 2
    assert trace.flops["padding"] == 0
    assert costs.lm_head == 2 * model.config.vocab_size * model.config.hidden_size
