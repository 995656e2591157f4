"""Studies from their declaration to claims.csv, with methods, cells and a bench made by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cells import identity

from dyndepth.cells import cell as cell_module
from dyndepth.cells.cell import Cell, CellSpec, method_identity
from dyndepth.cells.store import Store
from dyndepth.common import registry
from dyndepth.common.errors import UserError
from dyndepth.models import loading
from dyndepth.results import tables as tables_module
from dyndepth.routes.trace import Routes
from dyndepth.studies import __main__ as door
from dyndepth.studies import recordings, similarity, verdicts
from dyndepth.studies import study as studies
from dyndepth.studies.recordings import position_table, trace_file
from dyndepth.studies.study import Claim, Pick, Study
from dyndepth.studies.verdicts import COLUMNS, chosen, likened, report
from dyndepth.sweep import grid, workbench

DOCUMENTS = 40
METRICS = (("quartz", "acc"),)
GOOD = {"dense": 1.0, "fixed": 0.9, "steps": 0.2}
"""Share of documents that a method gets right."""

STUDY = Study(
    name="toy",
    title="A toy",
    limit={"quartz": DOCUMENTS},
    sweeps=(
        {"methods": "fixed", "speedups": (1.5, 2.0)},
        {"methods": "steps", "speedups": (1.25, 2.0), "seed": (0, 1)},
    ),
    claims=(
        Claim(
            "best", "Fixed beats steps.", "nobody", Pick("fixed"), (Pick("steps"),), "equal_flops"
        ),
        Claim("parity", "Fixed is dense.", "nobody", Pick("fixed"), (Pick("dense"),), "full_depth"),
        Claim("parts", "Attention runs less.", "nobody", Pick("fixed"), kind="sublayers"),
        Claim("place", "Late runs more.", "nobody", Pick("fixed"), kind="position"),
    ),
)
STUDY = replace(STUDY, claims=tuple(replace(claim, metrics=METRICS) for claim in STUDY.claims))


def tables(method: str, speedup: float, right: list[float]) -> dict:
    """Rows as an evaluation has them, with 12 blocks whose attention runs less than their MLPs."""
    task = "quartz"
    accuracy = {"task": task, "metric": "acc", "filter": "none", "value": sum(right) / len(right)}
    accuracy |= {"n": len(right), "higher_is_better": True, "task_version": "1.0", "stderr": 0.1}
    compute = {"task": task, "phase": "all", "tokens": 9, "block_speedup": speedup}
    compute |= {"block_flops_per_token": 1.0, "total_flops_per_token": 1.0, "total_speedup": 1.0}
    samples = [
        {"task": task, "doc_id": index, "doc_hash": f"h{index}", "metric": "acc,none"}
        | {"outcome": hit, "outcomes": json.dumps({"acc,none": hit}), "weight": 1.0}
        | {"block_flops": 1.0 / speedup, "dense_block_flops": 1.0}
        for index, hit in enumerate(right)
    ]
    routing = [
        {"task": "all", "phase": "all", "layer": layer, "sublayer": kind, "executed": executed}
        for layer in range(12)
        for kind, executed in (("attention", 0.4 + 0.01 * layer), ("mlp", 0.6 + 0.01 * layer))
    ]
    return {"accuracy": [accuracy], "compute": [compute], "routing": routing, "samples": samples}


def outcomes(method: str, seed: int = 0, documents: int = DOCUMENTS) -> list[float]:
    """Right on the first documents, which ones depending a little on the seed."""
    count = round(GOOD[method] * documents)
    return [float((index + seed) % documents < count) for index in range(documents)]


def made(spec: str, target: float = 1.0, *, seed: int = 0, speedup: float = 0.0, **changes) -> Cell:
    """A cell of ``spec`` that achieved ``speedup`` (its target unless given)."""
    method = registry.load_method(spec, target_speedup=target, seed=seed)
    base = identity(harness_code="now", torch="1") | method_identity(method)
    base |= {"recovery": "none"} | changes
    return Cell(base, **tables(method.name, speedup or target, outcomes(method.name, seed)))


@pytest.fixture(autouse=True)
def fake_methods(monkeypatch):
    """A registry of dense, steps and fixed."""
    entries = {
        name: EntryPoint(name, f"fakes:{cls}", registry.GROUP)
        for name, cls in (("dense", "Dense"), ("steps", "Steps"), ("fixed", "Fixed"))
    }
    monkeypatch.setattr(registry, "methods", lambda: entries)


@pytest.fixture
def cells():
    """Those of ``STUDY``, in the phases in which the methods were published."""
    found = [made("dense"), made("fixed", 1.5), made("fixed", 2.0, speedup=1.9)]
    return found + [made("steps", target, seed=s) for target in (1.25, 2.0) for s in (0, 1)]


def rows_of(
    name: str, cells: list[Cell], study: Study = STUDY, folder: Path = Path("nowhere")
) -> list[dict]:
    return [row for row in report(study, cells, "published", folder) if row["claim"] == name]


def trace(cell: Cell, folder: Path) -> None:
    """Routes of a cell on 12 documents of 10 tokens: attention late, MLPs everywhere but once."""
    gates = np.zeros((12, 10, 3, 2), dtype=bool)
    gates[:, 5:, :, 0] = True
    gates[..., 1] = True
    gates[3, 2, 0, 1] = False
    names = tuple(f"d{index}" for index in range(12))
    ids = np.ones(120, dtype=np.int64)
    lengths, prompts = (10,) * 12, (1,) * 12
    found = Routes(gates.reshape(120, 3, 2), ids, names, lengths, prompts, {1: "x"})
    found.save(trace_file(cell, folder))


class TestReport:
    def test_methods_are_compared_at_equal_flops(self, cells):
        first, second = rows_of("best", cells)
        assert (first["target_speedup"], second["target_speedup"]) == (1.5, 2.0)
        assert second["fraction_a"] == second["fraction_b"] == pytest.approx(1 / 1.9)
        assert first["value_a"] == 0.9
        assert first["value_b"] == pytest.approx(0.2)
        assert first["low"] <= first["difference"] <= first["high"]
        assert first["verdict"] == "better"
        assert first["p_holm"] >= first["p"]
        assert (first["n"], first["unit"]) == (DOCUMENTS, "documents")
        assert (first["seeds_a"], first["seeds_b"]) == (1, 2)
        assert len(first["cells_b"].split()) == 4
        assert set(first) <= set(COLUMNS)

    def test_dense_is_the_end_of_every_curve(self, cells):
        cells[1] = made("fixed", 1.5, speedup=1.1)
        first = rows_of("best", cells)[0]
        share = (1 / 1.1 - 0.8) / 0.2
        assert first["value_b"] == pytest.approx(share * 1.0 + (1 - share) * 0.2)

    def test_nothing_is_said_beyond_the_curve(self, cells):
        cells[2] = made("fixed", 2.0, speedup=2.5)
        second = rows_of("best", cells)[1]
        assert second["verdict"] == "not comparable"
        assert "0.500 to 1.000" in second["reason"]
        assert "low" not in second

    def test_a_matched_budget_may_miss_by_a_little_and_says_so(self, cells):
        cells[2] = made("fixed", 2.0, speedup=1 / 0.498)
        second = rows_of("best", cells)[1]
        assert (second["fraction_b"], second["verdict"]) == (0.5, "better")
        assert "0.0020 above A" in second["reason"]

    def test_full_depth_is_compared_as_it_is(self, cells):
        first = rows_of("parity", cells)[0]
        assert first["fraction_b"] == 1.0
        assert first["difference"] == pytest.approx(-0.1)
        # 4 of 40 documents differ: enough for one comparison, not for two.
        assert first["high"] < 0
        assert first["p"] < 0.05 < first["p_holm"]
        assert first["verdict"] == "no difference shown"
        assert "not after Holm" in first["reason"]

    def test_lower_may_be_better(self, cells):
        for cell in cells:
            cell.accuracy[0]["higher_is_better"] = False
        assert {row["verdict"] for row in rows_of("best", cells)} == {"worse"}

    def test_sublayers_are_compared_over_blocks(self, cells):
        first = rows_of("parts", cells)[0]
        assert first["difference"] == pytest.approx(-0.2)
        assert (first["n"], first["unit"]) == (12, "layers")
        assert first["verdict"] == "attention executes less"

    def test_traces_are_compared_over_documents_and_positions(self, cells, tmp_path):
        assert {row["verdict"] for row in rows_of("place", cells)} == {"not comparable"}
        for cell in cells[1:3]:
            trace(cell, tmp_path)
        first = rows_of("parts", cells, folder=tmp_path)[0]
        assert (first["n"], first["unit"]) == (12, "documents")
        assert first["difference"] == pytest.approx(0.5 - 359 / 360)
        attention, mlp = rows_of("place", cells, folder=tmp_path)[:2]
        assert (attention["difference"], attention["verdict"]) == (1.0, "rises with position")
        assert mlp["difference"] == pytest.approx(1 / 180)
        assert mlp["verdict"] == "no difference shown"
        table = position_table(cells, tmp_path)
        assert len(table) == 2 * 5 * 2
        assert (table[0]["first"], table[0]["last"], table[0]["executed"]) == (0, 1, 0.0)

    def test_equal_total_flops_counts_all_of_them(self, cells):
        """By all FLOPs fixed saves half of what it saves in the blocks, and steps saves nothing."""
        for cell in cells:
            blocks = cell.compute[0]["block_speedup"]
            saves = cell.identity["method"] == "fixed"
            cell.compute[0]["total_speedup"] = 1 / ((1 + 1 / blocks) / 2) if saves else 1.0
            for row in cell.samples:
                row |= {"total_flops": 1.0, "dense_total_flops": 1.0}
        claim = replace(STUDY.claims[0], kind="equal_total_flops")
        first, _ = rows_of("best", cells, replace(STUDY, claims=(claim,)))
        assert first["fraction_a"] == pytest.approx((1 + 1 / 1.5) / 2)
        assert first["verdict"] == "not comparable"
        assert first["reason"] == ("steps was measured from 1.000 to 1.000 of dense's FLOPs alone")

    def test_equal_modules_counts_sublayers(self, cells):
        """All cells execute 0.555 of their sublayers, dense all of them."""
        for row in cells[0].routing:
            row["executed"] = 1.0
        claim = replace(STUDY.claims[0], kind="equal_modules")
        first, second = rows_of("best", cells, replace(STUDY, claims=(claim,)))
        assert first["fraction_a"] == pytest.approx(0.555)
        assert second["fraction_b"] == pytest.approx(0.555)
        assert first["value_b"] == pytest.approx(0.2)
        assert first["verdict"] == "better"

    def test_reach_is_told_for_each_method(self, cells):
        claim = Claim("how deep", "Little.", "them", Pick("fixed"), (Pick("steps"),), "reach")
        claim = replace(claim, metrics=METRICS, published="a quarter")
        study = replace(STUDY, claims=(claim,))
        cells[2] = Cell(cells[2].identity, **tables("", 1.9, [1.0] * DOCUMENTS))
        first, second = rows_of("how deep", cells, study)
        assert (first["a"], first["b"], first["published"]) == ("fixed", "dense", "a quarter")
        assert (first["value_a"], first["verdict"]) == (pytest.approx(1 / 1.9), "reached")
        assert first["reason"] == "at the least budget measured"
        assert (second["a"], second["value_a"]) == ("steps", pytest.approx(1.0))
        assert second["verdict"] == "not shown"
        assert (first["published"], second["published"]) == ("a quarter", "")
        assert set(first) <= set(COLUMNS)
        (row,) = rows_of("how deep", cells[3:], replace(study, claims=(replace(claim, b=()),)))
        assert row["verdict"] == "not comparable"

    def test_similarity_is_compared_where_it_was_measured(self, cells, tmp_path):
        claim = replace(STUDY.claims[0], kind="similarity", metrics=())
        study = replace(STUDY, claims=(claim,))
        assert likened(study, cells, "published") == cells
        (row,) = rows_of("best", cells, study, tmp_path)
        assert row["verdict"] == "not comparable"
        for cell in cells:
            share = 1 / cell.compute[0]["block_speedup"]
            liking = share if cell.identity["method"] == "fixed" else share**3
            about = {"cosine": liking, "tokens": 4, "flops": share, "dense_flops": 1.0}
            file = similarity.file_of(cell, tmp_path)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({f"d{n}": about for n in range(12)}))
        first, second = rows_of("best", cells, study, tmp_path)
        assert (first["metric"], first["value_a"]) == ("cosine", pytest.approx(1 / 1.5))
        assert first["verdict"] == second["verdict"] == "better"

    def test_a_pick_may_name_its_phases(self, cells):
        own = made("steps(phases=generation)", 1.25)
        assert chosen(Pick("steps(phases=generation)"), [*cells, own], "both")
        assert chosen(Pick("steps"), [*cells, own], "both") == []

    def test_recovered_cells_stand_apart(self, cells):
        recipe = Pick("dense", "lora").recipe
        cells += [made("fixed", 1.5, recovery=recipe)]
        claim = replace(STUDY.claims[1], a=Pick("fixed", "lora"), b=(Pick("dense", "lora"),))
        (row,) = rows_of("parity", cells, replace(STUDY, claims=(claim,)))
        assert row["reason"] == "no finished cell of dense + lora"
        cells += [made("dense", recovery=recipe)]
        (row,) = rows_of("parity", cells, replace(STUDY, claims=(claim,)))
        assert (row["cells_a"], row["cells_b"]) == (cells[-2].key, cells[-1].key)

    def test_few_documents_have_no_verdict(self, cells):
        small = [Cell(c.identity, **tables("", 1.5, [1.0, 0.0, 1.0])) for c in cells]
        for row in rows_of("parity", small):
            assert row["verdict"] == "not comparable"
            assert "too few" in row["reason"]

    def test_the_newest_code_of_a_method_counts(self, cells):
        old = [made("fixed", 1.5, method_code="old"), made("fixed", 2.0, method_code="old")]
        assert len(chosen(Pick("fixed"), [*cells, *old], "published")) == 2
        assert chosen(Pick("fixed"), old, "published") == old
        with pytest.raises(UserError, match="several versions"):
            chosen(Pick("fixed"), [*old, made("fixed", 2.0, method_code="older")], "published")

    def test_parameters_must_be_those_of_the_pick(self, cells):
        assert chosen(Pick("steps(rule=other)"), cells, "published") == []
        assert chosen(Pick("steps"), cells, "both") == []
        with pytest.raises(UserError, match="no parameter"):
            chosen(Pick("steps(rul=other)"), cells, "published")


class ToyBench:
    """Computes the cells of ``STUDY``; ``broken`` methods fail."""

    broken: tuple[str, ...] = ()
    asked = 0

    def __init__(self, settings, documents) -> None:
        self.settings, self.documents = settings, documents

    @property
    def shared_identity(self):
        keys = ("model", "dtype", "sample_seed", "num_fewshot", "batch_size")
        found = identity(harness_code="now", torch="1", model_fingerprint="f")
        found |= {key: getattr(self.settings, key) for key in keys}
        found |= {"tasks": list(self.documents), "limit": self.documents}
        own = {*method_identity(CellSpec("dense").build())}
        return {key: value for key, value in found.items() if key not in own}

    def identity(self, plan: CellSpec):
        return cell_module.cell_identity(plan, self.shared_identity)

    def provenance(self, plan: CellSpec):
        return {}

    def evaluate(self, plan: CellSpec):
        ToyBench.asked += 1
        if plan.method in self.broken:
            raise ValueError("no such layer")
        right = outcomes(plan.method, plan.seed, self.documents["quartz"])
        return SimpleNamespace(**tables(plan.method, plan.target_speedup, right))


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The study ``toy`` on the embedded model's name; call it with more flags."""
    entry = SimpleNamespace(load=lambda: STUDY)
    monkeypatch.setattr(studies, "studies", lambda: {"toy": entry})
    monkeypatch.setattr(workbench, "Workbench", ToyBench)
    monkeypatch.setattr(verdicts, "harness_code", lambda: "now")
    monkeypatch.setattr(loading, "layer_count", lambda *_: 12)
    # The sweep's own tables are tested elsewhere.
    monkeypatch.setattr(tables_module, "write_tables", lambda *_: [])
    monkeypatch.setattr(ToyBench, "asked", 0)
    monkeypatch.setattr(
        recordings, "record", lambda cells, _, path: [trace(c, path) for c in cells]
    )
    monkeypatch.setattr(ToyBench, "broken", ())
    path = tmp_path / "run"
    return lambda *flags: door.main(["toy", "--output-path", str(path), *flags])


class TestCommand:
    def test_runs_reports_and_resumes(self, toy, tmp_path, capsys):
        assert toy() == 0
        out = capsys.readouterr().out
        summary = json.loads(out.splitlines()[-1])["study"]
        assert summary["cells"] == 7
        assert summary["verdicts"]["best"] == {"better": 2}
        assert "±15.5 points" in out
        with (tmp_path / "run" / "claims.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == list(COLUMNS)
        assert len(rows) == 10
        assert (tmp_path / "run" / "positions.csv").is_file()
        written = {p: p.read_bytes() for p in (tmp_path / "run").glob("claims.*")}
        assert b"## best" in written[tmp_path / "run" / "claims.md"]

        assert toy("--only-report") == 0
        assert toy() == 0
        assert ToyBench.asked == 7
        assert written == {path: path.read_bytes() for path in written}

    def test_failed_cell_is_reported(self, toy, monkeypatch, capsys):
        monkeypatch.setattr(ToyBench, "broken", ("steps", "fixed"))
        assert toy() == 1
        captured = capsys.readouterr()
        assert "ValueError: no such layer" in captured.err
        assert "no finished cell of fixed and of steps" in captured.out
        summary = json.loads(captured.out.splitlines()[-1])["study"]
        assert summary["failed"] == 6
        assert set(summary["verdicts"]["parts"]) == {"not comparable"}

    def test_other_limits_are_other_cells(self, toy, capsys):
        assert toy("--limit", "12") == 0
        assert toy("--only-report") == 2
        assert "quartz=12" in capsys.readouterr().err
        assert toy("--only-report", "--limit", "12") == 0

    def test_cells_of_different_data_or_conditions_are_refused(self, toy, tmp_path, capsys):
        assert toy() == 0
        for what in ("data_fingerprint", "task_version", "torch"):
            store = Store(tmp_path / "run")
            other = store.all()[0]
            other.identity["attn_implementation"] = "other"
            if what == "task_version":
                other.accuracy[0]["task_version"] = "2.0"
            else:
                other.identity[what] = "other"
            store.write(other)
            capsys.readouterr()
            assert toy("--only-report") == 2
            says = "several versions or conditions" if what == "torch" else "separate leaderboards"
            assert says in capsys.readouterr().err
            store.file(other.identity).unlink()

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (["--only-report"], "holds no cells"),
            (["--speedups", "50"], "at most 6x"),
            (["--speedups", "0"], "at least 1"),
            (["--limit", "nonsense"], "whole number"),
            (["--methods", "steps"], "no flag --methods"),
        ],
    )
    def test_wrong_input_gets_one_sentence(self, toy, tmp_path, capsys, flags, says):
        assert toy(*flags) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert says in captured.err
        assert not (tmp_path / "run").exists()

    def test_study_without_claims_is_its_sweeps(self, toy, tmp_path, monkeypatch, capsys):
        entry = SimpleNamespace(load=lambda: replace(STUDY, claims=()))
        monkeypatch.setattr(studies, "studies", lambda: {"toy": entry})
        assert toy() == 0
        assert ToyBench.asked == 7
        assert not list((tmp_path / "run").glob("claims.*"))
        capsys.readouterr()
        assert toy("--only-report") == 2
        assert "makes no claims" in capsys.readouterr().err

    def test_sweeps_may_be_timed_apart(self):
        timed = replace(STUDY, sweeps=({"methods": "steps", "timing": "full"}, STUDY.sweeps[0]))
        assert [each.timing for each in timed.settings({})] == ["full", "off"]
        assert [each.timing for each in timed.settings({"timing": "quick"})] == ["quick"] * 2

    def test_unknown_study(self, capsys):
        assert door.main(["nope"]) == 2
        assert "unknown study 'nope'" in capsys.readouterr().err

    def test_sweeps_may_not_differ_in_what_must_be_shared(self):
        with pytest.raises(ValueError, match="must not differ in dtype"):
            replace(STUDY, sweeps=({"methods": "steps", "dtype": "bfloat16"},))


@pytest.mark.parametrize("name", studies.studies())
def test_installed_study_computes_what_its_claims_need(name, monkeypatch):
    monkeypatch.undo()
    study = studies.load_study(name)
    assert study.name == name
    assert len({claim.name for claim in study.claims}) == len(study.claims)
    planned = set()
    for settings in study.settings({}):
        for plan in grid.plans(settings, 30):
            planned.add((plan.method, cell_module.parameters_text(plan.build()), plan.recovery))
    for claim in study.claims:
        assert {task for task, _ in claim.metrics} <= study.limit.keys()
        for pick in (claim.a, *claim.b):
            method = registry.load_method(pick.method)
            assert (method.name, cell_module.parameters_text(method), pick.recipe) in planned
