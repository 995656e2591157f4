"""Every command is a door with the same habits: one name, one way in, one word for one flag."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dyndepth
from dyndepth.__main__ import COMMANDS, FORMER, HEADINGS, ROOMS, SHELLS, main
from dyndepth.common.commands import FORMER as FORMER_FLAGS
from dyndepth.common.commands import HELP, Parser
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of

ROOT = Path(dyndepth.__file__).parent
DOORS = [*COMMANDS, "timing break-even", "timing limits", "gpu checks", "gpu training"]
ANOTHER_NOTION = {"phases": {"sweep", "routes", "studies", "export"}}
"""Former names of a flag that are the present name of another in these commands."""
OWN_WORDS = {
    "seed": "what is random differs",
    "output_path": "what is written differs",
    "limit": "whose documents differs",
    "tasks": "some choose among the tasks of a run",
    "timing": "the command that times has no cells",
    "dtype": "several are measured one after another",
    "recovery": "some take one",
    "methods": "the verb differs",
    "batch_size": "it is what is timed, or the most that is scored at once",
}
"""Flags whose help is each command's own, and why."""
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

    monkeypatch.setattr(Parser, "parse_args", stop)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def found(*words: str) -> argparse.ArgumentParser:
        with pytest.raises(Asked) as caught:
            main(list(words))
        return caught.value.parser

    return found


def test_every_door_has_a_line_in_the_list(capsys):
    files = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__", "method"}
    rooms = {path.parent.name for path in ROOT.glob("*/__main__.py")}
    assert set(COMMANDS) | set(FORMER) | set(ROOMS.values()) == files | rooms
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, text in COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in lines), name
    assert max(map(len, lines)) <= 80
    for name, heading in HEADINGS.items():
        assert lines[lines.index(f"{heading}:") + 1].split()[0] == name


@pytest.mark.parametrize("words", [[], ["-h"], ["--version"], ["swep"]])
def test_what_is_no_command_gets_a_sentence_or_the_list(words, capsys):
    status = main(words)
    said = capsys.readouterr()
    assert status == (0 if words in (["-h"], ["--version"]) else 2)
    assert ("did you mean sweep?" in said.err) is (words == ["swep"])
    assert (said.out == f"{dyndepth.__version__}\n") is (words == ["--version"])


@pytest.mark.parametrize("command", DOORS)
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


@pytest.mark.parametrize("command", DOORS)
def test_lists_are_written_with_commas_or_spaces(command, parser_of):
    parser = parser_of(*command.split())
    for action in parser._actions:
        if action.nargs not in ("+", "*") or action.dest in ("methods", "recovery", "runs"):
            continue
        one, other = [*map(str, action.choices or ()), "0.25", "0.5"][:2]
        apart = parser._get_values(action, [one, other])
        for words in ([f"{one},{other}"], [f"{one}, {other}"], [f"{one},", other]):
            assert parser._get_values(action, words) == apart, action.dest
        with pytest.raises(UserError, match="is empty; give at least one value"):
            parser._get_values(action, [","])


def test_a_notion_has_one_flag_and_a_flag_one_help(parser_of):
    texts: dict[str, dict[str, str]] = {}
    for command in DOORS:
        for action in parser_of(*command.split())._actions:
            for flag in action.option_strings:
                said = action.help or argparse.SUPPRESS
                if flag.startswith("--") and flag[:5] != "--no-" and said != argparse.SUPPRESS:
                    texts.setdefault(flag[2:], {})[command] = said
    for flag, helps in texts.items():
        assert flag not in FORMER_FLAGS or set(helps) <= ANOTHER_NOTION.get(flag, set()), flag
        assert f"{flag}s" not in texts, f"--{flag} and --{flag}s"
        if flag in HELP and flag not in {*OWN_WORDS, "run"}:  # RUN is no flag
            first = HELP[flag].partition(";")[0].partition(":")[0]
            for command, text in helps.items():
                assert text.startswith(first), f"{command} --{flag}: {text}"
    flags: dict[str, str] = {}
    for flag, helps in texts.items():
        for text in helps.values():
            assert flags.setdefault(text, flag) == flag, f"--{flag} and --{flags[text]}: {text}"
    assert set(FORMER_FLAGS.values()) <= set(texts)


@pytest.mark.parametrize("command", sorted({*DOORS} - {"compare"}))
def test_no_flag_takes_what_is_no_number_for_one(command, parser_of):
    """The budgets of ``compare`` are looked at where they are used."""
    for action in parser_of(*command.split())._actions:
        if not callable(action.type) or action.type in (path_of, Path):
            continue
        assert action.type not in (int, float), action.dest
        for word in ("nan", "inf", "-inf", "-1", "1e999", "many"):
            with pytest.raises(UserError, match="takes"):
                action.type(word)


@pytest.mark.parametrize(
    ("command", "now"),
    [
        ("timing --method uls --speedup 1.3 --level full --shapes 1x8",
         {"methods": "uls", "speedups": 1.3, "timing": "full", "timing_shapes": ["1x8"]}),
        ("timing --methods uls --speedups=1.3", {"methods": "uls", "speedups": 1.3}),
        ("fit uls --target-speedup=1.3", {"method": "uls", "speedups": 1.3}),
        ("fit --methods uls --speedups 1.3 --spacing even",
         {"methods": "uls", "parameter spacing": "even"}),
        ("timing break-even --phases decode --batch 2", {"passes": ["decode"], "batch_size": 2}),
        ("routes --methods uls --documents 3", {"limit": 3}),
        ("verify run --documents all", {"limit": "all"}),
        ("bench --dtypes float32 --phases decode_1 --documents 3",
         {"dtypes": ["float32"], "phases": ["decode_1"], "documents": 3}),
        ("bench --dtype float32 --passes decode_1",
         {"dtypes": ["float32"], "phases": ["decode_1"]}),
        ("sweep --method uls --speedup 1.3 --level off --documents 3",
         {"methods": ["uls"], "speedups": ["1.3"], "timing": "off", "limit": "3"}),
    ],
)  # fmt: skip
def test_former_names_of_flags_are_obeyed(command, now, monkeypatch):
    whole = Parser.parse_args

    def stop(self, *words):
        raise Asked(whole(self, *words))

    monkeypatch.setattr(Parser, "parse_args", stop)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(Asked) as caught:
        main(command.split())
    assert now.items() <= vars(caught.value.parser).items()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("sweep --methds uls", "there is no flag --methds; did you mean --methods?"),
        ("sweep --speed 2", "did you mean --speedups or"),
        ("sweep --out x", "did you mean --output_path?"),
        ("timing --speedup 1.5", "--methods"),
        (
            "timing --methods uls --timing fall",
            "takes one of quick, full, not 'fall'; did you mean",
        ),
        ("timing --methods uls --speedups 1.25 1.5", "--speedups takes one value here, and '1.5'"),
        ("timing --methods uls --speedups 1.25,1.5", "one number of at least 1 here, not '1.25,"),
        ("timing --methods uls,dense", "names 2 methods; give one"),
        ("fit uls --speedups 1.25 1.5", "--speedups takes one value here, and '1.5' is a second"),
        ("fit uls --methods dense", "--methods takes one method"),
        ("fit uls,dense --speedups 1", "uls,dense"),
        ("fit --methods ulss", "did you mean uls"),
        ("ls method", "did you mean methods"),
        ("completion tcsh", "takes one of bash, zsh, fish"),
        ("completions", "did you mean completion"),
    ],
)
def test_what_was_probably_meant_is_said(command, says, capsys):
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert says in said


LINES = {
    "dyndepth sw": {"sweep"},
    "dyndepth comp": {"compare", "completion"},
    "dyndepth sweep --met": {"--methods"},
    "dyndepth sweep --timing ": {"off", "quick", "full"},
    "dyndepth sweep --methods uls,ear": {"uls,early_exit"},
    "dyndepth timing break-even --passes ": {"prefill", "decode"},
    "dyndepth fit uls --spac": {"--spacing"},
    "dyndepth comparison --out": {"--output_path"},
    "dyndepth completion ": {*SHELLS, "--help"},
    "dyndepth leaderboard some": {"somewhere/"},
}
"""What may come next, by what was written."""


def test_bash_completes_commands_flags_choices_methods_and_paths(tmp_path):
    (tmp_path / "somewhere").mkdir()
    lines = ['eval "$(dyndepth completion bash)"']
    for line in LINES:
        lines += [
            f"COMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=({line})",
            "COMP_TYPE=9 COMPREPLY=()",
            "_python_argcomplete dyndepth",
            """(IFS=" "; echo "${COMPREPLY[*]}")""",
        ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    found = [set(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(LINES, found, strict=True)) == LINES
    assert done.stderr == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "dyndepth" in capsys.readouterr().out
