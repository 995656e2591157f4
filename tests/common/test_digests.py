"""Digests of code: an edit changes those that answer for a number it can change, and no other."""

import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from dyndepth.common import digests
from dyndepth.common.registry import method_class, methods

SHARED = ("harness", "ground", "timing", "removal", "unit_scores")
METHODS = sorted(methods())
LOOK_UP = {"random_mask", "self_speculation"}
"""Methods that are made of others, found by their names: whatever those use, they use."""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's own code that may be edited."""
    copied = tmp_path / "dyndepth"
    shutil.copytree(
        digests.PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
    )
    monkeypatch.setattr(digests, "PACKAGE", copied)
    return copied


def codes() -> dict[str, str]:
    """All digests, as a process that has just begun would find them."""
    found = {
        "harness": digests.harness_code.__wrapped__(),
        "ground": digests.ground_code.__wrapped__(),
        "timing": digests.timing_code.__wrapped__(),
        "removal": digests.fitting_code.__wrapped__("dyndepth.fitting.removal"),
        "unit_scores": digests.fitting_code.__wrapped__("dyndepth.fitting.unit_scores"),
    }
    for name in METHODS:
        found[name] = digests.method_code(method_class(name))
        found[f"{name}+recovery"] = digests.method_code(method_class(name), recovered=True)
    return found


def changed(package, *files: str) -> set[str]:
    """The digests that an edit of each of ``files`` changes; it must be one set for all."""
    found = []
    for file in files:
        before = codes()
        path = package / file
        path.parent.mkdir(exist_ok=True)
        path.open("a").write("\n# EDITED\n")
        found.append({name for name, code in codes().items() if code != before[name]})
    assert all(each == found[0] for each in found), dict(zip(files, found, strict=True))
    return found[0]


def using(file: str, package) -> set[str]:
    """Methods whose digest counts ``file``."""
    return {name for name in changed(package, file) if "+" not in name and name not in SHARED}


def test_what_scores_and_what_everything_stands_on(package):
    ground = (
        "method.py",
        "models/blocks.py",
        "data/corpus.py",
        "runtime/flops.py",
        "models/new.py",
    )
    assert changed(package, *ground) == {"harness", "ground", "removal", "unit_scores"}
    scores = ("evaluation/rows.py", "evaluation/new.py", "tasks/documents.py", "tasks/new.yaml")
    assert changed(package, *scores) == {"harness"}


def test_plots_pages_tables_and_commands_change_no_cell(package):
    counted = {*digests.HARNESS, "fitting", "timing", "methods"}
    files = [
        path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in counted
    ]
    assert len(files) > 60
    before = codes()
    for path in files:
        path.open("a").write("\n# EDITED\n")
    assert codes() == before


def test_the_procedure_of_timing_is_known_and_changes_no_cell(package):
    assert changed(package, "timing/measure.py", "timing/pairing.py", "timing/new.py") == {"timing"}


def test_what_fits_touches_the_methods_that_use_it(package):
    # The others import it, or its routers.
    on_skipgpt = {"skipgpt", "layer_controller", "mod", "mindskip", "prompt_router"}
    assert using("fitting/regression.py", package) == on_skipgpt | LOOK_UP
    assert {"static_pruning", "oracle"} <= using("fitting/importance.py", package)
    fitted = using("fitting/fits.py", package)
    assert "skipgpt" in fitted
    assert not fitted & {"dense", "random_skip", "exit_oracle"}
    assert {"removal", "unit_scores"} <= changed(package, "fitting/removal.py")
    assert {"unit_scores", "static_pruning"} <= changed(package, "fitting/unit_scores.py")


def test_what_recovers_touches_recovered_cells(package):
    recovered = {f"{name}+recovery" for name in METHODS}
    files = ("adapters", "kept", "training")
    found = changed(package, *(f"fitting/recovery/{name}.py" for name in files))
    assert found == recovered | LOOK_UP
    assert recovered <= changed(package, "fitting/loop.py")


def test_a_methods_own_files(tmp_path, monkeypatch):
    """Its module, what that imports from beside it, and no file that it does not import."""
    folder = tmp_path / "own_methods"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "beside.py").write_text("A = 1\n")
    (folder / "late.py").write_text("B = 1\n")
    (folder / "other.py").write_text("C = 1\n")
    (folder / "compiled.so").write_bytes(b"\x7fELF\x80\xff")
    monkeypatch.setitem(
        sys.modules, "own_methods.compiled", SimpleNamespace(__file__=str(folder / "compiled.so"))
    )
    (folder / "one.py").write_text(
        "from . import beside, compiled\nclass One:\n    def choose(self):\n"
        "        from own_methods.late import B\n        return B\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from own_methods.one import One  # type: ignore[import-not-found]

    try:
        counting = ("one.py", "beside.py", "late.py", "compiled.so")
        for name in (*counting, "other.py"):
            before = digests.method_code(One)
            (folder / name).open("a").write("# EDITED\n")
            assert (digests.method_code(One) != before) is (name in counting), name
    finally:
        for name in [name for name in sys.modules if name.startswith("own_methods")]:
            del sys.modules[name]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Makes modules of a package ``own_methods`` of somebody else."""
    folder = tmp_path / "own_methods"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def module(name: str, *lines: str):
        (folder / f"{name}.py").write_bytes("\n".join(lines).encode("latin-1"))
        return import_module(f"own_methods.{name}")

    yield module
    for name in [name for name in sys.modules if name.startswith("own_methods")]:
        del sys.modules[name]


def files_of(cls) -> set[str]:
    """Names of what the digest of a method reads."""
    read: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_digest", lambda files, root: read.extend(files))
        digests.method_code(cls)
    return {path.name for path in read}


def test_a_method_built_on_one_of_ours_follows_it(elsewhere, package):
    built = elsewhere(
        "built",
        "from dyndepth.methods.static_pruning import StaticPruning",
        "class Built(StaticPruning): name = 'built'",
    ).Built
    assert {"built.py", "choice.py", "importance.py", "unit_scores.py"} <= files_of(built)
    before = digests.method_code(built)
    (package / "fitting" / "importance.py").open("a").write("# EDITED\n")
    assert digests.method_code(built) != before


def test_what_lends_something_to_a_method_is_no_part_of_it(elsewhere):
    """Neither torch nor the standard library, nor what is built in."""
    lines = (
        "from abc import ABC",
        "from torch.nn import Module",
        "from dyndepth.method import DynamicDepthMethod",
        "class Mixed(DynamicDepthMethod, Module, ABC): name = 'mixed'",
        "class Plain(dict, DynamicDepthMethod): name = 'plain'",
    )
    mixed = elsewhere("mixed", *lines)
    assert files_of(mixed.Mixed) == files_of(mixed.Plain) == {"mixed.py"}
    assert digests.method_code(mixed.Plain) == digests.method_code(mixed.Mixed)


def test_a_method_that_looks_others_up_is_bound_to_all(elsewhere):
    lines = "from dyndepth.common.registry import load_method", "class Looking: pass"
    names = files_of(elsewhere("looking", *lines).Looking)
    assert {"looking.py", "uls.py", "choice.py", "regression.py", "kept.py"} <= names


def test_sources_of_any_encoding_and_such_that_cannot_be_read(elsewhere):
    latin = "# -*- coding: latin-1 -*-", "# \xe9", "class Latin: pass"
    assert len(digests.method_code(elsewhere("latin", *latin).Latin)) == 12
    whole = elsewhere(
        "whole", "try:", "    from own_methods import broken", "except Exception: pass",
        "class Whole: pass",
    )  # fmt: skip
    Path(whole.__file__).with_name("broken.py").write_text("class (\n")
    assert "broken.py" in files_of(whole.Whole)
    assert len(digests.method_code(whole.Whole)) == 12


def test_imports_are_those_of_the_file_as_it_is(elsewhere):
    one = elsewhere("one", "class One: pass")
    beside = Path(one.__file__).with_name("beside.py")
    beside.write_text("A = 1\n")
    assert "beside.py" not in files_of(one.One)
    Path(one.__file__).write_text("from own_methods import beside\nclass One: pass\n")
    assert "beside.py" in files_of(one.One)


def test_a_class_of_a_notebook_has_a_code_each_time_that_it_is_defined(monkeypatch):
    def defined():
        return type("Cell", (), {"__module__": "__main__", "fit": lambda self: None})

    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())
    one, other = defined(), defined()
    assert digests.method_code(one) == digests.method_code(one)
    assert digests.method_code(one) != digests.method_code(other)
    # The program around it is no source of the class.
    program = SimpleNamespace(__file__=str(Path(__file__).with_name("test_paths.py")))
    monkeypatch.setitem(sys.modules, "__main__", program)
    assert digests.method_code(defined()) != digests.method_code(defined())
