"""The rule of direction: a room imports rooms of a lower rank only, and nobody imports a door.

A room is a folder of dyndepth/, the contract method.py, or methods/. A door is a file at the root
of dyndepth/, a room's __main__.py, or what lm-eval comes in by: it reads a command line, calls
rooms and prints. CONTRIBUTING.md has the map.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dyndepth
from dyndepth.__main__ import FORMER
from dyndepth.common.digests import HARNESS

ROOT = Path(dyndepth.__file__).parent
METHODS = Path(__file__).parents[1] / "methods"
RANK = {
    "method": 0,
    "common": 1,
    **dict.fromkeys(("cells", "data"), 2),
    **dict.fromkeys(("models", "tasks", "results"), 3),
    "runtime": 4,
    **dict.fromkeys(("fitting", "evaluation", "timing"), 5),
    "sweep": 6,
    **dict.fromkeys(("routes", "verify", "bench", "export", "writing"), 7),
    **dict.fromkeys(("studies", "plots", "gpu"), 8),
    **dict.fromkeys(("pages", "methods"), 9),
}
PUBLIC = {"dyndepth", "dyndepth.plots"}
"""Faces: their modules hand on names of others, the first only when a name is asked for."""
OF_CELLS = ("dyndepth.cells.recipe", "dyndepth.cells.identity")
TORCH = {"torch", "transformers", "lm_eval", "accelerate", "safetensors", "peft"}
FILES = {
    "dyndepth." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.rglob("*.py")
    if "methods" not in path.relative_to(ROOT).parts
} | {
    "dyndepth.methods." + ".".join(path.relative_to(METHODS).with_suffix("").parts): path
    for path in METHODS.rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}


def imported(name: str, only_at_the_top: bool = False) -> Iterator[str]:
    """Modules that the module ``name`` imports: those of the project by their full name, of others
    the distribution's. Late imports and those for types count, unless ``only_at_the_top``."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if only_at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            whole = ".".join([*above, *filter(None, [node.module])])
            if not whole.startswith("dyndepth"):
                yield whole.partition(".")[0]
                continue
            for alias in node.names:
                one = f"{whole}.{alias.name}"
                yield one if one in MODULES else whole


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def is_door(name: str) -> bool:
    at_root = name.count(".") == 1 and MODULES[name].parent == ROOT and name != "dyndepth.method"
    return at_root or name.endswith(".__main__") or room(name) == "lm_eval_plugin"


LIBRARY = sorted(name for name in MODULES if "." in name and not is_door(name))


def test_every_room_has_a_rank_and_says_what_lives_there():
    rooms = {room(name) for name in LIBRARY}
    assert rooms == set(RANK)
    for each in rooms - {"method", "methods"}:
        said = ast.get_docstring(ast.parse((ROOT / each / "__init__.py").read_text())) or ""
        assert len(said.splitlines()) >= 2, f"dyndepth/{each}/__init__.py: who lives there?"


@pytest.mark.parametrize("name", LIBRARY)
def test_imports_go_down(name):
    own = room(name)
    for other in imported(name):
        if not other.startswith("dyndepth") or other == "dyndepth":
            continue
        assert not is_door(other), f"{name} imports the door {other}"
        if room(other) == own:
            continue
        study = own == "methods" and other == "dyndepth.studies.study"
        assert study or RANK[room(other)] < RANK[own], f"{name} imports {other}"


def test_what_a_digest_covers_runs_through_nothing_else():
    """Code that scores imports code that ``harness_code`` covers, and ``common``, which computes
    nothing; what fits, besides these, its own room and what a cell's recovery says."""
    hashed = {place.removesuffix(".py") for place in HARNESS}
    for name in LIBRARY:
        if room(name) not in hashed | {"fitting"}:
            continue
        for other in imported(name):
            if other.startswith("dyndepth.") and room(other) not in hashed | {"common"}:
                assert room(name) == "fitting", f"{name} imports {other}"
                assert other.startswith(("dyndepth.fitting", *OF_CELLS)), f"{name} imports {other}"


def test_no_file_imports_itself_in_a_circle():
    below = {
        name: {other for other in imported(name) if other in MODULES and other != name}
        for name in MODULES
        if name not in PUBLIC
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            pytest.fail(f"a circle: {' -> '.join([*above[above.index(name) :], name])}")
        if name not in done:
            for other in sorted(below.get(name, ())):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(below):
        visit(name, ())


def test_what_needs_no_model_loads_no_torch():
    """Commands say their help, and tables are read, in a moment."""
    heavy = {name for name in MODULES if TORCH & set(imported(name, only_at_the_top=True))}
    while True:
        more = {
            name
            for name in MODULES
            if name not in heavy and heavy & set(imported(name, only_at_the_top=True))
        }
        if not more:
            break
        heavy |= more
    light = {"common", "cells", "data", "tasks", "results", "sweep", "verify", "pages", "plots"}
    assert not {name for name in heavy if room(name) in light}
    assert not {name for name in heavy if is_door(name) and room(name) != "lm_eval_plugin"}


def test_the_house_is_small_enough_to_be_known():
    assert len({path.stem for path in ROOT.glob("*.py")} - set(FORMER)) <= 13
    lines = {name: _code(path) for name, path in MODULES.items()}
    tables = {"dyndepth.results.columns"}  # of data
    assert {name: n for name, n in lines.items() if n > 350 and name not in tables} == {}
    assert sorted(lines.values())[len(lines) // 2] < 200


def _code(path: Path) -> int:
    """Lines of code: neither blank, nor a comment, nor part of a docstring."""
    text = path.read_text(encoding="utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in prose
        for number, line in enumerate(text.splitlines(), 1)
    )
