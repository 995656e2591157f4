"""Means, retained fractions, intervals; which rows may stand in one table."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from cells import cell, identity

from dyndepth.cells.cell import Cell
from dyndepth.cells.merging import merged
from dyndepth.cells.store import Store
from dyndepth.common.errors import UserError
from dyndepth.leaderboard import main
from dyndepth.results.console import show_leaderboard
from dyndepth.results.leaderboard import leaderboard, speedups, wall_speedups
from dyndepth.results.leaderboard_pages import NAMES, board, markdown
from dyndepth.results.shown import folders
from dyndepth.results.shown_formats import written
from dyndepth.results.statistics.intervals import expected_margin, mean_score, retained


def _outcomes(values):
    return {"task": {str(index): float(value) for index, value in enumerate(values)}}


def test_interval_of_a_mean_matches_the_binomial():
    values = np.random.default_rng(1).random(400) < 0.7
    interval = mean_score(_outcomes(values))
    half = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.value == pytest.approx(half, rel=0.12)
    assert interval.value - interval.low == pytest.approx(half, rel=0.12)


def test_tasks_weigh_the_same_whatever_their_size():
    mean = mean_score({"small": {"0": 1.0, "1": 1.0}, "large": {str(i): 0.0 for i in range(50)}})
    assert mean.value == 0.5


def test_paired_interval_knows_that_documents_are_shared():
    generator = np.random.default_rng(2)
    dense = (generator.random(300) < 0.6).astype(float)
    method = dense.copy()
    method[:10] = 1 - method[:10]
    paired = retained(_outcomes(method), _outcomes(dense))
    assert paired.value == pytest.approx(method.mean() / dense.mean())
    assert paired.low <= paired.value <= paired.high
    # Unpaired, the ratio of two accuracies at n=300 has a half-width of about 0.13.
    assert paired.high - paired.low < 0.1
    same = retained(_outcomes(dense), _outcomes(dense))
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


def test_retained_uses_shared_documents_only():
    dense = {"task": {"a": 1.0, "b": 1.0}}
    assert retained({"task": {"b": 0.0, "z": 1.0}}, dense).value == 0.0
    assert retained({"other": {"b": 1.0}}, dense) is None
    assert retained({"task": {"a": 1.0}}, {"task": {"a": 0.0}}) is None


def test_dense_without_recovery_is_the_yardstick():
    recovered = cell([1, 1, 1, 1], recovery="lora(rank=4)")
    rows = leaderboard([recovered, cell([1, 0, 1, 0])])
    assert [row["retained"] for row in rows] == [2.0, 1.0]
    assert leaderboard([recovered])[0].get("retained") is None


def test_margin_is_the_one_quoted_for_accuracies():
    assert 100 * expected_margin(140) == pytest.approx(8.3, abs=0.05)
    assert 100 * expected_margin(1400) == pytest.approx(2.6, abs=0.05)


def test_rows_are_compared_with_dense_of_their_own_setting():
    cells = [
        cell([1, 1, 1, 1]),
        cell([0, 0, 1, 1], dtype="bfloat16"),
        cell([1, 1, 0, 0], method="m"),
        cell([1, 1, 0, 0], method="m", dtype="bfloat16"),
        cell([1, 1, 0, 0], method="m", dtype="float16"),
    ]
    assert [row.get("retained") for row in leaderboard(cells)] == [1.0, 1.0, 0.5, 1.0, None]


def test_accuracy_alone_makes_the_mean():
    one = cell([1, 0, 1, 0])
    for row in one.samples:
        row["outcomes"] = json.dumps({"acc_norm,none": 1.0} | json.loads(row["outcomes"]))
    one.samples.append({"task": "text", "doc_id": 0, "outcomes": '{"bits_per_byte,none": 1.0}'})
    one.accuracy.append(one.accuracy[0] | {"metric": "acc_norm", "value": 1.0})
    bits = {"task": "text", "metric": "bits_per_byte", "value": 1.25}
    one.accuracy.append(one.accuracy[0] | bits)
    (row,) = leaderboard([one])
    assert row["mean_acc"] == 0.5
    assert row["documents"] == 4
    assert row["bits_per_byte"] == 1.25
    assert row["rouge_l"] is None


def test_speedup_over_tasks_weighs_tokens():
    one = cell()
    first = one.compute[0] | {"tokens": 100, "block_flops_per_token": 1.0, "block_speedup": 2.0}
    second = first | {"tokens": 300, "block_speedup": 1.0}
    one.compute = [first, second, first | {"phase": "prompt", "tokens": 10**6}]
    assert speedups(one)["block_speedup"] == pytest.approx(500 / 400)


def test_wall_speedup_is_that_of_batch_one_at_the_longest_length():
    one = cell()
    base = {"phase": "prefill", "wall_speedup_low": 1.0, "wall_speedup_high": 2.0}
    one.timing = [
        base | {"batch": 8, "length": 64, "wall_speedup": 1.1},
        base | {"batch": 1, "length": 64, "wall_speedup": 1.2},
        base | {"batch": 1, "length": 512, "wall_speedup": 1.3},
    ]
    assert wall_speedups(one) == {
        "wall_prefill_speedup": 1.3,
        "wall_prefill_low": 1.0,
        "wall_prefill_high": 2.0,
    }


def _walls(*timed: tuple[str, str, int, int, float]) -> dict:
    one = cell()
    one.timing = [
        {"phase": phase, "mode": mode, "batch": batch, "length": length, "wall_speedup": value}
        | {"suspect": value > 5}
        for phase, mode, batch, length, value in timed
    ]
    (row,) = leaderboard([one])
    keys = ("prefill", "decode", "decode_graphs")
    walls = [row.get(f"wall_{key}_speedup") for key in keys]
    return {"walls": walls, "suspect": row["wall_suspect"]} | {
        key: row.get(f"wall_{key}") for key in ("batch", "length")
    }


def test_all_wall_speedups_of_a_cell_are_of_one_shape():
    both = [("prefill", "eager", 1, 512, 1.1), ("decode", "eager", 1, 512, 1.2)]
    # A longer one without steps stands for neither phase.
    longer = ("prefill", "eager", 1, 2048, 9.0)
    expected = {"walls": [1.1, 1.2, None], "suspect": None, "batch": 1, "length": 512}
    for timed in ([*both, longer], [longer, *both]):
        assert _walls(*timed) == expected
    # Another mode that reached less far: the shape that both have.
    far = [("prefill", "eager", 1, 4096, 1.3), ("decode", "eager", 1, 4096, 9.0)]
    graphs = ("decode", "graphs", 1, 512, 1.5)
    assert _walls(*both, *far, graphs) == expected | {"walls": [1.1, 1.2, 1.5]}
    # None in common: the longest of as many, and the other column is empty.
    assert _walls(*far, graphs) == {
        "walls": [1.3, 9.0, None],
        "suspect": "decode",
        "batch": 1,
        "length": 4096,
    }
    # Of a larger batch nothing, however much was timed there.
    larger = [(phase, mode, 8, 512, 1.9) for phase, mode, *_ in (*both, graphs)]
    assert _walls(*larger, longer) == {
        "walls": [9.0, None, None],
        "suspect": "prefill",
        "batch": 1,
        "length": 2048,
    }


def test_a_prefill_beside_graphs_is_in_no_column():
    found = _walls(("prefill", "graphs", 1, 4096, 1.4), ("decode", "graphs", 1, 512, 1.5))
    assert found["walls"] == [None, None, 1.5]
    assert found["length"] == 512


def test_what_was_timed_stands_beside_the_wall_speedups():
    one = cell()
    base = {"phase": "decode", "wall_speedup": 1.1}
    one.timing = [base | {"batch": 8, "length": 64}, base | {"batch": 2, "length": 32}]
    (row,) = leaderboard([one])
    assert (row["wall_batch"], row["wall_length"]) == (2, 32)
    assert "wall_batch" not in leaderboard([cell()])[0]


def test_scores_that_are_no_accuracies_have_intervals_from_their_errors():
    one = cell([1, 0] * 5)
    base = one.accuracy[0] | {"metric": "bits_per_byte"}
    one.accuracy += [base | {"task": "a", "value": 1.0, "stderr": 0.3}]
    one.accuracy += [base | {"task": "b", "value": 2.0, "stderr": 0.4}]
    (row,) = leaderboard([one])
    assert row["bits_per_byte"] == 1.5
    # The error of a mean of two independent values: half the root of the summed squares, 0.25.
    assert row["bits_per_byte_low"] == pytest.approx(1.5 - 1.96 * 0.25)
    assert row["bits_per_byte_high"] == pytest.approx(1.5 + 1.96 * 0.25)
    one.accuracy[-1]["stderr"] = None
    assert leaderboard([one])[0].get("bits_per_byte_low") is None


def test_failed_cell_has_a_row_and_an_oracle_is_a_bound(capsys):
    failed = Cell(identity(method="m"), status="error", error="ValueError: no")
    oracle = cell([1, 1, 1, 1], method="o")
    oracle.provenance["uses_labels"] = True
    rows = leaderboard([cell(), failed, oracle])
    assert [row["status"] for row in rows] == ["done", "error", "done"]
    assert [row["bound"] for row in rows] == [False, False, True]
    assert rows[1].get("mean_acc") is None


def test_runs_are_merged_and_a_finished_cell_beats_a_failed_one(tmp_path, capsys):
    Store(tmp_path / "a").write(cell())
    Store(tmp_path / "a").write(Cell(identity(method="m"), status="error", error="no"))
    Store(tmp_path / "b").write(cell([0, 0, 1, 1], method="m"))
    output = tmp_path / "board"
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*runs, "--output_path", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == sorted(NAMES)
    with (output / "leaderboard.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [(row["method"], row["status"]) for row in written] == [("dense", "done"), ("m", "done")]
    assert float(written[1]["retained"]) == pytest.approx(2 / 3)
    assert "dense" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["task_version", "data"])
def test_rows_that_are_not_comparable_are_refused(tmp_path, capsys, what):
    one, other = cell(), cell(method="m")
    if what == "data":
        other.identity["data_fingerprint"] = "new"
    else:
        other.accuracy[0]["task_version"] = 2.0
    Store(tmp_path / "a").write(one)
    Store(tmp_path / "b").write(other)
    output = tmp_path / "board"
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--output_path", str(output)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "separate leaderboards" in captured.err
    assert not output.exists()


def _run(path, *cells):
    for one in cells:
        Store(path).write(one)
    return path


def _timed(level: str, speedup: float, **changes) -> Cell:
    one = cell(**changes)
    base = {"phase": "decode", "batch": 1, "length": 8, "wall_speedup": speedup}
    one.timing, one.timing_level = [base], level
    return one


def test_what_a_cell_knows_decides_and_not_which_run_comes_first(tmp_path):
    plain = _run(tmp_path / "a", cell())
    quick = _run(tmp_path / "b", _timed("quick", 1.2))
    full = _run(tmp_path / "c", _timed("full", 1.3))
    again = _run(tmp_path / "d", _timed("full", 1.4))
    broken = _timed("off", 1.0)
    broken.status, broken.error, broken.timing = "error", "clock stopped", []
    failed = _run(tmp_path / "e", broken)
    for runs, speedup in (
        ([plain, quick], 1.2),
        ([quick, full], 1.3),
        ([failed, quick, plain], 1.2),
        ([full, again], None),
    ):
        found = [merged(order) for order in (runs, runs[::-1])]
        assert len(found[0]) == 1
        assert found[0] == found[1]
        speedups = [row["wall_speedup"] for row in found[0][0].timing]
        assert speedup is None or speedups == [speedup]
    assert merged([failed, plain])[0].status == "done"


@pytest.mark.parametrize("table", ["accuracy", "samples"])
def test_runs_that_disagree_on_a_cell_s_scores_are_refused(tmp_path, capsys, table):
    other = cell()
    if table == "accuracy":
        other.accuracy[0]["value"] = 0.5
    else:
        other.samples[2]["outcomes"] = '{"acc,none": 0}'
    runs = [str(_run(tmp_path / "a", cell())), str(_run(tmp_path / "b", other))]
    for order in (runs, runs[::-1]):
        assert main(order) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert all(run in said for run in runs)
        assert f"in its {table}, row one/" in said


def test_rounding_is_no_disagreement(tmp_path):
    one, other = cell(), cell()
    one.samples[0]["loglikelihoods"] = "[-10.0, -20.0]"
    other.samples[0]["loglikelihoods"] = "[-10.00001, -20.0]"
    runs = [_run(tmp_path / "a", one), _run(tmp_path / "b", other)]
    assert len(merged(runs)) == 1
    assert merged(runs) == merged(runs[::-1])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_an_outcome_that_is_no_number_names_its_cell(tmp_path, capsys, value):
    one = cell()
    one.samples[1]["outcomes"] = f'{{"acc,none": {value}}}'
    run = _run(tmp_path / "a", one)
    assert main([str(run), "--output_path", str(tmp_path / "board")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"cell {one.key} (dense) can't be read: row 2 of its samples has outcomes" in said
    assert not (tmp_path / "board").exists()


def test_an_infinite_perplexity_is_read(tmp_path):
    one = cell()
    one.samples[1]["outcomes"] = '{"acc,none": 1.0, "perplexity,none": Infinity}'
    assert len(merged([_run(tmp_path / "a", one)])) == 1


def test_printed_rows_of_several_settings_say_which_is_theirs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    control = cell(phases="both")
    control.provenance["paper"] = "control"
    show_leaderboard(leaderboard([control, cell(method="m")]))
    alone = capsys.readouterr().out
    assert "run" not in alone.split()
    assert "dense (control)" in alone
    both = {"phases": "both"}
    cells = [cell(**both), *(cell(method=m, num_fewshot=5, **both) for m in ("dense", "m"))]
    runs = {cells[0].key: ["runs/a"], cells[1].key: ["runs/b"], cells[2].key: ["runs/b"]}
    show_leaderboard(leaderboard(cells), runs=runs)
    told = capsys.readouterr().out
    assert [line.split()[:2] for line in told.splitlines() if line[:2] in ("A ", "B ")] == [
        ["A", "dense"],
        ["B", "dense"],
        ["B", "m"],
    ]
    assert "A: runs/a, num_fewshot=x" in told
    assert "B: runs/b, num_fewshot=5" in told


def test_letters_follow_the_order_of_the_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    for name, shots in (("five", 5), ("none", 0)):
        for method in ("dense", "m"):
            Store(tmp_path / name).write(cell(method=method, num_fewshot=shots))
    one, other = str(tmp_path / "five"), str(tmp_path / "none")
    for runs, shots in (((one, other), ("5", "0")), ((other, one), ("0", "5"))):
        assert main([*runs]) == 0
        told = capsys.readouterr().out
        for letter, run, count in zip("AB", runs, shots, strict=True):
            assert f"{letter}: {run}, num_fewshot={count}" in told.splitlines()
        for form in ("latex", "markdown"):
            assert main([*runs, "--format", form]) == 0
            told = capsys.readouterr().out.replace("\\_", "_")
            assert str(tmp_path) not in told
            assert f"A: {Path(runs[0]).name}, num_fewshot={shots[0]}" in told


def test_runs_of_one_folder_name_are_told_apart():
    runs = {"1": ["/tmp/x/run"], "2": ["/tmp/y/run", "/tmp/x/run"]}
    assert folders(runs) == {"1": ["x/run"], "2": ["y/run", "x/run"]}


def test_one_sequence_is_no_sequences(capsys):
    one = cell([1, 0] * 10)
    one.timing = [{"phase": "decode", "batch": 1, "length": 1, "wall_speedup": 1.2}]
    for form in ("latex", "markdown"):
        assert "in pairs with dense: 1 sequence of 1 token." in written(form, leaderboard([one]))


def test_a_missing_interval_has_its_reason(capsys):
    cells = [cell([1, 0] * 10), cell([1, 0] * 10, method="m")]
    for one in cells:
        rouge = {"task": "two", "metric": "rougeL", "value": 0.5, "stderr": 0.1, "n": 4}
        one.accuracy.append(one.accuracy[0] | rouge)
    rows = leaderboard(cells)
    said = "fewer than 10 documents a task: no intervals of ROUGE-L"
    show_leaderboard(rows)
    assert said in " ".join(capsys.readouterr().out.split())
    for form in ("latex", "markdown"):
        assert said in written(form, rows)
        assert said not in written(form, rows, keys=["method", "mean_acc"])
    assert said[1:] in markdown(board(cells, rows))
    plain = [cell([1, 0] * 10)]
    assert "fewer than" not in markdown(board(plain, leaderboard(plain)))


def test_a_share_s_interval_ends_at_one():
    one = cell([1, 0] * 5)
    one.accuracy.append(one.accuracy[0] | {"metric": "rougeL", "value": 0.99, "stderr": 0.1})
    assert leaderboard([one])[0]["rouge_l_high"] == 1.0


def test_few_documents_have_no_interval_and_no_share_of_dense(capsys):
    cells = [cell([1] * 9), cell([1] * 9, method="m")]
    for one in cells:
        bits = {"metric": "bits_per_byte", "value": 1.2, "stderr": 0.1, "higher_is_better": False}
        one.accuracy.append(one.accuracy[0] | bits)
    rows = leaderboard(cells)
    ends = [f"{key}_{end}" for key in ("mean_acc", "retained", "bits_per_byte", "rouge_l")
            for end in ("low", "high")]  # fmt: skip
    assert all(row.get(end) is None for row in rows for end in ends)
    show_leaderboard(rows)
    printed = capsys.readouterr().out
    assert "[" not in printed
    assert "100" not in printed
    assert "fewer than 10 documents a task: no intervals" in printed
    found = board(cells, rows)
    assert all("retained" not in entry["scores"] for entry in found["entries"])
    assert all(
        spread[1:] == [None, None] for e in found["entries"] for spread in e["scores"].values()
    )
    enough = leaderboard([cell([1] * 10)])[0]
    assert enough["mean_acc_low"] == enough["retained_low"] == 1.0


def test_rows_stand_by_target_and_then_the_best_first(capsys):
    cells = [cell([1, 0] * 10)]
    for target, method, bits in (
        (2.0, "m", 2.0),
        (1.5, "m", 1.9),
        (1.5, "n", 1.4),
        (1.5, "o", 1.6),
    ):
        one = cell([1, 0] * 10, method=method, target_speedup=target, phases="both")
        base = {"metric": "bits_per_byte", "value": bits, "stderr": 0.1, "higher_is_better": False}
        one.accuracy.append(one.accuracy[0] | base)
        cells.append(one)
    cells[-1].provenance["uses_labels"] = True
    show_leaderboard(leaderboard(cells))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    order = [
        (words[0], next(w for w in words if w[0] in "12")) for words in lines if "1.50x" in words
    ]
    assert order == [
        ("dense(phases=x)", "1x"),
        ("n", "1.5x"),
        ("m", "1.5x"),
        ("m", "2x"),
        ("o", "1.5x"),
    ]


def test_an_accuracy_that_guesses_reach_is_marked(capsys):
    def asked(right):
        one = cell(right)
        for row in one.samples:
            row["loglikelihoods"] = "[-1.0, -2.0]"
        return one

    rows = leaderboard([asked([1, 0] * 10)])
    show_leaderboard(rows)
    printed = capsys.readouterr().out
    assert "~0.500 [" in printed
    assert "~: chance (0.500) is inside" in printed
    assert "| ~0.500 [" in markdown(board([asked([1, 0] * 10)], rows))
    sure = [asked([1] * 20)]
    show_leaderboard(leaderboard(sure))
    assert "~" not in capsys.readouterr().out
    page = markdown(board(sure, leaderboard(sure)))
    assert "~" not in page
    # Neither has what is 100 % of dense in every draw any ends.
    assert "| 1.000 | 100.0 |" in page


def test_seeds_are_one_row(capsys):
    cells = [cell([1, 0] * 10, method="m", seed=seed, phases="both") for seed in (0, 1)]
    show_leaderboard(leaderboard(cells))
    assert capsys.readouterr().out.count("1.50x") == 1


def test_repeats_load_and_doubts_are_in_the_table_and_on_the_pages():
    one = cell([1, 0] * 10)
    times = {"batch": 1, "length": 8, "wall_speedup": 1.2, "wall_speedup_low": 1.19}
    times |= {"wall_speedup_high": 1.21, "cores": 2, "suspect": False}
    one.timing = [
        times | {"phase": "prefill", "repeats": 9, "load_average": 1.5},
        times | {"phase": "decode", "repeats": 30, "load_average": 3.5},
    ]
    rows = leaderboard([one])
    assert {key: rows[0][key] for key in ("wall_repeats", "wall_load", "wall_loaded")} == {
        **{"wall_repeats": 9, "wall_load": 3.5, "wall_loaded": "decode"}
    }
    found = board([one], rows)
    assert "1.20x [1.19, 1.21] loaded | 9 | 3.5 |" in markdown(found)
    assert found["entries"][0]["noise"] == {"prefill": "", "decode": "loaded"}


def _run_of(tmp_path, capsys, *words):
    run = tmp_path / "run"
    for one in (cell([1, 0] * 10), cell([1, 0] * 10, method="m_n", parameters="a=50%")):
        Store(run).write(one)
    status = main([str(run), *words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_table_for_latex_is_escaped_and_balanced(tmp_path, capsys):
    status, printed, _ = _run_of(tmp_path, capsys, "--format", "latex")
    assert status == 0
    plain = re.sub(r"\\\\|\\[{}]", "", printed)
    assert plain.count("{") == plain.count("}")
    assert printed.count("\\begin") == printed.count("\\end") == 2
    for line in printed.splitlines()[1:]:
        assert not re.search(r"(?<!\\)[_%#]", line), line
    body = printed[printed.index("\\midrule") : printed.index("\\bottomrule")]
    heads = printed[printed.index("\\toprule") :].splitlines()[1].count(" & ")
    rows = [line for line in body.splitlines() if line.endswith("\\\\")]
    assert [line.count(" & ") for line in rows] == [heads] * 2
    assert "m\\_n(a=50\\%" in printed
    assert "Model: tiny" in printed
    assert "Brackets are 95\\% intervals" in printed


def test_columns_are_chosen_by_name_in_every_format(tmp_path, capsys):
    words = ("--columns", "method", "mean_acc")
    for form in ("terminal", "markdown", "csv", "latex"):
        status, printed, _ = _run_of(tmp_path, capsys, "--format", form, *words)
        assert status == 0
        assert "1.50x" not in printed
        assert "0.5" in printed
    _, printed, _ = _run_of(tmp_path, capsys, "--format", "csv", "--columns", "method", "seeds")
    assert {line.rpartition(",")[2] for line in printed.split()[1:]} == {"1"}  # a number, unquoted
    status, _, said = _run_of(tmp_path, capsys, "--columns", "colour")
    assert status == 2
    assert "there is no column 'colour'; --columns takes run, model, method" in said


def test_markdown_and_csv_hold_the_rows(tmp_path, capsys):
    _, printed, _ = _run_of(tmp_path, capsys, "--format", "markdown")
    assert printed.startswith("| method | target | mean acc |")
    _, printed, _ = _run_of(tmp_path, capsys, "--format", "csv")
    rows = list(csv.DictReader(printed.splitlines()))
    assert [row["method"] for row in rows] == ["dense", "m_n"]
    assert float(rows[1]["mean_acc"]) == 0.5


def test_folder_without_cells_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no cells"):
        merged([tmp_path])
