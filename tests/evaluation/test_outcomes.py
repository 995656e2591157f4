"""Outcomes of plans: what scoring each plan alone gives, computed once and kept."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import test_evaluate as scored
import torch
from gating import GivenPlan, plan_without
from lm_eval.api import metrics

from dyndepth.common.errors import UserError
from dyndepth.common.files import cache_root
from dyndepth.evaluation import outcomes, plan_scoring
from dyndepth.evaluation.evaluate import quiet_lm_eval, sample, set_shots
from dyndepth.evaluation.language_model import DyndepthLM
from dyndepth.evaluation.outcomes import outcomes_of
from dyndepth.tasks import task_manager

model, run, tokenizer = scored.model, scored.run, scored.tokenizer

GRADED = (
    scored.TASKS["written"]
    .replace("task: written", "task: graded\nprocess_results: !function graded.grade")
    .replace("metric: exact_match", "metric: grade")
)
DRAWN = (
    scored.TASKS["choice"]
    .replace("task: choice", "task: drawn")
    .replace("fewshot_config: {sampler: first_n}\n", "")
)
GRADE = """
def grade(doc, results):
    return {"grade": sum(map(ord, results[0])) % 101 / 100}
"""

PLANS = [
    plan_without(4),
    plan_without(4, (1, 0), (1, 1)),
    plan_without(4, (0, 0), (2, 1)),
    plan_without(4, (1, 0), (1, 1), (2, 0), (2, 1)),
    plan_without(4, *((layer, sub) for layer in range(4) for sub in range(2))),
]
TABLE = torch.tensor(PLANS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tasks of test_evaluate; ``graded``: written, with a metric that always differs;
    ``drawn``: choices whose examples are drawn at random, as lm-eval does by default."""
    path = tmp_path_factory.mktemp("tasks")
    for name, text in (scored.TASKS | {"graded": GRADED, "drawn": DRAWN}).items():
        (path / f"{name}.yaml").write_text(text)
    (path / "tiny_documents.py").write_text(scored.DOCUMENTS)
    (path / "graded.py").write_text(GRADE)
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ask(model, tokenizer, folder):
    """``ask(task, phases, indices=None, shots=0)``: the outcomes of PLANS."""

    def ask(name, phases, indices=None, shots=0, plans=TABLE):
        method = GivenPlan(plan=PLANS[0], phases=phases)
        reader = DyndepthLM(model, method, tokenizer, 4, progress=False)
        if indices is not None:
            reader.document_index = {name: indices}
        with quiet_lm_eval():
            task = task_manager([name], folder).load([name])["tasks"][name]
            set_shots(task, shots)
            return outcomes_of(reader, task, plans)

    return ask


@pytest.mark.parametrize("phases", ["both", "generation"])
@pytest.mark.parametrize("name", ["choice", "rolling", "graded"])
def test_outcomes_are_those_of_each_plan_alone(ask, run, name, phases):
    shots = 2 if name == "choice" else 0
    found = ask(name, phases, shots=shots)
    assert found.task == name
    prompts = [0.0] * len(found.documents)
    if phases == "generation":  # without any block in the generation, what is left is the prompt
        bare = run(GivenPlan(plan=PLANS[-1], phases=phases), name, num_fewshot=shots)
        prompts = [row["block_flops"] for row in bare.samples]
    for number, plan in enumerate(PLANS):
        alone = run(GivenPlan(plan=plan, phases=phases), name, num_fewshot=shots)
        rows = alone.samples
        assert found.documents == tuple(f"{name}/{row['doc_id']}" for row in rows)
        assert found.metric == rows[0]["metric"]
        sign = -1 if name == "rolling" else 1
        expected = [sign * row["outcome"] for row in rows]
        tolerance = 1e-4 if name == "rolling" else 0
        assert found.quality[:, number].tolist() == pytest.approx(expected, abs=tolerance)
        assert found.weights.tolist() == [row["weight"] for row in rows]
        counts = [
            (row["block_flops"] - prompt, row["dense_block_flops"] - prompt)
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        executed, dense = np.array(counts).T
        if name == "graded":  # per FLOP of its own text, on that of the dense model
            share = np.divide(executed, dense, out=np.zeros_like(dense), where=dense > 0)
            expected = share * found.dense_flops.numpy()
            assert found.flops[:, number].numpy() == pytest.approx(expected, rel=1e-12)
        else:
            assert found.flops[:, number].tolist() == executed.tolist()
        if name != "graded" or number == 0:
            assert found.dense_flops.tolist() == dense.tolist()
    assert len(set(found.quality.flatten().tolist())) > 1


def test_the_documents_of_a_sample_are_those_that_are_scored(ask, run):
    whole, some = ask("choice", "both"), sample("choice", 20, 6, seed=3)
    part = ask("choice", "both", indices=some)
    assert part.documents == tuple(f"choice/{index}" for index in some)
    assert torch.equal(part.quality, whole.quality[some])
    assert torch.equal(part.flops, whole.flops[some])


def test_outcomes_are_kept_and_garbled_ones_made_again(ask, monkeypatch):
    calls = []
    stock = plan_scoring.score
    monkeypatch.setattr(plan_scoring, "score", lambda *a, **k: calls.append(a) or stock(*a, **k))
    first, again = ask("choice", "both"), ask("choice", "both")
    assert len(calls) == 1
    for name in ("quality", "weights", "flops", "dense_flops"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert (first.documents, first.metric) == (again.documents, again.metric)
    ask("choice", "generation")
    ask("choice", "both", shots=1)
    ask("choice", "both", indices=[1, 2])
    ask("choice", "both", plans=TABLE[:3])
    assert len(calls) == 5
    for file in cache_root().glob("outcomes/*/*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert torch.equal(ask("choice", "both").quality, first.quality)
    assert len(calls) == 6


def test_a_task_without_values_on_single_documents_is_refused(ask, folder):
    text = scored.TASKS["written"].replace("task: written", "task: judged")
    text = text.replace("metric: exact_match, aggregation: mean", "metric: bleu, aggregation: bleu")
    (folder / "judged.yaml").write_text(text)
    try:
        task_manager.__globals__["_manager"].cache_clear()
        with pytest.raises(UserError, match="task judged, whose first metric .bleu. has no value"):
            ask("judged", "both")
    finally:
        (folder / "judged.yaml").unlink()
        task_manager.__globals__["_manager"].cache_clear()


def test_perplexities_count_by_their_logarithm():
    def quality(aggregation, item, higher=None):
        task = SimpleNamespace(
            task_name="t",
            aggregation=lambda: {"m": aggregation},
            higher_is_better=lambda: {"m": higher},
        )
        return outcomes._quality(task, "m", item)

    assert quality(metrics.perplexity, -900.0, False) == (-900.0, 1.0)
    assert quality(metrics.weighted_perplexity, (-900.0, 3), False) == (-300.0, 3.0)
    bits = quality(metrics.bits_per_byte, (-math.log(2) * 30, 15), False)
    assert bits == (pytest.approx(-2.0), 15.0)
    assert quality(metrics.mean, 1.0, True) == quality(metrics.mean, True) == (1.0, 1.0)
    with pytest.raises(UserError, match="has no value on a single document"):
        quality(metrics.mean, ("reference", "text"))


def test_a_log_likelihood_that_is_not_a_number_stops_the_run(ask, model):
    weight = model.get_output_embeddings().weight
    kept = weight.clone()
    try:
        weight[:] = float("nan")
        with pytest.raises(FloatingPointError, match=r"document choice/0 is not a number"):
            ask("choice", "both")
    finally:
        weight.copy_(kept)
