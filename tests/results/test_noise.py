"""No wall-clock number is told without its noise, wherever it is printed."""

from __future__ import annotations

import ast
import io
import re
import types
from pathlib import Path

import pytest
from cells import cell
from rich.console import Console

import dyndepth
from dyndepth.common import commands
from dyndepth.common.printing import Column, fitting
from dyndepth.pages.cards import wall
from dyndepth.results import noise as module
from dyndepth.results.console import show_leaderboard
from dyndepth.results.leaderboard import leaderboard
from dyndepth.results.leaderboard_pages import board, html, markdown
from dyndepth.results.noise import WALLS, headed, legend, loaded, noise, told, told_of
from dyndepth.results.numbers import Numbers
from dyndepth.results.shown import spread
from dyndepth.results.tables import write_tables
from dyndepth.timing.console import show_break_even, show_timing


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ((1.23, 1.20, 1.26, False), ""),
        ((1.44, 0.89, 1.99, False), "noisy, undecided"),
        ((1.23, 1.16, 1.29, False), "noisy"),  # 0.13 of 1.23
        ((1.01, 0.98, 1.03, False), "undecided"),
        ((3.75, 3.70, 3.80, True), "suspect"),
        ((3.75, 2.00, 5.00, True), "suspect, noisy"),
        ((1.23, None, None, False), "no interval"),
        ((1.23, float("nan"), float("nan"), False), "no interval"),
        ((1.23, 1.20, float("nan"), False), "no interval"),
        ((1.23, "1.20", "1.26", "False"), ""),
        ((1.23, "1.20", "1.26", "FALSE"), ""),
        ((1.23, "1.20", "1.26", ""), ""),
        ((1.23, "1.20", "1.26", float("nan")), ""),
        ((1.23, "1.20", "1.26", "TRUE"), "suspect"),
        ((1.23, "1.20", "1.26", "", "TRUE"), "loaded"),
        ((1.01, 0.98, 1.03, False, True), "undecided, loaded"),
    ],
)
def test_an_interval_that_is_wide_or_holds_one_is_said_to_be(numbers, word):
    assert noise(*numbers) == word


def test_a_number_is_told_with_its_interval_and_its_noise():
    assert told(1.44, 0.89, 1.99) == "1.44x [0.89, 1.99] noisy, undecided"
    assert told("1.2", "1.19", "1.21", suspect="False") == "1.20x [1.19, 1.21]"
    assert told("1.234", "1.2", "1.26", form="{:.3f}") == "1.234 [1.200, 1.260]"
    assert told(1.44, 0.89, 1.99, mark=" ({})") == "1.44x [0.89, 1.99] (noisy, undecided)"
    assert told(1.44, float("nan"), float("nan")) == "1.44x no interval"
    assert told(None, None, None) == told("", "", "") == told(float("nan"), 1, 2) == ""


def test_headings_name_the_mode_where_there_are_several():
    eager = {"wall_decode_speedup": 1.2}
    assert headed([eager]) == {"prefill": "prefill", "decode": "decode"}
    assert list(headed([eager, {"wall_decode_graphs_speedup": "1.3"}]).values()) == [
        "prefill (eager)",
        "decode (eager)",
        "decode (graphs)",
    ]
    assert list(headed([{"wall_decode_graphs_speedup": ""}])) == ["prefill", "decode"]


def _cells():
    timed = cell(method="m", target_speedup=1.25, phases="both")
    timed.timing = [
        {"phase": phase, "mode": mode, "batch": 1, "length": 8, "wall_speedup": value}
        | {"wall_speedup_low": low, "wall_speedup_high": high, "suspect": suspect}
        for phase, mode, value, low, high, suspect in (
            ("prefill", "eager", 1.23, 1.21, 1.25, False),
            ("decode", "eager", 3.75, 2.5, 5.5, True),
            ("decode", "graphs", 1.44, 0.89, 1.99, False),
        )
    ]
    return [cell(phases="both"), timed]


TOLD = (
    "1.23x [1.21, 1.25]",
    "3.75x [2.50, 5.50] suspect, noisy",
    "1.44x [0.89, 1.99] noisy, undecided",
)


def test_a_leaderboard_has_a_figure_a_mode(capsys, monkeypatch):
    rows = leaderboard(_cells())
    assert [told_of(rows[1], wall.key) for wall in WALLS] == list(TOLD)
    assert rows[1]["wall_suspect"] == "decode"
    assert rows[0]["wall_suspect"] is None
    monkeypatch.setattr(commands, "PIPE_WIDTH", 400)
    show_leaderboard(rows)
    printed = capsys.readouterr().out
    assert all(text in printed for text in (*TOLD, "decode (graphs)", "prefill (eager)"))
    assert "noisy: the interval is wider than 10 %" in " ".join(printed.split())


def test_pages_of_a_leaderboard_tell_the_noise():
    cells = _cells()
    found = board(cells, leaderboard(cells))
    lines = markdown(found)
    assert all(text in lines for text in TOLD)
    assert found["entries"][1]["noise"] == {
        "prefill": "",
        "decode": "suspect, noisy",
        "decode_graphs": "noisy, undecided",
    }
    assert [wall["label"] for wall in found["walls"]][-1] == "decode (graphs)"
    assert "suspect, noisy" in html(found)


def test_seeds_together_are_as_suspect_as_each():
    cells = _cells()
    other = cell(method="m", target_speedup=1.25, phases="both", seed=1)
    other.timing = [row | {"suspect": row["phase"] == "prefill"} for row in cells[1].timing]
    cells.append(other)
    found = board(cells, leaderboard(cells))["entries"][1]
    assert len(found["seeds"]) == 2
    assert {key for key, word in found["noise"].items() if "suspect" in word} == {
        *("prefill", "decode")
    }


@pytest.mark.parametrize(
    ("load", "threads", "found"),
    [
        (2.2, 1, True),  # 1.2 for the one that is free
        (1.9, 1, False),
        (4.2, 4, False),  # its own four, and what no machine is without
        (4.6, 4, True),
        (4.2, None, True),
        (None, 1, False),
    ],
)
def test_a_machine_is_loaded_by_other_work_than_the_timing_s_own(load, threads, found):
    row = {"load_average": load, "threads": threads, "cores": 4 if load and load > 4 else 2}
    assert loaded(row) is loaded({key: str(value or "") for key, value in row.items()}) is found


def test_what_a_command_measured_is_told_with_its_noise(capsys, monkeypatch):
    monkeypatch.setattr(commands, "PIPE_WIDTH", 400)
    row = _measured()
    show_timing("one", [row])
    printed = capsys.readouterr().out
    assert "3.750 [2.500, 5.500] suspect, noisy" in printed
    assert "60%, 70%" in printed
    show_timing("one", [row | {"busy_speedup": None}])
    assert "host share" not in capsys.readouterr().out


def _measured(**changes):
    row = {"phase": "decode", "mode": "eager", "batch": 1, "length": 8, "repeats": 9}
    row |= {"dense_median_s": 0.2, "method_median_s": 0.1, "suspect": True, "wall_speedup": 3.75}
    row |= {"wall_speedup_low": 2.5, "wall_speedup_high": 5.5, "total_speedup": 1.23}
    row |= {"wall_efficiency": 3.0, "busy_speedup": 1.2, "dense_host_share": 0.6}
    row |= {"method_host_share": 0.7, "device_name": "x", "dtype": "float32", "threads": 1}
    row |= {"attn_implementation": "sdpa", "allocator": "default", "load_average": 0.1}
    return row | changes


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of 80 columns: what it shows."""
    shown = io.StringIO()
    terminal = Console(width=80, file=shown, force_terminal=True, color_system=None)
    monkeypatch.setattr(commands, "console", lambda: terminal)
    return shown


def _whole(printed, texts):
    """No line is too long, nothing is cut, and every interval of ``texts`` is in one line."""
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    pieces = [piece for text in texts for piece in re.findall(r"\[[^]]*\]|\S+", text)]
    for piece in set(pieces):
        assert printed.count(piece) >= pieces.count(piece), piece


def test_in_80_columns_a_speedup_keeps_its_interval_and_its_word(narrow):
    row = _measured(length=4096, batch=32, mode="graphs", dense_median_s=12.3456)
    show_timing("uls(spacing=even) on shape:llama-3-8b", [row, row | {"phase": "prefill"}])
    printed = narrow.getvalue()
    _whole(printed, ["3.750 [2.500, 5.500] suspect, noisy", "32x4096"] * 2)
    flat = " ".join(printed.split())
    assert "left out at this width: busy speedup, host share" in flat
    for word in ("suspect", "noisy"):
        assert f"{word}: {module.WORDS[word]}" in flat
    assert "undecided" not in flat


def test_in_80_columns_a_break_even_keeps_its_numbers_whole(narrow):
    row = _measured(skipped_fraction=0.25, routed_median_s=1234.5, sublayers="both", router=0)
    curve = types.SimpleNamespace(break_even="pays")
    show_break_even(curve, [row | {"model": "embedded"}])
    _whole(narrow.getvalue(), ["3.750 [2.500, 5.500] suspect, noisy"])


@pytest.mark.parametrize("parameters", ["", "criterion=greedy, windows=16, rate=0.0004"])
def test_in_80_columns_a_leaderboard_keeps_its_numbers_whole(narrow, parameters):
    cells = [cell([1, 0] * 20, phases="both"), cell([1, 0] * 20, method="m", phases="both")]
    cells[1].timing = _cells()[1].timing
    other = cell([1, 1] * 20, method="layer_controller_of_a_long_name", phases="generation")
    other.timing = cells[1].timing
    for one in (*cells, other):
        one.identity["parameters"] = parameters
        bits = {"metric": "bits_per_byte", "value": 1.2, "stderr": 0.1, "higher_is_better": False}
        one.accuracy.append(one.accuracy[0] | bits)
    rows = leaderboard([*cells, other])
    show_leaderboard(rows)
    printed = narrow.getvalue()
    scores = [spread(row, key) for row in rows for key in ("mean_acc", "bits_per_byte")]
    _whole(printed, scores)
    assert [word for word in printed.split() if word == "1x"] == ["1x"] * 3
    assert "0.0004" in printed or not parameters
    assert "left out at this width" in " ".join(printed.split())
    # What is shown of a time is shown with its interval, and its legend only then.
    assert ("3.75x" in printed) == ("[2.50, 5.50]" in printed)
    assert ("noisy:" in printed) == ("3.75x" in printed)


def test_a_wide_terminal_and_a_pipe_have_every_column(capsys, monkeypatch):
    monkeypatch.setattr(commands, "PIPE_WIDTH", 60)
    cells = _cells()
    cells[0].accuracy.append(cells[0].accuracy[0] | {"metric": "rougeL", "value": 0.3})
    show_leaderboard(leaderboard(cells))
    printed = capsys.readouterr().out
    assert "at this width" not in printed
    assert "ROUGE-L" in printed


@pytest.mark.parametrize("width", [30, 40, 80, 100, 160])
def test_no_width_cuts_a_name_s_numbers(width):
    names = ["uls(rate=0.0004, other_parameter=1e-05)", "static_pruning(criterion=greedy)"]
    column = Column("method", names, name=True)
    numbers = Column("value", ["1.234 [1.200, 1.260] noisy, undecided", "2.000"], rank=0)
    extra = Column("more", ["12345.6789", "1"], rank=1)
    kept, widths, left_out = fitting([column, numbers, extra], width)
    assert kept[:2] == [column, numbers]
    assert left_out == ([] if extra in kept else ["more"])
    assert sum(widths) + 2 * (len(widths) - 1) <= width
    folded = column.folded(widths[0])
    assert [text.replace("\n", "").replace(" ", "") for text in folded] == [
        name.replace(" ", "") for name in names
    ]
    assert "0.0004" in folded[0]
    assert max(len(line) for text in folded for line in text.split("\n")) <= widths[0]
    assert "[1.200, 1.260]" in numbers.folded(widths[1])[0]


def test_the_legend_is_of_the_words_that_stand_there():
    assert legend(["1.01x [0.98, 1.02] undecided"]).startswith("undecided: the interval holds 1")
    assert "noisy" not in legend(["1.01x [0.98, 1.02] undecided"])
    assert legend(["1.40x [1.37, 1.44]", ""]) == ""
    assert all(word in legend() for word in ("suspect", "no interval", "noisy", "undecided"))


def test_sentences_and_cards_tell_the_noise(tmp_path):
    write_tables(_cells(), tmp_path / "run")
    numbers = Numbers(tmp_path, Path("run"))
    where = {"method": "m", "phase": "decode", "mode": "graphs"}
    assert (
        numbers.of("timing", "wall_speedup", digits=2, **where)
        == "1.44 [0.89, 1.99] (noisy, undecided)"
    )
    said = numbers.of("leaderboard", "wall_decode_speedup", digits=2, method="m")
    assert said == "3.75 [2.50, 5.50] (suspect, noisy)"
    assert wall(leaderboard(_cells())[1], "decode") == "3.75 [2.50, 5.50] suspect, noisy"


PRINTED = re.compile(r"wall_(\w+_)?speedup|wall_\{")


def test_nothing_else_formats_a_wall_speedup():
    """No f-string, format or str of the program holds one but in the module that tells it."""
    root = Path(dyndepth.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        if path == Path(module.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for part in _formatted(node):
                keys = [
                    each.slice.value
                    for each in ast.walk(part)
                    if isinstance(each, ast.Subscript)
                    and isinstance(each.slice, ast.Constant)
                    and isinstance(each.slice.value, str)
                ]
                found += [f"{path.name}:{node.lineno}" for key in keys if PRINTED.search(key)]
    assert found == []


def _formatted(node):
    if isinstance(node, ast.FormattedValue):
        return [node.value]
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in ("format", "str", "_figure", "spread", "_spread", "_number", "number"):
            return node.args
    return []
