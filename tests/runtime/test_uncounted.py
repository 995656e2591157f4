"""An attachment that counts nothing computes the same, and says so when it is asked for counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from gating import GivenPlan, RandomMask, plan_without

from dyndepth.method import ForwardContext
from dyndepth.runtime.attach import attach
from dyndepth.runtime.gates import Settler
from dyndepth.runtime.trace import phase_of_tokens

METHODS = {
    "masks": RandomMask(),
    "masks_generation": RandomMask(phases="generation"),
    "plan": GivenPlan(plan=plan_without(4, (0, 0), (2, 1))),
}
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backend", ["sparse", "masked"])
def test_it_computes_what_a_counted_one_does(tiny, name, backend):
    model, found = tiny(attn="eager"), []
    for count in (True, False):
        with attach(model, METHODS[name], backend=backend, prompt_length=5, count=count):
            found.append(model(IDS, output_attentions=True))
    assert torch.equal(found[0].logits, found[1].logits)
    for counted, uncounted in zip(found[0].attentions, found[1].attentions, strict=True):
        assert (counted is None) == (uncounted is None)


def test_under_masked_no_gate_is_decided(tiny, monkeypatch):
    def decided(*given):
        raise AssertionError("the host asked for a mask")

    monkeypatch.setattr(Settler, "decided", decided)
    with attach(tiny(), RandomMask(), backend="masked", count=False):
        tiny()(IDS)


def test_counts_are_refused_and_not_zero(tiny):
    model = tiny()
    with attach(model, RandomMask(), count=False) as trace:
        hidden = model(IDS, output_hidden_states=True).hidden_states[-1]
        asked = [
            trace.totals,
            trace.by_document,
            trace.executed,
            trace.gates,
            lambda: trace.totals("prompt"),
            lambda: trace.flops,
            lambda: trace.bill_last([[("a", 3)]]),
            lambda: trace.readout(hidden[0], torch.zeros(12, dtype=torch.long)),
        ]
        for each in asked:
            with pytest.raises(RuntimeError, match="nothing is counted: attached with count=False"):
                each()
        trace.reset()


@pytest.mark.parametrize("past", [0, 3, 9])
@pytest.mark.parametrize("length", [0, 1, 4, 8, 9, 20])
def test_phases_of_one_prompt_length_are_those_of_one_a_row(past, length):
    """The first are known to the host, the second it asks the device for."""
    context = SimpleNamespace(batch=2, tokens=5, device=DEVICE, past_length=past)
    context.valid = context.past_real = None
    context.positions = ForwardContext.positions.func(context)
    rows = torch.full((2,), length, device=DEVICE)
    phase, mask = phase_of_tokens(context, length)
    expected, masks = phase_of_tokens(context, rows)
    assert phase == expected
    assert (mask is None) == (masks is None)
    assert mask is None or torch.equal(mask, masks)
