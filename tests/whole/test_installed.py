"""Where the code comes from: the installed checkout, a copy in site-packages, or the checkout in
which one stands; never of two at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions, version
from pathlib import Path

import pytest

import dyndepth

ROOT = Path(dyndepth.__file__).parents[1]
SAID = "import dyndepth, dyndepth.methods as m; print(dyndepth.__file__); print(m.__file__)"
USED = "from dyndepth import load_method; print(load_method('uls').name)"


def said(python: Path | str, *words: str, folder: Path, status: int = 0) -> str:
    """What ``python words`` prints in ``folder``; of one that fails, what it says on stderr."""
    done = subprocess.run(
        [str(python), *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def copied(parent: Path, name: str) -> Path:
    """A checkout as far as an installation needs it, in the folder ``name`` of ``parent``."""
    folder = parent / name
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("dyndepth", "methods"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / file)
    return folder


def environment(folder: Path) -> Path:
    """The interpreter of a new environment that has this one's libraries, but not its project."""
    said(sys.executable, "-m", "venv", "--without-pip", str(folder), folder=folder.parent)
    place = next(folder.glob("lib/python*/site-packages"))
    # Added plainly, so that no .pth file of theirs counts: one leads to the project.
    libraries = [sysconfig.get_path("purelib"), *(p for p in sys.path if "site-packages" in p)]
    (place / "libraries.pth").write_text("\n".join(dict.fromkeys(libraries)) + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function: an environment in which a checkout is installed, with ``-e`` or without."""
    there = {each.name for each in distributions()}
    if not {"pip", "setuptools"} <= there or int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("installing without a network needs pip and setuptools 77 in this environment")

    def made(*how: str) -> tuple[Path, Path]:
        parent = tmp_path_factory.mktemp("parent")
        # The clone's own folder is called as the package is.
        clone, python = copied(parent, "dyndepth"), environment(parent / "environment")
        words = ["-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
        words += ["--no-build-isolation", "--disable-pip-version-check", "--ignore-installed"]
        said(sys.executable, *words, *how, str(clone), folder=parent)
        return clone, python

    return made


def test_a_script_beside_an_editable_clone_gets_the_project(installed):
    clone, python = installed("-e")
    (clone.parent / "script.py").write_text(f"{SAID}\n{USED}\n")
    ours = [str(clone / part / "__init__.py") for part in ("dyndepth", "methods")]
    assert said(python, "script.py", folder=clone.parent).splitlines() == [*ours, "uls"]
    assert said(python, "-c", f"{SAID}; {USED}", folder=clone).splitlines() == [*ours, "uls"]

    # Another checkout, in this one's environment: nothing of the first.
    second = copied(clone.parent, "second")
    theirs = [str(second / part / "__init__.py") for part in ("dyndepth", "methods")]
    assert said(python, "-c", SAID, folder=second).splitlines() == theirs
    assert "random_skip" in said(python, "-m", "dyndepth.ls", "methods", folder=second)

    # One that has no methods must not take those of the first.
    shutil.rmtree(second / "methods")
    sentence = said(python, "-m", "dyndepth.ls", "methods", folder=second, status=2)
    assert str(second / "dyndepth") in sentence
    assert "pip install -e ." in sentence


ALONE = """
from importlib.util import find_spec
from pickle import dumps, loads
import dyndepth
from dyndepth.common.errors import UserError
print([each for each in {names!r} if find_spec(f"dyndepth.{{each}}")])
from dyndepth.methods.uls import UnifiedLayerSkipping
print(loads(dumps(UnifiedLayerSkipping())) == UnifiedLayerSkipping())
"""


def test_of_what_lies_beside_the_package_methods_alone_are_in_it(tmp_path):
    """No file is imported by two names, of which the second has exceptions of its own."""
    names = sorted({each.stem for each in ROOT.iterdir() if each.stem.isidentifier()})
    assert {"dyndepth", "methods", "tests", "setup"} <= set(names)
    inside = {each.stem for each in (ROOT / "dyndepth").iterdir()}
    program = ALONE.format(names=[each for each in names if each not in inside])
    assert said(sys.executable, "-c", program, folder=ROOT).splitlines() == ["['methods']", "True"]
    help_text = said(sys.executable, "-m", "dyndepth.methods.skipgpt.ship", "-h", folder=tmp_path)
    assert "--speedups" in help_text


def test_a_copy_in_an_environment_needs_no_checkout(installed):
    clone, python = installed()
    folder = clone.parent / "elsewhere"
    shutil.move(clone, folder)
    paths = said(python, "-c", f"{SAID}; {USED}", folder=clone.parent).splitlines()
    place = next((clone.parent / "environment").glob("lib/python*/site-packages"))
    inside = [place / "dyndepth" / "__init__.py", place / "dyndepth" / "methods" / "__init__.py"]
    assert paths == [*map(str, inside), "uls"]
    assert list((place / "dyndepth" / "methods").rglob("*.safetensors"))


FINDER = """
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "dyndepth.methods":
            return spec_from_file_location(name, {init!r}, submodule_search_locations=[{folder!r}])

sys.meta_path.insert(0, Finder)
"""
"""An editable installation as setuptools makes it by itself, of the folder ``methods``."""


@pytest.mark.parametrize("module", ["dyndepth.sweep", "dyndepth.ls"])
def test_two_checkouts_are_not_mixed(module, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dyndepth", tmp_path / "dyndepth", ignore=ignored)
    init, folder = str(ROOT / "methods" / "__init__.py"), str(ROOT / "methods")
    words = ["methods"] if module == "dyndepth.ls" else ["--dry_run"]
    run = f"{FINDER.format(init=init, folder=folder)}\nfrom runpy import run_module\n"
    run += f"sys.argv = [{module!r}, *{words!r}]\nrun_module({module!r}, run_name='__main__')\n"
    (tmp_path / "run.py").write_text(run)
    sentence = said(sys.executable, "run.py", folder=tmp_path, status=2)
    assert sentence.count("\n") == 1
    assert str(tmp_path / "dyndepth") in sentence
    assert str(ROOT / "methods") in sentence
    assert "pip install -e ." in sentence
