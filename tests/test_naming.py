"""Names for people: a function of the row alone, without what is as by default."""

from __future__ import annotations

import pytest

from dyndepth.naming import changed, label
from dyndepth.recipe import parse_recovery


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
