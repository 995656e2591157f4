"""Losses by chunks of positions: the same numbers and gradients as from all logits at once."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, TINY_VOCABULARY, make_tiny, variants
from torch.nn.functional import kl_div

from dyndepth.fitting import losses
from dyndepth.fitting.losses import next_token_nats
from dyndepth.fitting.routers import Routed, Tuning, divergence, next_token_loss
from dyndepth.methods.skipgpt.router import LinearRouter
from dyndepth.runtime.attach import attach

IDS = torch.randint(3, 90, (3, 10), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.fixture(params=[None, 7], ids=["whole", "chunks"])
def rows(request, monkeypatch):
    """Logits of how many positions may be held; None: of all."""
    if request.param is not None:
        if DEVICE.type == "standin":
            pytest.skip("a device written in Python computes nothing again in a backward pass")
        monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * TINY_VOCABULARY * request.param)
    return request.param


def routed() -> Routed:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 2, 32, generator=generator) * 0.3
    router = LinearRouter(weight, torch.full((4, 2), 0.3), normalise=True).to(DEVICE)
    return Routed(router, Tuning(target_speedup=1.5))


@variants()
@pytest.mark.parametrize("first", [0, 4])
def test_next_token_nats_are_those_of_all_logits(family, attn, first, rows):
    model, method = make_tiny(family, attn), routed()
    found = []
    for whole in (True, False):
        method.router.zero_grad()
        with attach(model, method, backend="masked", count=False):
            if whole:
                nats = next_token_loss(model(IDS, use_cache=False).logits, IDS, first)
            else:
                nats = next_token_nats(model, IDS, first)
        nats.backward()
        found.append((nats.detach(), method.router.weight.grad, method.router.bias.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert found[0][1].abs().sum() > 0


@variants()
@pytest.mark.parametrize("first", [0, 4])
def test_divergence_is_that_of_all_logits(family, attn, first, rows):
    model, method = make_tiny(family, attn), routed()
    dense = model(IDS, use_cache=False).logits[:, first:].log_softmax(-1)
    with attach(model, method, backend="masked", count=False):
        got = model(IDS, use_cache=False).logits[:, first:].log_softmax(-1)
        expected = kl_div(got, dense, reduction="none", log_target=True).sum(-1)
        expected.sum().backward()
        slopes = method.router.weight.grad.clone()
        method.router.zero_grad()
        found = divergence(model, method, IDS, first)
    assert found.shape == (3, 10 - first)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    torch.testing.assert_close(method.router.weight.grad, slopes, rtol=1e-3, atol=1e-5)


def test_a_head_that_is_trained_and_drops_gets_its_gradient(monkeypatch):
    """The second computation drops what the first one dropped."""
    if DEVICE.type == "standin":
        pytest.skip("a device written in Python computes nothing again in a backward pass")
    model, found = make_tiny(), []
    weight = model.lm_head.weight.requires_grad_(True)
    model.lm_head.register_module("dropout", torch.nn.Dropout(0.5))
    model.lm_head.register_forward_pre_hook(lambda head, args: (head.dropout(args[0]),))
    model.lm_head.train()
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * TINY_VOCABULARY * 7)
    for again in (losses.checkpoint, lambda nats, *rows, **named: nats(*rows)):
        monkeypatch.setattr(losses, "checkpoint", again)
        torch.manual_seed(0)
        weight.grad = None
        nats = next_token_nats(model, IDS)
        torch.manual_seed(7)
        nats.backward()
        found.append((nats.detach(), weight.grad))
    torch.testing.assert_close(found[0], found[1])


def test_no_more_logits_are_held_than_the_limit(monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * TINY_VOCABULARY * 7)
    model, seen = make_tiny(), []
    model.lm_head.register_forward_hook(lambda head, args, out: seen.append(out.numel()))
    next_token_nats(model, IDS)
    assert max(seen) == 7 * TINY_VOCABULARY
    assert sum(seen) == 3 * 9 * TINY_VOCABULARY
