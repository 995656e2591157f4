"""When gathering pays: the rule, its measurement, and where that is kept."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, make_tiny
from gating import RandomMask
from test_attach import ids

from dyndepth.models.selection import Counts, Selection
from dyndepth.runtime.attach import attach
from dyndepth.runtime.limits import ALWAYS, Limits, keep, limits_of
from dyndepth.timing import __main__ as door
from dyndepth.timing import limits as limits_command
from dyndepth.timing.pairing import Median

UNMEASURED = Limits(0.85, 0.90, 64) if DEVICE.type == "cpu" else Limits(0.8, 0.85, 1024)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))


def selection(count, tokens):
    mask = (torch.arange(tokens) < count)[None]
    return Selection(mask, count, count)


def test_the_rule():
    limits = Limits(attention=0.5, mlp=0.75, tokens=8)
    assert limits.gather(0, selection(4, 8))
    assert not limits.gather(0, selection(5, 8))
    assert limits.gather(1, selection(6, 8))
    assert not limits.gather(1, selection(3, 7))
    assert ALWAYS.gather(0, selection(6, 7))


def test_zero_is_never():
    """Even of one token in a long forward; what nobody executes is no selection."""
    never = Limits(attention=0.0, mlp=0.0, tokens=0)
    assert not never.gather(0, selection(1, 4096))
    none = selection(0, 4096).mask[None]
    assert Selection.of(none, Counts(none), 4096) == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_go_by_the_kind_of_device(dtype):
    """``meta`` stands for whatever is no CPU."""
    model = make_tiny().to(dtype)
    assert limits_of(model.to("cpu")).attention > 0.7
    assert limits_of(model.to("meta")) == Limits(attention=0.8, mlp=0.85, tokens=1024)


@pytest.mark.rule
def test_kept_limits_are_followed():
    model = make_tiny()
    assert limits_of(model) == UNMEASURED
    assert limits_of(make_tiny().bfloat16()).attention < 0.85
    with attach(model, RandomMask()) as trace:
        model(ids(1, 20))
        before = trace.flops["padding"]
    file = keep(model, Limits(1.0, 1.0, 0))
    assert limits_of(model) == Limits(1.0, 1.0, 0)
    assert limits_of(make_tiny(hidden_size=64)) == UNMEASURED
    with attach(model, RandomMask()) as trace:
        model(ids(1, 20))
        assert trace.flops["padding"] == 0 < before
    file.write_text('{"attention": ')
    assert limits_of(model) == UNMEASURED


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom", "opt"])
def test_measuring_runs_both_ways_on_every_family(family):
    lines = []
    found = limits_command.measure_limits(make_tiny(family), 256, 6, say=lines.append)
    assert found.attention in (0.0, *limits_command.SHARES)
    assert found.mlp in (0.0, *limits_command.SHARES)
    assert found.tokens in (*limits_command.COUNTS, max(limits_command.COUNTS) + 1)
    assert len(lines) >= 2 * len(limits_command.SHARES) + len(limits_command.COUNTS)


def test_the_limits_are_where_gathering_stops_to_pay(monkeypatch):
    def faster(model, tokens, share, sublayer, repeats, say):
        return tokens >= 64 and share <= (0.7, 0.85)[sublayer]

    tiny_model = make_tiny()
    monkeypatch.setattr(limits_command, "_faster", faster)
    assert limits_command.measure_limits(tiny_model, 512, 6) == Limits(0.7, 0.85, 64)
    monkeypatch.setattr(limits_command, "_faster", lambda *_: False)
    assert limits_command.measure_limits(tiny_model, 512, 6) == Limits(0.0, 0.0, 257)


def test_the_command(monkeypatch, capsys, tmp_path):
    from dyndepth.models import loading
    from dyndepth.timing import pairing

    model = make_tiny()
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(pairing, "ratio", lambda *_: Median(1.2, 1.1, 1.3, 6))
    assert door.main(["limits", "--tokens", "256", "--repeats", "6"]) == 0
    out = capsys.readouterr().out
    assert "gather attention up to 0.95 and MLP up to 0.95 of the tokens,\nin forwards of" in out
    assert "of at least 8 tokens; kept in" in out
    assert limits_of(model) == Limits(0.95, 0.95, 8)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--tokens", "16"], "--tokens takes a whole number of at least 256, not 16"),
        (["--repeats", "2"], "--repeats takes a whole number of at least 6, not 2"),
        (["--threads", "0"], "--threads takes a whole number of at least 1, not 0"),
    ],
)
def test_wrong_inputs(capsys, given, told):
    assert door.main(["limits", *given]) == 2
    assert capsys.readouterr().err == f"dyndepth.timing: {told}\n"
