"""Every command is a door with the same habits: one name, one way in, one word for one flag."""

import argparse
from pathlib import Path

import pytest

import dyndepth
from dyndepth.__main__ import COMMANDS, FORMER, main

ROOT = Path(dyndepth.__file__).parent
SHARED = {
    "model": "embedded",
    "device": "auto",
    "dtype": "float32",
    "attn_implementation": None,
    "revision": None,
    "corpus": "embedded",
}
"""Flags that several commands have, and their default."""
OF_A_RUN = {"routes", "verify", "studies", "sweep"}
"""Commands whose settings come from elsewhere unless they are given: no default of the parser's."""


class Asked(Exception):
    """A parser that was about to read its words."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


@pytest.fixture
def parser_of(monkeypatch):
    """The parser of a command."""

    def stop(self, *_, **__):
        raise Asked(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def found(*words: str) -> argparse.ArgumentParser:
        with pytest.raises(Asked) as caught:
            main(list(words))
        return caught.value.parser

    return found


def test_every_door_has_a_line_in_the_list(capsys):
    files = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__", "method"}
    rooms = {path.parent.name for path in ROOT.glob("*/__main__.py")}
    assert set(COMMANDS) | set(FORMER) == files | rooms
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, text in COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in lines), name
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("words", [[], ["-h"], ["--version"], ["swep"]])
def test_what_is_no_command_gets_a_sentence_or_the_list(words, capsys):
    status = main(words)
    said = capsys.readouterr()
    assert status == (0 if words in (["-h"], ["--version"]) else 2)
    assert ("did you mean sweep?" in said.err) is (words == ["swep"])
    assert (said.out == f"{dyndepth.__version__}\n") is (words == ["--version"])


@pytest.mark.parametrize("command", [*COMMANDS, "timing break-even", "timing limits"])
def test_flags_have_one_word_each(command, parser_of):
    words = command.split()
    parser = parser_of(*words)
    assert parser.prog.endswith(f"dyndepth.{command}") or parser.prog == f"dyndepth {command}"
    flags = {action.dest: action for action in parser._actions if action.option_strings}
    assert "debug" in flags
    assert not any(
        "-" in flag[2:].removeprefix("no-") for f in flags.values() for flag in f.option_strings
    )
    sweep = {action.dest: action for action in parser_of("sweep")._actions}
    for name, default in SHARED.items():
        if name not in flags:
            continue
        said = sweep[name].help.partition(" (default")[0]
        assert flags[name].help.startswith(said.partition(":")[0]), name
        if words[0] not in OF_A_RUN:
            assert flags[name].default == default, name
