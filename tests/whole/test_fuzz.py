"""Whatever stands in a text, a file or a cell: it is read, or refused in a sentence.

Nothing else is ever raised, what was read is read alike when it is written again, and no name that
comes of it leaves its folder.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_bad_input import made_cell

from dyndepth.cells import cell
from dyndepth.cells import identity as records
from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import cell_hash
from dyndepth.cells.merging import check_rows, merged
from dyndepth.cells.recipe import NONE, Recipe, parse_recoveries, parse_recovery
from dyndepth.cells.store import Store
from dyndepth.common import paths
from dyndepth.common.errors import UserError
from dyndepth.common.paths import check_path
from dyndepth.common.registry import methods, parse_methods
from dyndepth.common.spec import name_of, parameters_of, split, value
from dyndepth.plots.tables import read_tables
from dyndepth.results.comparison import compared
from dyndepth.results.leaderboard import leaderboard
from dyndepth.results.schema import TABLES as SCHEMAS
from dyndepth.results.tables import write_tables
from dyndepth.sweep import settings as options
from dyndepth.sweep.settings import Settings
from dyndepth.verify.tables import _compared

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SLOW = settings(FUZZ, max_examples=40)

SYMBOLS = st.text("(),='\"\\ \n\tab_19.-+eé\0", max_size=40)
TEXTS = st.one_of(st.text(max_size=30), SYMBOLS)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
)
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
HUGE = "9" * 5000
"""More digits than Python turns into an integer."""


@st.composite
def spoilt(draw: st.DrawFn, sound: str) -> str:
    """``sound`` with a few pieces cut out, doubled or replaced."""
    text = sound
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 8)))
        put = draw(st.one_of(st.just(text[start:stop] * 2), st.just(""), SYMBOLS))
        text = text[:start] + put + text[stop:]
    return text


@st.composite
def spoilt_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """``sound`` cut off, with some bytes replaced, or with others put between."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["cut", "replace", "insert", "drop"]))
        if kind == "cut":
            del content[start:]
        elif kind == "drop":
            del content[start : start + draw(st.integers(1, 40))]
        else:
            put = draw(st.binary(min_size=1, max_size=6))
            content[start : start + (len(put) if kind == "replace" else 0)] = put
    return bytes(content)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """A UserError inside is as good as a result."""
    with contextlib.suppress(UserError):
        yield


class TestSpecs:
    @FUZZ
    @given(TEXTS)
    @example(HUGE)
    @example("'" + "(" * 2000 + "'")
    @example("'a' 'b'")
    @example("'\\N{no such name}'")
    def test_every_text_has_a_value_and_most_have_no_other_reading(self, text):
        found = value(text)
        assert found is None or isinstance(found, bool | int | float | str)
        for read in (
            split,
            lambda it: name_of(it, "method"),
            lambda it: parameters_of(it, "method"),
        ):
            with told():
                read(text)

    @FUZZ
    @given(NAMES, st.dictionaries(NAMES, SCALARS, max_size=4))
    def test_what_repr_writes_is_read_again(self, name, given):
        text = f"{name}({', '.join(f'{key}={each!r}' for key, each in given.items())})"
        assert name_of(text, "method") == name
        assert parameters_of(text, "method") == given
        assert [type(each) for each in parameters_of(text, "method").values()] == [
            type(each) for each in given.values()
        ]
        assert split(f"{text},{text}") == [text, text]

    @FUZZ
    @given(TEXTS)
    def test_entries_are_the_text(self, text):
        with told():
            parts = split(text)
            assert ",".join(parts) == text or (parts == [] and not text.strip())


METHODS = (
    "uls(spacing=even),early_exit(confidence=saturation, every=3)",
    "static_pruning(criterion=greedy, keep_first=1),skipgpt(routers='a, (b)')",
    "random_skip,oracle(depths=2, cross_fitted=true)",
)


class TestMethods:
    @FUZZ
    @given(st.one_of(TEXTS, *map(spoilt, METHODS)))
    @example(f"early_exit(every={HUGE})")
    @example(f"layer_controller(penalty={'9' * 400})")
    def test_are_refused_or_read_and_read_again_to_the_same(self, text):
        with told():
            found = parse_methods(text)
            assert found
            written = ",".join(
                f"{name}({', '.join(f'{key}={each!r}' for key, each in given.items())})"
                for name, given in found
            )
            assert repr(parse_methods(written)) == repr(found)
            assert {name for name, _ in found} <= set(methods())


RECOVERIES = (
    "lora(rank=8, alpha=3.5, dropout=0.1, targets=gate+query, steps=7, rate=1e-05)",
    "none,joint(rank=2, targets=key),lora(preset=paper, precision=bf16)",
)


class TestRecoveries:
    @FUZZ
    @given(st.one_of(TEXTS, *map(spoilt, RECOVERIES)))
    @example(f"lora(rank={'9' * 400})")
    @example(f"lora(alpha={'9' * 400})")
    @example("lora(targets=+)")
    def test_are_refused_or_have_one_canonical_text(self, text):
        with told():
            found = parse_recoveries([text])
            assert parse_recoveries(found) == found
            assert parse_recoveries([",".join(found)]) == found
            for each in found:
                recipe = parse_recovery(each)
                assert str(recipe or NONE) == each
                assert recipe is None or parse_recovery(recipe.short) == recipe

    @FUZZ
    @given(
        rank=st.integers(1, 10**6),
        alpha=st.floats(1e-300, 1e300),
        dropout=st.floats(0, 0.999),
        rate=st.floats(1e-12, 1e3),
        steps=st.integers(1, 10**9),
        targets=st.lists(st.sampled_from(["query", "key", "value", "output", "gate"]), min_size=1),
        precision=st.sampled_from(["no", "bf16", "fp16"]),
    )
    def test_every_recipe_comes_back_from_its_text(self, targets, **given):
        recipe = Recipe(targets="+".join(targets), **given)
        assert parse_recovery(str(recipe)) == recipe
        assert parse_recovery(recipe.short) == recipe


KEYS = st.one_of(
    st.sampled_from([field.name for field in dataclasses.fields(Settings)]), TEXTS, SCALARS
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXTS, st.integers()), inner)
    ),
    max_leaves=5,
)
SETTINGS = """\
model: embedded
methods: {uls: {spacing: even}, early_exit: }
tasks: [quartz, last_word]
speedups: [1.25, 2]
recovery: [none, 'lora(rank=2)']
limit: {quartz: 3, last_word: none}
seed: 1
timing: off
output_path: runs/a
dry_run: true
"""


class TestConfigs:
    @FUZZ
    @given(content=st.one_of(st.binary(max_size=60), spoilt(SETTINGS).map(str.encode)))
    @example(content=b"seed: 0x" + b"f" * 6000)
    @example(content=b"speedups: " + b"9" * 400)
    @example(content=b"speedups: " + b"9" * 5000)
    @example(content=b'model: "\\ud800"')
    @example(content=b"output_path: ~nobody.here/a")
    @example(content=b"limit: 2024-13-01")
    @example(content=b"methods: &a [*a]")
    @example(content=b"limit: &a {b: *a}")
    def test_bytes_are_settings_or_a_sentence(self, tmp_path, content):
        _read(tmp_path, content)

    @FUZZ
    @given(found=st.dictionaries(KEYS, VALUES, max_size=4))
    def test_documents_are_settings_or_a_sentence(self, tmp_path, found):
        _read(tmp_path, yaml.safe_dump(found).encode())

    @FUZZ
    @given(words=st.lists(st.one_of(TEXTS, st.builds("--{}".format, KEYS)), max_size=5))
    def test_flags_are_settings_or_a_sentence(self, words):
        if any(word.startswith(("-h", "--help")) for word in words):
            return
        with told():
            assert isinstance(options.read(words), Settings)


def _read(folder: Path, content: bytes) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    with told():
        found = options.settings(options.read_config(path))
        assert isinstance(found, Settings)
        assert all(1 <= speedup < float("inf") for speedup in found.speedups)
        assert all(seed >= 0 for seed in found.seed)


# --- cells ----------------------------------------------------------------------------------------

CELLS = (
    made_cell(),
    made_cell([1, 0, 0, 1], method="uls", parameters="spacing='even'"),
    made_cell([0, 0, 1, 1], method="uls", seed=1),
)
BODIES: list[dict[str, Any]] = [
    records.plain({"format": 1, "cell": each.key, **dataclasses.asdict(each)}) for each in CELLS
]


@st.composite
def changed(draw: st.DrawFn, body: Any) -> Any:
    """A JSON document in which one value, however deep, is another or is gone."""
    if isinstance(body, dict) and body and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(body)))
        if not draw(st.integers(0, 4)):
            return {each: inner for each, inner in body.items() if each != key}
        return body | {key: draw(changed(body[key]))}
    if isinstance(body, list) and body and draw(st.integers(0, 9)):
        index = draw(st.integers(0, len(body) - 1))
        return [*body[:index], draw(changed(body[index])), *body[index + 1 :]]
    return draw(VALUES)


class TestCells:
    @FUZZ
    @given(
        which=st.integers(0, len(CELLS) - 1),
        content=st.one_of(
            spoilt_bytes(json.dumps(BODIES[0]).encode()),
            st.sampled_from(BODIES).flatmap(changed).map(lambda it: json.dumps(it).encode()),
            st.binary(max_size=40),
        ),
        ending=st.sampled_from([".json", ".json.gz"]),
    )
    @example(which=0, content=json.dumps(BODIES[1]).encode(), ending=".json")
    @example(which=1, content=b"\x1f\x8b\x08\x00", ending=".json.gz")
    def test_reading_never_fails_and_never_gives_another_cell(
        self, tmp_path, which, content, ending
    ):
        store = _stored(tmp_path / "run", CELLS)
        path = store.file(CELLS[which].identity)
        path.unlink()
        path.with_name(path.name.removesuffix(".json") + ending).write_bytes(content)
        fresh = Store(store.path)
        with contextlib.redirect_stderr(io.StringIO()) as warned:
            found = {each.key: each for each in fresh.all()}
            read = fresh.read(CELLS[which].identity)
        others = [each for each in CELLS if each.key != CELLS[which].key]
        assert all(found[each.key].accuracy == each.accuracy for each in others)
        assert set(found) <= {each.key for each in CELLS}
        assert (read is None) == (CELLS[which].key not in found)
        if read is None:
            assert warned.getvalue().count("cannot be read as a cell") == 1
        else:
            assert cell_hash(read.identity) == CELLS[which].key

    @SLOW
    @given(body=st.sampled_from(BODIES).flatmap(changed))
    def test_spoilt_rows_make_tables_or_a_sentence(self, tmp_path, body):
        """The rows of a cell are changed, and its identity is not: it still counts as that cell."""
        if not isinstance(body, dict):
            return
        whole = next(each for each in BODIES if each["cell"] in (body.get("cell"), each["cell"]))
        given = {name: body.get(name, whole[name]) for name in Cell.__dataclass_fields__}
        given["identity"] = whole["identity"]
        store = _stored(tmp_path / "run", CELLS)
        content = json.dumps(whole | given)
        store.file(whole["identity"]).write_text(content)
        with contextlib.redirect_stderr(io.StringIO()), told():
            cells = merged([store.path])
            assert len(leaderboard(cells)) == len(cells)
            check_rows(cells, compared=True)
            assert set(compared(cells)) == {"comparison", "curves", "equal_flops"}


def _stored(folder: Path, cells: tuple[Cell, ...]) -> Store:
    shutil.rmtree(folder, ignore_errors=True)
    store = Store(folder)
    for each in cells:
        store.write(each)
    return store


# --- tables ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = _stored(tmp_path_factory.mktemp("fuzz") / "run", CELLS)
    write_tables(store.all(), store.path)
    return store.path


@st.composite
def spoilt_table(draw: st.DrawFn, sound: bytes) -> bytes:
    """A CSV file with some field, row or column changed, or any bytes of it."""
    if not draw(st.integers(0, 2)):
        return draw(spoilt_bytes(sound))
    rows = list(csv.reader(io.StringIO(sound.decode())))
    row = draw(st.integers(0, len(rows) - 1))
    column = draw(st.integers(0, len(rows[0]) - 1))
    kind = draw(st.sampled_from(["field", "field", "field", "row", "column", "header"]))
    if kind == "row":
        rows[row : row + 1] = draw(st.sampled_from([[], [rows[row]] * 2]))
    elif kind == "column":
        rows = [[*each[:column], *each[column + 1 :]] for each in rows]
    else:
        put = draw(st.one_of(SYMBOLS, st.sampled_from(["nan", "inf", "-1", "1e400", "True", ""])))
        rows[0 if kind == "header" else row][column] = put
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


TABLES = ("leaderboard.csv", "accuracy.csv", "compute.csv")


class TestTables:
    @SLOW
    @given(data=st.data(), name=st.sampled_from(TABLES))
    def test_figures_read_them_or_say_why_not(self, run, tmp_path, data, name):
        copy = tmp_path / "run"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("cells"))
        sound = (run / name).read_bytes()
        (copy / name).write_bytes(data.draw(spoilt_table(sound)))
        with told():
            found = read_tables(copy)
            board = found["leaderboard"]
            assert pandas.api.types.is_numeric_dtype(board["target_speedup"])
            assert set(found) >= {"leaderboard", "accuracy", "compute", "routing"}

    @FUZZ
    @given(data=st.data(), name=st.sampled_from([*TABLES, "routing.parquet", "samples.parquet"]))
    def test_verification_names_every_difference(self, run, data, name):
        sound = (run / name).read_bytes()
        kind = spoilt_table if name.endswith(".csv") else spoilt_bytes
        stored = data.draw(kind(sound))
        findings = list(_compared(name, stored, sound))
        assert len(findings) == (stored != sound)
        assert all(each.cell == name and each.what for each in findings)
        # A note is a table of the same content, or one without a column that says nothing.
        if name.endswith(".csv"):
            assert all(each.failure for each in findings) or _only_lacks_blanks(name, stored, sound)


def _only_lacks_blanks(name: str, stored: bytes, sound: bytes) -> bool:
    """Whether ``stored`` is the table ``sound`` without columns that say nothing: in which nothing
    stands, or what files from before are read as."""
    defaults = SCHEMAS[name].defaults
    old, new = (list(csv.reader(io.StringIO(x.decode(), newline=""))) for x in (stored, sound))
    gone = [place for place, name in enumerate(new[0]) if name not in old[0]]
    rest = [[x for place, x in enumerate(row) if place not in gone] for row in new]
    said = {(new[0][place], row[place]) for row in new[1:] for place in gone}
    return rest == old and all(text in ("", defaults.get(column, "")) for column, text in said)


# --- names ----------------------------------------------------------------------------------------

HUB = st.from_regex(r"[A-Za-z0-9._-]{1,40}/[A-Za-z0-9._-]{1,40}", fullmatch=True)


class TestNames:
    @FUZZ
    @given(
        st.fixed_dictionaries(
            {name: st.text(max_size=300) for name in ("method", "parameters", "phases", "recovery")}
            | {"target_speedup": st.floats(1, 1e9), "seed": st.integers(0, 2**63)}
        )
    )
    @example(
        {"method": "../../etc", "parameters": "routers='/a/..'", "phases": "..", "seed": 0}
        | {"recovery": "../x", "target_speedup": 1.0}
    )
    def test_of_cells_stay_in_their_folder(self, identity):
        name = cell.readable_name(identity)
        assert "/" not in name
        assert "\\" not in name
        assert name.isascii()
        assert not name.startswith(".")
        assert len(name) <= 123

    @FUZZ
    @given(st.one_of(TEXTS, HUB, st.text("./~ab\\", max_size=12)))
    def test_of_models_stay_in_their_folder(self, model):
        with told():
            check_path("model", model)
            name = paths.slug(model)
            assert "/" not in name
            assert name not in (".", "..")
            longest = max(len(model) + model.count("/"), len("model"))
            assert len(name) <= longest or Path(model).expanduser().exists()
