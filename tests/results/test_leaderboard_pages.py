"""The page for people: its data, Markdown, what papers report, and the page in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import browsing
import pytest
from cells import cell, identity

from dyndepth.cells.cell import Cell, order
from dyndepth.common.errors import UserError
from dyndepth.results import leaderboard_pages, published
from dyndepth.results.leaderboard import leaderboard
from dyndepth.results.leaderboard_pages import board, html, markdown, write

NASTY = "RuntimeError: </script><b>|*bold*|\u2028"
PAPER = {
    "method": "method_1",
    "parameters": "",
    "recovery": "",
    "model": "Large-7B",
    "speedup": 1.5,
    "unit_of_speedup": "layers",
    "task": "MMLU",
    "metric": "accuracy %",
    "dense_value": 50.0,
    "value": 40.0,
    "source": "arXiv 0000.00000, table 2",
    "hand": "second",
    "note": "run by its authors",
}


def _cells(methods: int = 3) -> list[Cell]:
    """Dense, methods at three targets, one of two seeds, a bound, a failed cell."""
    cells = [_one(200, method="dense")]
    for number in range(1, methods + 1):
        for place, target in enumerate((1.25, 1.5, 2.0)):
            for seed in (0, 1) if number == 1 else (0,):
                right = 190 - 10 * number - 20 * place + 4 * seed
                phases = "generation" if number == 2 else "both"
                name = f"method_{number}"
                cells.append(
                    _one(right, method=name, target_speedup=target, seed=seed, phases=phases)
                )
    bound = _one(199, method="bound", target_speedup=2.0)
    bound.provenance["uses_labels"] = True
    failed = identity(method="method_1", target_speedup=3.0, phases="both")
    cells += [bound, Cell(failed, status="error", error=NASTY)]
    return sorted(cells, key=order)


def _one(right: int, **changes: object) -> Cell:
    changes = {"phases": "both"} | changes
    found = cell([1] * right + [0] * (200 - right), **changes)
    target = float(found.identity["target_speedup"])
    found.compute[0] |= {"block_speedup": target, "total_speedup": target}
    bits = {"metric": "bits_per_byte", "value": 1.1 * target, "stderr": 0.02}
    found.accuracy.append(found.accuracy[0] | bits | {"task": "text", "higher_is_better": False})
    for phase in ("prefill", "decode"):
        ends = {"wall_speedup_low": 0.9, "wall_speedup_high": 2 * target}
        row = {"phase": phase, "batch": 1, "length": 8, "wall_speedup": target**0.5}
        found.timing.append(row | ends)
    return found


@pytest.fixture(autouse=True)
def papers(monkeypatch):
    monkeypatch.setattr(leaderboard_pages, "published", lambda: [dict(PAPER)])


def _board(methods: int = 3) -> dict:
    cells = _cells(methods)
    return board(cells, leaderboard(cells))


def _entry(found: dict, method: str, target: float) -> dict:
    (one,) = [e for e in found["entries"] if (e["method"], e["target"]) == (method, target)]
    return one


# --- the data -------------------------------------------------------------------------------------


def test_seeds_are_averaged_and_the_interval_covers_them():
    found = _board()
    one = _entry(found, "method_1", 1.25)
    assert one["seeds"] == [0, 1]
    rows = [row for row in leaderboard(_cells()) if row["cell"] in one["cells"]]
    value, low, high = one["scores"]["mean_acc"]
    assert value == pytest.approx((180 + 184) / 400)
    assert low == min(row["mean_acc_low"] for row in rows)
    assert high == max(row["mean_acc_high"] for row in rows)
    assert len(_entry(found, "method_2", 1.25)["seeds"]) == 1


def test_scores_of_tasks_have_intervals_by_their_errors():
    found = _board()
    labels = {score["label"]: score for score in found["scores"]}
    assert list(labels)[:2] == ["mean accuracy", "accuracy retained, % of dense"]
    assert labels["text: bits_per_byte"]["higher"] is False
    one = _entry(found, "method_2", 2.0)["scores"][labels["text: bits_per_byte"]["key"]]
    assert one == pytest.approx([2.2, 2.2 - 1.96 * 0.02, 2.2 + 1.96 * 0.02])
    low = _entry(found, "method_2", 2.0)["scores"][labels["one: acc"]["key"]][1]
    assert low >= 0


def test_an_accuracy_s_interval_ends_at_one_and_bits_do_not():
    one = cell([1] * 39 + [0])
    one.accuracy[0] |= {"value": 0.975, "stderr": 0.025}
    bits = {"task": "text", "metric": "bits_per_byte", "value": 0.99, "stderr": 0.025}
    one.accuracy.append(one.accuracy[0] | bits | {"higher_is_better": False})
    one.samples.append({"task": "text", "doc_id": 0, "outcomes": '{"bits_per_byte,none": 0.99}'})
    found = board([one], leaderboard([one]))["entries"][0]["scores"]
    assert found["one/acc,none"] == pytest.approx([0.975, 0.926, 1.0])
    assert found["text/bits_per_byte,none"][2] == pytest.approx(0.99 + 1.96 * 0.025)


def _settings(**changes: object) -> list[Cell]:
    """Dense and a method in two settings."""
    return sorted(
        [
            _one(150, **{"method": method, "target_speedup": target} | more)
            for method, target in (("dense", 1.0), ("m", 1.5), ("m", 2.0))
            for more in ({}, changes)
        ],
        key=order,
    )


SETTINGS = [
    ({"num_fewshot": 5}, "num_fewshot=5"),
    ({"limit": {"one": 9, "two": 9}}, "limit=9"),
    ({"tasks": ["one"]}, "tasks=one"),
    ({"device": "cuda"}, "device=cuda"),
    ({"dtype": "bfloat16"}, "bfloat16"),
    ({"attn_implementation": "eager"}, "attention=eager"),
    ({"harness_code": "1a2b3c4d5e6f"}, "code=1a2b3c"),
    ({"model": "small", "model_fingerprint": "f"}, "small"),
]


@pytest.mark.parametrize(("changes", "word"), SETTINGS, ids=[word for _, word in SETTINGS])
def test_entries_of_several_settings_say_which_is_theirs(changes, word):
    cells = _settings(**changes)
    found = board(cells, leaderboard(cells))
    labels = [(entry["label"], entry["target"]) for entry in found["entries"]]
    assert len(set(labels)) == len(labels) == 6
    (letter,) = [told[0] for told in found["runs"] if word in told[3:].split(", ")]
    named = [entry for entry in found["entries"] if entry["setting"] == letter]
    assert {entry["label"].rpartition(", ")[2] for entry in named} == {letter}
    assert sorted(entry["method"] for entry in named) == ["dense", "m", "m"]
    # Each setting's entries stand together, and no two rows of the table are alike.
    settings = [entry["setting"] for entry in found["entries"]]
    assert settings == sorted(settings, key=settings.index)
    rows = [line.split(" | ") for line in markdown(found).splitlines() if line.startswith("| ")][2:]
    cut = 3 if "model" in changes else 2
    assert len({tuple(row[:cut]) for row in rows}) == len(rows)


def test_entries_of_one_setting_have_plain_names():
    cells = _cells()
    found = board(cells, leaderboard(cells))
    assert {entry["setting"] for entry in found["entries"]} == {""}
    assert all(entry["label"] == entry["name"] for entry in found["entries"] + found["failed"])


def test_conditions_hold_what_makes_cells_comparable_without_prefixes():
    cells = [_one(150, method="dense", torch="2.13.0", harness_code="abc", device="cuda")]
    text = markdown(board(cells, leaderboard(cells)))
    for line in ("torch: 2.13.0", "harness_code: abc", "device: cuda", "tasks: one,two"):
        assert f"\n- {line}\n" in text


def test_conditions_of_some_settings_are_not_those_of_all():
    chat = {"apply_chat_template": "default", "system_instruction": "Answer briefly."}
    cells = _settings(**chat)
    found = board(cells, leaderboard(cells))["conditions"]
    assert found["apply_chat_template"] == ["default", "none"]
    assert found["system_instruction"] == ["Answer briefly.", "none"]
    assert "- system_instruction: Answer briefly.; none" in markdown(
        board(cells, leaderboard(cells))
    )
    # Nothing is said where none has it, and nothing added where all have the same.
    assert "fewshot_as_multiturn" not in found
    assert found["model"] == ["tiny"]


def test_controls_are_marked_beside_bounds():
    cells = _cells()
    for one in cells:
        if one.identity["method"] in ("dense", "method_3"):
            one.provenance["paper"] = "control"
    found = board(cells, leaderboard(cells))
    assert {e["method"] for e in found["entries"] if e["control"]} == {"dense", "method_3"}
    text = markdown(found)
    assert "| method_3 (control) | 1.25x |" in text
    assert "\nControls are no methods of a paper" in text
    assert text.splitlines()[2].startswith("2 methods in 6 settings, 4 settings of controls, 1 of")


def _asked(choices: dict[str, int | None]) -> Cell:
    one = cell([1, 0, 1, 1])
    (base,) = one.accuracy
    one.accuracy = [base | {"task": task} for task in choices]
    one.samples = [
        {"task": task, "doc_id": place, "outcomes": '{"acc,none": 1.0}'}
        | {"loglikelihoods": None if count is None else json.dumps([-1.0] * count)}
        for task, count in choices.items()
        for place in range(3)
    ]
    return one


def test_chance_is_the_mean_over_tasks_of_one_in_their_choices():
    from dyndepth.results.leaderboard import chance

    one = _asked({"three": 3, "two": 2, "word": 1})
    assert chance(one) == pytest.approx((1 / 3 + 1 / 2) / 3)
    assert chance(_asked({"two": 2, "written": None})) == 0.25
    assert chance(_asked({"word": 1, "written": None})) is None
    assert chance(cell()) is None
    mutual = _asked({"two": 4})
    for row in mutual.samples:
        row["outcomes"] = '{"acc,none": 1.0, "acc_mutual_info,none": 1.0}'
    assert chance(mutual) == 0.5
    found = board([one], leaderboard([one]))
    assert found["chance"] == "chance: 0.278"
    assert "\nMean accuracy by chance: 0.278.\n" in markdown(found)


def test_chance_is_told_by_setting_where_it_differs():
    one, other = _asked({"two": 2}), _asked({"four": 4})
    one.identity["tasks"], other.identity["tasks"] = ["two"], ["four"]
    cells = [one, other]
    found = board(cells, leaderboard(cells))["chance"]
    assert found == "chance: 0.500 (A), 0.250 (B)"


def _contrast(colour: str, ground: str) -> float:
    """By WCAG 2: (L1 + 0.05) / (L2 + 0.05)."""

    def luminance(text: str) -> float:
        shares = [int(text[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return sum(w * s for w, s in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(colour), luminance(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_of_a_line_stands_out_from_its_ground():
    text = (Path(leaderboard_pages.__file__).parent / "leaderboard.html").read_text()
    themes = re.findall(r"--paper: (#\w{6});.*?((?:--c\d: #\w{6};\s*)+)", text, re.DOTALL)
    assert len(themes) == 2
    for ground, colours in themes:
        found = re.findall(r"#\w{6}", colours)
        assert len(set(found)) == 7
        assert min(_contrast(colour, ground) for colour in found) >= 3


def test_bounds_dense_and_failures_are_told_apart():
    found = _board()
    assert [e["method"] for e in found["entries"] if e["bound"]] == ["bound"]
    assert [e["method"] for e in found["entries"] if e["dense"]] == ["dense"]
    assert [(e["method"], e["target"], e["error"]) for e in found["failed"]] == [
        ("method_1", 3.0, NASTY)
    ]
    assert not [e for e in found["entries"] if e["target"] == 3.0]


def test_a_cell_whose_timing_failed_keeps_its_scores_and_is_named():
    one = _one(100, method="m")
    one.status, one.error, one.timing = "error", "RuntimeError: clock stopped", []
    found = board([one], leaderboard([one]))
    assert found["entries"][0]["scores"]["mean_acc"][0] == 0.5
    assert found["entries"][0]["decode"] is None
    assert found["failed"][0]["error"] == one.error


def test_variants_are_named_as_everywhere():
    cells = [
        _one(150, method="m", parameters="rule='a', keep=1"),
        _one(150, method="m", parameters="rule='b, c', keep=1", recovery="lora(rank=4)"),
        _one(150, method="n", parameters="keep=1", phases="generation"),
    ]
    found = board(cells, leaderboard(cells))
    variants = [entry["variant"] for entry in found["entries"]]
    assert variants == ["rule=a, keep=1", "rule=b, c, keep=1, + lora", "keep=1, phases=generation"]


# --- Markdown and the file ------------------------------------------------------------------------


def test_markdown_has_every_section_and_no_cell_breaks_its_table():
    text = markdown(_board())
    for title in ("# Leaderboard", "## Bounds", "## Failed cells", "## Reported by papers"):
        assert f"{title}\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| method_1")]
    assert rows[0].startswith("| method_1 | 1.25x | 2 | 0.910 [")
    (failed,) = [line for line in rows if "RuntimeError" in line]
    assert "<b>" not in failed
    assert len(re.findall(r"(?<!\\)\|", failed)) == 6
    (paper,) = [line for line in rows if "Large-7B" in line]
    assert "1.5x layers | MMLU | accuracy % | 50 | 40 | method_1 at 1.50x: 80% of" in paper
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert not [line for line in tables if not line.endswith(" |")]


def test_markdown_of_a_single_method_has_no_empty_sections():
    cells = [_one(150, method="dense"), _one(120, method="m", target_speedup=2.0)]
    text = markdown(board(cells, leaderboard(cells)))
    assert "Bounds" not in text
    assert "Failed" not in text
    assert "papers" not in text


def test_page_is_one_file_that_asks_for_nothing_and_escapes_its_data():
    text = html(_board())
    # The names of XML's vocabularies are no addresses.
    without = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"https?://|@import|\bsrc=|url\(|fetch\(|innerHTML", without)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(data[1])["failed"][0]["error"] == NASTY
    assert "<b>|" not in text
    assert "__BOARD__" not in text


def test_equal_cells_give_equal_bytes(tmp_path):
    cells = _cells()
    first = write(cells, leaderboard(cells), tmp_path / "a")
    second = write(cells, leaderboard(cells), tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


# --- what papers report ---------------------------------------------------------------------------


def test_what_papers_report_is_read_and_every_method_exists():
    from dyndepth.common.registry import methods

    rows = published.published()
    assert rows
    assert {row["method"] for row in rows} <= set(methods())
    for row in rows:
        assert row["speedup"] >= 1
        # What is on no arXiv is named by its authors' repository.
        assert re.search(r"\b(arXiv \d{4}\.\d{5}|GitHub [\w-]+/[\w-]+)\b", row["source"]), row
    keys = ("method", "parameters", "model", "speedup", "unit_of_speedup", "task", "metric", "note")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows)


def test_other_distributions_may_report_too(tmp_path, monkeypatch):
    package = tmp_path / "others"
    package.mkdir()
    (package / "__init__.py").write_text("")
    header = ",".join(published.COLUMNS)
    (package / published.FILE).write_text(
        f"{header}\nm,,,Big,1.25,layers,T,acc,,40.5,arXiv 1,first,\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (row,) = published.rows_of("others")
    assert (row["speedup"], row["dense_value"], row["value"]) == (1.25, None, 40.5)
    assert published.rows_of("no_such_package") == []
    assert published.rows_of("json") == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("m,,,Big,x,layers,T,acc,,40,arXiv 1,first,", "line 2: speedup must be a number, not 'x'"),
        ("m,,,Big,0.5,layers,T,acc,,40,arXiv 1,first,", "line 2: speedup must be at least 1"),
        ("m,,,Big,2,layers,T,acc,,,arXiv 1,first,", "line 2: value must be a number"),
        ("m,,,Big,2,layers,T,acc,,40,,first,", "a row needs every column, and a method"),
        (
            "m,,magic,Big,2,layers,T,acc,,40,arXiv 1,first,",
            "line 2: recovery must be empty or one of none",
        ),
        ("m,,Big", "a row needs every column"),
        ("m,,,Big,2,layers,T,acc,,40,arXiv 1,,", "line 2: hand must be first or second, not ''"),
    ],
)
def test_a_wrong_line_is_refused(line, says):
    with pytest.raises(UserError, match=re.escape(says)):
        published.parse(f"{','.join(published.COLUMNS)}\n{line}\n", "a file")


def test_other_columns_are_refused():
    with pytest.raises(UserError, match="a file must have the columns method, parameters"):
        published.parse("method,value\n", "a file")


def test_the_nearest_budget_with_the_paper_s_parameters_stands_beside():
    def row(speedup, parameters="rule='a', keep=1", phases="both", method="m"):
        own = {"method": method, "parameters": parameters, "phases": phases}
        return own | {"block_speedup": speedup}

    rows = [row(1.2), row(2.0), row(1.5, "rule='b', keep=1"), row(1.5, phases="generation")]
    rows += [row(1.5, method="n"), row(None)]
    paper = {"method": "m", "parameters": "rule='a', phases='both'", "speedup": 1.5}
    assert published.nearest(paper, rows) is rows[0]
    assert published.nearest(paper | {"speedup": 1.6}, rows) is rows[1]
    assert published.nearest(paper | {"parameters": "keep=9"}, rows) is None
    assert published.nearest(paper | {"parameters": ""}, rows)["block_speedup"] == 1.5


def test_a_paper_s_row_is_set_beside_rows_recovered_alike():
    def row(speedup, recovery):
        own = {"method": "m", "parameters": "", "phases": "both", "recovery": recovery}
        return own | {"block_speedup": speedup}

    rows = [row(1.5, "lora(rank=4)"), row(1.2, "none"), row(1.9, "joint(rank=4)")]
    paper = {"method": "m", "parameters": "", "speedup": 1.5}
    assert published.nearest(paper, rows) is rows[1]
    assert published.nearest(paper | {"recovery": ""}, rows) is rows[1]
    assert published.nearest(paper | {"recovery": "lora"}, rows) is rows[0]
    assert published.nearest(paper | {"recovery": "joint"}, rows) is rows[2]
    assert published.nearest(paper | {"recovery": "full"}, rows) is None


@pytest.mark.parametrize("turn", [1, -1])
def test_what_a_paper_s_row_leaves_unsaid_is_the_default(turn):
    def row(spacing, phases="both", speedup=1.5):
        own = {"method": "uls", "parameters": f"spacing='{spacing}'", "phases": phases}
        return own | {"block_speedup": speedup, "recovery": "none"}

    rows = [row("even"), row("paper"), row("paper", "generation"), row("paper", speedup=1.2)]
    rows = rows[::turn]
    paper = {"method": "uls", "parameters": "phases='both'", "speedup": 1.5}
    assert published.nearest(paper, rows) == row("paper")
    assert published.nearest(paper | {"parameters": ""}, rows) == row("paper")
    assert published.nearest(paper | {"parameters": "spacing='even'"}, rows) == row("even")
    # Off the default only where nothing else was measured.
    others = [row("even", speedup=2.0), row("even", speedup=1.6)]
    assert published.nearest(paper, others) is others[1]


def test_no_value_without_recovery_stands_beside_a_recovered_row():
    from dyndepth.results.published import kind_of

    unrecovered = [row for row in published.published() if "no training" in row["note"]]
    assert len(unrecovered) > 30
    assert {kind_of(row["recovery"]) for row in unrecovered} == {"none"}
    trained = [row for row in published.published() if "weights trained" in row["note"]]
    assert {row["recovery"] for row in trained} == {"full"}


def test_what_few_documents_say_stands_beside_no_paper():
    cells = [cell([1, 0, 1] * size, method="method_1", phases="both") for size in (1, 4)]
    beside = [board([one], leaderboard([one]))["published"][0]["measured"] for one in cells]
    assert beside[0] is None
    assert beside[1]["block"] == 1.5


def test_published_values_say_whose_reading_they_are():
    rows = published.published()
    hands = {(row["method"], row["source"].partition(",")[0]): row["hand"] for row in rows}
    assert hands["skipgpt", "HeRo (a later paper)"] == "second"
    assert hands["uls", "arXiv 2501.02336"] == "second"
    assert hands["static_pruning", "arXiv 2403.03853"] == "first"
    # A rule of another paper that this one's authors ran, and their own.
    blocks = {row["hand"] for row in rows if row["source"] == "arXiv 2406.15786"
              and row["parameters"] == "criterion='block_influence'"}  # fmt: skip
    own = {row["hand"] for row in rows if row["source"] == "arXiv 2406.15786"
           and row["parameters"] == "criterion='attention'"}  # fmt: skip
    assert (blocks, own) == ({"second"}, {"first"})
    found = _board()
    assert "| second-hand |" in markdown(found)
    assert "second-hand" in html(found)


def test_papers_enter_no_average(monkeypatch):
    with_papers = _board()
    monkeypatch.setattr(leaderboard_pages, "published", list)
    without = _board()
    assert with_papers["entries"] == without["entries"]
    assert with_papers["published"][0]["measured"]["block"] == 1.5
    assert without["published"] == []


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that reports its console and every request."""
    with pytest.MonkeyPatch.context() as patch:
        # The driver listens on this machine, of which a proxy knows nothing.
        patch.setenv("no_proxy", "*")
        running = browsing.start(tmp_path_factory.mktemp("browser"))
        yield running
        running.quit()


@pytest.fixture
def page(browser, tmp_path):
    """The page of a board of three methods, a bound and a failed cell, opened anew."""
    cells = _cells()
    path = write(cells, leaderboard(cells), tmp_path)[2]
    _width(browser, 1280)
    browser.get_log("performance")
    browser.get(path.as_uri())
    return browser


def _width(browser, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _texts(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent.trim())"
    return browser.execute_script(script, selector)


def _methods(browser):
    script = "return [...document.querySelectorAll('#competitors tr')].map(e => e.dataset.method)"
    return browser.execute_script(script)


def _numbers(browser, key):
    """The values of a sorted column, as floats."""
    heads = browser.execute_script(
        "return [...document.querySelectorAll('#board thead button')].map(e => e.dataset.sort)"
    )
    place = heads.index(key) + 1
    cells = browser.execute_script(
        "return [...document.querySelectorAll(`#competitors tr > :nth-child(${arguments[0]})`)]"
        ".map(e => e.firstChild ? e.firstChild.textContent : '')",
        place,
    )
    return [float(text.rstrip("×")) for text in cells]


def _sorted(browser, key):
    return browser.execute_script(
        "return document.querySelector(`[data-sort=${arguments[0]}]`).parentElement.ariaSort", key
    )


def _choose(browser, name, value):
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", name)).select_by_value(value)


def test_page_loads_without_errors_and_without_requests(page):
    assert page.title == "Dynamic depth leaderboard"
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert len([url for url in asked if url.startswith("file:")]) == 1


def test_page_shows_competitors_bounds_failures_and_papers(page):
    assert len(_methods(page)) == 10
    bounds = _texts(page, "#bounds tr")
    assert bounds[0].startswith("Bounds choose by the answers")
    assert len(bounds) == 2
    (failure,) = _texts(page, "#failures li")
    assert "method_1" in failure
    assert "</script><b>" in failure
    assert page.find_elements("css selector", "#failures b") == []
    (paper,) = _texts(page, "#reported tbody tr")
    assert "arXiv 0000.00000, table 2" in paper
    assert "1.50×: 80% of dense's accuracy" in paper


def test_a_press_on_a_heading_sorts_and_another_turns_it_round(page):
    page.find_element("css selector", "[data-sort=mean_acc]").click()
    falling = _numbers(page, "mean_acc")
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) > 5
    assert _sorted(page, "mean_acc") == "descending"
    page.find_element("css selector", "[data-sort=mean_acc]").click()
    assert _numbers(page, "mean_acc") == sorted(falling)
    assert _sorted(page, "mean_acc") == "ascending"
    assert _sorted(page, "target") == "none"
    # Where less is better, the first press brings the least to the top.
    page.find_element("css selector", "[data-sort=bits_per_byte]").click()
    assert _numbers(page, "bits_per_byte") == sorted(_numbers(page, "bits_per_byte"))


@pytest.mark.parametrize("key", ["ENTER", "SPACE"])
def test_the_keyboard_reaches_a_heading_and_sorts_by_it(page, key):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    focused = "return document.activeElement.dataset.sort || ''"
    for _ in range(60):
        ActionChains(page).send_keys(Keys.TAB).perform()
        if page.execute_script(focused) == "block":
            break
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.execute_script(focused) == "block"
    assert page.execute_script(outline) == "solid"
    ActionChains(page).send_keys(getattr(Keys, key)).perform()
    assert _numbers(page, "block") == sorted(_numbers(page, "block"), reverse=True)
    # The heading was drawn anew and must still be where the reader is.
    assert page.execute_script(focused) == "block"


def test_filters_hide_rows_marks_and_what_belongs_to_them(page):
    page.find_element("css selector", "#methods input[value=method_1]").click()
    assert "method_1" not in _methods(page)
    assert len(_methods(page)) == 7
    assert _texts(page, "#failures li") == []
    assert not page.find_element("id", "failed").is_displayed()
    assert not page.find_element("id", "papers").is_displayed()
    drawn = "return [...document.querySelectorAll('#flops .series')].map(e => e.dataset.series)"
    assert sorted(page.execute_script(drawn)) == [
        "bound",
        "dense",
        "method_2(phases=generation)",
        "method_3",
    ]
    _choose(page, "phases", "generation")
    assert sorted(set(_methods(page))) == ["dense", "method_2"]
    page.find_element("id", "methods-none").click()
    assert _methods(page) == []
    assert "Nothing to show" in page.find_element("id", "flops").text
    page.find_element("id", "methods-all").click()
    assert len(_methods(page)) == 4


def test_a_score_of_a_task_fills_the_charts_and_a_column(page):
    labels = dict(
        page.execute_script(
            "return [...document.getElementById('score').options].map(o => [o.text, o.value])"
        )
    )
    _choose(page, "score", labels["text: bits_per_byte"])
    assert "text: bits_per_byte, lower is better" in page.find_element("id", "flops").text
    assert "text: bits_per_byte" in _texts(page, "#board thead button")
    first = "return document.querySelector('#wall .series path').getAttribute('d')"
    before = page.execute_script(first)
    _choose(page, "wall-phase", "decode")
    assert "decode speedup" in page.find_element("id", "wall").text
    assert page.execute_script(first) == before  # equal times in both phases of these cells


def test_a_bound_is_hollow_and_marks_have_intervals(page):
    found = page.execute_script("""
        const pick = name => document.querySelector(`#flops [data-series="${name}"]`);
        const fill = name => [...pick(name).querySelectorAll("path")].pop().getAttribute("fill");
        const legend = [...document.querySelectorAll("#legend button")]
            .find(e => e.textContent.startsWith("bound")).querySelector("line");
        return [fill("bound"), fill("method_1"), legend.getAttribute("stroke-dasharray"),
            pick("method_1").querySelectorAll("line").length,
            document.querySelectorAll('#wall [data-series="method_1"] line').length];
    """)
    assert found[0] == "var(--paper)"
    assert found[1] != "var(--paper)"
    assert found[2] is None  # the first of its colour: a solid line
    # Three points: an interval upwards in one chart, another across in the other.
    assert found[3:] == [3, 6]


def test_text_is_scored_first_and_chance_stands_by_the_accuracy(browser, tmp_path):
    from selenium.webdriver.support.ui import Select

    cells = _cells()
    for one in cells:
        for row in one.samples:
            row["loglikelihoods"] = "[-1.0, -2.0, -3.0]"
    _width(browser, 1280)
    browser.get(write(cells, leaderboard(cells), tmp_path)[2].as_uri())
    chosen = Select(browser.find_element("id", "score")).first_selected_option
    assert chosen.text == "bits per byte"
    assert "bits per byte, lower is better" in browser.find_element("id", "flops").text
    assert "chance" not in browser.find_element("id", "flops").text
    assert browser.find_element("id", "chance").text == "Mean accuracy by chance: 0.333."
    _choose(browser, "score", "mean_acc")
    assert "chance: 0.333" in browser.find_element("id", "flops").text


def test_cells_and_parameters_are_reached_by_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    details = page.find_elements("css selector", "#competitors details")
    assert len(details) == len(_methods(page))
    summary = details[0].find_element("css selector", "summary")
    summary.send_keys(Keys.ENTER)
    assert details[0].get_attribute("open")
    (dense,) = [one for one in _cells() if one.identity["method"] == "dense"]
    assert f"cells: {dense.key}" in details[0].text
    assert page.find_elements("css selector", "#board [title]") == []


def test_controls_are_grey_and_named_and_leave_the_colours_to_methods(browser, tmp_path):
    cells = _cells(6)
    for one in cells:
        if one.identity["method"] in ("dense", "method_6"):
            one.provenance["paper"] = "control"
    recovered = _one(190, method="dense", recovery="lora(rank=4)")
    recovered.provenance["paper"] = "control"
    cells = sorted([*cells, recovered], key=order)
    _width(browser, 1280)
    browser.get(write(cells, leaderboard(cells), tmp_path)[2].as_uri())
    colours = dict(
        browser.execute_script("""
            return [...document.querySelectorAll("#legend button")]
                .map(e => [e.textContent, e.querySelector("path").getAttribute("stroke")]);
        """)
    )
    grey = {name for name, colour in colours.items() if colour == "var(--soft)"}
    assert grey == {"dense, control", "dense + lora, control", "method_6, control"}
    others = [colour for name, colour in colours.items() if name not in grey]
    assert len(set(others)) == len(others) == 6
    assert [text for text in _texts(browser, "#competitors th") if text.endswith("control")]


def test_failed_methods_are_counted_as_failed_alone(browser, tmp_path):
    cells = _cells(1)
    dense = next(one for one in cells if one.identity["method"] == "dense")
    dense.provenance["paper"] = "control"
    for name in ("one", "two", "three"):
        failed = identity(method=name, target_speedup=2.0, phases="both")
        cells.append(Cell(failed, status="error", error="no"))
    cells.sort(key=order)
    browser.get(write(cells, leaderboard(cells), tmp_path)[2].as_uri())
    (said,) = _texts(browser, "#summary")
    assert said.startswith("1 method, 1 bound and 1 control in 5 settings of the model tiny; 4 ")


def test_an_accuracy_that_guesses_reach_is_marked_on_the_page(browser, tmp_path):
    cells = [_one(100), _one(160, method="m", target_speedup=1.5)]
    for one in cells:
        for row in one.samples:
            row["loglikelihoods"] = "[-1.0, -2.0]"
    browser.get(write(cells, leaderboard(cells), tmp_path)[2].as_uri())
    (marked,) = _texts(browser, "#competitors .guessed")
    assert marked.startswith("~0.500")
    assert _texts(browser, "#chance")[0].endswith("~: it is inside of the interval.")


def test_points_of_several_settings_are_never_one_line(browser, tmp_path):
    cells = _settings(num_fewshot=5, harness_code="1a2b3c4d5e6f")
    _width(browser, 1280)
    browser.get(write(cells, leaderboard(cells), tmp_path)[2].as_uri())
    names = "return [...document.querySelectorAll('#flops .series')].map(e => e.dataset.series)"
    assert sorted(browser.execute_script(names)) == [
        *("dense, A", "dense, B", "m, A", "m, B"),
    ]
    told = _texts(browser, "#runs li")
    assert sorted(text[3:] for text in told) == [
        *("num_fewshot=5, code=1a2b3c", "num_fewshot=x, code=x"),
    ]
    rows = _texts(browser, "#competitors tr")
    assert len({tuple(row.split("▸")) for row in rows}) == len(rows) == 6
    _choose(browser, "setting", "A")
    assert len(_methods(browser)) == 3


def test_the_legend_lights_one_line_up(page):
    page.find_element("css selector", "#legend li:nth-child(2) button").click()
    lit = "return [...document.querySelectorAll('#charts .lit')].map(e => e.dataset.series)"
    assert len(page.execute_script(lit)) == 2
    assert "dimmed" in page.find_element("id", "charts").get_attribute("class")


@pytest.mark.parametrize("methods", [1, 20])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(browser, tmp_path, width, methods):
    cells = _cells(methods)
    _width(browser, width)
    browser.get(write(cells, leaderboard(cells), tmp_path)[2].as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    box = browser.execute_script(
        "const b = document.querySelector('.box'); return [b.scrollWidth, b.clientWidth]"
    )
    assert width > 500 or box[0] > box[1]
    # Every label of a chart lies inside of it.
    outside = browser.execute_script("""
        return [...document.querySelectorAll("svg.chart")].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll("text")].filter(text => {
                const own = text.getBoundingClientRect();
                return own.left < frame.left - 1 || own.right > frame.right + 1
                    || own.top < frame.top - 1 || own.bottom > frame.bottom + 1;
            }).map(text => text.textContent);
        });
    """)
    assert outside == []
    marks = browser.execute_script("""
        return [...document.querySelectorAll("#legend button")].map(button => {
            const mark = button.querySelector("path"), line = button.querySelector("line");
            const look = [mark, line].map(e => e.getAttribute("stroke")
                + e.getAttribute("stroke-dasharray"));
            return mark.getAttribute("d") + look + mark.getAttribute("fill");
        });
    """)
    assert len(set(marks)) == len(marks) == methods + 2


@pytest.mark.parametrize("graphs", [False, True])
def test_every_column_fits_on_a_screen_of_1280(browser, tmp_path, graphs):
    cells = [_one(200, method="dense"), _one(100, method="a_rather_long_name", target_speedup=1.5)]
    for one in cells:
        scores = {"metric": "rougeL", "value": 0.255, "stderr": 0.02, "task": "words"}
        one.accuracy.append(one.accuracy[0] | scores)
        more = {"repeats": 30, "load_average": 13.5, "cores": 2, "suspect": True}
        for row in one.timing:
            row |= more
        if graphs:
            one.timing += [row | {"mode": "graphs"} for row in one.timing]
    _width(browser, 1280)
    browser.get(write(cells, leaderboard(cells), tmp_path)[2].as_uri())
    box = browser.execute_script(
        "const b = document.querySelector('#board').parentElement;"
        "return [b.scrollWidth, b.clientWidth, document.querySelectorAll('#board thead th').length]"
    )
    assert box[2] == 14 + graphs
    assert box[0] <= box[1]


def test_template_is_shipped_as_package_data():
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^"dyndepth.results" = \["\*\.html"\]', text, re.MULTILINE)
