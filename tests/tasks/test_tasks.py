"""The offline tasks: what is read from the files, what is scored, and how names are resolved."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dyndepth.common.errors import UserError
from dyndepth.tasks import OFFLINE, SUITES, resolve, task_manager
from dyndepth.tasks import documents as docs
from dyndepth.tasks.rouge import rouge_l


@pytest.fixture(scope="module")
def tasks():
    """The five offline tasks, loaded."""
    return task_manager(OFFLINE).load(list(OFFLINE))["tasks"]


def test_every_item_of_the_files_is_parsed():
    social = [docs.parse_social(*item) for item in docs._items("socialiqa.jsonl")]
    quartz = [docs.parse_quartz(*item) for item in docs._items("quartz.jsonl")]
    assert (len(social), len(quartz)) == (2224, 3860)
    for documents, options in ((social, 3), (quartz, 2)):
        for document in documents:
            assert len(document["choices"]) == options
            assert document["text"]
            assert all(choice and choice == choice.strip() for choice in document["choices"])
            assert 0 <= document["label"] < options


def test_parsing_takes_text_and_not_letters():
    assert docs.parse_social("Al ran. Why? A: to A: b; B: c; d; C: e.f.", "C") == {
        "text": "Al ran. Why? A: to",
        "choices": ["b", "c; d", "e.f"],
        "label": 2,
    }
    assert docs.parse_quartz("Heat makes it\n\n A: go up?\n B: fall.", "B") == {
        "text": "Heat makes it",
        "choices": ["go up", "fall"],
        "label": 1,
    }


@pytest.mark.parametrize("ideal", ["D", "a"])
def test_a_label_outside_the_options_is_refused(ideal):
    with pytest.raises(ValueError, match="substring not found"):
        docs.parse_quartz("Heat\n\n A: up\n B: down", ideal)


def test_an_item_without_options_is_refused():
    with pytest.raises(ValueError, match="no list of options"):
        docs.parse_social("What now? A: this; B: that.", "A")


def test_no_item_is_scored_twice_or_with_two_answers():
    social, quartz = docs.social_documents(), docs.quartz_documents()
    assert (len(social), len(quartz)) == (2197, 3828)
    for documents in (social, quartz):
        questions = {(document["text"], *document["choices"]) for document in documents}
        assert len(questions) == len(documents)
    assert all(len(set(document["choices"])) == 3 for document in social)


def test_passages_hold_prose_only():
    text = "5N 3E / 5.1N 3.2E / 5.1; 3.2\nIt was [citation needed] built [by whom?] in [1] May.\n"
    assert docs.clean_passage(text) == "It was  built  in [1] May."
    passages = docs.passages()
    assert len(passages) == 931
    assert all(len(passage.split()) >= docs.WORDS for passage in passages)


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ("He lived in Rome.", {"context": "He lived in", "word": " Rome"}),
        ("A so-called\npart of it.", {"context": "A so-called\npart of", "word": " it"}),
        ("He died in 1859.", None),
        ('He said "no."', None),
        ("The list follows:", None),
        ("Stop.", None),
    ],
)
def test_last_word_needs_a_whole_sentence(passage, expected):
    assert docs.split_last_word(passage) == expected


def test_offline_tasks_load_without_those_of_lm_eval(tasks):
    assert set(task_manager(OFFLINE).all_tasks) == set(OFFLINE)
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    assert sizes == {
        "socialiqa": 2181,
        "quartz": 3812,
        "last_word": 670,
        "wikipedia_bpb": 931,
        "title_generation": 238,
        "wikipedia_continuation": 931,
    }
    assert all(task.VERSION == 1.0 for task in tasks.values())


def test_prompts_read_as_text_with_their_options(tasks):
    social = tasks["socialiqa"]
    document = social.eval_docs[0]
    context = social.fewshot_context(document, 0)
    requests = social.construct_requests(document, context)
    assert context.startswith("Q: riley saved their people")
    assert context.endswith("?\nA:")
    assert [request.args[1] for request in requests] == [
        " " + choice for choice in document["choices"]
    ]
    word = tasks["last_word"]
    document = word.eval_docs[0]
    request = word.construct_requests(document, word.fewshot_context(document, 0))
    assert request.args == (document["context"], document["word"])
    assert not request.args[0].endswith(" ")
    assert request.args[1].startswith(" ")


@pytest.mark.parametrize("name", [name for name in OFFLINE if "wikipedia" not in name])
def test_few_shot_examples_are_answered_and_never_scored(tasks, name):
    task = tasks[name]
    scored = {repr(document) for document in task.eval_docs}
    shots = task.dataset["shots"]
    assert len(shots) == docs.SHOTS
    assert not scored & {repr(document) for document in shots}
    first, second = (task.fewshot_context(task.eval_docs[i], 2) for i in (0, 1))
    assert first.count("\n\n") >= 2
    examples = first.split("\n\n")[:2]
    assert second.split("\n\n")[:2] == examples
    for example, document in zip(examples, shots, strict=False):
        answer = task.doc_to_target(document)
        if isinstance(answer, int):
            answer = document["choices"][answer]
        assert example.rstrip(".").endswith(answer)


def test_rouge_l_is_the_f_measure_of_the_common_subsequence():
    assert rouge_l("stable perovskite solar cells", "stable perovskite solar cells") == 1.0
    assert rouge_l("solar cells", "quantum dots") == 0.0
    # common: solar cell (stemmed), 2 of 4 and 2 of 3 words
    assert rouge_l("Efficient stable solar cells", "solar new cell") == pytest.approx(4 / 7)
    assert rouge_l("a b c", "c b a") == pytest.approx(1 / 3)


def test_a_passage_is_continued_from_its_middle(tasks):
    task = tasks["wikipedia_continuation"]
    whole = docs.passages()
    for index, document in enumerate(task.eval_docs):
        assert document["context"] + document["continuation"] == whole[index]
        halves = [len(document[key].split()) for key in ("context", "continuation")]
        assert abs(halves[0] - halves[1]) <= 1
        assert document["continuation"][0].isspace()
    document = task.eval_docs[0]
    request = task.construct_requests(document, task.fewshot_context(document, 0))
    assert request.args == (document["context"], document["continuation"])
    size = len(document["continuation"].encode())
    assert task.process_results(document, [(-3.0, False)]) == {"bits_per_byte": (-3.0, size)}


def test_suites_are_expanded_once_and_in_order():
    assert resolve("offline") == [name for name in OFFLINE if name != "wikipedia_continuation"]
    assert resolve(["quartz", "offline"])[:2] == ["quartz", "socialiqa"]
    assert resolve("quartz, socialiqa,quartz") == ["quartz", "socialiqa"]
    assert set(SUITES) == {"offline", "commonsense", "perplexity", "generation"}


def test_naming_no_task_is_refused():
    with pytest.raises(UserError, match="no task was named.*offline, commonsense"):
        resolve(" , ")


def test_an_unknown_task_is_refused_with_the_nearest_names(monkeypatch):
    from dyndepth import tasks as module

    # lm-eval's own files take long to read; the offline ones are enough to be near.
    offline = module._manager(None, include_defaults=False)
    monkeypatch.setattr(module, "_manager", lambda *_, **__: offline)
    with pytest.raises(UserError, match="unknown task 'quarts'; did you mean quartz"):
        resolve(["socialiqa", "quarts"])
    with pytest.raises(UserError, match="unknown task 'zzzzzzzz'; see dyndepth ls tasks"):
        resolve("zzzzzzzz")


def test_own_task_files_are_found(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\noutput_type: loglikelihood\n")
    assert resolve(["mine", "quartz"], tmp_path) == ["mine", "quartz"]
    assert set(task_manager(["mine"], tmp_path).all_tasks) == {*OFFLINE, "mine"}


def test_names_of_offline_tasks_cost_no_import_of_lm_eval():
    code = (
        "import sys; from dyndepth.tasks import resolve; resolve('offline'); "
        "assert not {'lm_eval', 'torch', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_suites_of_the_papers_are_known_to_lm_eval():
    wanted = [name for names in SUITES.values() for name in names]
    assert resolve(SUITES) == list(dict.fromkeys(wanted))
