"""Lossless cells are listed apart: in no table, figure or claim that compares can one be a win."""

from __future__ import annotations

import json
import re

import pytest
from cells import cell, identity
from test_comparison import DOCUMENTS, bits, made
from test_curves import make_cells

from dyndepth import compare, plots
from dyndepth.cells import naming
from dyndepth.cells.cell import Cell, identity_columns
from dyndepth.cells.store import Store
from dyndepth.common.errors import UserError
from dyndepth.plots import retention
from dyndepth.plots.tables import points
from dyndepth.results import console, lossless, published, schema, seeds, shown, shown_formats
from dyndepth.results.comparison import against_dense, compared
from dyndepth.results.leaderboard import leaderboard
from dyndepth.results.leaderboard_pages import board, html, markdown
from dyndepth.results.tables import as_csv, write_tables
from dyndepth.sweep.driver import skipped_nothing
from dyndepth.verify.differences import EXACT, differences
from dyndepth.verify.findings import of_cell
from dyndepth.verify.tables import tables as checked

COUNTS = {"drafted": 40, "accepted": 25, "verifications": 12, "written": 36}


def drafting(task: str = "one", target: float = 2.0, counts=COUNTS, **changes) -> Cell:
    """A cell of a method that drafts, as good as can be, whose FLOPs are more than dense's."""
    changes = {"parameters": "", "phases": "generation"} | changes
    found = cell([1] * 12, method="sketch", target_speedup=target, **changes)
    found.provenance["speculates"] = True
    found.compute[0] |= {"block_speedup": 1.0, "total_speedup": 0.8, "task": task}
    written = found.compute[0] | {"phase": "generation", "tokens": 40} | counts
    found.compute.append(written)
    return found


def competing() -> list[Cell]:
    """Dense, curves and a bound (``bits``), and a lossless cell that scores as dense and is called
    a speedup of 1.25."""
    cells = bits()
    dense = cells[0]
    own = made(
        [json.loads(row["outcomes"])["bits_per_byte,none"] for row in dense.samples],
        1.25,
        metric="bits_per_byte",
        method="sketch",
    )
    own.provenance["speculates"] = True
    return [*cells, own]


def test_a_cell_says_it_and_older_ones_do_not():
    assert identity_columns(drafting())["lossless"] is True
    assert identity_columns(cell())["lossless"] is False


def test_no_comparison_knows_it():
    cells = competing()
    with_it, without = compared(cells), compared(cells[:-1])
    assert with_it["curves"] == without["curves"]
    assert with_it["equal_flops"] == without["equal_flops"]
    rest = [row for row in with_it["comparison"] if row["method"] != "sketch"]
    # Holm's correction and the front are what they were, too.
    assert rest == without["comparison"]
    (own,) = [row for row in with_it["comparison"] if row["method"] == "sketch"]
    assert (own["verdict"], own["difference"], own["n"]) == ("lossless", 0.0, DOCUMENTS)
    assert not {"pareto", "p", "p_holm", "test"} & set(own)
    # Without that fact it would be on the front: nobody is as good at as few FLOPs.
    cells[-1].provenance["speculates"] = False
    (own,) = [row for row in against_dense(cells) if row["method"] == "sketch"]
    assert own["pareto"] is True


def test_a_comparison_says_what_it_leaves_out(tmp_path, capsys):
    cells = competing()
    for name, own in (("all", cells), ("alone", [cells[0], cells[-1]])):
        for each in own:
            Store(tmp_path / name).write(each)
    left_out = "left out, as lossless: sketch: they write what dense writes"
    assert compare.main([str(tmp_path / "all")]) == 0
    told = capsys.readouterr().out
    assert left_out in told
    assert "nothing to compare" not in told
    assert compare.main([str(tmp_path / "alone")]) == 0
    told = capsys.readouterr().out
    assert "nothing to compare: all methods but dense are lossless\n" + left_out in told
    assert compare.main([str(tmp_path / "all"), "--methods", "sketch"]) == 2
    assert "sketch is lossless, and such are not compared" in capsys.readouterr().err


def test_its_phases_are_no_part_of_its_name(tmp_path):
    """In tables and figures: it has no others."""
    cells = [cell([1] * 12, phases="both"), drafting()]
    write_tables(cells, tmp_path)
    tables = plots.read_tables(tmp_path)
    assert list(tables["leaderboard"]["label"]) == ["dense", "sketch"]
    assert naming.label(identity_columns(cells[1])) == "sketch"


def test_figures_leave_it_out(tmp_path):
    cells = make_cells()
    own = make_cells(methods=1, bounds=0)[1]
    own.identity["method"] = "sketch"
    own.provenance["speculates"] = True
    write_tables([*cells, own], tmp_path)
    table = plots.read_tables(tmp_path)["leaderboard"]
    assert set(points(table, "mean_acc", "block_speedup")["label"]) == {"m0", "m1", "ceiling0"}
    assert "sketch" not in set(retention.gaps(table)["label"])
    # And tables from before there was such a column are drawn as ever.
    assert len(points(table.drop(columns="lossless"), "mean_acc", "block_speedup")) > 4


def rows_of(*cells: Cell):
    return leaderboard(cells)


def test_its_columns_are_sums_over_the_tasks_that_write():
    own = drafting()
    more = {"drafted": 10, "accepted": 10, "verifications": 3, "written": 11}
    own.compute.append(own.compute[1] | {"task": "two"} | more)
    (row,) = rows_of(own)
    assert row["acceptance"] == pytest.approx(35 / 50)
    assert row["tokens_per_verify"] == pytest.approx(47 / 15)
    assert lossless.shares(row["acceptance_by_task"]) == {"one": 0.625, "two": 1.0}
    assert row["total_speedup"] < row["block_speedup"] == 1.0
    assert "acceptance" not in rows_of(cell())[0]


def test_times_of_drawn_tokens_and_what_was_predicted_stand_beside():
    own = drafting()
    base = {"phase": "decode", "batch": 1, "length": 8, "new_tokens": 4, "mode": "eager"}
    own.timing = [
        base | {"wall_speedup": 0.9, "temperature": 0.0, "predicted_speedup": 1.1},
        base | {"wall_speedup": 0.7, "temperature": 1.0, "predicted_speedup": 1.0}
        | {"wall_speedup_low": 0.6, "wall_speedup_high": 0.8},
        base | {"wall_speedup": 3.0, "temperature": 1.0, "batch": 8},
    ]  # fmt: skip
    (row,) = rows_of(own)
    assert row["wall_drawn_speedup"] == 0.7
    assert (row["wall_drawn_low"], row["wall_drawn_high"]) == (0.6, 0.8)
    assert row["predicted_speedup"] == 1.1


def test_all_times_of_a_row_are_of_one_shape():
    """Of that which was timed in most modes, though it is shorter; none of draws alone."""
    own = drafting()
    base = {"phase": "decode", "batch": 1, "length": 512, "mode": "eager", "temperature": 0.0}
    of_draws = {"temperature": 1.0, "suspect": True, "load_average": 9.0, "cores": 2, "threads": 1}
    own.timing = [
        base | {"wall_speedup": 0.7, "predicted_speedup": 1.1},
        base | {"wall_speedup": 0.6, "mode": "graphs"},
        base | {"wall_speedup": 0.5, "repeats": 3} | of_draws,
        base | {"wall_speedup": 0.8, "predicted_speedup": 1.2, "length": 2048},
        base | {"wall_speedup": 0.9, "length": 2048} | of_draws,
        base | {"wall_speedup": 0.4, "length": 4096} | of_draws,
    ]
    (row,) = rows_of(own)
    assert (row["wall_batch"], row["wall_length"]) == (1, 512)
    assert (row["wall_decode_speedup"], row["predicted_speedup"]) == (0.7, 1.1)
    assert row["wall_drawn_speedup"] == 0.5
    # What is doubtful of drawn tokens says so, there alone.
    assert (row["wall_suspect"], row["wall_loaded"], row["wall_repeats"]) == ("drawn", "drawn", 3)
    schema.validate("leaderboard.csv", [row])
    headings, (line,) = lossless.table(shown.board_rows([row])[0])
    told = dict(zip(headings, line, strict=True))
    assert told["decode, drawn"] == "0.50x suspect, no interval, loaded"
    assert "suspect" not in told["decode (eager)"]


def test_the_caption_tells_of_what_stands_there():
    headings, lines = lossless.table(shown.board_rows(rows_of(drafting()))[0])
    assert "Decode" not in lossless.caption(headings, lines)
    told = lossless.caption(["decode", "decode, drawn"], [["0.5x suspect", ""]])
    assert "Decode: " in told
    assert "Drawn: against dense that draws" in told
    assert "suspect: faster" in told
    assert "noisy" not in told


def test_seeds_are_averaged_by_task():
    one = drafting(seed=0)
    other = drafting(seed=1, counts=COUNTS | {"accepted": 15})
    found = seeds.together(rows_of(one, other))
    assert lossless.shares(found["acceptance_by_task"]) == {"one": pytest.approx(0.5)}
    assert found["acceptance"] == pytest.approx(0.5)


def test_the_terminal_has_a_table_of_its_own(capsys):
    rows = rows_of(cell([1] * 12), cell([1, 0] * 6, method="cut", target_speedup=2.0), drafting())
    console.show_leaderboard(rows)
    before, title, after = capsys.readouterr().out.partition(lossless.TITLE)
    assert title
    assert "sketch" not in before
    assert "cut" not in after
    assert re.search(r"sketch\S*\s+2x\s+62\.5%\s+3\.00\s+0\.80x", after)
    console.show_leaderboard(rows[:2])
    assert lossless.TITLE not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["latex", "markdown"])
def test_what_is_written_has_it_apart(form):
    rows = rows_of(cell([1] * 12), drafting())
    made, alone = (shown_formats.written(form, each) for each in (rows, rows[:1]))
    assert made.startswith(alone)
    assert "sketch" in made[len(alone) :]
    assert "sketch" not in alone


def test_a_csv_says_which_rows_are_lossless():
    made = shown_formats.written("csv", rows_of(cell([1] * 12), drafting())).splitlines()
    place = made[0].split(",").index("lossless")
    assert [line.split(",")[place] for line in made[1:]] == ["FALSE", "TRUE"]


def test_the_pages_have_it_in_a_section_of_its_own():
    cells = [cell([1] * 12), drafting()]
    found = board(cells, leaderboard(cells))
    assert [entry["method"] for entry in found["entries"]] == ["dense"]
    text = markdown(found)
    before, _, after = text.partition(f"## {lossless.TITLE}")
    assert "sketch" not in before
    assert re.search(r"\| sketch\S* \| 2x \| 62\.5% \| 3\.00 \| 0\.80x \|", after)
    assert "1 of lossless methods" in before
    page = html(found)
    assert page.index('id="lossless"') > page.index('id="bounds"')
    assert re.search(r'<th scope="row">sketch\S*</th><td>2x</td><td>62\.5%</td>', page)
    # Where there is none, the page is what it was before there could be one.
    plain = html(board(cells[:1], leaderboard(cells[:1])))
    assert "lossless-title" not in plain
    assert "<!-- lossless -->" not in plain


def test_it_is_last_of_the_rows_that_are_shown():
    bound = cell([1] * 12, method="seer", target_speedup=2.0)
    bound.provenance["uses_labels"] = True
    found, _ = shown.board_rows(rows_of(cell([1] * 12), drafting(target=1.5), bound))
    assert [row["method"] for row in found] == ["dense", "seer", "sketch"]


def test_tables_from_before_are_read_and_verified(tmp_path):
    cells = [cell([1, 0] * 6, phases="both"), cell([1] * 12, method="cut", target_speedup=2.0)]
    write_tables(cells, tmp_path)
    for name in ("leaderboard.csv", "compute.csv"):
        lines = (tmp_path / name).read_text().splitlines()
        place = lines[0].split(",").index("lossless")
        assert place == lines[0].split(",").index("bound") + 1
    frame = schema.read(tmp_path / "leaderboard.csv").drop(columns="lossless")
    old = tmp_path / "old"
    old.mkdir()
    frame.to_csv(old / "leaderboard.csv", index=False)
    assert schema.read(old / "leaderboard.csv")["lossless"].tolist() == [False, False]
    import pandas

    for name in ("samples.parquet", "routing.parquet"):
        pandas.read_parquet(tmp_path / name).drop(columns="lossless").to_parquet(tmp_path / name)
    found = list(checked(tmp_path, cells))
    assert [each.failure for each in found] == [False, False]
    assert all("before there was lossless" in each.what for each in found)


def test_a_cell_from_before_there_were_drafts_is_what_is_computed_today():
    old = cell()
    new = [row | {"draft": 0.0} for row in old.compute]
    assert differences(old, "compute", new, EXACT) == []
    new = [row | {"draft": 3.0} for row in old.compute]
    assert differences(old, "compute", new, EXACT)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"accepted": 41}, "accepted of one"),
        ({"written": 38}, "written of one against what was accepted"),
        ({"verifications": 50, "written": 60}, "written of one against its tokens"),
    ],
)
def test_counts_that_cannot_be_are_found(wrong, told):
    def whats(one):
        return [each.what for each in of_cell(one) if "compute" in each.what]

    own = drafting(tasks=["one"], limit={"one": None})
    assert not [what for what in whats(own) if "accepted" in what or "written" in what]
    own.compute[1] |= wrong
    assert any(told in what for what in whats(own))


def test_it_did_not_miss_its_target():
    own = drafting()
    assert skipped_nothing(own) == ""
    own.provenance["speculates"] = False
    assert "every block" in skipped_nothing(own)


LINE = "sketch,,,Big,{},{},T,wall speedup,1,{},arXiv 1,first,"


def test_a_paper_s_row_may_be_lossless_and_slower_than_dense():
    header = ",".join(published.COLUMNS)

    def parse(*values):
        return published.parse(f"{header}\n{LINE.format(*values)}\n", "a file")

    (row,) = parse(1, "lossless", 0.83)
    assert (row["speedup"], row["value"]) == (1.0, 0.83)
    with pytest.raises(UserError, match="what is lossless has the budget 1, not 1.5"):
        parse(1.5, "lossless", 1.5)
    measured = {"method": "sketch", "parameters": "", "phases": "generation", "block_speedup": 1.0}
    assert published.nearest(row, [measured]) is None
    assert published.nearest(row | {"unit_of_speedup": "layers"}, [measured]) is measured


def test_the_table_of_leaderboards_holds_it():
    frame = schema.validate("leaderboard.csv", rows_of(cell([1] * 12), drafting()))
    assert frame["lossless"].tolist() == [False, True]
    made = as_csv(rows_of(drafting()), schema.TABLES["leaderboard.csv"].own).splitlines()
    assert "one=0.6250" in made[1]
    assert set(identity()) <= set(made[0].split(","))


def test_no_claim_about_flops_is_judged_by_it(monkeypatch, tmp_path):
    from importlib.metadata import EntryPoint

    from dyndepth.common import registry
    from dyndepth.studies import verdicts
    from dyndepth.studies.study import Claim, Pick

    places = {"dense": "fakes:Dense", "steps": "fakes:Steps", "drafting": "toys:Drafting"}
    entries = {name: EntryPoint(name, place, registry.GROUP) for name, place in places.items()}
    monkeypatch.setattr(registry, "methods", lambda: entries)
    sketch, cut = Pick("drafting"), Pick("steps")
    shared = {"name": "c", "text": "t", "source": "s", "metrics": (("one", "acc"),)}
    for a, b in ((sketch, cut), (cut, sketch)):
        claim = Claim(a=a, b=(b,), kind="equal_flops", **shared)
        ((row, why),) = verdicts._methods(claim, [cell()], "both", tmp_path)
        assert why.startswith("drafting drafts what the whole model verifies")
    (row,) = verdicts._reached(Claim(a=sketch, b=(), kind="reach", **shared), [cell()], "both")
    assert (row["verdict"], row["a"]) == ("not comparable", "drafting (lossless)")
