"""Acceptance of drafts: what is recorded of a cell, and what it predicts for other models."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from cells import cell
from toys import Drafting

from dyndepth.results.statistics.intervals import LEAST
from dyndepth.routes import recorded
from dyndepth.runtime.draft_costs import by_bytes, predicted_speedup
from dyndepth.studies import acceptance, verdicts
from dyndepth.studies.predictions import COLUMNS, predictions
from dyndepth.studies.study import Claim, Pick, Study
from dyndepth.sweep.settings import settings

COUNT = LEAST
PROMPTS = {"one/0": [3, 4, 5], "one/1": [50, 49, 48, 47]}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Texts that are quickly written."""
    monkeypatch.setattr(acceptance, "WRITTEN", 12)


def row(drafted: int, accepted: int, refused: int, **changes: float) -> dict[str, float]:
    """What is recorded of a document, by hand."""
    found = {"drafted": drafted, "accepted": accepted, "refused": refused, "written": 9}
    found |= {"verifications": 4, "flops": 60.0, "dense_flops": 80.0, "identical": 1.0}
    return found | {"reran": 0.0} | changes


def keep(folder, cells, kind=acceptance.METRIC, **tasks) -> None:
    """Files of what was recorded of each cell: by task the rows of its documents."""
    for one in cells:
        file = acceptance.file_of(one, folder, kind)
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(
            json.dumps(
                {
                    task: {f"{task}/{i}": r for i, r in enumerate(rows)}
                    for task, rows in tasks.items()
                }
            )
        )


def test_the_whole_model_as_its_own_draft_is_accepted_throughout(tiny):
    found = acceptance.drafted(tiny(), Drafting(without=None, length=3), PROMPTS, {})
    for each in found.values():
        assert each["accepted"] == each["drafted"] > 0
        assert (each["refused"], each["identical"]) == (0, 1.0)
        assert each["flops"] == each["dense_flops"] > 0
        assert each["reran"] == 0


def test_blocks_that_are_run_again_are_recorded_as_passes(tiny):
    class Trying(Drafting):
        reads_states = True

        def verified(self, verdict):
            for layer in (0, 2, 2):
                verdict.rerun(layer, verdict.states[:3])

    found = acceptance.drafted(tiny(), Trying(without=None, length=4), PROMPTS, {})
    for each in found.values():
        # Of four blocks; after the first token two drafts of four, and one token drafted or none.
        assert each["verifications"] == 3
        assert each["reran"] == 3 / 4 * (3 if each["drafted"] > 8 else 2)


def test_a_thinned_draft_counts_its_share_and_writes_what_dense_writes(tiny):
    dense: dict[str, list[int]] = {}
    model = tiny()
    found = acceptance.drafted(model, Drafting(without=1), PROMPTS, dense)
    for name, each in found.items():
        assert each["flops"] == pytest.approx(0.75 * each["dense_flops"])  # one of four blocks
        assert each["written"] == len(dense[name]) <= acceptance.WRITTEN
        assert each["identical"] == 1.0
        # A round writes what was accepted and one more; the first token is the prompt's.
        assert each["written"] == each["accepted"] + each["verifications"] + 1
        assert each["refused"] <= each["verifications"]
    other = {name: [0] * len(ids) for name, ids in dense.items()}
    found = acceptance.drafted(model, Drafting(without=1), PROMPTS, other)
    assert [each["identical"] for each in found.values()] == [0.0, 0.0]


def test_cells_are_measured_once(tiny, tmp_path, monkeypatch):
    model = tiny()

    class Job:
        def __init__(self, label, key, settings, identity):
            self.identity = identity

        def ready(self, bench):
            bench.model, bench.tokenizer = model, None
            return nullcontext(Drafting(without=1))

    monkeypatch.setattr(acceptance, "prompts", lambda *_: {"one": PROMPTS})
    monkeypatch.setattr(recorded, "Recording", Job)
    cells = [cell(seed=seed) for seed in (0, 1)]
    assert acceptance.point(cells, tmp_path, "one") is None
    acceptance.record(cells, settings({}), tmp_path)
    found = acceptance.point(cells, tmp_path, "one")
    assert (found.documents, found.seeds) == (("one/0", "one/1"), 2)
    assert found.fraction == pytest.approx(0.75)
    assert acceptance.point(cells, tmp_path, "another") is None
    monkeypatch.setattr(acceptance, "prompts", lambda *_: pytest.fail("measured again"))
    acceptance.record(cells, settings({}), tmp_path)


def test_a_method_is_fitted_anew_on_each_tasks_own_texts(tiny, tmp_path, monkeypatch):
    model, read = tiny(), []

    @dataclass(kw_only=True)
    class Fitted(Drafting):
        def fit(self, model, corpus=None):
            read.append(corpus)
            return self

    class Job:
        def __init__(self, label, key, settings, identity):
            self.identity = identity

        def ready(self, bench):
            bench.model, bench.tokenizer = model, None
            return nullcontext(Drafting())

    monkeypatch.setattr(recorded, "Recording", Job)
    monkeypatch.setattr(recorded, "rebuilt", lambda identity: Fitted(without=1))
    monkeypatch.setattr(
        "dyndepth.fitting.fits.fit_cached", lambda m, model, corpus: m.fit(model, corpus)
    )
    asked = {task: {f"{task}/0": [3, 4, 5]} for task in ("one", "two")}
    monkeypatch.setattr(acceptance, "prompts", lambda *_: asked)
    others = lambda task, settings, continued: [f"{task} {n}" for n in range(4)]  # noqa: E731
    monkeypatch.setattr(acceptance, "_other_texts", others)
    acceptance.record_transfer([cell()], settings({}), tmp_path)
    assert [sorted(corpus.texts) for corpus in read] == [others(t, 0, 0) for t in asked]
    assert acceptance.point([cell()], tmp_path, "two", kind="transfer").fraction < 1


def test_texts_to_fit_on_are_prompts_and_right_answers_of_other_documents(monkeypatch):
    class Task:
        eval_docs, config = range(6), SimpleNamespace(doc_to_choice="choices")

        def doc_to_text(self, document):
            return f"question {document}:"

        def doc_to_choice(self, document):
            return ["none", "one", "the second"]

        def doc_to_target(self, document):
            return {2: 2, 4: ["four", "4"]}.get(document, f" answer {document}")

    monkeypatch.setattr(acceptance, "_load", lambda *_: Task())
    found = acceptance._other_texts("one", settings({}), {"one/0", "one/3"})
    wanted = ["question 1: answer 1", "question 2: the second", "question 4:"]
    assert found == [*wanted, "question 5: answer 5"]
    monkeypatch.setattr(Task, "config", SimpleNamespace(doc_to_choice=None))
    assert acceptance._other_texts("one", settings({}), {"one/0"})[1] == "question 2: 2"


def test_a_choice_of_the_harness_brings_its_right_option(monkeypatch):
    asked = settings({"tasks": ["socialiqa"]})
    text, *_ = acceptance._other_texts("socialiqa", asked, set())
    assert text.startswith("Q: ")
    assert text.endswith("\nA: be saved")


def test_prompts_are_those_of_the_documents_that_are_scored(embedded_tokenizer):
    asked = settings(
        {"tasks": ["last_word", "wikipedia_bpb"], "limit": "last_word=3,wikipedia_bpb=2"}
    )
    found = acceptance.prompts(asked, embedded_tokenizer)
    assert {task: len(texts) for task, texts in found.items()} == {
        "last_word": 3,
        "wikipedia_bpb": 2,
    }
    for ids in found["last_word"].values():
        assert 1 <= len(ids) <= acceptance.PROMPT
    for ids in found["wikipedia_bpb"].values():
        assert 1 <= len(ids) <= acceptance.PROMPT // 2
    few = settings({"tasks": ["last_word"], "limit": 2})
    assert (
        acceptance.prompts(few, embedded_tokenizer)["last_word"].items()
        <= found["last_word"].items()
    )


STUDY = Study(
    name="toy",
    title="A toy",
    limit={"one": COUNT},
    sweeps=({"methods": "static_pruning", "speedups": (1.25,)},),
    claims=(
        Claim(
            *("more", "More.", "nobody", Pick("uls"), (Pick("static_pruning"),), "acceptance"),
            metrics=acceptance.of(["one"]),
        ),
        Claim(
            *(
                "moved",
                "Sets serve other texts.",
                "nobody",
                Pick("uls"),
                (Pick("uls"),),
                "transfer",
            ),
            metrics=acceptance.of(["one"]),
        ),
        Claim(
            *("same", "Nothing changes.", "nobody", Pick("uls"), (), "identical"),
            metrics=acceptance.of(["one"], acceptance.IDENTICAL),
        ),
    ),
)


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    """Cells of two methods, and what was recorded of them on eight documents."""
    cells = {
        (name, target): cell(method=name, target_speedup=target)
        for name, targets in {"uls": (1.5,), "static_pruning": (1.25, 2.0)}.items()
        for target in targets
    }

    def chosen(pick, given, phases):
        return [one for (name, _), one in cells.items() if name == pick.method]

    monkeypatch.setattr(verdicts, "chosen", chosen)
    shares = {1.25: 80.0, 1.5: 60.0, 2.0: 40.0}
    for (_, target), one in cells.items():
        good = {1.25: 60, 1.5: 65, 2.0: 40}[target]
        rows = [
            row(100, good + n, 5, flops=shares[target], dense_flops=100.0) for n in range(COUNT)
        ]
        keep(tmp_path, [one], one=rows)
    return cells, tmp_path


def test_acceptance_is_compared_at_equal_draft_depth(by_hand):
    cells, folder = by_hand
    found, *_ = verdicts.report(STUDY, list(cells.values()), "both", folder)
    # The other stands between .8 (60 %) and .4 (40 %) of full depth: at .6 it has 50 %.
    assert found["fraction_a"] == pytest.approx(0.6)
    assert found["difference"] == pytest.approx(0.15)
    assert (found["verdict"], found["n"]) == ("better", COUNT)


def test_curves_of_acceptance_end_at_the_whole_model(by_hand):
    """Half way from .8 (60 %) to all of it (100 %) stands 80 %."""
    cells, folder = by_hand
    rows = [row(100, 65 + n, 5, flops=90.0, dense_flops=100.0) for n in range(COUNT)]
    keep(folder, [cells["uls", 1.5]], one=rows)
    found, *_ = verdicts.report(STUDY, list(cells.values()), "both", folder)
    assert found["fraction_b"] == pytest.approx(0.9)
    spread = sum(range(COUNT)) / COUNT / 100
    assert found["value_b"] == pytest.approx((0.6 + spread + 1.0) / 2)


def test_a_transfer_compares_fits_on_own_and_on_other_texts(by_hand):
    cells, folder = by_hand
    own = cells["uls", 1.5]
    row_of = lambda: verdicts.report(STUDY, list(cells.values()), "both", folder)[1]  # noqa: E731
    assert row_of()["verdict"] == "not comparable"
    keep(folder, [own], "transfer", one=[row(100, 90 + n, 5) for n in range(COUNT)])
    found = row_of()
    assert found["difference"] == pytest.approx(0.25)
    assert found["verdict"] == "better"


def test_texts_that_are_not_densest_differ(by_hand):
    cells, folder = by_hand
    assert verdicts.report(STUDY, list(cells.values()), "both", folder)[2]["verdict"] == "identical"
    rows = [row(100, 50, 5, identical=float(n > 0)) for n in range(COUNT)]
    keep(folder, [cells["uls", 1.5]], one=rows)
    found = verdicts.report(STUDY, list(cells.values()), "both", folder)[2]
    assert (found["verdict"], found["value_a"]) == ("differs", pytest.approx(1 - 1 / COUNT))


def test_claims_take_the_mean_over_documents_and_tables_the_ratio_of_sums(tmp_path):
    keep(tmp_path, [cell()], one=[row(1, 1, 0), row(16, 4, 4)])
    assert acceptance.point([cell()], tmp_path, "one").value == (1 + 4 / 16) / 2
    assert acceptance.table([cell()], tmp_path)[0]["accepted_share"] == 5 / 17


def test_texts_of_one_token_are_left_out(tmp_path):
    keep(tmp_path, [cell()], one=[row(0, 0, 0, written=1), row(4, 2, 1)])
    assert acceptance.point([cell()], tmp_path, "one").value == 0.5
    keep(tmp_path, [cell()], one=[row(0, 0, 0, written=1)])
    assert acceptance.point([cell()], tmp_path, "one") is None


def test_the_table_sums_documents_by_task_and_over_all(tmp_path):
    one = row(8, 6, 1, written=11, reran=1.75)
    other = row(8, 2, 3, written=7, identical=0.0, reran=0.5)
    keep(tmp_path, [cell()], first=[one], second=[other])
    first, second, whole = acceptance.table([cell(), cell(seed=5)], tmp_path)
    assert [each["task"] for each in (first, second, whole)] == ["first", "second", "all"]
    assert (first["accepted_share"], second["accepted_share"]) == (0.75, 0.25)
    assert (whole["drafted"], whole["accepted_share"], whole["chance"]) == (16, 0.5, 8 / 12)
    assert whole["tokens_per_verify"] == (11 + 7 - 2) / 8  # the first of each is the prompt's
    assert (whole["identical"], whole["draft_share"], whole["documents"]) == (0.5, 0.75, 2)
    assert [each["reran"] for each in (first, second, whole)] == [1.75, 0.5, 2.25]
    assert set(whole) == set(acceptance.COLUMNS)


def test_predictions_are_the_cost_models_on_public_shapes(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from dyndepth.models import shapes as known

    kept = {name: known.shapes()[name] for name in ("smollm2-135m", "tiny")}
    monkeypatch.setattr(known, "shapes", lambda: kept)
    keep(tmp_path, [cell()], one=[row(8, 6, 1), row(8, 2, 3)])
    (found,) = predictions(acceptance.table([cell()], tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known.shape_config("shape:smollm2-135m"))
    costs = by_bytes(model, torch.full((30, 2), 0.75))
    assert found["draft_cost"] == pytest.approx(costs.draft, rel=1e-6)
    assert found["length"] == 2
    assert found["predicted_speedup"] == pytest.approx(predicted_speedup(8 / 12, 2, costs))
    assert found["best_predicted_speedup"] >= found["predicted_speedup"]
    assert found["verify_cost"] == 1
    assert found["size"] == 134_515_008
    assert set(found) == set(COLUMNS)


def test_what_is_run_again_is_read_in_predictions(tmp_path, monkeypatch):
    """Half a pass after each verification, and one after each, after which no draft pays."""
    from dyndepth.models import shapes as known

    kept = {name: known.shapes()[name] for name in ("smollm2-135m", "tiny")}
    monkeypatch.setattr(known, "shapes", lambda: kept)
    found = []
    for passes in (0.0, 2.0, 4.0):
        keep(tmp_path, [cell()], one=[row(16, 12, 1, reran=passes, flops=16.0)])
        found += predictions(acceptance.table([cell()], tmp_path))
    none, half, one = found
    layers, head = 30 * 3_540_096, 49_152 * 576 + 576
    assert half["verify_cost"] == pytest.approx(1 + 0.5 * layers / (layers + head))
    assert one["verify_cost"] == pytest.approx(1 + layers / (layers + head))
    tokens = sum((12 / 13) ** place for place in range(5))
    draft = (0.2 * layers + head) / (layers + head)
    for each in found:
        cost = 4 * draft + each["verify_cost"]
        assert each["predicted_speedup"] == pytest.approx(tokens / cost)
    assert none["best_predicted_speedup"] > half["best_predicted_speedup"] > 1
    keep(tmp_path, [cell()], one=[row(16, 4, 4, reran=4.0, flops=16.0)])
    (found,) = predictions(acceptance.table([cell()], tmp_path))
    assert (found["best_length"], found["best_predicted_speedup"]) == (0, 1.0)


def test_pages_show_what_was_accepted_and_what_it_would_come_to(tmp_path):
    from dyndepth.pages.blocks import Source
    from dyndepth.pages.drafts import acceptances
    from dyndepth.pages.drafts import predictions as shown
    from dyndepth.results.tables import csv_text

    source = Source(tmp_path, tmp_path)
    missing = f"No run of it is committed in `{tmp_path}` yet."
    asked = {"folder": tmp_path, "target": 1.25}
    assert acceptances(source, asked) == shown(source, asked) == missing
    cells = [cell(method=name, target_speedup=1.25) for name in ("uls", "static_pruning")]
    keep(tmp_path, cells[:1], one=[row(8, 6, 1, written=9)])
    keep(tmp_path, cells[1:], one=[row(8, 0, 4, written=5)])
    rows = acceptance.table(cells, tmp_path)
    (tmp_path / "acceptance.csv").write_text(csv_text(rows, acceptance.COLUMNS))
    lines = acceptances(source, asked).splitlines()
    assert lines[0] == (
        "| draft | target | share of depth | accepted, one | of judged | tokens a verification | "
        "texts as dense's |"
    )
    assert lines[2] == "| `static_pruning` | 1.25x | 0.75 | 0.00 | 0.00 | 1.00 | 1 of 1 |"
    assert lines[3] == "| `uls` | 1.25x | 0.75 | 0.75 | 0.86 | 2.00 | 1 of 1 |"
    (tmp_path / "predictions.csv").write_text(csv_text(list(predictions(rows)), COLUMNS))
    head, _, share, best, worst = shown(source, asked).splitlines()
    assert "llama-3.1-70b" in head
    assert share.startswith("| LM head's share")
    assert best.startswith("| `uls` | 0.86 | ")
    assert "x at " in best
    assert worst.startswith("| `static_pruning` | 0.00 | needs 0.")
