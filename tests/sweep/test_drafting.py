"""Sweeps of a method that drafts: a cell a speedup, resumed, in two processes and verified; what
it would cost; and what is refused before any work."""

from __future__ import annotations

import csv
import json
import os
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import sweeping
from conftest import make_tiny
from faulting import with_distribution
from folders import tiny_folder
from reading import byte_tokenizer
from toys import Drafting

from dyndepth.cells.recipe import parse_recovery
from dyndepth.common import registry
from dyndepth.common.errors import UserError
from dyndepth.export.write import export
from dyndepth.fitting.recovery.kept import fit_and_recover
from dyndepth.lm_eval_plugin.model import NamedLM
from dyndepth.methods.dense import Dense
from dyndepth.results.tables import NAMES
from dyndepth.sweep.estimate import costs
from dyndepth.sweep.estimate.costs import Depth
from dyndepth.sweep.estimate.machines import Machine
from dyndepth.sweep.estimate.models import Shape
from dyndepth.sweep.estimate.passes import ACCEPTED, DRAFTED, Pass, verified, written
from dyndepth.sweep.grid import plans
from dyndepth.sweep.settings import Settings

METHOD = '''
from dataclasses import dataclass

import torch

from dyndepth.method import DynamicDepthMethod


@dataclass(kw_only=True)
class Sketching(DynamicDepthMethod):
    """Drafts without the last blocks."""

    name = "sketching"
    granularity = "static"
    paper = "test"
    speculates = True

    length: int = 3
    phases: str = "generation"

    def start(self, context):
        kept = round(context.layers / self.target_speedup)
        return (torch.arange(context.layers) < kept)[:, None].repeat(1, 2)

    def more(self, draft):
        return draft.length < self.length
'''
SCORES = tuple(name for name in NAMES if name != "timing.csv")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a model, a corpus, a distribution with the method, and a run ``inline``."""
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    info = folder / "site" / "sketching-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "site" / "sketching_method.py").write_text(METHOD)
    entry = "[dyndepth.methods]\nsketching = sketching_method:Sketching\n"
    (info / "entry_points.txt").write_text(entry)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sketching\nVersion: 1.0\n")
    run = start(folder, folder, "--output_path", "inline")
    assert run.wait() == 0, run.err
    assert "skipped nothing" not in run.out + run.err
    return folder


def start(folder: Path, tiny: Path, *more: str, door: str = "sweep") -> sweeping.Sweep:
    base = ()
    if door == "sweep":
        base = ("--model", str(tiny / "model"), "--corpus", str(tiny / "corpus.txt"))
        base += ("--methods", "sketching", "--speedups", "1.3,2", "--tasks")
        base += ("quartz,title_generation", "--limit", "3", "--timing", "off", "--phases", "both")
    cache = {"DYNDEPTH_CACHE": os.environ.get("DYNDEPTH_CACHE", "")}
    return sweeping.start(
        folder,
        *base,
        *more,
        door=f"dyndepth.{door}.__main__",
        before=partial(with_distribution, str(tiny / "site")),
        OMP_NUM_THREADS="1",
        **{key: value for key, value in cache.items() if value},
    )


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_speedup_is_a_cell_whose_scores_are_denses(tiny):
    board = read(tiny / "inline" / "leaderboard.csv")
    assert [(row["method"], row["target_speedup"], row["lossless"]) for row in board] == [
        ("dense", "1", "FALSE"),
        ("sketching", "1.3", "TRUE"),
        ("sketching", "2", "TRUE"),
    ]
    assert {row["phases"] for row in board[1:]} == {"generation"}
    assert len({row["mean_acc"] for row in board}) == 1
    assert len({row["rouge_l"] for row in board}) == 1
    for row in board[1:]:
        assert float(row["block_speedup"]) == 1.0
        assert float(row["total_speedup"]) < 1.0
        assert 0 <= float(row["acceptance"]) <= 1
        assert float(row["tokens_per_verify"]) >= 1
    drafts = [row for row in read(tiny / "inline" / "compute.csv") if row["drafted"]]
    assert {(row["task"], row["phase"]) for row in drafts} == {("title_generation", "generation")}
    assert len(drafts) == 2


def test_two_processes_and_a_resumed_run_have_the_same_bytes(tiny, tmp_path):
    more = ("--executor", "processes", "--workers", "2", "--output_path", "run")
    run = start(tmp_path, tiny, *more)
    assert run.wait() == 0, run.err

    def check():
        for name in SCORES:
            made = (tmp_path / "run" / name).read_bytes()
            assert made == (tiny / "inline" / name).read_bytes(), name

    check()
    (gone,) = (tmp_path / "run" / "cells").glob("sketching*x2-*")
    gone.unlink()
    run = start(tmp_path, tiny, "--output_path", "run")
    assert run.wait() == 0, run.err
    assert json.loads(run.out.splitlines()[-1])["sweep"]["reused"] == 2
    check()


def test_it_is_verified(tiny, tmp_path):
    corpus = ("--corpus", str(tiny / "corpus.txt"))
    run = start(tmp_path, tiny, str(tiny / "inline"), "--all", *corpus, door="verify")
    assert run.wait() == 0, run.out + run.err


def test_recovery_is_refused_before_anything_is_written(tiny, tmp_path):
    run = start(tmp_path, tiny, "--output_path", "run", "--recovery", "none", "lora")
    assert run.wait() == 2
    assert "recovery 'lora' trains weights, and sketching writes what the model" in run.err
    assert len(run.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


# --- without a sweep ------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch):
    entries = {
        name: EntryPoint(name, place, registry.GROUP)
        for name, place in (("dense", "fakes:Dense"), ("drafting", "toys:Drafting"))
    }
    monkeypatch.setattr(registry, "methods", lambda: entries)


def test_phases_are_its_own_whatever_is_asked(registered):
    for phases in ("both", "generation", "published"):
        found = plans(Settings(methods="drafting", speedups=(1.5, 2.0), phases=phases), 4)
        built = [cell.build() for cell in found]
        assert [(each.name, each.phases) for each in built[1:]] == [("drafting", "generation")] * 2


def test_recovery_is_refused_in_python_too(tiny_corpus):
    with pytest.raises(UserError, match="drafting writes what the model as it is verifies"):
        fit_and_recover(Drafting(), make_tiny(), tiny_corpus, str(parse_recovery("lora")))


def test_an_export_is_refused(tmp_path, tiny_corpus):
    with pytest.raises(UserError, match="drafts what the whole model verifies"):
        export(make_tiny(), byte_tokenizer(), Drafting(), tiny_corpus, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_lm_eval_writes_denses_texts_and_is_told_of_drafts(capsys):
    from types import SimpleNamespace

    model = make_tiny(vocab_size=259)
    requests = [
        SimpleNamespace(args=(text, {"until": [], "max_gen_toks": 8}), task_name="t", doc_id=n)
        for n, text in enumerate(("red", "green blue"))
    ]
    told = {}
    for method in (Dense(), Drafting()):
        lm = NamedLM(model, method=method, tokenizer=byte_tokenizer(), progress=False)
        told[method.name] = lm.generate_until(requests, True)
        info = lm.get_model_info()
    assert told["drafting"] == told["dense"]
    assert 0 <= info["acceptance"] <= 1 <= info["tokens_per_verify"]
    assert "tokens a verification" in capsys.readouterr().err


def test_what_is_read_costs_as_dense_and_what_is_written_more():
    machine = Machine("a machine", "cpu", 1e11, 1e10, None, 0.0, ())
    shape = Shape.of(make_tiny(), "float32")
    depth = Depth.of(Drafting(target_speedup=2.0), 0.0)
    read = [Pass(4, 20, 20, 4, False), Pass(3, 5, 25, 15, True)]
    assert costs.run(machine, shape, read, depth) == costs.run(machine, shape, read)
    passes = written([20, 30], 9, 1, 1024)
    dense = costs.run(machine, shape, passes)
    own = costs.run(machine, shape, passes, depth)
    assert dense.flops < own.flops < 3 * dense.flops
    # By hand: as many tokens are written, some per round of drafts and a verification of them all.
    whole, drafts = verified(passes)
    rounds = sum(one.times for one in whole if one.generation)
    a_round = 1 + sum(ACCEPTED**n for n in range(1, DRAFTED + 1))
    assert rounds * a_round == pytest.approx(sum(p.rows * p.times for p in passes if p.writes))
    assert sum(one.times for one in drafts) == pytest.approx(DRAFTED * rounds)
