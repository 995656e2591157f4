"""Methods' pages: what is committed of them, their presets, what was published and what trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dyndepth.common.registry import method_class
from dyndepth.pages.blocks import method_classes
from dyndepth.pages.cards import card, claims, rows, study_rows, training, unmeasured
from dyndepth.pages.parameters import parameters, preset_table, presets
from dyndepth.results.noise import WORDS

SCORES = ("retained", "retained_low", "retained_high", "bits_per_byte", "error", "mean_acc")


def row(method: str, **values: Any) -> dict[str, str]:
    """A row of a leaderboard, as a CSV file gives it."""
    base = {"method": method, "parameters": "", "phases": "both", "recovery": "none", "seed": "0"}
    base |= {"model": "embedded", "status": "done", "target_speedup": "1.5"}
    base |= {"block_speedup": "1.5", "total_speedup": "1.4"} | dict.fromkeys(SCORES, "")
    return base | {key: str(value) for key, value in values.items()}


def reported(method: str, **values: Any) -> dict[str, Any]:
    """A row of published.csv."""
    base = {"method": method, "parameters": "", "recovery": "", "model": "Large-7B"}
    base |= {"speedup": 1.5, "unit_of_speedup": "layers", "task": "talk", "metric": "BLEU"}
    return (
        base
        | {"dense_value": 20.0, "value": 10.0, "source": "arXiv 1", "hand": "first", "note": ""}
        | values
    )


def status_of(made: str) -> str:
    (found,) = re.findall(r"^\*\*Status\.\*\* (.*)$", made, re.MULTILINE)
    return found


def test_studies_that_hold_rows_are_named_and_linked():
    cls = method_class("uls")
    studies = {"one": [row("uls"), row("uls"), row("dense")], "two": [row("dense")]}
    alone = card(cls, [], [], "The run has no row of it.", studies)
    assert "no row of it in the main run, and the study `one` has 2 rows of it" in status_of(alone)
    assert "([studies](../studies.md))" in status_of(alone)
    assert "The run has no row of it. The study `one` has 2 rows of it: see [studies]" in alone
    both = card(cls, [row("uls")], [], "From the run.", studies | {"three": [row("uls")]})
    assert "1 of 1 cells of the main run finished, and the studies `one` and `three` have 3" in both
    assert status_of(card(cls, [], [], "", {})).endswith("no row of it is committed.")


def test_a_study_is_a_folder_with_claims_beside_the_main_run(tmp_path):
    for name, files in {
        "embedded": ("leaderboard.csv", "claims.csv"),
        "study": ("leaderboard.csv", "claims.csv"),
        "other_run": ("leaderboard.csv",),
        "empty": ("claims.csv",),
    }.items():
        (tmp_path / "results" / name).mkdir(parents=True)
        for file in files:
            (tmp_path / "results" / name / file).write_text("method\nuls\n")
    assert study_rows(tmp_path, Path("results/embedded")) == {"study": [{"method": "uls"}]}


def test_choices_without_a_committed_row_are_named():
    cls = method_class("uls")
    assert unmeasured(cls, [row("uls")]) == ["`phases=generation`", "`spacing=even`"]
    every = [row("uls", phases="generation"), row("uls", parameters="spacing='even'")]
    assert unmeasured(cls, every) == []
    assert "No committed row has `phases=generation`; `spacing=even`." in status_of(
        card(cls, [row("uls")], [], "")
    )
    assert unmeasured(cls, [row("uls", parameters="garbled(")]) == [
        "`phases=generation or both`".replace(" or ", "` or `phases="),
        "`spacing=paper` or `spacing=even`",
    ]


def test_every_choice_of_a_method_is_measured_or_named():
    for cls in method_classes():
        text = status_of(card(cls, [row(cls.name)], [], ""))
        missing = unmeasured(cls, [row(cls.name)])
        assert all(words in text for words in missing), cls.name


def test_presets_show_their_values():
    found = {cls.name: presets(cls) for cls in method_classes()}
    named = {name: chooser for name, (chooser, _) in found.items() if chooser}
    assert named
    for name, chooser in named.items():
        cls, sets = method_class(name), found[name][1]
        table = preset_table(cls)
        assert table.splitlines()[2].count(f"`{chooser}=") == len(sets)
        default = sets[getattr(cls(), chooser)]
        for field, value in vars(default).items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            assert f"| `{field}` | `{text}` |" in table
            assert f"| `{text}`, by `{chooser}` |" in parameters(cls)
        assert table in card(cls, [], [], "")
    plain = next(cls for cls in method_classes() if cls.name not in named)
    assert preset_table(plain) == ""


def test_published_values_stand_under_a_heading_that_holds_for_re_reports_too():
    made = card(method_class("uls"), [], [reported("uls")], "")
    assert "## Published values\n" in made
    assert "What its paper reports" not in made


def test_the_measured_setting_is_told_where_it_is_not_the_default():
    cls = method_class("uls")
    known = {"mean_acc_low": 0.3}
    even, paper = (row("uls", parameters=f"spacing='{one}'", **known) for one in ("even", "paper"))
    assert "1.50x on embedded |" in claims(cls, [reported("uls")], [even, paper])
    assert "1.50x on embedded with `uls(spacing=even)` |" in claims(cls, [reported("uls")], [even])
    few = row("uls", parameters="spacing='paper'")
    assert "on embedded" not in claims(cls, [reported("uls")], [few])
    recovered = row("uls", recovery="lora(rank=4)", **known)
    assert "on embedded" not in claims(cls, [reported("uls")], [recovered])
    table = claims(cls, [reported("uls", recovery="lora")], [recovered, paper])
    assert "| recovery=lora | Large-7B |" in table
    assert "1.50x on embedded with `uls + lora" in table


def test_the_words_beside_times_are_explained_where_they_stand():
    walls = {"wall_decode_speedup": "1.01", "wall_decode_low": "0.98", "wall_decode_high": "1.02"}
    made = rows([row("uls", **walls)])
    assert made.endswith(f"\n\nBeside prefill and decode: undecided: {WORDS['undecided']}.")
    assert "Beside" not in rows([row("uls", **walls | {"wall_decode_low": "1.005"})])
    assert "Beside" not in rows([row("uls")])


@pytest.mark.parametrize("cls", method_classes(), ids=lambda cls: cls.name)
def test_who_trains_is_said(cls):
    made = card(cls, [], [], "")
    if not cls.needs_training:
        assert "| trains | no |" in made
    elif hasattr(cls, "source_method"):
        assert training(cls) == "its source trained"
        assert "| trains | nothing of its own: its source is trained, in minutes or more |" in made
    else:
        assert "| trains | yes: `fit` takes minutes or more |" in made
