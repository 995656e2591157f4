"""The pages: their commands are understood by the real parsers, their Python runs, their links lead
somewhere, and their numbers are those of the committed results.

A fenced block with ``needs-gpu`` or ``needs-hub`` behind its language is not run; its commands are
parsed all the same.
"""

from __future__ import annotations

import argparse
import pkgutil
import re
import runpy
import shlex
import signal
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dyndepth
from dyndepth import __main__ as door_names
from dyndepth import attach
from dyndepth.common import registry
from dyndepth.common.errors import UserError
from dyndepth.common.registry import GROUP, parse_methods
from dyndepth.models.families import FAMILIES
from dyndepth.pages import __main__ as door

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
MARKS = {"needs-gpu", "needs-hub"}
FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
GENERATED = re.compile(r"<!-- generated:.*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    marks: frozenset[str]
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        inner = re.sub(rf"^{found[1]}", "", found[4], flags=re.MULTILINE)
        line = text[: found.start()].count("\n") + 1
        yield Block(page, line, found[2], frozenset(found[3].split()), inner)


BLOCKS = [block for page in PAGES for block in _blocks(page)]


def _commands() -> Iterator[Any]:
    """Every shell command of the pages, in blocks and within a line, as words."""
    for block in BLOCKS:
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line.partition(" > ")[0], comments=True):
                    yield pytest.param(words, id=f"{block} {' '.join(words)}"[:90])
    for page in PAGES:
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        for text in re.findall(r"`((?:python -m|make|dyndepth) [^`]+)`", prose):
            words = shlex.split(" ".join(text.split()))
            yield pytest.param(words, id=f"{page.relative_to(ROOT)} {' '.join(words)}"[:90])


COMMANDS = {param.id: param for param in _commands()}


class Parsed(BaseException):
    """The parser took the arguments. No Exception: nothing on the way out may swallow it."""


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a module as its command line would, up to where its arguments are parsed; returns what
    they gave."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any, **more: Any) -> None:
        raise Parsed(parse_args(self, *given, **more))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(module: str, words: list[str]) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Parsed) as caught:
            runpy.run_module(module, run_name="__main__")
        options: argparse.Namespace = caught.value.args[0]
        return options

    return run


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("words", COMMANDS.values())
def test_commands_are_understood(words: list[str], understood: Any):
    if words[0] == "make":
        # Not left to make: it is content with a folder of the target's name.
        targets = [word for word in words[1:] if "=" not in word]
        declared = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(targets) <= set(declared)
    elif words[:2] == ["python", "-m"] or words[:3] == ["accelerate", "launch", "-m"]:
        module, *arguments = words[words.index("-m") + 1 :]
        options = understood(module, arguments)
        _check_values(module, arguments, options)
    elif words[0] == "dyndepth" and len(words) == 2:
        assert words[1] in {*door_names.COMMANDS, "--help"}
    elif words[0] == "dyndepth":
        test_commands_are_understood(
            ["python", "-m", f"dyndepth.{words[1]}", *words[2:]], understood
        )
    elif words[0] == "lm_eval":
        understood("lm_eval", words[1:])
    elif words[0] == "pytest":
        assert all((ROOT / word).is_file() for word in words[1:] if word.endswith(".py"))
    elif words[0] == "source":
        assert words[1:] == [f"{_makefile_value('VENV')}/bin/activate"]
    elif words[:2] == ["pip", "install"]:
        assert words[2:] == ["-e", "."]
        assert (ROOT / "pyproject.toml").is_file()
    else:
        pytest.fail(f"nothing here checks {words[0]!r}")


def _makefile_value(name: str) -> str:
    found = re.search(rf"^{name} := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    return found[1]


def _check_values(module: str, arguments: list[str], options: argparse.Namespace) -> None:
    """What argparse leaves to a later step: methods, settings of a sweep, names of studies."""
    methods = getattr(options, "methods", None) or getattr(options, "method", None)
    if methods:
        parse_methods(methods if isinstance(methods, str) else ",".join(methods))
    if module == "dyndepth.sweep":
        # The parser is caught above; here each value is checked as the sweep does.
        from dyndepth.sweep.settings import settings
        from dyndepth.tasks import OFFLINE, SUITES

        given = {key: value for key, value in vars(options).items() if value is not None}
        given.pop("config", None)
        assert set(settings(given).tasks) <= {*OFFLINE, *SUITES}
    if module == "dyndepth.studies":
        from dyndepth.studies.study import load_study

        load_study(options.name)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_wrong_flag_is_noticed(understood: Any):
    """The check above can fail: these reach no end of parsing."""
    for module, words in (("dyndepth.leaderboard", ["--wrong"]), ("dyndepth.bench", ["--parts"])):
        with pytest.raises(SystemExit):
            understood(module, words)


def test_marks_and_languages_are_known():
    for block in BLOCKS:
        assert block.marks <= MARKS, block
        assert block.language in {"bash", "python", "toml", "text"}, block


def _python() -> list[Any]:
    return [
        pytest.param(block, id=str(block))
        for block in BLOCKS
        if block.language == "python" and not block.marks
    ]


@pytest.mark.parametrize("block", _python())
def test_python_runs(
    block: Block,
    monkeypatch: pytest.MonkeyPatch,
    embedded_model: Any,
    embedded_tokenizer: Any,
    tiny: Any,
    tiny_corpus: Any,
):
    monkeypatch.setattr(dyndepth, "load_model", lambda name: {"embedded": embedded_model}[name])
    monkeypatch.setattr(
        dyndepth, "load_tokenizer", lambda name: {"embedded": embedded_tokenizer}[name]
    )
    for name in FAMILIES:
        monkeypatch.setitem(FAMILIES, name, FAMILIES[name])
    known = set(FAMILIES)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(compile(block.text, str(block), "exec"), vars(module))
    for name in set(FAMILIES) - known:
        del FAMILIES[name]
    if "LastBlocks" in vars(module):
        model = tiny()
        method = module.LastBlocks(target_speedup=2.0).fit(model)
        with attach(model, method) as trace:
            model(torch.tensor([[5, 6, 7]]))
        layers = len(trace.executed())
        assert trace.executed().tolist() == [[float(2 * i < layers)] * 2 for i in range(layers)]
    if "FirstBlocks" in vars(module):
        model, asked = tiny(), torch.tensor([[5, 6, 7]])
        given: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        text = model.generate(asked, **given)
        with attach(model, module.FirstBlocks(target_speedup=2.0)) as trace:
            assert torch.equal(model.generate(asked, **given), text)
        lengths = [len(each.drafted) for each in trace.speculation.rounds]
        for before, length in zip(trace.speculation.rounds, lengths[1:-1], strict=False):
            assert length == (1 if before.accepted < len(before.drafted) else 4)
    if "LongStreams" in vars(module):
        model = tiny()
        method = module.LongStreams(target_speedup=1.5).fit(model, tiny_corpus)
        assert method.facts["achieved_speedup"] == pytest.approx(1.5, rel=0.05)
        solved = method.facts["threshold"]
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(3.0)
        method.calibrate(model, tiny_corpus)
        assert method.facts["threshold"] > solved
        with (
            pytest.raises(UserError, match="is not fitted"),
            attach(model, module.LongStreams(target_speedup=1.5)),
        ):
            pytest.fail("attached")


def _named() -> list[str]:
    """What the pages call by its full name."""
    texts = (FENCE.sub("", page.read_text(encoding="utf-8")) for page in PAGES)
    found = {
        name for text in texts for name in re.findall(r"`(dyndepth\.[a-z]\w*(?:\.\w+)*)", text)
    }
    return sorted(name for name in found if not name.endswith((".py", ".csv", ".json")))


@pytest.mark.parametrize("name", _named())
def test_what_pages_name_is_there(name: str):
    pkgutil.resolve_name(name)


def test_the_entry_point_of_the_example():
    (block,) = (block for block in BLOCKS if block.language == "toml")
    example = next(
        other.text for other in BLOCKS if other.page == block.page and other.language == "python"
    )
    ((name, value),) = tomllib.loads(block.text)["project"]["entry-points"][GROUP].items()
    assert f'name = "{name}"' in example
    assert f"class {value.rpartition(':')[2]}(" in example


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "results" / "README.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page: Path):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def test_generated_text_is_that_of_the_results(capsys: pytest.CaptureFixture[str]):
    """Fails when a number in a page and the results, or a page and the code, differ."""
    status = door.main(["--check"])
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
)
def test_no_measured_number_is_written_by_hand(page: Path):
    """Outside of generated text nothing looks like a measurement: three decimals, an interval."""
    text = page.read_text(encoding="utf-8")
    if text.startswith("<!-- Written by `make docs`"):
        pytest.skip("generated as a whole")
    by_hand = FENCE.sub("", GENERATED.sub("", text))
    by_hand = re.sub(r"arXiv \d{4}\.\d{5}", "", by_hand)
    assert not re.findall(r"\d\.\d{3}|\[[-+]?\d[\d.]*, [-+]?\d[\d.]*\]", by_hand)


def test_newcomers_get_by_with_the_readme():
    words = GENERATED.sub("", (ROOT / "README.md").read_text(encoding="utf-8")).split()
    # Two hundred and some words a minute are read.
    assert len(words) < 1100


def test_citation():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    citation = yaml.safe_load(text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license", "type"} <= set(citation)
    assert citation["authors"] == [{"name": "The dyndepth authors"}]
    assert citation["version"] == project["version"] == dyndepth.__version__
    assert citation["version"] == metadata.version("dyndepth")
    assert citation["license"] == project["license"]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    bibtex = (ROOT / "results" / "README.md").read_text(encoding="utf-8").partition("```bibtex")[2]
    assert f"{{{{{citation['authors'][0]['name']}}}}}" in bibtex
    for value in (citation["title"], citation["version"], citation["license"]):
        assert f"= {{{value}}}" in bibtex


def test_every_paper_can_be_cited():
    entries = re.findall(
        r"^@\w+\{([\d.]+),", (ROOT / "docs" / "papers.bib").read_text(), re.MULTILINE
    )
    papers = " ".join(registry.method_class(name).paper for name in registry.methods())
    # What the pages cite beside the methods: what is not one of them.
    papers += "".join((ROOT / "docs" / f"{n}.md").read_text() for n in ("commands", "not_covered"))
    wanted = set(re.findall(r"(?<!\d)\d{4}\.\d{5}(?!\d)", papers))
    assert len(entries) == len(set(entries))
    assert wanted == set(entries) != set()


def test_the_changelog_knows_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    assert versions[0][0] == dyndepth.__version__
