"""FlexiDepth: the router, adapters in place of MLPs, weights, what is billed."""

from __future__ import annotations

import pytest
import torch
from by_hand import scaled
from conftest import DEVICE, TOLERANCE
from torch import nn
from torch.nn.functional import silu

from dyndepth.methods.flexidepth import FlexiDepth, RouterWithAdapter, router_of
from dyndepth.runtime.attach import attach

LAYERS, NARROW, WIDTH = 4, 2, 3


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def given(threshold: float = 0.1, **fields) -> FlexiDepth:
    """With parameters of its own, so that nothing is trained."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "inner": (NARROW, 32),
        "gain": (NARROW,),
        "outer": (NARROW,),
        "bias": (1,),
        "gate": (WIDTH, 32),
        "up": (WIDTH, 32),
        "down": (32, WIDTH),
    }
    method = FlexiDepth(target_speedup=1.4, **fields)
    method.tensors = {
        name: torch.randn(2, *shape, generator=random) * (0.3 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }
    method.tensors["bias"].zero_()
    method.facts = {"layers": LAYERS, "hidden": 32, "threshold": threshold}
    return method


def confidence(table, stream):
    narrow = scaled(stream) @ table["inner"].T
    narrow = narrow / (narrow.square().mean(-1, keepdim=True) + 1e-5).sqrt() * table["gain"]
    return torch.sigmoid(torch.tanh(narrow) @ table["outer"] + table["bias"])


@torch.no_grad()
def by_hand(model, ids, method):
    """Logits, and who runs the routed blocks; everything is computed and chosen from."""
    inner, threshold = model.model, torch.sigmoid(torch.tensor(method.facts["threshold"]))
    stream = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    tables, chosen = inner.rotary_emb(stream, positions), []
    for layer, block in enumerate(inner.layers):
        weight = runs = torch.ones(ids.shape, device=ids.device)
        replaced = torch.zeros_like(stream)
        if layer >= 2:
            own = {name: each[layer - 2].to(ids.device) for name, each in method.tensors.items()}
            weight = confidence(own, stream)
            runs = (weight >= threshold).float()
            normed = scaled(stream)
            replaced = (silu(normed @ own["gate"].T) * (normed @ own["up"].T)) @ own["down"].T
            replaced = replaced * (1 - weight)[..., None]
            chosen.append(runs.bool())
        attended = block.self_attn(block.input_layernorm(stream), tables, attention_mask=None)[0]
        between = stream + runs[..., None] * attended
        update = weight[..., None] * block.mlp(block.post_attention_layernorm(between))
        stream = between + torch.where(runs[..., None] > 0, update, replaced)
    return model.lm_head(inner.norm(stream)), chosen


@pytest.mark.parametrize("backend", ["sparse", "masked"])
def test_the_forward_is_that_of_the_formula(tiny, tokens, backend):
    model, method = tiny(), given()
    expected, chosen = by_hand(model, tokens, method)
    with torch.no_grad(), attach(model, method, backend=backend) as trace:
        found = model(tokens).logits
        gates = trace.gates()
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    for layer, runs in enumerate(chosen, 2):
        assert torch.equal(gates[:, :, layer, 0], runs.cpu())
        assert 0 < runs.double().mean() < 1


def test_adapters_count_among_the_mlps(tiny, tokens):
    model, method = tiny(), given()
    with torch.no_grad(), attach(model, method) as trace:
        model(tokens)
    runs = trace.executed()[:, 1] * tokens.numel()
    skipped = (tokens.numel() - runs[2:]).sum().item()
    assert skipped > 0
    router, adapter, mlp = 2 * (NARROW * 32 + NARROW), 2 * 3 * 32 * WIDTH, 2 * 3 * 32 * 64
    assert trace.flops["mlp"] == pytest.approx(runs.sum().item() * mlp + skipped * adapter)
    assert trace.flops["router"] == pytest.approx((2 * tokens.numel() + skipped) * router)


def test_adapters_begin_as_nothing_and_cost_what_they_should(tiny, tiny_corpus):
    method = FlexiDepth()
    router = method.initial(tiny(intermediate_size=128), tiny_corpus)
    assert router.down.shape == (2, 32, 128 // 16)
    assert router.inner.shape == (2, 32 // 16, 32)
    rows = torch.randn(7, 32)
    assert (router.instead(2, 1, rows) == 0).all()
    assert router.instead(2, 0, rows) is None
    assert router.instead(1, 1, rows) is None
    assert method.max_speedup(30) == 2.0


def test_published_routers_are_ours_with_two_maps_in_one():
    """Written out as published: it reads through the block's norm, and has two last maps."""
    torch.manual_seed(0)
    norm = nn.RMSNorm(32, eps=1e-6)
    down, inside = nn.Linear(32, NARROW, bias=False), nn.RMSNorm(NARROW, eps=1e-5)
    up, head = nn.Linear(NARROW, 32, bias=False), nn.Linear(32, 1, bias=False)
    for each in (norm, inside):
        nn.init.uniform_(each.weight, 0.5, 1.5)
    stream = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = head(up(torch.tanh(inside(down(norm(stream))))))
        tables = router_of(down.weight, inside.weight, up.weight, head.weight, norm.weight)
        random = {n: torch.zeros(1) for n in ("gate", "up", "down")}
        router = RouterWithAdapter(
            range(1),
            **{n: each[None] for n, each in tables.items()},
            bias=torch.zeros(1, 1),
            **random,
        )
        torch.testing.assert_close(router(0, stream), expected)
