"""SkipGPT: the rule, the fit, the shipped routers."""

from __future__ import annotations

import json
import os

import pytest
import torch

from dyndepth.calibration import block_speedup
from dyndepth.errors import UserError
from dyndepth.fits import load_fit, save_fit
from dyndepth.methods.skipgpt import SkipGPT, shipped, tuning
from dyndepth.runtime import attach

QUICK = {"steps": 20, "batch": 2, "length": 24, "bias_rate": 0.1}


@pytest.fixture
def trained(tiny, tiny_corpus):
    method = SkipGPT(target_speedup=1.4, **QUICK)
    return method.fit(tiny(), tiny_corpus)


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def test_fit_meets_the_target_and_gates_differ_by_token(tiny, tiny_corpus, trained):
    windows = tiny_corpus.windows(48, 8, 0, split="calibration")
    assert block_speedup(tiny(), trained, windows) == pytest.approx(1.4, rel=0.02)
    assert trained.facts["achieved_speedup"] == pytest.approx(1.4, rel=0.02)
    model = tiny()
    with attach(model, trained) as trace:
        model(windows)
    executed = trace.executed()
    assert ((executed > 0) & (executed < 1)).any()
    assert trained.tensors["weight"].abs().sum() > 0


@pytest.mark.parametrize("normalise", [True, False])
def test_rule_is_the_formula(tiny, tokens, normalise):
    """Gates against the formula on the stream that enters each block."""
    generator = torch.Generator().manual_seed(0)
    method = SkipGPT(target_speedup=1.5, normalise=normalise)
    method.tensors = {
        "weight": torch.randn(4, 2, 32, generator=generator),
        "bias": torch.randn(4, 2, generator=generator),
    }
    method.facts = {"threshold": 0.3}
    model, streams = tiny(), []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad(), attach(model, method) as trace:
        model(tokens)
    for hook in hooks:
        hook.remove()
    seen = 0
    for layer, stream in enumerate(streams):
        if normalise:
            stream = stream / stream.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        logits = torch.einsum("btd,kd->btk", stream, method.tensors["weight"][layer])
        execute = logits + method.tensors["bias"][layer] >= 0.3
        expected = execute.double().mean((0, 1))
        torch.testing.assert_close(trace.executed()[layer], expected)
        seen += int(((expected > 0) & (expected < 1)).sum())
    assert seen > 4
    assert trace.flops["router"] == tokens.numel() * 4 * 2 * 2 * 32


def test_training_goes_on_from_another_target(tiny, tiny_corpus, trained):
    further = SkipGPT(target_speedup=1.8, **QUICK)
    before = {name: tensor.clone() for name, tensor in trained.tensors.items()}
    curve = tuning.train(further, tiny(), tiny_corpus, trained, progress=False)
    assert curve[0]["wanted"] < curve[0]["executed"] < 0.85
    assert further.facts["started_from"] == 1.4
    assert further.facts["achieved_speedup"] == pytest.approx(1.8, rel=0.02)
    assert all(torch.equal(before[name], trained.tensors[name]) for name in before)


def test_phase_generation_calibrates_on_generated_tokens(tiny, tiny_corpus):
    method = SkipGPT(target_speedup=1.3, phases="generation", **QUICK).fit(tiny(), tiny_corpus)
    windows = tiny_corpus.windows(48, 8, 0, split="calibration")
    assert block_speedup(tiny(), method, windows) == pytest.approx(1.3, rel=0.03)


def test_routers_of_another_model_are_refused(tiny, trained, tokens, tmp_path):
    save_fit(trained, tiny(), tmp_path / "fit")
    with pytest.raises(UserError, match="another model"):
        load_fit(SkipGPT(target_speedup=1.4, **QUICK), tiny(seed=1), tmp_path / "fit")
    deeper = tiny(num_hidden_layers=6)
    with pytest.raises(UserError, match="a model of 4 blocks, not 6"), attach(deeper, trained):
        deeper(tokens)


def test_unfitted_is_refused(tiny, tokens):
    model = tiny()
    with attach(model, SkipGPT(target_speedup=2.0)), pytest.raises(UserError, match="call fit"):
        model(tokens)
    with pytest.raises(UserError, match="give fit a corpus"):
        SkipGPT(target_speedup=2.0, **QUICK).fit(tiny())


def test_shipped_routers_are_taken_for_their_model_target_and_defaults_only(
    tiny, tiny_corpus, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(shipped, "ROUTERS", tmp_path)
    model, kept = tiny(), SkipGPT(target_speedup=1.4)
    kept.tensors = trained.tensors
    shipped.save_shipped(kept, model, {"command": "none", **trained.facts})
    taken = SkipGPT(target_speedup=1.4).fit(model)
    assert all(torch.equal(taken.tensors[name], kept.tensors[name]) for name in kept.tensors)
    assert taken.facts["threshold"] == trained.facts["threshold"]
    assert shipped.load_shipped(SkipGPT(target_speedup=1.5), model) is None
    assert shipped.load_shipped(SkipGPT(target_speedup=1.4, steps=7), model) is None
    assert shipped.load_shipped(SkipGPT(target_speedup=1.4, seed=1), model) is None
    assert shipped.load_shipped(kept, tiny(seed=1)) is None
    prompt_kept = SkipGPT(target_speedup=1.4, phases="generation")
    with pytest.raises(UserError, match="give fit a corpus"):
        prompt_kept.fit(model)


def test_repository_ships_routers_under_one_megabyte():
    files = [path for path in shipped.ROUTERS.rglob("*") if path.is_file()]
    assert {path.stem for path in files} >= {"1.25", "1.5", "2"}
    assert sum(os.path.getsize(path) for path in files) < 1e6
    for path in files:
        if path.suffix == ".json":
            card = json.loads(path.read_text())
            assert card["achieved_speedup"] == pytest.approx(float(path.stem), rel=0.01)
            assert "dyndepth.methods.skipgpt.ship" in card["command"]
            assert card["held_out_loss"] > card["held_out_dense_loss"]
