"""A shape is timed: on random tokens, with methods that need no text."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_tiny

from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method
from dyndepth.timing import __main__ as door
from dyndepth.timing.random_tokens import RandomTokens, fit_without_text


@pytest.fixture
def shape(tmp_path):
    """A tiny one, by its configuration."""
    (tmp_path / "config.json").write_text(json.dumps(make_tiny().config.to_dict()))
    return f"shape:{tmp_path}/config.json"


def test_tokens_lie_in_the_vocabulary_and_repeat(tiny):
    model = tiny()
    tokens = RandomTokens(model)
    found = tokens.windows(200, 20, seed=1, split="calibration", model=model)
    assert found.shape == (20, 200)
    assert found.dtype == torch.int64
    assert set(found.unique().tolist()) == set(range(model.config.vocab_size))
    assert torch.equal(found, RandomTokens(model.config).windows(200, 20, 1))
    assert not torch.equal(found, tokens.windows(200, 20, 2))
    with pytest.raises(UserError, match="random tokens: 300 tokens are too long"):
        tokens.windows(300, 1, 0, model=model)


def test_methods_that_need_text_are_told_so(tiny):
    model = tiny()
    pruning = load_method("static_pruning(criterion=last)", target_speedup=1.5)
    method = fit_without_text(pruning, model)
    assert method.tensors
    with pytest.raises(UserError, match=r"early_exit can't be fitted .* needs none"):
        fit_without_text(load_method("early_exit", target_speedup=1.5), model)


@pytest.mark.parametrize("method", ["uls(phases=both)", "random_mask(rates=uniform)"])
def test_a_method_is_timed_on_a_shape(method, shape, capsys):
    words = ["--model", shape, "--dtype", "bfloat16", "--device", "cpu"]
    assert door.main(["--method", method, *words]) == 0
    out = capsys.readouterr().out
    assert "it reads random tokens" in out
    timing = json.loads(out.splitlines()[-1])["timing"]
    assert timing["model"] == shape
    assert {row["phase"] for row in timing["rows"]} == {"prefill", "decode"}
    assert {row["dtype"] for row in timing["rows"]} == {"bfloat16"}


def test_break_even_and_limits_take_a_shape(shape, tmp_path, monkeypatch, capsys):
    words = ["--model", shape, "--device", "cpu", "--repeats", "6"]
    curve = ["--length", "16", "--fractions", "0.5", "--phases", "prefill"]
    assert door.main(["break-even", *words, *curve]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["break_even"]["rows"]
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dyndepth.timing.limits.SHARES", (0.5,))
    assert door.main(["limits", *words, "--tokens", "256"]) == 0
    assert "kept in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "early_exit"], "early_exit can't be fitted to random weights"),
        (["--method", "uls", "--corpus", "text.txt"], "no tokenizer to read --corpus with"),
        (["--method", "uls", "--level", "full"], "too long for this model of 256"),
    ],
)
def test_what_a_shape_cannot_is_told(words, told, shape, capsys):
    assert door.main([*words, "--model", shape, "--device", "cpu"]) == 2
    assert told in capsys.readouterr().err
