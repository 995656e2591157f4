"""Routers by regression: slopes at gates that are off, the budget, what is read."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from dyndepth.fitting import loop, regression
from dyndepth.fitting.regression import (
    KEPT,
    Regression,
    _Moments,
    _Probe,
    _slopes,
    _spend,
    regress_gains,
)
from dyndepth.fitting.routers import budget_shares
from dyndepth.runtime.attach import attach

SETTINGS = Regression(windows=(6, 6), ridge=1.0)


@pytest.fixture
def windows(tiny_corpus):
    return tiny_corpus.windows(24, 12, 0).to(DEVICE)


@pytest.fixture
def removable():
    chosen = torch.zeros(4, 2, dtype=torch.bool)
    chosen[1:3] = True
    return chosen


@torch.no_grad()
def _divergence(model, method, ids, place, step):
    """Summed over the window in float64, with ``step`` on one gate; see _slopes."""
    layer, kind, row, token = place
    gates = method.gates

    def nudged(block, hidden):
        pair = [gate.detach().double() for gate in gates(block, hidden)]
        if block == layer:
            pair[kind][row, token] += step
        return tuple(pair)

    method.full_depth = True
    dense = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    method.full_depth, method.gates = False, nudged
    thinned = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    method.gates = gates
    assert dense.dtype == thinned.dtype == torch.float64
    return (dense.exp() * (dense - thinned)).sum().item()


def test_slopes_are_those_of_the_divergence(tiny, windows, removable):
    """A leaf's gradient against a finite difference in one gate of one token, in float64.

    In float32 the divergence is rounded by some 1e-5 nats, otherwise on each processor, and a step
    of 1e-2 makes that 1e-3 of slope. The norms of gpt2 stay in float64, those of llama do not.
    """
    model, ids, step = tiny("gpt2").double(), windows[:2], 1e-4
    method = _Probe(removable, SETTINGS)
    places = [(1, 0, 0, 3), (1, 1, 1, 0), (2, 0, 0, 7), (2, 1, 1, 5), (2, 1, 0, 11)]
    with attach(model, method, backend="masked"):
        _slopes(model, method, ids, 0)
        leaves = [leaf.grad for leaf in method.leaves]
        for layer, kind, row, token in places:
            ends = [
                _divergence(model, method, ids, (layer, kind, row, token), way * step)
                for way in (1, -1)
            ]
            slope = leaves[layer][row, token, kind].item()
            assert abs(slope) > 1e-2
            assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_moments_solve_the_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 5, generator=generator) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) + 1
    truth = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.1])
    moments = _Moments(5)
    for part in rows.split(50):
        moments.add(part, part @ truth + 3)
    weight, intercept = moments.solve(ridge=1e-6)
    torch.testing.assert_close(weight, truth, atol=1e-2, rtol=0)
    assert intercept.item() == pytest.approx(3, abs=2e-2)
    heavy, mean = moments.solve(ridge=1e12)
    torch.testing.assert_close(heavy, torch.zeros(5), atol=1e-5, rtol=0)
    assert mean.item() == pytest.approx((rows @ truth + 3).mean().item(), rel=1e-3)


def test_the_threshold_spends_the_budget():
    predicted = [torch.arange(100.0), torch.arange(100.0) - 50]
    _, threshold = _spend(predicted, [0.2, 0.4], executed=0.7)
    spent = 0.4 + sum(
        share * float((each >= threshold).float().mean())
        for each, share in zip(predicted, (0.2, 0.4), strict=True)
    )
    assert spent == pytest.approx(0.7, abs=0.01)


def test_routers_meet_the_budget_and_read_tokens(tiny, windows, removable):
    model = tiny()
    shares = budget_shares(model, 24)
    weight, bias, curve = regress_gains(
        model, windows, removable, shares, 0.8, SETTINGS, progress=False
    )
    assert weight.shape == (4, 2, 32)
    assert [row["tokens"] for row in curve] == [48.0 * n for n in range(1, 7)]
    first = 1 - shares[removable].sum().item()
    assert [row["executed"] for row in curve[:3]] == pytest.approx([first] * 3, abs=1e-5)
    assert curve[-1]["executed"] > first
    assert (bias[~removable] == KEPT).all()
    assert (weight[~removable] == 0).all()
    assert (weight[removable].abs().sum(-1) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    again = regress_gains(model, windows, removable, shares, 0.8, SETTINGS, progress=False)
    assert torch.equal(weight, again[0])
    assert torch.equal(bias, again[1])


def test_a_constant_reads_no_token(tiny, windows, removable):
    model = tiny()
    shares = budget_shares(model, 24)
    settings = Regression(windows=(6, 6), constant=True)
    weight, bias, _ = regress_gains(
        model, windows, removable, shares, 0.8, settings, progress=False
    )
    assert weight.shape == (4, 2, 32)
    assert (weight == 0).all()
    assert len(bias[removable].unique()) == 4


def test_only_generated_tokens_are_observed(tiny, windows, removable):
    """In phase generation the prompt's gates have no slope and must not count as gains of zero."""
    model = tiny()
    shares = budget_shares(model, 24)
    settings = Regression(windows=(12,), constant=True, phases="generation")
    _, bias, _ = regress_gains(model, windows, removable, shares, 0.8, settings, progress=False)
    method = _Probe(removable, settings)
    gains = []
    with attach(model, method, backend="masked", prompt_length=12):
        for ids in windows.split(2):
            _slopes(model, method, ids, 12)
            gains.append(-torch.stack([leaf.grad for leaf in method.leaves]))
    regression = torch.cat(gains, 1).clamp(-4, 4)
    assert (regression[:, :, :12] == 0).all()
    expected = regression[:, :, 12:].mean((1, 2))[removable] / shares[removable]
    order = bias[removable].argsort().tolist()
    assert order == expected.argsort().tolist()


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_killed_regression_goes_on_with_the_same_curve(
    tiny, windows, removable, tmp_path, monkeypatch, stop
):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    model = tiny()
    shares = budget_shares(model, 24)

    def regress():
        return regress_gains(model, windows, removable, shares, 0.8, SETTINGS, progress=False)

    expected, measured, calls = regress(), regression._slopes, []

    def killed(*given):
        calls.append(None)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return measured(*given)

    with loop.checkpoints(tmp_path):
        monkeypatch.setattr(regression, "_slopes", killed)
        with pytest.raises(KeyboardInterrupt):
            regress()
        monkeypatch.setattr(regression, "_slopes", measured)
        again = regress()
    assert again[2] == expected[2]
    assert torch.equal(again[0], expected[0])
    assert torch.equal(again[1], expected[1])


def test_progress_says_how_fast(tiny, windows, removable, capsys):
    shares = budget_shares(tiny(), 24)
    regress_gains(tiny(), windows, removable, shares, 0.8, SETTINGS)
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "| 6/6 [" in shown
    assert " batch/s, loss " in shown
    assert shown.rstrip().endswith(" tokens/s]")
