"""The bench's routes: what is timed is what the one-by-one scores are."""

from __future__ import annotations

import argparse

import pytest
import torch

from dyndepth import bench, bench_routes


def test_spaced_blocks_keep_both_ends():
    assert bench_routes.spaced(1, 6) == [0]
    assert bench_routes.spaced(6, 6) == list(range(6))
    assert bench_routes.spaced(4, 30) == [0, 10, 20, 29]
    for count in range(2, 31):
        kept = bench_routes.spaced(count, 30)
        assert len(set(kept)) == count
        assert {kept[0], kept[-1]} == {0, 29}


def test_plans_take_every_depth_three_times():
    plans = bench_routes.spaced_and_random(5)
    assert plans.shape == (15, 5, 2)
    assert plans[..., 0].sum(1).tolist() == [count for count in range(1, 6) for _ in range(3)]
    assert torch.equal(plans[..., 0], plans[..., 1])


def test_computed_counts_beginnings_once():
    plans = torch.zeros(2, 2, 2, dtype=torch.bool)
    plans[:, 0] = True
    plans[1, 1] = True
    assert bench_routes.computed(plans) == 4 / 6


def test_routes_agree_and_are_reported(tiny, tiny_corpus, monkeypatch, capsys):
    monkeypatch.setattr(bench_routes, "load_model", lambda *_, **__: tiny("llama", "sdpa"))
    options = argparse.Namespace(
        dtypes=["float32"],
        model="tiny",
        device="cpu",
        documents=bench_routes.BATCH + 2,
        skipping=["both", "generation"],
    )
    lines = bench_routes.routes(tiny_corpus, options)
    assert list(lines) == ["routes/both/float32", "routes/generation/float32"]
    for line in lines.values():
        assert line["difference"] < 1e-3
        assert line["together_s"] > 0
        assert 0 < line["computed"] < 1
    assert "12 plans on 10 documents" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--documents", "--repeats", "--threads"])
def test_wrong_numbers_fail_with_a_sentence(flag, capsys):
    assert bench.main(["--parts", "routes", flag, "0"]) == 2
    assert f"{flag} takes a whole number of at least 1, not 0" in capsys.readouterr().err


def test_prompts_kept_whole_are_timed_on_request_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "bench", asked.append)
    assert bench.main([]) == bench.main(["--skipping", "generation"]) == 0
    assert [options.skipping for options in asked] == [["both"], ["generation"]]
