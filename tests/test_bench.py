"""The bench's routes: what is timed is what the one-by-one scores are."""

from __future__ import annotations

import argparse

import torch

from dyndepth import bench, models


def test_spaced_blocks_keep_both_ends():
    assert bench._spaced(1, 6) == [0]
    assert bench._spaced(6, 6) == list(range(6))
    assert bench._spaced(4, 30) == [0, 10, 20, 29]
    for count in range(2, 31):
        kept = bench._spaced(count, 30)
        assert len(set(kept)) == count
        assert {kept[0], kept[-1]} == {0, 29}


def test_plans_take_every_depth_three_times():
    plans = bench._plans(5)
    assert plans.shape == (15, 5, 2)
    assert plans[..., 0].sum(1).tolist() == [count for count in range(1, 6) for _ in range(3)]
    assert torch.equal(plans[..., 0], plans[..., 1])


def test_computed_counts_beginnings_once():
    plans = torch.zeros(2, 2, 2, dtype=torch.bool)
    plans[:, 0] = True
    plans[1, 1] = True
    assert bench._computed(plans) == 4 / 6


def test_routes_agree_and_are_reported(tiny, tiny_corpus, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: tiny("llama", "sdpa"))
    options = argparse.Namespace(
        dtypes=["float32"],
        model="tiny",
        device="cpu",
        documents=bench._BATCH + 2,
        skipping=["both", "generation"],
    )
    lines = bench._routes(tiny_corpus, options)
    assert list(lines) == ["routes/both/float32", "routes/generation/float32"]
    for line in lines.values():
        assert line["difference"] < 1e-3
        assert line["together_s"] > 0
        assert 0 < line["computed"] < 1
    assert "12 plans on 10 documents" in capsys.readouterr().out
