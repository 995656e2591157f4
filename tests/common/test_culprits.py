"""What goes wrong in a method is told with its own file and line."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest
from test_attach import ids

from dyndepth.cells.cell import CellSpec
from dyndepth.common import registry
from dyndepth.common.commands import run
from dyndepth.common.errors import MethodFault, UserError
from dyndepth.runtime.attach import attach
from dyndepth.sweep.settings import Settings
from dyndepth.sweep.worker import Work, Worker

HEAD = """from dataclasses import dataclass
import torch
from dyndepth.method import DynamicDepthMethod

@dataclass(kw_only=True)
class Mine(DynamicDepthMethod):
    name = "mine"
    granularity = "token"
    paper = "test"
"""
FAULTS = {
    "fit": "    def fit(self, model, corpus=None):\n        return None + 1\n",
    "calibrate": "    def calibrate(self, model, corpus=None):\n        return None + 1\n",
    "choose": "    def choose(self, outcomes):\n        return None + 1\n",
    "start": "    def start(self, context):\n        return None + 1\n",
    "gates": "    def gates(self, layer, hidden):\n        return None + 1\n",
    "context": "    def start(self, context):\n        pass\n"
    "    def gates(self, layer, hidden):\n        return self.context, True\n",
}
WRONG = {
    "shape": ("gates(self, layer, hidden)", "torch.ones(1, 2, dtype=torch.bool), True"),
    "dtype": ("gates(self, layer, hidden)", "torch.ones(hidden.shape[:2]), True"),
    "kind": ("gates(self, layer, hidden)", "'yes', True"),
    "one": ("gates(self, layer, hidden)", "True"),
    "plan": ("start(self, context)", "torch.ones(4, 2)"),
    "no plan": ("start(self, context)", "[True] * 4"),
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """``written(body)``: a method of one's own, in a file of its own, of which ``body`` is the end;
    returns the file."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    known = {"mine": EntryPoint("mine", f"{name}:Mine", registry.GROUP)}
    monkeypatch.setattr(registry, "methods", lambda: known)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"{name}.py"

    def write(body, head=HEAD):
        file.write_text(head + body)
        return file

    yield write
    sys.modules.pop(name, None)


def called(method, model, kind):
    if kind in ("fit", "calibrate"):
        return getattr(method, kind)(model, None)
    if kind == "choose":
        return method.choose(None)
    with attach(model, method, warn=False):
        return model(ids(1, 5))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_failed_cell_names_file_and_line(tiny, written, kind):
    file = written(FAULTS[kind])
    method = registry.load_method("mine")
    line = len((HEAD + FAULTS[kind]).splitlines())

    class Bench:
        def identity(self, plan):
            return {}

        def evaluate(self, plan):
            return called(method, tiny(), kind)

    cell = Worker(Bench(), Settings()).do(Work(CellSpec("mine"), {}))
    where = "gates" if kind == "context" else kind
    assert cell.status == "error"
    assert cell.error.endswith(f"({file.name}:{line}, in {where})")
    assert cell.error.startswith(("TypeError: ", "AttributeError: "))
    assert "Traceback" in cell.traceback


@pytest.mark.parametrize("debug", [False, True])
def test_a_command_names_file_and_line_and_the_way_to_the_traceback(written, capsys, debug):
    file = written(FAULTS["fit"])
    method = registry.load_method("mine")
    words = ["--debug"] if debug else []
    assert run("fit", lambda _: method.fit(None), words) == 1
    said = capsys.readouterr().err
    place = f"TypeError: unsupported operand type(s) for +: 'NoneType' and 'int' ({file.name}:11, "
    assert f"dyndepth.fit: {place}in fit)" in said
    assert ("--debug prints the traceback" in said) is not debug
    assert ("Traceback" in said) is debug


def test_what_is_no_methods_fault_stays_as_it_is(written):
    written("")
    registry.load_method("mine")
    with pytest.raises(ZeroDivisionError):
        run("fit", lambda _: 1 // 0, [])


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_names_class_file_and_line(tiny, written, kind):
    signature, answer = WRONG[kind]
    file = written(f"    def {signature}:\n        return {answer}\n")
    model, name = tiny(), signature.partition("(")[0]
    with (
        attach(model, registry.load_method("mine"), warn=False),
        pytest.raises(MethodFault, match=rf"^mine: .*\(Mine\.{name}, {file.name}:10\)$"),
    ):
        model(ids(1, 5))


@pytest.mark.parametrize(
    ("head", "body", "line", "says"),
    [
        (HEAD, "    def start(self context):\n", 10, "SyntaxError: "),
        ("import torch\nimport no_such_module\n", "", 2, "ModuleNotFoundError: "),
        (HEAD, "    tensors: int = 3\n", 6, "TypeError: Mine: tensors is what the contract keeps"),
        (HEAD.replace("Mine", "Yours"), "", None, "AttributeError: .*Mine"),
    ],
)
def test_a_file_that_cannot_be_imported(written, head, body, line, says):
    file = written(body, head)
    where = rf"\({file.name}:{line}\)$" if line else ""
    with pytest.raises(UserError, match=rf"'mine' cannot be imported from .*{says}.*{where}"):
        registry.load_method("mine")


def test_a_post_init_without_super(written):
    file = written("    def __post_init__(self):\n        pass\n")
    says = rf"'mine' does not call super\(\).__post_init__\(\) .*{file.name}:10"
    with pytest.raises(UserError, match=says):
        registry.load_method("mine")


def test_a_post_init_that_fails(written):
    file = written("    def __post_init__(self):\n        super().__post_init__(3)\n")
    with pytest.raises(UserError, match=rf"method 'mine': .*\({file.name}:11, in __post_init__\)"):
        registry.load_method("mine")
