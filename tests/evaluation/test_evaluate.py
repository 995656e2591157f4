"""Scores under a method: equal to lm-eval's own on dense, to a plain forward on anything else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tiny
from gating import GivenPlan, RandomMask, plan_without
from reading import byte_tokenizer

from dyndepth.common.errors import UserError
from dyndepth.evaluation import language_model, scoring
from dyndepth.evaluation.evaluate import evaluate, sample
from dyndepth.evaluation.forwards import parts
from dyndepth.evaluation.language_model import DyndepthLM
from dyndepth.evaluation.rows import outcome, standard_error
from dyndepth.lm_eval_plugin.model import NamedLM
from dyndepth.methods.dense import Dense
from dyndepth.runtime.attach import attach
from dyndepth.tasks import OFFLINE, task_manager

LAYERS = 4
WORDS = ["red", "green", "blue", "cold", "warm", "old", "new", "big", "small", "tall"]

TASKS = {
    "choice": """
task: choice
custom_dataset: !function tiny_documents.choice
output_type: multiple_choice
test_split: test
fewshot_split: test
fewshot_config: {sampler: first_n}
doc_to_text: "{{text}}\\nA:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 3.0}
""",
    "rolling": """
task: rolling
custom_dataset: !function tiny_documents.rolling
output_type: loglikelihood_rolling
test_split: test
num_fewshot: 0
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
metadata: {version: 1.0}
""",
    "written": """
task: written
custom_dataset: !function tiny_documents.choice
output_type: generate_until
test_split: test
doc_to_text: "{{text}}\\nA:"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
""",
}

DOCUMENTS = """
from datasets import Dataset

WORDS = ["red", "green", "blue", "cold", "warm", "old", "new", "big", "small", "tall"]


def choice(**_):
    rows = [
        {
            "text": " ".join(WORDS[(i * k) % 10] for k in range(1, 2 + (5 * i) % 13)),
            "choices": [WORDS[i % 10], " ".join(WORDS[: 1 + i % 4]), "x"],
            "label": i % 3,
        }
        for i in range(20)
    ]
    return {"test": Dataset.from_list(rows)}


def rolling(**_):
    rows = [{"text": " ".join(WORDS[(i * k) % 10] for k in range(3 + i * i))} for i in range(9)]
    return {"test": Dataset.from_list(rows)}
"""


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, without special tokens in texts."""
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    """A tiny model over bytes; its window is short, so that long texts need several."""
    return make_tiny(vocab_size=259, max_position_embeddings=160)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with task files of its own."""
    path = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        (path / f"{name}.yaml").write_text(text)
    (path / "tiny_documents.py").write_text(DOCUMENTS)
    return path


@pytest.fixture(scope="module")
def run(model, tokenizer, folder):
    """``run(method, tasks, **settings)`` on the tiny model."""

    def run(method=None, tasks="choice,rolling,written", **settings):
        settings = {"progress": False, "include_path": folder, "batch_size": 4} | settings
        return evaluate(model, tokenizer, method or Dense(), tasks, **settings)

    return run


@pytest.fixture(scope="module")
def random_mask(run):
    """All three tiny tasks under random token masks."""
    return run(RandomMask(rate=0.6))


def logs(evaluation, task):
    """Log-likelihoods by document."""
    rows = (row for row in evaluation.samples if row["task"] == task)
    return {row["doc_id"]: json.loads(row["loglikelihoods"]) for row in rows}


@torch.no_grad()
def plain(model, method, tokenizer, context, continuation):
    """Log-likelihood by one full forward over one sequence."""
    start = tokenizer.encode(context) if context else [tokenizer.bos_token_id]
    target = tokenizer.encode(continuation)
    ids = torch.tensor([start + target[:-1]])
    with attach(model, method, prompt_length=len(start)):
        logits = model(ids).logits[0, len(start) - 1 :].log_softmax(-1)
    return logits.gather(1, torch.tensor(target)[:, None]).sum().item()


@pytest.mark.parametrize(
    "method",
    [
        RandomMask(rate=0.6),
        RandomMask(rate=0.6, phases="generation"),
        GivenPlan(plan=plan_without(LAYERS, (0, 0), (1, 0), (1, 1))),
        GivenPlan(plan=plan_without(LAYERS, (0, 0), (2, 1)), phases="generation"),
    ],
    ids=repr,
)
def test_two_passes_over_a_cache_equal_one_plain_forward(model, tokenizer, folder, run, method):
    scored = logs(run(method, "choice"), "choice")
    documents = task_manager(["choice"], folder).load(["choice"])["tasks"]["choice"].eval_docs
    assert len(scored) == len(documents) == 20
    for index, document in enumerate(documents):
        expected = [
            plain(model, method, tokenizer, document["text"] + "\nA:", " " + choice)
            for choice in document["choices"]
        ]
        assert scored[index] == pytest.approx(expected, abs=1e-4)


def test_a_long_text_is_scored_in_windows_that_cover_it_once(model, tokenizer, folder, run):
    from lm_eval.models.huggingface import HFLM

    task = task_manager(["rolling"], folder).load(["rolling"])["tasks"]["rolling"]
    texts = [document["text"] for document in task.eval_docs]
    assert max(map(len, texts)) > model.config.max_position_embeddings
    requests = [SimpleNamespace(args=(text,)) for text in texts]
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    expected = stock.loglikelihood_rolling(requests, disable_tqdm=True)
    scored = logs(run(tasks="rolling"), "rolling")
    assert [scored[i][0] for i in range(len(texts))] == pytest.approx(expected, abs=1e-3)


def test_a_context_that_does_not_fit_is_cut_from_the_left(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    pairs = [("old " * 80, " cold"), ("new " * 39 + "red", " blue green tall"), ("", " warm")]
    requests = [SimpleNamespace(args=pair, task_name="t", doc_id=0) for pair in pairs]
    own = DyndepthLM(model, Dense(), tokenizer, progress=False).loglikelihood(requests)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    expected = stock.loglikelihood(requests, disable_tqdm=True)
    assert [one for one, _ in own] == pytest.approx([one for one, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("batch_size", [1, 20])
def test_results_do_not_depend_on_the_batch(run, random_mask, batch_size):
    other = run(RandomMask(rate=0.6), batch_size=batch_size)
    for task in ("choice", "rolling"):
        one, two = logs(random_mask, task), logs(other, task)
        assert one.keys() == two.keys()
        for index in one:
            assert one[index] == pytest.approx(two[index], abs=1e-3)
    costs = ("task", "doc_id", "response", "tokens", "block_flops", "total_flops")
    assert [[row[key] for key in costs] for row in other.samples] == [
        [row[key] for key in costs] for row in random_mask.samples
    ]


@pytest.mark.parametrize("most", [1, 3, 8])
def test_batches_hold_every_sequence_once_and_cost_least(most):
    lengths = sorted((7 * i * i % 301 + 1 for i in range(1, 60)), reverse=True)
    found = [range(len(lengths))[part] for part in parts(lengths, most, 640)]
    assert [index for part in found for index in part] == list(range(59))

    def cost(batches):
        return sum(len(part) * lengths[part[0]] + 640 / 16 for part in batches)

    for part in found:
        assert len(part) <= most
        assert len(part) == 1 or len(part) * lengths[part[0]] <= 640
    by_rows = [range(59)[start : start + most] for start in range(0, 59, most)]
    fitting = [part for part in by_rows if len(part) * lengths[part[0]] <= 640]
    if len(fitting) == len(by_rows):
        assert cost(found) <= cost(by_rows)
    assert cost(found) <= cost([range(index, index + 1) for index in range(59)])
    assert list(parts([], most, 640)) == []


def test_sparse_and_masked_score_alike(run, random_mask):
    masked = run(RandomMask(rate=0.6), "choice", backend="masked")
    for index, expected in logs(random_mask, "choice").items():
        assert logs(masked, "choice")[index] == pytest.approx(expected, abs=1e-4)


def test_generation_is_greedy_and_stops_by_itself(model, tokenizer, run, random_mask):
    method = RandomMask(rate=0.6)
    rows = [row for row in random_mask.samples if row["task"] == "written"]
    assert len(rows) == 20
    lengths = set()
    for row in rows:
        text = " ".join(
            WORDS[(row["doc_id"] * k) % 10] for k in range(1, 2 + (5 * row["doc_id"]) % 13)
        )
        ids = torch.tensor([tokenizer.encode(text + "\nA:")])
        with attach(model, method) as trace:
            out = model.generate(
                ids, max_new_tokens=12, do_sample=False, pad_token_id=0, tokenizer=tokenizer,
                stop_strings=["e", "\n"],
            )  # fmt: skip
            tokens = trace.totals()["tokens"]
        generated = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["response"] == generated.split("e")[0].split("\n")[0]
        assert row["tokens"] == tokens
        lengths.add(out.shape[1] - ids.shape[1])
    assert len(lengths) > 1, "all completions are equally long: nothing stopped early"


@pytest.mark.parametrize("settings", [{"do_sample": True, "temperature": 0.7}, {"num_beams": 2}])
def test_generation_by_chance_or_beams_is_refused(model, tokenizer, settings):
    request = SimpleNamespace(args=("red", settings | {"until": []}), task_name="t", doc_id=0)
    with pytest.raises(UserError, match="task t generates by sampling or beams"):
        DyndepthLM(model, Dense(), tokenizer, progress=False).generate_until([request])


def test_tables_are_plain_complete_and_consistent(random_mask):
    json.dumps(vars(random_mask), allow_nan=False)
    assert [(row["task"], row["metric"], row["n"]) for row in random_mask.accuracy] == [
        ("choice", "acc", 20),
        ("choice", "acc_norm", 20),
        ("rolling", "word_perplexity", 9),
        ("rolling", "bits_per_byte", 9),
        ("written", "exact_match", 20),
    ]
    assert {row["filter"] for row in random_mask.accuracy} == {"none"}
    assert random_mask.accuracy[0]["task_version"] == "3.0"
    assert random_mask.accuracy[0]["higher_is_better"] is True
    assert random_mask.accuracy[3]["higher_is_better"] is False
    for row in random_mask.compute:
        mine = [s for s in random_mask.samples if s["task"] == row["task"]]
        if row["phase"] == "all":
            assert row["tokens"] == sum(s["tokens"] for s in mine)
            flops = row["tokens"] * row["total_flops_per_token"]
            assert flops == pytest.approx(sum(s["total_flops"] for s in mine))
        blocks = row["attention"] + row["mlp"]
        assert blocks == pytest.approx(row["block_flops_per_token"])
    assert len(random_mask.routing) == 3 * LAYERS * 2
    executed = [row["executed"] for row in random_mask.routing if row["phase"] == "all"]
    assert 0.4 < np.mean(executed) < 0.8


def test_samples_reproduce_the_scores(random_mask):
    rows = {row["metric"]: row for row in random_mask.accuracy}
    choice = [row for row in random_mask.samples if row["task"] == "choice"]
    assert {row["metric"] for row in choice} == {"acc,none"}
    assert np.mean([row["outcome"] for row in choice]) == pytest.approx(rows["acc"]["value"])
    norm = [json.loads(row["outcomes"])["acc_norm,none"] for row in choice]
    assert np.mean(norm) == pytest.approx(rows["acc_norm"]["value"])
    rolling = [row for row in random_mask.samples if row["task"] == "rolling"]
    assert {row["metric"] for row in rolling} == {"bits_per_byte,none"}
    mean = np.average([r["outcome"] for r in rolling], weights=[r["weight"] for r in rolling])
    assert mean == pytest.approx(rows["bits_per_byte"]["value"])
    assert all(row["target"] is None for row in rolling)


def test_phases_are_kept_apart(run):
    half = GivenPlan(plan=plan_without(LAYERS, (1, 0), (1, 1), (2, 0), (2, 1)), phases="generation")
    result = run(half, "choice,rolling")
    speedups = {(row["task"], row["phase"]): row["block_speedup"] for row in result.compute}
    for task in ("choice", "rolling"):
        assert speedups[task, "prompt"] == 1.0
        assert speedups[task, "generation"] == pytest.approx(2.0)
        assert 1.0 < speedups[task, "all"] < 2.0
    executed = {(r["phase"], r["layer"], r["sublayer"]): r["executed"] for r in result.routing}
    assert executed["prompt", 1, "mlp"] == 1.0
    assert executed["generation", 1, "mlp"] == 0.0
    assert executed["generation", 3, "attention"] == 1.0


@dataclass(kw_only=True)
class PlanByDocument(GivenPlan):
    """A plan a document, and so none that documents could share a beginning under."""

    granularity = "sequence"


def test_a_method_hears_which_document_it_sees(run):
    full, half = plan_without(LAYERS), plan_without(LAYERS, (1, 0), (1, 1), (2, 0), (2, 1))
    chosen = sample("choice", 20, 6, seed=5)
    plans = {f"choice/{index}": half if index % 2 else full for index in chosen}
    result = run(PlanByDocument(plan=plans), "choice", limit=6, seed=5)
    assert [row["doc_id"] for row in result.samples] == chosen
    assert {row["doc_id"] % 2 for row in result.samples} == {0, 1}
    for row in result.samples:
        speedup = row["dense_block_flops"] / row["block_flops"]
        assert speedup == pytest.approx(2.0 if row["doc_id"] % 2 else 1.0)


def test_a_limit_draws_the_same_documents_for_every_method(run):
    one = run(Dense(), "choice", limit=7, seed=1)
    two = run(RandomMask(), "choice", limit=7, seed=1)
    drawn = [[(row["doc_id"], row["doc_hash"]) for row in r.samples] for r in (one, two)]
    assert drawn[0] == drawn[1]
    assert [index for index, _ in drawn[0]] == sample("choice", 20, 7, 1) != list(range(7))
    assert one.accuracy[0]["n"] == 7
    hashes = {row["doc_id"]: row["doc_hash"] for row in run(Dense(), "choice").samples}
    assert len(hashes) == 20
    assert all(hashes[index] == text for index, text in drawn[0])


def test_samples_are_sorted_nested_and_seeded():
    small, large = sample("t", 1000, 50, 0), sample("t", 1000, 200, 0)
    assert small == sorted(set(small))
    assert len(small) == 50
    assert set(small) < set(large)
    assert sample("t", 1000, 50, 1) != small != sample("u", 1000, 50, 0)
    assert 350 < np.mean(sample("t", 1000, 200, 0)) < 650


def test_examples_come_before_the_question(run):
    none, two = run(tasks="choice,rolling"), run(tasks="choice,rolling", num_fewshot=2)
    tokens = [
        {row["task"]: row["tokens"] for row in result.compute if row["phase"] == "prompt"}
        for result in (none, two)
    ]
    assert tokens[1]["choice"] > 2 * tokens[0]["choice"]
    assert tokens[1]["rolling"] == tokens[0]["rolling"], "a task that fixes 0 examples keeps them"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit must be at least 1"),
        ({"num_fewshot": 21}, "task choice holds 20 few-shot examples, not 21"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
    ],
)
def test_wrong_settings_are_told_in_a_sentence(run, settings, message):
    with pytest.raises(UserError, match=message):
        run(tasks="choice", **settings)


def test_a_log_likelihood_that_is_not_a_number_stops_the_run(tokenizer, folder):
    broken = make_tiny(vocab_size=259)
    broken.get_output_embeddings().weight[:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"Dense.*document choice/\d+ is not a number"):
        evaluate(broken, tokenizer, Dense(), "choice", progress=False, include_path=folder)


def test_scores_that_bypass_the_method_are_refused(run, monkeypatch):
    def bypass(model, trace, groups, batch_size, **_):
        yield from ((i, [(0.0, True)] * len(g.continuations)) for i, g in enumerate(groups))

    monkeypatch.setattr(scoring, "score", bypass)
    monkeypatch.setattr(language_model, "agree", lambda *_: None)
    with pytest.raises(RuntimeError, match="task choice: nothing was recorded"):
        run(tasks="choice")


def test_the_model_is_left_as_it_was(model, run):
    ids = torch.arange(3, 40)[None]
    before = model(ids).logits
    run(RandomMask(rate=0.3), "choice", limit=3)
    assert torch.equal(model(ids).logits, before)


def test_rules_that_draw_begin_where_they_always_do(run, monkeypatch):
    drawn = []

    class Drawing(RandomMask):
        def start(self, context):
            drawn.append(torch.rand(1).item())
            return super().start(context)

    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run(Drawing(rate=0.3), "choice", limit=2)
        assert torch.equal(torch.get_rng_state(), before)
    half = len(drawn) // 2
    assert drawn[:half] == drawn[half:]
    assert half


def test_lm_eval_knows_the_name(model, tokenizer, tmp_path):
    from lm_eval.api.registry import get_model

    assert get_model("dyndepth") is NamedLM
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = get_model("dyndepth").create_from_arg_string(
        f"pretrained={tmp_path},method=dense", {"batch_size": "3", "device": "cuda:0"}
    )
    assert made.batch_size == 3
    assert made.method == Dense()
    assert made.max_length == 160
    with pytest.raises(UserError, match="batch_size"):
        DyndepthLM(model, Dense(), tokenizer, batch_size="auto")
    with pytest.raises(UserError, match="target_speedup: parameters go with a method's name"):
        NamedLM(model, Dense(), tokenizer, target_speedup=2.0)
    with pytest.raises(TypeError, match="target_speedup"):
        DyndepthLM(model, Dense(), tokenizer, target_speedup=2.0)


def test_standard_errors_agree_with_resampling():
    from lm_eval.api import metrics

    random = np.random.default_rng(0)
    plain = random.normal(-2, 0.5, 400)
    sizes = random.integers(20, 200, 400)
    pairs = list(zip(-1.1 * sizes + random.normal(0, 8, 400), sizes, strict=True))
    for aggregation, items in (
        (metrics.mean, list(plain)),
        (metrics.perplexity, list(plain)),
        (metrics.bits_per_byte, pairs),
        (metrics.weighted_perplexity, pairs),
    ):
        draws = [aggregation([items[i] for i in random.integers(0, 400, 400)]) for _ in range(1000)]
        assert standard_error(aggregation, items) == pytest.approx(np.std(draws), rel=0.12)
    assert standard_error(metrics.mean, [1.0]) is None
    assert standard_error(max, [1.0, 2.0]) is None


def test_the_outcome_of_one_document_is_the_metric_on_it_alone():
    from lm_eval.api import metrics

    assert outcome(metrics.mean, True) == (1.0, 1.0)
    assert outcome(metrics.bits_per_byte, (-math.log(2) * 30, 15)) == (pytest.approx(2.0), 15.0)
    assert outcome(metrics.perplexity, -math.log(8)) == (pytest.approx(8.0), 1.0)
    assert outcome(metrics.perplexity, -800.0) == (None, 1.0)
    assert outcome(metrics.bleu, ("reference", "text")) == (None, 1.0)


# --- against lm-eval's own model, on the embedded one -------------------------------------------


def both(model, tokenizer, task, limit, **settings):
    """Scores and log-likelihoods by lm-eval's hf model and by dyndepth, on the same documents."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    own = evaluate(
        model, tokenizer, Dense(), task, limit=limit, progress=False, batch_size=6, **settings
    )
    stock = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=6),
        tasks=[task],
        samples={task: [row["doc_id"] for row in own.samples]},
        bootstrap_iters=0,
        task_manager=task_manager([task]),
        **settings,
    )
    return own, stock


@pytest.mark.parametrize(
    ("task", "limit", "settings"),
    [
        ("socialiqa", 12, {}),
        ("quartz", 8, {"num_fewshot": 2}),
        ("last_word", 5, {}),
        ("wikipedia_bpb", 4, {}),
        ("wikipedia_continuation", 3, {}),
        ("title_generation", 2, {}),
        ("quartz", 5, {"num_fewshot": 2, "apply_chat_template": True}),
        (
            "last_word",
            3,
            {
                "apply_chat_template": True,
                "fewshot_as_multiturn": False,
                "system_instruction": "Go on.",
            },
        ),
        ("title_generation", 1, {"apply_chat_template": "default", "system_instruction": "Hm."}),
    ],
)
def test_dense_equals_lm_evals_own_model(
    embedded_model, embedded_tokenizer, monkeypatch, task, limit, settings
):
    # It describes the machine by running programs, which takes longer than the evaluation.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    own, stock = both(embedded_model, embedded_tokenizer, task, limit, **settings)
    assert task in OFFLINE
    assert len(own.samples) == len(stock["samples"][task]) == limit
    by_document = {record["doc_id"]: record for record in stock["samples"][task]}
    for row in own.samples:
        record = by_document[row["doc_id"]]
        assert row["doc_hash"] == record["doc_hash"]
        responses = [response for request in record["resps"] for response in request]
        if task == "title_generation":
            assert row["response"] == responses[0]
            continue
        expected = [r if isinstance(r, float) else r[0] for r in responses]
        # lm-eval adds up a passage's log-probabilities in float32: to 6e-5 at best at 1000 nats.
        tolerance = max(1e-4, 2e-7 * abs(expected[0])) if "wikipedia" in task else 1e-4
        assert json.loads(row["loglikelihoods"]) == pytest.approx(expected, abs=tolerance)
    for row in own.accuracy:
        value = stock["results"][task][f"{row['metric']},{row['filter']}"]
        exact = row["metric"] in ("acc", "acc_norm", "rougeL")
        assert row["value"] == (value if exact else pytest.approx(value, rel=1e-5))
    for row in own.compute:
        assert row["block_speedup"] == row["total_speedup"] == 1.0
