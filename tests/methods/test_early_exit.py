"""Early exit: where tokens may leave, which do, and whether the threshold meets its target."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method
from dyndepth.fitting.calibration import block_speedup
from dyndepth.methods.early_exit import EarlyExit
from dyndepth.runtime.attach import attach

LAYERS = 8


@pytest.fixture
def model(tiny):
    return tiny(num_hidden_layers=LAYERS)


def executed(model, method, tokens):
    with attach(model, method) as trace:
        model(tokens)
    return trace.executed()[:, 0]


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (3, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("confidence", ["margin", "max_prob", "saturation"])
@pytest.mark.parametrize("phases", ["generation", "both"])
@pytest.mark.parametrize("target", [1.25, 1.6])
def test_threshold_meets_the_target(model, tiny_corpus, confidence, phases, target):
    method = EarlyExit(target_speedup=target, confidence=confidence, phases=phases, every=1)
    method.fit(model, tiny_corpus)
    windows = tiny_corpus.windows(256, 4, 0, split="calibration").to(DEVICE)
    measured = block_speedup(model, method, windows)
    assert measured == pytest.approx(target, rel=0.02)
    assert method.facts["achieved_speedup"] == measured


@pytest.mark.parametrize("confidence", ["margin", "max_prob", "saturation"])
def test_tokens_leave_at_candidates_only(model, tokens, confidence):
    method = EarlyExit(target_speedup=2, confidence=confidence, phases="both", first_exit=3)
    method.every = 2
    method.facts["threshold"] = {"margin": 0.02, "max_prob": 0.05, "saturation": 0.93}[confidence]
    depth = executed(model, method, tokens)
    assert depth[:3].tolist() == [1, 1, 1]
    assert 0 < depth[3] < 1
    assert depth[3] == depth[4] >= depth[5] == depth[6] >= depth[7]
    method.facts["threshold"] = -1.0
    assert executed(model, method, tokens).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_confidences_are_what_they_say(model, tokens):
    """Margin, maximum probability and saturation against the stock model's hidden states."""
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
        head = model.lm_head(model.model.norm(states[4])).softmax(-1)
    best = head.topk(2).values
    cosine = torch.nn.functional.cosine_similarity(states[3], states[4], dim=-1)
    expected = {
        "margin": best[..., 0] - best[..., 1],
        "max_prob": best[..., 0],
        "saturation": cosine,
    }
    for confidence, values in expected.items():
        low, high = values.flatten().sort().values[60:62].tolist()
        threshold = (low + high) / 2
        method = EarlyExit(target_speedup=2, confidence=confidence, phases="both", first_exit=4)
        method.facts["threshold"] = threshold
        assert executed(model, method, tokens)[4].item() == pytest.approx(61 / 120)


def test_readouts_are_billed_for_running_tokens_only(model, tokens):
    method = EarlyExit(target_speedup=2, phases="both", first_exit=2, every=2)
    method.facts["threshold"] = 0.02
    with attach(model, method) as trace:
        model(tokens)
    asked = tokens.numel() * (1 + trace.executed()[2, 0] + trace.executed()[4, 0]).item()
    assert trace.flops["readout"] == pytest.approx(asked * 2 * model.lm_head.weight.numel())


def test_fixed_layer_is_a_plan(model, tokens):
    for method, depth in [
        (EarlyExit(layer=3, phases="both"), 3),
        (EarlyExit(confidence="fixed", target_speedup=2.0, phases="both"), 4),
        (EarlyExit(confidence="fixed", target_speedup=1.5, phases="both"), 5),
    ]:
        assert (method.granularity, method.kv_policy) == ("static", "drop")
        assert method.fit(model, None) is method
        assert executed(model, method, tokens).tolist() == [1] * depth + [0] * (LAYERS - depth)
    assert EarlyExit(layer=3, phases="generation").kv_policy == "prompt_only"
    assert EarlyExit().kv_policy == "project"
    assert EarlyExit(layer=4).max_speedup(LAYERS) == 2.0
    assert EarlyExit().budgeted
    assert not EarlyExit(layer=4).budgeted
    assert not load_method("self_speculation", draft="early_exit(layer=4)").budgeted
    for method in (EarlyExit(layer=LAYERS), load_method("early_exit", layer=99)):
        with pytest.raises(UserError, match=f"beyond the {LAYERS} blocks.*at most {LAYERS - 1}"):
            method.max_speedup(LAYERS)
        with pytest.raises(UserError, match="give at most"):
            method.fixed_depth(LAYERS)


def test_wrong_use_is_refused(model, tiny_corpus):
    with pytest.raises(UserError, match="give fit a corpus"):
        EarlyExit(target_speedup=1.5).fit(model)
    with pytest.raises(UserError, match="at most 2, not 2.5"):
        EarlyExit(target_speedup=2.5, first_exit=4).fit(model, tiny_corpus)
    with pytest.raises(UserError, match="beyond the 8 blocks"):
        EarlyExit(target_speedup=1.5, first_exit=9).fit(model, tiny_corpus)
    with pytest.raises(ValueError, match="every must be at least 1"):
        EarlyExit(every=0)
    for phases in ("both", "generation"):
        unfitted = EarlyExit(target_speedup=2, phases=phases)
        with pytest.raises(UserError, match="not fitted.*call .fit"), attach(model, unfitted):
            pass
