"""Names for people: a function of the row alone, without what is as by default."""

from __future__ import annotations

import pytest
from cells import cell

from dyndepth.cells.cell import identity_columns
from dyndepth.cells.naming import apart, changed, label, remark, titled
from dyndepth.cells.recipe import parse_recovery


def row(method="uls", parameters="", phases="both", recovery="none") -> dict[str, str]:
    return {
        "method": method,
        "parameters": parameters,
        "phases": phases,
        "recovery": recovery if recovery == "none" else str(parse_recovery(recovery)),
    }


@pytest.mark.parametrize(
    ("one", "name"),
    [
        (row("dense"), "dense"),
        (row(parameters="spacing='paper'"), "uls"),
        (row(parameters="spacing='even'"), "uls(spacing=even)"),
        (row(phases="generation"), "uls(phases=generation)"),
        ({**row(phases="generation"), "lossless": True}, "uls"),
        ({**row(phases="generation"), "lossless": "FALSE"}, "uls(phases=generation)"),
        (row("self_speculation", phases="generation"), "self_speculation"),
        (row(recovery="lora"), "uls + lora"),
        (row(recovery="lora(rank=8)"), "uls + lora(rank=8)"),
        (row("foreign", "deep=True, text='a, b'"), "foreign(deep=true, text=a, b)"),
        (row("foreign", "garbled("), "foreign(garbled()"),
        ({"method": "uls", "parameters": None}, "uls"),
    ],
)
def test_names(one, name):
    assert label(one) == name


def test_settings_that_differ_have_different_names():
    rows = [
        row(parameters=f"spacing='{spacing}'", phases=phases, recovery=recovery)
        for spacing in ("paper", "even")
        for phases in ("both", "generation")
        for recovery in ("none", "lora", "lora(rank=8)", "lora(steps=9)")
    ]
    assert len(set(map(label, rows))) == len(rows)


def test_parameters_of_a_method_that_is_not_installed_are_all_told():
    assert changed(row("foreign", "keep=1, rule='a'")) == ["keep=1", "rule=a"]


def _apart(*changes: dict) -> list[str]:
    return [" ".join(words) for words in apart([identity_columns(cell(**one)) for one in changes])]


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({}, {"method": "m", "method_code": "y", "target_speedup": 2.0}, ["", ""]),
        ({"tasks": ["a"]}, {"tasks": ["a", "b"]}, ["tasks=a", "tasks=a+b"]),
        (
            {"tasks": ["a"], "limit": {"a": 4}},
            {"tasks": ["b"], "limit": {"b": 4}},
            ["tasks=a", "tasks=b"],
        ),
        (
            {"tasks": list("abcd")},
            {"tasks": list("xycd")},
            ["tasks=a+b+2 more", "tasks=x+y+2 more"],
        ),
        ({"tasks": list("abcd")}, {"tasks": list("abcx")}, ["tasks=a+b+c+d", "tasks=a+b+c+x"]),
        ({"limit": None}, {"limit": {"a": 4, "b": 4}}, ["limit=all", "limit=4"]),
        ({"limit": {"a": 4, "b": 5}}, {"limit": {"a": 4}}, ["limit=a=4+b=5", "limit=4"]),
        ({"num_fewshot": None}, {"num_fewshot": 5}, ["num_fewshot=by task", "num_fewshot=5"]),
        (
            {},
            {
                "apply_chat_template": "default",
                "chat_template_fingerprint": "a" * 16,
                "fewshot_as_multiturn": "yes",
            },
            ["plain text", "chat template"],
        ),
        (
            {"apply_chat_template": "default", "chat_template_fingerprint": "a" * 16},
            {"apply_chat_template": "default", "chat_template_fingerprint": "b" * 16},
            ["template=aaaaaa", "template=bbbbbb"],
        ),
        (
            {"apply_chat_template": "rag", "fewshot_as_multiturn": "no"},
            {"apply_chat_template": "rag", "fewshot_as_multiturn": "yes"},
            ["few-shot turns=no", "few-shot turns=yes"],
        ),
        ({"torch": "2.1"}, {"torch": "2.2"}, ["torch=2.1", "torch=2.2"]),
        ({"harness_code": "1a2b3c4d"}, {"harness_code": "9a"}, ["code=1a2b3c", "code=9a"]),
        (
            {"harness_code": "1a2b3c4d"},
            {"harness_code": "1a2b3cff"},
            ["code=1a2b3c4d", "code=1a2b3cff"],
        ),
        ({"model": "a", "revision": "1"}, {"model": "b", "revision": "2"}, ["a", "b"]),
        ({"model_fingerprint": "1"}, {"model_fingerprint": "2"}, ["weights=1", "weights=2"]),
        ({"method_code": "1"}, {"method_code": "2"}, ["method_code=1", "method_code=2"]),
    ],
)
def test_settings_are_told_apart_in_a_few_words(one, other, words):
    assert _apart(one, other) == words


def test_the_same_words_for_every_row_of_a_setting():
    found = _apart({"dtype": "a"}, {"dtype": "a", "method": "m"}, {"dtype": "b", "method": "m"})
    assert found == ["a", "a", "b"]


def test_a_method_may_say_whose_training_a_row_has():
    row = {"method": "skipgpt", "parameters": "preset='embedded', reads='stream'", "phases": "both"}
    assert titled(row) == "skipgpt [dyndepth's training]"
    paper = row | {"parameters": "preset='paper'", "recovery": "none"}
    assert titled(paper) == "skipgpt(preset=paper) [the paper's training]"
    assert remark(row | {"parameters": ""}) == "dyndepth's training"
    for other in ({"method": "uls", "parameters": ""}, {"method": "gone", "parameters": "a=1"}):
        assert titled(other) == label(other)
