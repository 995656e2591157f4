"""Sweeps of instruct models: chat templates in flags, identities, tables, and made again."""

from __future__ import annotations

import csv
import shutil

import pytest
from folders import tiny_folder

from dyndepth import leaderboard, rerun
from dyndepth.cells.identity import CHAT
from dyndepth.cells.store import Store
from dyndepth.common.errors import UserError
from dyndepth.sweep.__main__ import main as sweep
from dyndepth.sweep.settings import chat_of, read, settings
from dyndepth.verify.__main__ import main as verify

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TASK = """
task: talk
custom_dataset: !function talk_documents.rows
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
ROWS = """
from datasets import Dataset


def rows(**_):
    made = [
        {"text": "is it " + "x" * n, "choices": ["yes", "no"], "label": n % 2} for n in range(6)
    ]
    return {"test": Dataset.from_list(made)}
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with a base model, an instruct model, a text and a task."""
    folder = tiny_folder(tmp_path_factory.mktemp("chat"))
    shutil.copytree(folder / "model", folder / "instruct")
    (folder / "instruct" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "talk.yaml").write_text(TASK)
    (folder / "tasks" / "talk_documents.py").write_text(ROWS)
    return folder


def words(scene, *more, model="instruct", run="run"):
    given = ["--model", str(scene / model), "--methods", "uls(spacing=even)", "--speedups", "1.3"]
    given += ["--corpus", str(scene / "corpus.txt"), "--tasks", "talk", "--timing", "off"]
    given += ["--include_path", str(scene / "tasks"), "--output_path", str(scene / run)]
    return [*given, *more]


@pytest.fixture(scope="module")
def cells(scene):
    """The cells of the same sweep on plain text and on conversations, by whether they are."""
    assert sweep(words(scene)) == 0
    chat = ["--apply_chat_template", "--fewshot_as_multiturn", "false"]
    assert sweep(words(scene, *chat, "--system_instruction", "Be brief, or 'not'.")) == 0
    found = Store(scene / "run").all()
    return {
        applied: [each for each in found if bool(each.identity["apply_chat_template"]) == applied]
        for applied in (False, True)
    }


def test_conversations_are_cells_of_their_own(scene, cells):
    plain, talked = cells[False], cells[True]
    assert len(plain) == len(talked) == 2
    assert all(each.identity[key] == "" for each in plain for key in CHAT)
    told = {key: talked[0].identity[key] for key in CHAT}
    assert told.pop("chat_template_fingerprint")
    assert told == {
        "apply_chat_template": "default",
        "fewshot_as_multiturn": "no",
        "system_instruction": "Be brief, or 'not'.",
    }
    for one, other in zip(plain, talked, strict=True):
        logs = [[row["loglikelihoods"] for row in each.samples] for each in (one, other)]
        assert logs[0] != logs[1]
        tokens = [sum(row["tokens"] for row in each.samples) for each in (one, other)]
        assert tokens[0] < tokens[1]
    with (scene / "run" / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["apply_chat_template"] for row in rows} == {"", "default"}


def test_plain_and_talked_cells_stand_apart_in_a_leaderboard(scene, cells, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert leaderboard.main([str(scene / "run")]) == 0
    printed = capsys.readouterr().out
    assert "plain text" in printed
    assert "chat template" in printed


def test_a_cell_is_made_again_as_it_was_put(scene, cells, capsys):
    talked = next(each for each in cells[True] if each.identity["method"] == "uls")
    assert rerun.main([str(scene / "run"), talked.key]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "--apply_chat_template default " in line
    assert "--fewshot_as_multiturn no " in line
    more = ["--include_path", str(scene / "tasks"), "--corpus", str(scene / "corpus.txt")]
    assert verify([str(scene / "run"), "--all", "--documents", "3", *more]) == 0
    assert "4 computed again: nothing failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("model", ["--apply_chat_template"], "the tokenizer has no chat template, as those of bas"),
        ("instruct", ["--apply_chat_template", "rag"], "no chat template 'rag'; it has default"),
        ("instruct", ["--fewshot_as_multiturn"], "give --apply_chat_template as well"),
        ("instruct", ["--fewshot_as_multiturn", "perhaps"], "is true or false, not 'perhaps'"),
        ("instruct", ["--system_instruction", ""], "--system_instruction is empty; give at lea"),
    ],
)
def test_what_cannot_be_had_is_told_before_the_first_cell(scene, capsys, model, flags, message):
    assert sweep(words(scene, *flags, model=model, run="refused")) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert message in sentence
    assert not (scene / "refused" / "cells").exists()


def test_flags_are_lm_evals(tmp_path):
    bare = chat_of(read(["--apply_chat_template", "--methods", "uls"]))
    assert bare == chat_of(read(["--apply-chat-template", "default", "--fewshot_as_multiturn"]))
    assert bare == chat_of(settings({"apply_chat_template": True, "fewshot_as_multiturn": True}))
    assert bare.fewshot_as_multiturn
    off = chat_of(settings({"apply_chat_template": False, "fewshot_as_multiturn": False}))
    assert off == chat_of(read([]))
    assert not chat_of(read(["--apply_chat_template", "--fewshot_as_multiturn", "no"])).settings()[
        "fewshot_as_multiturn"
    ]
    with pytest.raises(UserError, match="--system_instruction takes a text, not 3"):
        settings({"system_instruction": 3})
