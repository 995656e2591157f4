"""Requests are lm-eval's own: token ids, scores and texts of its ``hf``, whatever tokenizer."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as run_lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from reading import CHAT, KINDS, NO_SYSTEM, WORDS, tokenizer

from dyndepth.cells.identity import same_data
from dyndepth.common.errors import UserError
from dyndepth.evaluation import generation_settings
from dyndepth.evaluation.evaluate import evaluate
from dyndepth.evaluation.generation_settings import (
    ENDINGS,
    NEUTRAL,
    OBEYED,
    WITHOUT_EFFECT,
    GenerationSettings,
)
from dyndepth.evaluation.language_model import DyndepthLM
from dyndepth.lm_eval_plugin.model import NamedLM
from dyndepth.methods.dense import Dense
from dyndepth.sweep import settings as options
from dyndepth.sweep.workbench import bring_tasks, data_fingerprint

BOUNDS = [(False, False), (True, False), (False, True), (True, True)]
"""BOS before each text, EOS after it."""
PAIRS = [
    ("question answer:", " yes"),
    ("question answer:", "yes"),
    ("question answer: ", "yes"),
    ("question answer:\n", "no maybe"),
    ("question answer:", "\n\nno"),
    ("hel", "lo there"),
    ("hello the", "re good day"),
    ("hello", " "),
    ("who are", "you"),
    ("", "yes no"),
    ("", " yes no"),
    ("<s>hello", " there"),
    ("red green blue " * 40, "day"),
    ("12", "305 0.5"),
    ("x,", "y."),
]
# Long, and not periodic: where a window's tokens are those of another, lm-eval's cache of requests
# scores the first positions in place of the last, unless each is a batch of its own.
LONG = " ".join(random.Random(1).choices(WORDS, k=150))
TEXTS = ["hello there good day", " red\n\ngreen ", LONG, "<s>who are you", "12"]
PROMPTS = ["question answer:", "who", "hello there ", "red green blue " * 40, "Is it?\n"]
WINDOW = 96


@pytest.fixture(autouse=True)
def _no_advice():
    for name in ("lm_eval", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def requests(kind, arguments):
    return [
        Instance(kind, doc={}, arguments=copy.deepcopy(one), idx=0, metadata=("t", number, 1))
        for number, one in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def model():
    return make_tiny(vocab_size=400, max_position_embeddings=WINDOW, bos_token_id=2, eos_token_id=3)


@pytest.fixture(scope="module")
def writer():
    """A model that likes to write what it has read: rules against that show."""
    return make_tiny(
        vocab_size=400,
        max_position_embeddings=WINDOW,
        bos_token_id=2,
        eos_token_id=3,
        tie_word_embeddings=True,
    )


@pytest.fixture
def both(model):
    """``both(tokenizer, batch_size, **settings)``: lm-eval's model and ours on the same weights."""

    def both(reads, batch_size=1, model=model, **settings):
        stock = HFLM(pretrained=model, tokenizer=reads, batch_size=batch_size, **settings)
        ours = DyndepthLM(model, Dense(), reads, batch_size, progress=False, **settings)
        return stock, ours

    return both


def scored(lm, kind, arguments):
    found = getattr(lm, kind)(requests(kind, arguments), disable_tqdm=True)
    return [one if isinstance(one, tuple) else (one, True) for one in found]


def same(found, expected):
    """Within 1e-4, or the rounding of lm-eval's sums in float32 where those are large."""
    wanted = pytest.approx([one for one, _ in expected], abs=1e-4, rel=2.5e-7)
    assert [one for one, _ in found] == wanted
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def fitting(stock, pairs):
    """The pairs that lm-eval scores: a token on both sides."""
    ids = [stock._encode_pair(*pair) if pair[0] else ([1], [1, 1]) for pair in pairs]
    return [pair for pair, (one, two) in zip(pairs, ids, strict=True) if one and two]


# --- what is inherited ----------------------------------------------------------------------------


def test_nothing_of_lm_evals_is_shadowed(both):
    """An attribute of lm-eval's with another meaning here changes what lm-eval does, silently."""
    stock, ours = both(tokenizer("metaspace"))
    theirs = {name for base in HFLM.__mro__[:-1] for name in vars(base)} | set(vars(stock))
    replaced = {"loglikelihood", "loglikelihood_rolling", "generate_until", "tok_encode"}
    replaced |= {"chat_template"}
    replaced |= {"_loglikelihood_tokens", "__init__"}
    automatic = {"__module__", "__doc__", "__abstractmethods__", "_abc_impl"}
    automatic |= {"__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__"}
    assert set(vars(DyndepthLM)) & theirs == replaced | set(vars(DyndepthLM)) & automatic
    for name in replaced - {"__init__"}:
        own, other = getattr(DyndepthLM, name), getattr(HFLM, name)
        assert set(inspect.signature(own).parameters) <= {*inspect.signature(other).parameters} | {
            "settings",
            "_",
        }
    for name in set(vars(ours)) & theirs:
        one, other = getattr(ours, name), getattr(stock, name)
        if name == "revision":  # of a model that comes loaded: None, not "main"
            continue
        assert type(one) is type(other), name
        if not hasattr(one, "__dict__"):
            assert one == other, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bos", "eos"), BOUNDS)
def test_token_ids_are_lm_evals(both, kind, bos, eos):
    for add in (None, True, False):
        stock, ours = both(tokenizer(kind, bos, eos), add_bos_token=add)
        for pair in fitting(stock, PAIRS):
            request = requests("loglikelihood", [pair])[0]
            if pair[0]:
                expected = stock._encode_pair(*pair)
            else:
                expected = [1], stock.tok_encode(pair[1], add_special_tokens=False)
                expected = ([stock.prefix_token_id], expected[1])
            assert ours.pair(request) == expected, pair
        for text in TEXTS:
            assert ours.tok_encode(text) == stock.tok_encode(text)
        arguments = [(prompt, {"until": [], "max_gen_toks": 4}) for prompt in PROMPTS]
        prompts, _ = ours.prompts(requests("generate_until", arguments))
        for text, prompt in zip(PROMPTS, prompts, strict=True):
            room = stock.max_length - 4
            expected, _ = stock.tok_batch_encode([text], left_truncate_len=room)
            assert list(prompt.tokens) == expected[0].tolist()


@pytest.mark.parametrize("template", [CHAT, NO_SYSTEM + CHAT], ids=["any", "no system role"])
def test_chats_are_lm_evals(both, template):
    history = [
        {"role": "system", "content": "hello"},
        {"role": "user", "content": "who are you"},
        {"role": "assistant", "content": "day"},
    ]
    stock, ours = both(tokenizer("metaspace", True, template=template))
    for turns, prompt in ((history, False), (history[:2], True), (history[1:2], True)):
        assert ours.apply_chat_template(turns, prompt) == stock.apply_chat_template(turns, prompt)
    assert ours.chat_template(True) == stock.chat_template(True) == template
    thinks = {"enable_thinking": True, "think_end_token": "day"}
    marked = "{% if enable_thinking %}deep {% endif %}" + CHAT
    stock, ours = both(tokenizer("metaspace", True, template=marked), **thinks)
    told = ours.apply_chat_template(history)
    assert told == stock.apply_chat_template(history)
    assert told.startswith("deep ")
    with pytest.raises(UserError, match="enable_thinking goes with generation alone, and t "):
        ours.loglikelihood(requests("loglikelihood", [("a", " b")]))


# --- scores and texts -----------------------------------------------------------------------------


def compare(both, kind, bos, eos, batch_size):
    """Pairs, whole texts and completions of both models on one tokenizer; returns how many."""
    stock, ours = both(tokenizer(kind, bos, eos), batch_size)
    pairs = fitting(stock, PAIRS)
    same(*(scored(lm, "loglikelihood", pairs) for lm in (ours, stock)))
    texts = [(text,) for text in TEXTS]
    same(*(scored(lm, "loglikelihood_rolling", texts) for lm in (ours, stock)))
    prompts = [(text, {"until": ["green", "\n"], "max_gen_toks": 8}) for text in PROMPTS]
    made = [lm.generate_until(requests("generate_until", prompts), True) for lm in (ours, stock)]
    assert made[0] == made[1]
    return len(pairs) + len(texts) + len(prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_texts_are_lm_evals(both, kind):
    for number, (bos, eos) in enumerate(BOUNDS):
        assert compare(both, kind, bos, eos, (1, 4, 3, 32)[number]) >= 20


SHAPES = """
task: NAME
custom_dataset: !function reading_documents.rows
output_type: OUTPUT
test_split: test
fewshot_split: shots
fewshot_config: {sampler: first_n}
doc_to_text: "question {{text}} answer:"
doc_to_target: "{{choices[label]}}"
target_delimiter: "DELIMITER"
num_fewshot: SHOTS
MORE
metadata: {version: 1.0}
"""
DOCUMENTS = """
from datasets import Dataset

WORDS = "red green blue hello there good day who are you 12 305".split()


def rows(**_):
    made = [
        {
            "text": " ".join(WORDS[(i * k) % 12] for k in range(1, 3 + (5 * i) % 9)),
            "choices": [WORDS[i % 12], "yes no", WORDS[(i + 5) % 12] + "."],
            "label": i % 3,
        }
        for i in range(14)
    ]
    return {"test": Dataset.from_list(made[:10]), "shots": Dataset.from_list(made[10:])}
"""
ACCURACY = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"
OUTPUTS = {
    "multiple_choice": "doc_to_choice: choices\n" + ACCURACY,
    "loglikelihood": ACCURACY,
    "loglikelihood_rolling": "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, "
    "higher_is_better: false}]",
    "generate_until": 'generation_kwargs: {until: ["\\n", "good"], max_gen_toks: 6}\n'
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of each output, with delimiter and without, without examples and with
    two."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "reading_documents.py").write_text(DOCUMENTS)
    for output, more in OUTPUTS.items():
        for number, delimiter in enumerate((" ", "")):
            for shots in (0, 2):
                text = SHAPES.replace("NAME", f"{output}_{number}_{shots}")
                text = text.replace("OUTPUT", output).replace("DELIMITER", delimiter)
                text = text.replace("SHOTS", str(shots)).replace("MORE", more)
                if output == "multiple_choice":
                    text = text.replace('"{{choices[label]}}"', "label")
                (folder / f"{output}_{number}_{shots}.yaml").write_text(text)
    return folder


def of_tasks(lm, folder, names, **settings):
    """What lm-eval makes of ``lm`` on tasks: values, and responses of all documents."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    loaded = manager.load(names)["tasks"]
    for task in loaded.values():
        task.set_fewshot_seed(seed=1234)
    found = run_lm_eval(lm, {"tasks": loaded}, bootstrap_iters=0, log_samples=True, **settings)
    values = {
        (name, key): value
        for name, row in found["results"].items()
        for key, value in row.items()
        if key.endswith(",none") and "stderr" not in key
    }
    responses = [
        [response for request in sample["resps"] for response in request]
        for name in sorted(found["samples"])
        for sample in found["samples"][name]
    ]
    return values, responses


def compare_tasks(both, folder, kind, bos, batch_size, chat):
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    settings = {}
    if chat:
        names = [name for name in names if "rolling" not in name]
        settings = {
            "apply_chat_template": True,
            "system_instruction": "who are you",
            "fewshot_as_multiturn": chat == "turns",
        }
    stock, ours = both(tokenizer(kind, bos, template=NO_SYSTEM + CHAT), batch_size)
    (values, found), (expected, theirs) = (
        of_tasks(lm, folder, names, **settings) for lm in (ours, stock)
    )
    assert values.keys() == expected.keys()
    for key, value in values.items():
        exact = "bits_per_byte" not in key[1]
        assert value == (expected[key] if exact else pytest.approx(expected[key], abs=1e-4)), key
    assert len(found) == len(theirs) == 10 * len(names)
    for one, other in zip(found, theirs, strict=True):
        if isinstance(one[0], str):
            assert one == other
        else:
            logs, others = ([r[0] if isinstance(r, tuple) else r for r in x] for x in (one, other))
            assert logs == pytest.approx(others, abs=1e-4)
    return len(found)


@pytest.mark.parametrize(
    ("kind", "bos", "batch_size", "chat"),
    [
        ("metaspace", True, 4, ""),
        ("prepended", False, 3, "turns"),
    ],
)
def test_tasks_are_scored_as_by_lm_eval(both, tasks, kind, bos, batch_size, chat):
    assert compare_tasks(both, tasks, kind, bos, batch_size, chat) >= 120


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_whole_matrix_is_scored_as_by_lm_eval(both, tasks, kind, batch_size):
    """Tokenizer x bounds x batch size, and of them shapes x delimiter x examples x chat."""
    count = 0
    for bos, eos in BOUNDS:
        count += compare(both, kind, bos, eos, batch_size)
        for chat in () if eos else ("", "turns", "one text") if batch_size == 3 else ("",):
            count += compare_tasks(both, tasks, kind, bos, batch_size, chat)
    print(f"{count} requests of {kind} in batches of {batch_size} are as with lm-eval")
    assert count > 380


# --- requests without a token ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bos", "eos"), BOUNDS)
def test_a_context_without_a_token_is_the_prefix_in_every_batch(both, kind, bos, eos):
    """Blank contexts, of which lm-eval makes the continuation's beginning and then asserts."""
    blank = [(" ", "yes it"), ("\n", "yes"), ("  \n ", "no"), ("", "yes")]
    others = [(f"question {n} answer", " yes no") for n in range(5)]
    results = []
    for batch_size in (1, 2, 32):
        stock, ours = both(tokenizer(kind, bos, eos), batch_size)
        results.append(scored(ours, "loglikelihood", blank + others))
    for found in results[1:]:
        same(found, results[0])
    for (context, continuation), (log, _) in zip(blank, results[0], strict=False):
        expected = stock.tok_encode(context + continuation, add_special_tokens=False)
        with torch.no_grad():
            logits = ours.model(torch.tensor([[stock.prefix_token_id, *expected]])).logits[0, :-1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(expected)[:, None]).sum()
        assert log == pytest.approx(exact.item(), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(
    "pair", [("hello", ""), ("", ""), ("", "<s>"), ("<s>", "")], ids=lambda pair: "|".join(pair)
)
def test_a_continuation_without_a_token_is_refused_by_name(both, batch_size, pair):
    _, ours = both(tokenizer("byte-level"), batch_size)
    with pytest.raises(UserError, match=r"document t/2: its continuation .* has no token of its"):
        scored(ours, "loglikelihood", [("hello", " there"), ("who", " are"), pair])


def test_a_continuation_longer_than_the_model_is_refused_by_name(both):
    _, ours = both(tokenizer("byte-level"))
    with pytest.raises(UserError, match=r"document t/0: its continuation has \d+ tokens, and 96"):
        scored(ours, "loglikelihood", [("hello", " red green x, y." * 60)])


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_prompt_is_the_prefix_in_every_batch(both, kind):
    settings = {"until": [], "max_gen_toks": 6}
    prompts = [("", settings), ("hello there", settings), ("who", settings), (" ", settings)]
    texts = []
    for batch_size in (1, 4):
        _, ours = both(tokenizer(kind), batch_size)
        texts.append(ours.generate_until(requests("generate_until", prompts), True))
    assert texts[0] == texts[1]
    start = torch.tensor([[ours.prefix_token_id]])
    with torch.no_grad():
        ids = ours.model.generate(start, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert texts[0][0] == ours.tok_decode(ids[0, 1:]).split("</s>")[0]


def test_an_empty_text_costs_and_scores_nothing(model, tmp_path, tasks):
    task = (tasks / "loglikelihood_rolling_0_0.yaml").read_text()
    task = task.replace('"{{choices[label]}}"', "\"{{text if label else ''}}\"")
    (tmp_path / "some.yaml").write_text(task.replace("loglikelihood_rolling_0_0", "some"))
    none = task.replace("if label else", "if label == 9 else")
    (tmp_path / "none.yaml").write_text(none.replace("loglikelihood_rolling_0_0", "none"))
    (tmp_path / "reading_documents.py").write_text(DOCUMENTS)
    how = {"include_path": tmp_path, "progress": False}
    found = evaluate(model, tokenizer("byte-level"), Dense(), "some", **how)
    logs = {row["doc_id"]: json.loads(row["loglikelihoods"])[0] for row in found.samples}
    empty = [index for index in range(10) if index % 3 == 0]
    assert [logs[index] for index in empty] == [0.0] * 4
    assert all(logs[index] < -1 for index in logs if index not in empty)
    assert [row["tokens"] for row in found.samples if row["doc_id"] in empty] == [0] * 4
    (value,) = (row["value"] for row in found.accuracy)
    assert math.isfinite(value)
    with pytest.raises(UserError, match="task none: none of its texts has a token"):
        evaluate(model, tokenizer("byte-level"), Dense(), "none", **how)


def test_a_model_is_scored_as_it_was_loaded():
    """lm-eval's class would tie a head that was saved beside a configuration that ties it."""
    loose = make_tiny(vocab_size=400, tie_word_embeddings=True)
    loose.lm_head.weight = torch.nn.Parameter(loose.lm_head.weight.detach() + 1.0)
    loose.requires_grad_(False)
    before = loose(torch.arange(3, 20)[None]).logits
    DyndepthLM(loose, Dense(), tokenizer("byte-level"))
    assert torch.equal(loose(torch.arange(3, 20)[None]).logits, before)
    assert "tie_weights" not in vars(loose)


def test_add_bos_token_reaches_a_tokenizer_that_comes_by_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer("byte-level").save_pretrained(tmp_path)
    for add in (None, True, False):
        stock = HFLM(str(tmp_path), device="cpu", add_bos_token=add)
        ours = NamedLM(str(tmp_path), Dense(), add_bos_token=add, progress=False)
        for text in ("hello there", "<s>hello"):
            assert ours.tok_encode(text) == stock.tok_encode(text)
        (request,) = requests("loglikelihood", [("hello", " there")])
        assert ours.pair(request) == stock._encode_pair(*request.args)


def test_a_tokenizer_of_another_kind_is_named(model):
    with pytest.raises(UserError, match="the tokenizer is a object, and lm-eval reads texts with"):
        DyndepthLM(model, Dense(), object())


def test_completions_do_not_depend_on_who_else_is_written(both):
    """lm-eval's go on after a tokenizer's EOS that is not the model's, until the batch is done."""
    stopped = make_tiny(vocab_size=400, max_position_embeddings=WINDOW)
    assert stopped.generation_config.eos_token_id == 2
    stock, _ = both(tokenizer("byte-level", eos=True), 1, model=stopped)
    _, ours = both(tokenizer("byte-level", eos=True), 8, model=stopped)
    assert written(ours, {}) == written(stock, {})


def test_a_tokenizer_without_any_prefix_is_refused(model):
    bare = tokenizer("byte-level")
    bare.bos_token = bare.eos_token = None
    with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
        DyndepthLM(model, Dense(), bare)
    assert DyndepthLM(model, Dense(), bare, prefix_token_id=3).prefix_token_id == 3


# --- settings of generation -----------------------------------------------------------------------

RULES = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 5.0},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[7, 8], *([token] for token in range(100, 400, 2))]},
    {"sequence_bias": [[[9], 60.0], [[11, 12], -4.0]]},
    {"min_new_tokens": 6, "eos_token_id": list(range(2, 200))},
    {"min_length": 12, "eos_token_id": list(range(2, 200))},
    {"min_length": 90, "min_new_tokens": 3, "eos_token_id": list(range(2, 200))},
    {"min_length": 90, "min_new_tokens": 0, "eos_token_id": list(range(2, 200))},
    {"forced_eos_token_id": 17},
    {"forced_bos_token_id": 19},
    {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": [2, 9]},
    {"suppress_tokens": list(range(3, 60))},
    {"begin_suppress_tokens": list(range(60, 220))},
    {"eos_token_id": list(range(2, 400, 2))},
    {"max_length": 12},
    {"max_new_tokens": 3, "max_gen_toks": None},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [4, 5, 6]},
    {"temperature": 0.0, "top_p": 0.5, "top_k": 3, "do_sample": False},
    {"until": "green"},
    {"until": None},
    {},
]


def written(lm, settings, prompts=PROMPTS[:3]):
    given = {"until": [], "max_gen_toks": 8} | settings
    given = {key: value for key, value in given.items() if value is not None or key == "until"}
    made = [(prompt, copy.deepcopy(given)) for prompt in prompts]
    return lm.generate_until(requests("generate_until", made), True)


@pytest.mark.parametrize("settings", RULES, ids="-".join)
def test_a_tasks_settings_of_generation_are_obeyed(both, settings, writer):
    stock, ours = both(tokenizer("byte-level"), model=writer)
    theirs = settings if settings.get("until", "") is not None else {"until": []}
    prompts = [*PROMPTS[:3], "y"]  # one of a single token
    expected = written(stock, theirs, prompts)
    assert written(ours, settings, prompts) == expected
    _, batched = both(tokenizer("byte-level"), 8, model=writer)
    assert written(batched, settings, prompts) == expected
    idle = {"temperature", "until", "max_new_tokens", "max_length", "min_length"}
    if settings and not idle & settings.keys():
        assert expected != written(stock, {}, prompts), "the setting shows in no text"


@pytest.mark.parametrize("settings", RULES[:14], ids="-".join)
def test_what_a_model_ships_for_generation_is_obeyed(both, settings, writer, monkeypatch):
    own = copy.deepcopy(writer.generation_config)
    own.update(**settings, do_sample=True, temperature=0.6, top_p=0.9)
    monkeypatch.setattr(writer, "generation_config", own)
    stock, ours = both(tokenizer("byte-level"), model=writer)
    assert written(ours, {}) == written(stock, {})
    # The task goes first.
    neutral = {name: OBEYED[name] for name in settings if OBEYED.get(name) is not None}
    assert written(ours, neutral) == written(stock, neutral)


def test_a_models_own_length_gives_way_to_the_tasks(both, writer, monkeypatch):
    own = copy.deepcopy(writer.generation_config)
    own.update(max_new_tokens=3, max_length=5)
    monkeypatch.setattr(writer, "generation_config", own)
    _, ours = both(tokenizer("byte-level"), model=writer)
    monkeypatch.undo()
    stock, _ = both(tokenizer("byte-level"), model=writer)
    assert written(ours, {}) == written(stock, {})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"do_sample": True, "temperature": 0.7}, "task t generates by sampling or beams"),
        ({"temperature": 0.7}, "task t generates by sampling or beams"),
        ({"num_beams": 2}, "task t generates by sampling or beams"),
        ({"num_return_sequences": 2}, "task t sets num_return_sequences=2"),
        ({"guidance_scale": 1.5}, "task t sets guidance_scale=1.5"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "task t sets penalty_alpha=0.6"),
        ({"stop_strings": ["a"]}, "task t sets stop_strings.*give them as 'until'"),
        ({"cache_implementation": "quantized"}, "task t sets cache_implementation='quantized'"),
        ({"dola_layers": "high"}, "task t sets dola_layers='high'"),
        ({"max_time": 3.0}, "task t sets max_time=3.0"),
        ({"no_such_setting": 1}, "task t sets no_such_setting=1"),
        ({"repetition_penalty": -1.0}, "task t: repetition_penalty can't be -1.0"),
        ({"bad_words_ids": "x"}, "task t: bad_words_ids can't be 'x'"),
        ({"max_gen_toks": 0}, "task t generates 0 tokens"),
        ({"max_gen_toks": 96}, "task t generates 96 tokens, which leaves no room"),
        ({"max_gen_toks": "many"}, "task t: its generation settings can't be read"),
        ({"temperature": "warm"}, "task t: its generation settings can't be read"),
        ({"until": [1]}, "task t: 'until' takes texts to stop at, not 1"),
        ({"until": ["a", ""]}, "task t: 'until' takes texts to stop at, not ''"),
        ({"eos_token_id": "</s>"}, "task t: eos_token_id takes whole numbers, not '</s>'"),
        ({"max_length": "20"}, "task t: max_length takes whole numbers, not '20'"),
        ({"max_length": 100}, r"task t stops at 100 tokens with the prompt .*, and the model ta"),
        ({"max_length": 2}, r"document t/0: its prompt has \d+ tokens, and the task stops at 2"),
    ],
    ids=str,
)
def test_what_greedy_generation_has_no_place_for_is_refused(both, settings, told, writer):
    _, ours = both(tokenizer("byte-level"), model=writer)
    with pytest.raises(UserError, match=told):
        written(ours, settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bad_words_ids": [[999]]}, "bad_words_ids"),
        ({"forced_eos_token_id": 99999}, "forced_eos_token_id"),
        ({"eos_token_id": 400}, "eos_token_id holds 400, and the model knows 400 tokens"),
        ({"repetition_penalty": "x"}, "repetition_penalty can't be 'x'"),
    ],
    ids=str,
)
def test_rules_that_can_not_be_applied_are_told_before_the_first_cell(settings, told, model):
    asked = GenerationSettings.of(model, settings, "task t")
    with pytest.raises(UserError, match=told):
        asked.check_rules(400, model.device)


def test_a_model_that_ships_another_search_is_refused(both, writer, monkeypatch):
    own = copy.deepcopy(writer.generation_config)
    own.update(num_beams=4)
    monkeypatch.setattr(writer, "generation_config", own)
    stock, ours = both(tokenizer("byte-level"), model=writer)
    with pytest.raises(UserError, match="the model's generation_config generates by sampling or b"):
        written(ours, {})
    assert written(ours, {"num_beams": 1}) == written(stock, {"num_beams": 1})


def test_every_setting_of_transformers_is_one_kind():
    """A setting that a newer transformers adds is refused until somebody says what it does."""
    from transformers import GenerationConfig

    kinds = [set(OBEYED), set(ENDINGS), set(WITHOUT_EFFECT), set(NEUTRAL)]
    for number, kind in enumerate(kinds):
        for other in kinds[number + 1 :]:
            assert not kind & other
    refused = set(GenerationConfig().to_dict()) - set.union(*kinds)
    assert refused <= {
        *("stop_strings", "max_time", "watermarking_config", "dola_layers", "constraints"),
        *("prompt_lookup_num_tokens", "assistant_early_exit", "force_words_ids"),
    }
    for name in refused:
        with pytest.raises(UserError, match=name):
            generation_settings._refuse(name, "anything", "task t")


def test_thinking_is_cut_off_as_by_lm_eval(both):
    plain = written(both(tokenizer("byte-level"))[0], {"max_gen_toks": 12})
    led = [text for text in plain if text != text.lstrip()]
    inside = tokenizer("byte-level").encode(plain[0], add_special_tokens=False)[2]
    for end in (5, inside, "e"):
        stock, ours = both(tokenizer("byte-level"), think_end_token=end)
        found = written(ours, {"max_gen_toks": 12})
        assert found == written(stock, {"max_gen_toks": 12})
        assert not led or isinstance(end, str) or found != plain


def test_settings_of_lm_evals_hf_that_have_no_counterpart_are_named(model):
    with pytest.raises(UserError, match="peft is a setting of lm-eval's hf model"):
        NamedLM(model, "dense", tokenizer("byte-level"), peft="somewhere")
    with pytest.raises(UserError, match="has no parameter 'no_such'"):
        NamedLM(model, "dense", tokenizer("byte-level"), no_such=1)


# --- few-shot examples ----------------------------------------------------------------------------


def test_examples_are_the_tasks_own_unless_asked_for(model, tasks, both):
    how = {"include_path": tasks, "progress": False}
    reads = tokenizer("byte-level")
    own = evaluate(model, reads, Dense(), "loglikelihood_0_2", **how)
    two = evaluate(model, reads, Dense(), "loglikelihood_0_2", num_fewshot=2, **how)
    one = evaluate(model, reads, Dense(), "loglikelihood_0_2", num_fewshot=1, **how)
    assert own.samples == two.samples != one.samples
    zero = evaluate(model, reads, Dense(), "loglikelihood_0_0", num_fewshot=2, **how)
    assert zero.samples[0]["tokens"] < own.samples[0]["tokens"], "a task that fixes 0 keeps it"


def test_the_page_names_every_setting_that_is_obeyed_or_refused():
    page = (Path(__file__).parents[2] / "docs" / "measures.md").read_text(encoding="utf-8")
    requests_part = page.partition("## Requests")[2].partition("## Comparisons")[0]
    named = set(re.findall(r"`(\w+)(?:: true)?`", requests_part))
    assert set(OBEYED) <= named
    shown = {"do_sample", "num_beams", "num_return_sequences", "guidance_scale", "penalty_alpha"}
    assert shown <= set(NEUTRAL) & named


def test_data_are_told_task_by_task_and_those_of_examples_apart(tasks):
    def of(names, **given):
        chosen = options.settings({"include_path": str(tasks), "tasks": names, **given})
        return data_fingerprint(chosen, bring_tasks(chosen, names))

    one, two = "loglikelihood_0_2", "multiple_choice_0_0"
    alone, both_of_them = of([one]), of([two, one])
    assert f"{one}/shots=" in alone
    assert alone != both_of_them
    assert same_data(alone, both_of_them)
    bare = of([one], num_fewshot=0)
    assert "/shots=" not in bare
    assert same_data(alone, bare)
    assert "/shots=" not in of([two], num_fewshot=2)
    other = alone.replace(f"{one}=", f"{one}=f")
    assert not same_data(alone, other)


def test_windows_that_repeat_are_scored_alike_in_every_batch(both):
    """Where lm-eval's own model gives another number in batches: see ``LONG``."""
    periodic = [("x, y. " * 60,)]
    found = []
    for batch_size in (1, 3):
        stock, ours = both(tokenizer("word-piece"), batch_size)
        found.append(scored(ours, "loglikelihood_rolling", periodic))
        if batch_size == 1:
            same(found[0], scored(stock, "loglikelihood_rolling", periodic))
    same(found[1], found[0])
