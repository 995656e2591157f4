"""D-LLM: the decision network, eviction, what always runs, joint training."""

from __future__ import annotations

import pytest
import torch
from by_hand import evicting
from conftest import DEVICE, TOLERANCE
from torch import nn

from dyndepth.cells.recipe import parse_recovery
from dyndepth.fitting.recovery.training import recover
from dyndepth.methods.d_llm import DLLM, DecisionNetwork
from dyndepth.runtime.attach import attach

LAYERS, WIDTH = 5, 8


@pytest.fixture
def model(tiny):
    return tiny(num_hidden_layers=LAYERS)


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def published(seed: int) -> nn.Module:
    """One block's network in plain torch: skip, execute."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(32, WIDTH), nn.RMSNorm(WIDTH, eps=1e-5), nn.SiLU(), nn.Linear(WIDTH, 2)
        )
        nn.init.normal_(network[1].weight, 1.0, 0.3)
        nn.init.normal_(network[3].weight)
    network[3].bias.data = torch.tensor([0.1, 0.3])
    return network.requires_grad_(False).to(DEVICE)


@pytest.fixture
def networks():
    return {layer: published(layer) for layer in range(2, LAYERS)}


def given(networks, **fields) -> DLLM:
    """The published networks as the method keeps them, at the published threshold."""
    method = DLLM(target_speedup=1.4, width=WIDTH, **fields)
    every = list(networks.values())
    router = DecisionNetwork(
        method.routed(LAYERS),
        inner=torch.stack([each[0].weight for each in every]),
        inner_bias=torch.stack([each[0].bias for each in every]),
        gain=torch.stack([each[1].weight for each in every]),
        outer=torch.stack([each[3].weight for each in every]),
        bias=torch.stack([each[3].bias for each in every]),
    )
    method.tensors = router.folded()
    method.facts = {"layers": LAYERS, "hidden": 32, "threshold": 0.0}
    return method


@pytest.mark.parametrize("backend", ["sparse", "masked"])
@pytest.mark.parametrize("keep_first", [0, 2])
def test_the_forward_is_that_of_the_published_rule(model, tokens, networks, backend, keep_first):
    method, shares = given(networks, keep_first=keep_first), []

    def decide(layer, stream):
        runs = torch.ones(len(stream), dtype=torch.bool, device=stream.device)
        if layer >= 2:
            runs = networks[layer](stream).softmax(-1)[:, 1] >= 0.5
            runs[:keep_first] = True
            shares.append(runs.double().mean().item())
        return runs, 1.0

    expected = evicting(model, tokens, decide)
    with torch.no_grad(), attach(model, method, backend=backend) as trace:
        found = model(tokens).logits
        gates = trace.gates()
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert any(0 < share < 1 for share in shares)
    assert trace.executed()[2:, 0].sum().item() == pytest.approx(sum(shares) / 2)
    assert gates[:, :keep_first].all()
    assert trace.flops["router"] == tokens.numel() * 3 * 2 * (WIDTH * 32 + WIDTH)


def test_first_tokens_are_those_of_each_sequence(model, tokens, networks):
    """Behind padding on the left, and not again in every step of a generation."""
    method = given(networks, keep_first=2)
    method.facts["threshold"] = 1e3
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    with torch.no_grad(), attach(model, method) as trace:
        output = model(tokens, attention_mask=mask, use_cache=True)
        gates = trace.gates()[:, :, 2, 0]
        trace.reset()
        longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype, device=DEVICE)], 1)
        model(tokens[:, :1], attention_mask=longer, past_key_values=output.past_key_values)
        assert (trace.executed()[2:] == 0).all()
    assert gates[0].nonzero()[:, 0].tolist() == [0, 1]
    assert gates[1].nonzero()[:, 0].tolist() == [5, 6]


def test_two_logits_are_trained_and_their_difference_is_kept(tiny_corpus, model):
    router = DLLM(width=WIDTH).initial(model, tiny_corpus)
    assert router.bias.tolist() == [pytest.approx([0.1, 2.0])] * 3
    assert router.outer.shape == (3, 2, WIDTH)
    folded = DecisionNetwork(range(2, LAYERS), **router.folded())
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(folded(3, hidden), router(3, hidden))
    assert (router(1, hidden) > 100).all()


def test_adapters_are_trained_along(model, tiny_corpus):
    method = DLLM(target_speedup=1.4, **DLLM.quick)
    recipe = parse_recovery("joint(rank=2, targets=query+key+value)")
    found = recover(method, model, tiny_corpus, recipe, progress=False)
    assert {name.rpartition(".")[2] for name in found.factors} == {"q_proj", "k_proj", "v_proj"}
    assert method.facts["achieved_speedup"] == pytest.approx(1.4, rel=0.02)
