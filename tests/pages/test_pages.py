"""What the pages say is computed: cards, tables' reference, and generated blocks."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import fields
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from dyndepth.cells.identity import LEADING
from dyndepth.common import registry
from dyndepth.common.errors import UserError
from dyndepth.common.registry import method_class, methods
from dyndepth.pages import __main__ as door
from dyndepth.pages import blocks
from dyndepth.pages.blocks import Source, averaged
from dyndepth.pages.cards import card, kind
from dyndepth.pages.markdown import joined, layout, table
from dyndepth.pages.parameters import descriptions, parameters
from dyndepth.results import numbers
from dyndepth.results.numbers import Numbers, spread
from dyndepth.results.schema import TABLES, tables
from dyndepth.results.tables import entry
from dyndepth.studies.study import Study

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path("results/embedded")
COLUMNS = (*LEADING, *TABLES["leaderboard.csv"].own)


def _row(method: str, **values: Any) -> dict[str, str]:
    base = dict.fromkeys(COLUMNS, "") | {"method": method, "model": "embedded", "phases": "both"}
    base |= {
        "recovery": "none",
        "seed": "0",
        "status": "done",
        "bound": "FALSE",
        "dtype": "float32",
    }
    base |= {"target_speedup": "1.5", "block_speedup": "1.5", "total_speedup": "1.4"}
    return base | {key: entry(value) for key, value in values.items()}


def _own(cls: Any) -> list[str]:
    return [f.name for f in fields(cls) if f.name not in ("target_speedup", "seed")]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(buffer.getvalue())


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A repository with a small main run."""
    rows = [
        _row("dense", target_speedup=1, block_speedup=1, total_speedup=1, bits_per_byte=1.25),
        _row("uls", parameters="spacing='even'", bits_per_byte=3.5, seed=1, mean_acc=0.5),
        _row("uls", parameters="spacing='paper'", bits_per_byte=2.5, bits_per_byte_low=2.25)
        | {"bits_per_byte_high": "2.75"},
        _row("uls", parameters="spacing='even'", bits_per_byte=4.5, seed=0, mean_acc=0.25),
        _row("uls", target_speedup=2, bits_per_byte=9.5),
        _row("uls", phases="generation", bits_per_byte=9.5),
        _row("uls", recovery="lora(rank=4)", bits_per_byte=9.5),
        _row("random_skip", status="error", error="no memory", bits_per_byte=""),
        _row("oracle", bound=True, bits_per_byte=1.5),
    ]
    _write(tmp_path / RESULTS / "leaderboard.csv", rows)
    return Source(tmp_path, RESULTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what pages are made of, with its pages made."""
    root = tmp_path_factory.mktemp("made")
    unread = shutil.ignore_patterns("cells", "samples.parquet")
    for folder in ("docs", "results"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=unread)
    shutil.copy(REPOSITORY / "README.md", root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "ROOT", root)
        assert door.main([]) == 0
    return root


@pytest.fixture
def repository(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``made``, and the command at work on it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(door, "ROOT", tmp_path)
    return tmp_path


def _fill(text: str, source: Source) -> str:
    return door.filled(text, Path("page.md"), source)


def test_a_changed_number_is_named_and_written_anew(repository, capsys):
    page = repository / "README.md"
    right = page.read_text()
    assert "| 1.1x | 1.222 |" in right
    page.write_text(right.replace("| 1.1x | 1.222 |", "| 1.1x | 1.122 |"))
    capsys.readouterr()
    assert door.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "README.md is not what the results and the code give; `make docs` writes it anew"
    ]
    assert door.main([]) == 0
    assert page.read_text() == right
    assert door.main(["--check"]) == 0


def test_changed_results_change_the_pages(repository, capsys):
    path = repository / "results" / "skipgpt" / "claims.csv"
    path.write_text(path.read_text().replace("1.221842015", "1.321842015"))
    assert door.main(["--check"]) == 1
    assert "README.md" in capsys.readouterr().out
    assert door.main([]) == 0
    assert "| 1.1x | 1.322 |" in (repository / "README.md").read_text()


def test_a_card_without_a_method_goes(repository, capsys):
    old = repository / "docs" / "methods" / "gone.md"
    old.write_text("# gone\n")
    assert door.main(["--check"]) == 1
    assert "gone.md is of no method" in capsys.readouterr().out
    assert door.main([]) == 0
    assert not old.exists()


def test_the_main_run_may_lie_elsewhere(repository):
    _write(repository / "results" / "other" / "leaderboard.csv", [_row("dense", target_speedup=1)])
    (repository / "results" / "README.md").unlink()  # its findings quote the committed run
    assert door.main(["--results", "results/other"]) == 0
    assert "`results/other/`: 1 cells (0 failed)" in (repository / "README.md").read_text()
    assert "`results/other/leaderboard.csv`" in (repository / "docs/methods/dense.md").read_text()


def test_what_is_no_checkout_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(door, "ROOT", tmp_path)
    assert door.main([]) == 2
    assert "has no docs/" in capsys.readouterr().err


def test_only_what_is_generated_changes(source):
    text = "before 1.5\n<!-- generated: run -->\nold\n<!-- end -->\nafter\n"
    made = _fill(text, source)
    assert made.startswith("before 1.5\n<!-- generated: run -->\n`results/embedded/`: 9 cells (1 f")
    assert made.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in made
    assert _fill(made, source) == made


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<!-- generated: riddle -->\n<!-- end -->", "block 'riddle'; there is methods, run"),
        ("<!-- generated: run -->\nno end", "has no <!-- end -->"),
        ("<!-- generated: run\n[: -->\n<!-- end -->", "are not YAML"),
        ("<!-- generated: run\nwords -->\n<!-- end -->", "must map names to values"),
        ("<!-- generated: study\nfolder: x -->\n<!-- end -->", "needs 'columns' among its options"),
    ],
)
def test_blocks_that_cannot_be_made(source, text, sentence):
    with pytest.raises(UserError, match=sentence):
        _fill(text, source)


def test_without_a_run_the_page_says_how_to_make_one(tmp_path):
    source = Source(tmp_path, RESULTS)
    for name in ("run", "leaderboard", "equal_flops"):
        made = blocks.BLOCKS[name](source, {})
        assert made.startswith("No run is committed in `results/embedded/` yet.")
        assert "`python -m dyndepth.sweep --output_path results/embedded`" in made


def test_leaderboard_rows(source):
    lines = blocks.leaderboard(source, {"target": 1.5}).splitlines()[2:]
    cells = [[entry.strip() for entry in line.strip("|").split("|")] for line in lines]
    assert [(entry[0], entry[1], entry[2], entry[3]) for entry in cells] == [
        ("`dense`", "1", "1.250", ""),
        ("`uls`", "1", "2.500 [2.250, 2.750]", ""),
        ("`uls(spacing=even)`", "2", "4.000", "0.375"),
        ("`oracle` (bound)", "1", "1.500", ""),
    ]
    recovered = blocks.leaderboard(source, {"target": 1.5, "recovered": True})
    assert "`uls + lora`" in recovered
    assert "9.500" in blocks.leaderboard(source, {"target": 1.5, "phases": "generation"})


def test_seeds_are_averaged_and_intervals_widened():
    rows = [
        _row("uls", seed=0, mean_acc=0.2, mean_acc_low=0.1, mean_acc_high=0.3),
        _row("uls", seed=1, mean_acc=0.4, mean_acc_low=0.2, mean_acc_high=0.6),
    ]
    found = averaged(rows)
    ends = [float(found[key]) for key in ("mean_acc", "mean_acc_low", "mean_acc_high")]
    assert ends == pytest.approx([0.3, 0.1, 0.6])
    assert found["method"] == "uls"


def test_equal_budgets_are_sorted_best_first_and_bounds_last(source):
    def row(method: str, budget: float, value: float, **more: Any) -> dict[str, str]:
        base = {"method": method, "parameters": "", "phases": "both", "recovery": "none"}
        base |= {"flops": "block"}
        base |= {"bound": "FALSE", "task": "t", "metric": "m", "higher_is_better": "TRUE"}
        base |= {"reference_speedup": str(budget), "value": str(value), "low": "", "high": ""}
        return base | {key: entry(value) for key, value in more.items()}

    rows = [
        row("uls", 1.25, 0.5),
        row("uls", 1.5, 0.25, low=0.125, high=0.375),
        row("random_skip", 1.5, 0.75),
        row("oracle", 1.5, 0.875, bound=True),
        row("uls", 1.5, 0.9, task="other"),
        row("uls", 1.5, 0.9, recovery="lora(rank=4)"),
        row("uls", 1.5, 0.9, flops="total"),
    ]
    _write(source.root / RESULTS / "equal_flops.csv", rows)
    lines = blocks.equal_flops(source, {"task": "t", "metric": "m"}).splitlines()
    assert lines[0] == "| method | 1.25x | 1.5x |"
    assert lines[2:] == [
        "| `random_skip` |  | 0.750 |",
        "| `uls` | 0.500 | 0.250 [0.125, 0.375] |",
        "| `oracle` (bound) |  | 0.875 |",
    ]


def test_a_study_column_that_nothing_compares_is_refused(repository):
    options = {"folder": "results/skipgpt", "task": "wikipedia_bpb", "metric": "bits_per_byte"}
    with pytest.raises(UserError, match="compares no 'sleep'"):
        blocks.study(Source(repository, RESULTS), options | {"columns": {"nap": "sleep"}})


def test_lines_of_a_bench_are_told_with_what_the_flops_allow(tmp_path):
    options = {"file": "lines.json", "works": {"mask_50_evicted": "evicted"}}
    source = Source(tmp_path, RESULTS)
    assert "No measurement of it is committed" in blocks.bench(source, options)
    line = {"speedup": 2.204, "low": 2.1, "high": 2.31, "suspect": False, "flop_ideal": 2.5}
    about = {"device_name": "a processor", "threads": 2, "repeats": 9}
    kept = {"about": about, "bench": {"mask_50_evicted/prefill_1x2048/float32": line}}
    (tmp_path / "lines.json").write_text(json.dumps(kept))
    found = blocks.bench(source, options)
    assert "| evicted | prefill of 1x2048, float32 | 2.20x [2.10, 2.31] | 2.50x |" in found
    assert found.endswith("a processor, 2 threads, 9 rounds.")


def test_verdicts_are_counted(repository):
    made = blocks.verdicts(Source(repository, RESULTS), {"folder": "results/skipgpt"})
    rows = numbers.read(repository / "results" / "skipgpt" / "claims.csv")
    better = sum(row["claim"] == "tokens" and row["verdict"] == "better" for row in rows)
    assert f"| better: {better}, no difference shown: " in made
    assert len(made.splitlines()) == 2 + len({row["claim"] for row in rows})


def test_the_bench_speaks_once_it_was_kept(source):
    options = {"file": "results/bench/routes.json"}
    path = source.root / options["file"]
    assert "No measurement of it is committed" in blocks.routes(source, options)
    line = {"ratio": 0.5, "low": 0.25, "high": 0.75, "computed": 0.625}
    path.parent.mkdir(parents=True)
    path.write_text("threads 1\n" + json.dumps({"routes": {"routes/both/float32": line}}) + "\n")
    assert "`routes/both/float32`: 0.50 [0.25, 0.75] of" in blocks.routes(source, options)
    path.write_text("[]\n")
    with pytest.raises(UserError, match="does not end in the JSON line"):
        blocks.routes(source, options)


@pytest.mark.parametrize("cls", blocks.method_classes(), ids=lambda cls: cls.name)
def test_cards_hold_parameters_facts_and_text(cls):
    made = card(cls, [], [], "nothing measured")
    for parameter in _own(cls):
        assert f"| `{parameter}` |" in made
    for section in ("**Idea:**", "**Rule:**", "**Paper", "**Deviations:**", "KV policy"):
        assert section in made
    assert "``" not in made.replace("```", "")
    assert f"| sees the answers | {'yes: a bound' if cls.uses_labels else 'no'} |" in made
    assert f"| kind | {'bound' if cls.uses_labels else kind(cls)} |" in made


def test_every_parameter_is_described():
    for cls in blocks.method_classes():
        assert set(_own(cls)) <= set(descriptions(cls)), cls.name


def test_cards_show_measured_and_published_values():
    cls = method_class("uls")
    measured = [
        _row("uls", mean_acc=0.5, mean_acc_low=0.4, mean_acc_high=0.6)
        | {"retained": "0.9", "retained_low": "0.8", "retained_high": "1.1"},
        _row(
            "uls", parameters="spacing='even'", target_speedup=2, status="error", error="no memory"
        ),
    ]
    reported = [
        {"method": "uls", "parameters": "", "model": "Large-7B", "speedup": 1.6, "task": "talk"}
        | {"unit_of_speedup": "layers", "metric": "BLEU", "dense_value": 20.5, "value": 19.25}
        | {"source": "table 9", "hand": "second", "note": "read off a figure"}
    ]
    made = card(cls, measured, reported, "From the run.")
    assert "0.500 [0.400, 0.600]" in made
    assert "error: no memory" in made
    assert "1 of 2 cells of the main run finished; measured on embedded." in made
    assert "The published values are of Large-7B" in made
    assert "| Large-7B | 1.6x (layers) | talk, BLEU | 20.5 | 19.25 |" in made
    assert "1.50x on embedded, 0.90 [0.80, 1.10] of dense's accuracy" in made
    assert "table 9. read off a figure" in made


def test_methods_of_others_have_no_page_here(monkeypatch):
    known = methods() | {"toy": EntryPoint("toy", "toys:Toy", registry.GROUP)}
    monkeypatch.setattr(registry, "methods", lambda: known)
    assert "toy" not in {cls.name for cls in blocks.method_classes()}


def test_a_parameter_table_of_none():
    assert parameters(method_class("dense")).startswith("None beside")


def test_all_columns_of_all_tables_stand_in_the_reference():
    made = door.table_reference()
    for name, described in tables().items():
        section = made.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for column in set(described.columns) - set(LEADING):
            assert f"| `{column}` | {described.columns[column].dtype} |" in section
    leading = made.partition("\n## ")[2].partition("\n## ")[0]
    assert all(f"| `{column}` |" in leading for column in LEADING)


def test_docstrings_as_markdown():
    text = (
        "Idea: skip ``a | b`` and\n"
        "go on < 2.\n"
        "KV policy (all): drop.\n"
        "Rule: with x,\n"
        "    run iff x >= 1,\n"
        "    else not;\n"
        "both hold.\n"
        "    ``one``: the first\n"
        "        of two.\n"
        "    ``two``: the other."
    )
    assert layout(text).split("\n\n") == [
        "**Idea:** skip `a | b` and go on &lt; 2.",
        "**KV policy (all):** drop.",
        "**Rule:** with x,",
        "```text\nrun iff x >= 1,\nelse not;\n```",
        "both hold.",
        "- `one`: the first of two.",
        "- `two`: the other.",
    ]


def test_texts():
    assert table(("a",), [("x|y\nz",)]) == "| a |\n| --- |\n| x\\|y z |"
    assert joined(["a", "b", "a", "c"]) == "a, b and c"
    assert joined([]) == ""
    assert spread({"v": "1", "l": "", "h": ""}, "v", "l", "h") == "1.000"
    assert spread({"v": ""}, "v", "l", "h") == ""


class TestFindings:
    @pytest.fixture
    def source(self, tmp_path) -> Source:
        rows = [
            _row("dense", target_speedup=1, bits_per_byte=1.25),
            _row("uls", mean_acc=0.4, mean_acc_low=0.3, mean_acc_high=0.5),
            _row("uls", seed=1, target_speedup=2, mean_acc=0.2),
            _row("uls", seed=2, target_speedup=2, mean_acc=0.2),
        ]
        _write(tmp_path / RESULTS / "leaderboard.csv", rows)
        return Source(tmp_path, RESULTS)

    @pytest.fixture
    def told(self, monkeypatch):
        """Makes ``findings`` those of every study that is asked for."""

        def tell(findings: Any) -> None:
            study = Study("any", "Any", (), (), {}, findings)
            monkeypatch.setattr("dyndepth.studies.study.load_study", lambda name: study)

        return tell

    def test_quote_rows_with_their_intervals(self, source, told):
        def findings(numbers):
            accuracy = numbers.of(
                "leaderboard", "mean_acc", digits=2, label="uls", target_speedup=1.5
            )
            bits = numbers.of("leaderboard", "bits_per_byte", label="dense")
            yield f"""
                It has {accuracy}, dense {bits},
                of {numbers.count("leaderboard", method="dense")} rows.
            """
            yield "No numbers."

        told(findings)
        assert blocks.findings(source, {"study": "any"}) == (
            "- It has 0.40 [0.30, 0.50], dense 1.250, of 1 rows.\n- No numbers."
        )

    @pytest.mark.parametrize(
        ("show", "where", "said"),
        [
            ("mean_acc", {"label": "uls", "target_speedup": 2}, "has 2 rows with"),
            ("mean_acc", {"label": "none", "target_speedup": 1.5}, "has 0 rows with"),
            ("mean_acc", {"label": "uls", "no_column": 1.5}, "has 0 rows with"),
            (
                "bits_per_byte",
                {"label": "uls", "target_speedup": 1.5},
                "results/embedded/leaderboard.csv has no bits_per_byte where",
            ),
        ],
    )
    def test_a_value_that_is_not_one_is_refused(self, source, told, show, where, said):
        def findings(numbers):
            yield numbers.of("leaderboard", show, **where)

        told(findings)
        with pytest.raises(UserError, match=said):
            blocks.findings(source, {"study": "any"})

    def test_a_table_that_is_not_there_has_no_rows(self, source):
        own = Numbers(source.root, source.results)
        assert own.count("timing") == 0
        with pytest.raises(UserError, match="results/other/timing.csv has 0 rows"):
            own.within("results/other").of("timing", "wall_speedup")

    def test_block_flops_are_quoted_unless_told_otherwise(self, source):
        rows = [
            _row("uls", reference_speedup=1.5, value=3, low=2, high=4) | {"flops": "block"},
            _row("uls", reference_speedup=1.5, value=5, low="", high="") | {"flops": "total"},
        ]
        _write(source.root / RESULTS / "equal_flops.csv", rows)
        own = Numbers(source.root, source.results)
        chosen = {"label": "uls", "reference_speedup": 1.5}
        assert own.of("equal_flops", "value", **chosen) == "3.000 [2.000, 4.000]"
        assert own.of("equal_flops", "value", flops="total", **chosen) == "5.000"
        assert own.count("equal_flops", **chosen) == 1
        assert own.count("equal_flops", label="uls", reference_speedup=1.25) == 0

    def test_without_a_run_say_how_to_make_one(self, tmp_path):
        source = Source(tmp_path, RESULTS)
        said = blocks.findings(source, {"study": "embedded"})
        assert said.startswith("No run is committed")
        assert blocks.dense_by_run(source, {"folders": ["results/embedded"]}) == said

    def test_a_study_that_says_nothing_is_told(self, source):
        with pytest.raises(UserError, match="the study 'skipgpt' has no findings"):
            blocks.findings(source, {"study": "skipgpt"})
        with pytest.raises(UserError, match="unknown study 'sleep'"):
            blocks.findings(source, {"study": "sleep"})
        with pytest.raises(UserError, match="needs 'study' among its options"):
            _fill("<!-- generated: findings -->\n<!-- end -->", source)

    def test_dense_in_each_run(self, source):
        dense = _row("dense", bits_per_byte=1.5, bits_per_byte_low=1.25)
        dense |= {"bits_per_byte_high": "1.75"}
        _write(source.root / "results" / "other" / "leaderboard.csv", [dense])
        folders = ["results/embedded", "results/other"]
        assert blocks.dense_by_run(source, {"folders": folders}) == (
            "- Bits per byte of dense: 1.250 in `embedded/`, 1.500 [1.250, 1.750] in `other/`."
        )
        with pytest.raises(UserError, match="results/none/leaderboard.csv has 0 rows"):
            blocks.dense_by_run(source, {"folders": ["results/none"]})

    @pytest.mark.parametrize("folder", ["embedded", "bounds"])
    def test_a_committed_row_that_is_gone_is_told(self, repository, capsys, folder):
        path = repository / "results" / folder / "equal_flops.csv"
        rows = numbers.read(path)
        _write(path, [row for row in rows if row["task"] != "socialiqa"][:1])
        assert door.main(["--check"]) == 2
        said = capsys.readouterr().err
        assert f"results/{folder}/equal_flops.csv has 0 rows with" in said


def _rounds_to(value: float, text: str) -> bool:
    return abs(value - float(text)) <= 0.500001 * 10.0 ** -len(text.partition(".")[2])


def test_numbers_written_by_hand_stand_in_their_tables():
    """Of each section of results/README.md: decimals outside of generated blocks."""
    text = (REPOSITORY / "results" / "README.md").read_text()
    text = re.sub(r"<!-- generated:.*?<!-- end -->", "", text, flags=re.DOTALL)
    sections = re.split(r"^## `(\w+)/`", text, flags=re.MULTILINE)
    quoted = 0
    for folder, prose in zip(sections[1::2], sections[2::2], strict=True):
        values = [
            abs(float(field))
            for path in (REPOSITORY / "results" / folder).glob("*.csv")
            for row in csv.reader(path.open())
            for field in row
            if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", field)
        ]
        numbers = re.findall(r"(?<![\w.])\d+\.\d{2,}(?![\w.]*\d*\.\d)", prose)
        quoted += len(numbers)
        for number in numbers:
            assert any(_rounds_to(value, number) for value in values), (folder, number)
    assert quoted > 100
