"""Digests of code: an edit changes those that answer for a number it can change, and no other."""

import shutil
import sys
from types import SimpleNamespace

import pytest

from dyndepth.common import digests
from dyndepth.common.registry import method_class, methods

SHARED = ("harness", "ground", "timing", "removal")
METHODS = sorted(methods())


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
    digests.imports.cache_clear()
    found = {
        "harness": digests.harness_code.__wrapped__(),
        "ground": digests.ground_code.__wrapped__(),
        "timing": digests.timing_code.__wrapped__(),
        "removal": digests.fitting_code.__wrapped__("dyndepth.fitting.removal"),
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
    assert changed(package, *ground) == {"harness", "ground", "removal"}
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
    on_skipgpt = {"skipgpt", "layer_controller", "random_mask"}  # the others import it
    assert using("fitting/regression.py", package) == on_skipgpt
    assert {"static_pruning", "oracle"} <= using("fitting/importance.py", package)
    fitted = using("fitting/fits.py", package)
    assert "skipgpt" in fitted
    assert not fitted & {"dense", "uls", "random_skip", "exit_oracle"}
    assert "removal" in changed(package, "fitting/removal.py")


def test_what_recovers_touches_recovered_cells(package):
    recovered = {f"{name}+recovery" for name in METHODS}
    files = ("adapters", "kept", "training")
    found = changed(package, *(f"fitting/recovery/{name}.py" for name in files))
    assert found == recovered
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
