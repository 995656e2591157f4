"""What every command does alike: flags and their words, errors in one sentence, exit statuses,
printed tables.

A door reads its command line by a ``Parser`` inside of ``run``.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dyndepth.common.completion import asked, offer
from dyndepth.common.culprits import culprit, told
from dyndepth.common.errors import MethodFault, RunFailed, UserError
from dyndepth.common.modes import MODES
from dyndepth.common.paths import EMBEDDED, path_of
from dyndepth.common.pipes import outlive_readers
from dyndepth.common.spec import nearest
from dyndepth.common.trees import check_one_tree

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


PIPE_WIDTH = 200
"""Columns where no terminal tells its width; rich would fold everything into 80."""


def console() -> Console:
    """Standard output, as wide as its terminal, or ``PIPE_WIDTH``."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=PIPE_WIDTH)


def print_table(table: Table) -> None:
    """Print ``table`` to standard output."""
    console().print(table)


_SPELLING = "Dashes and underscores in flags are the same."

CHOICES = {
    "phases": ("both", "generation", "published"),
    "timing": ("off", "quick", "full"),
    "mode": (*MODES, "both"),
    "resume": ("only-missing", "always", "never"),
    "dtype": ("float32", "bfloat16", "float16"),
    "attn_implementation": ("sdpa", "eager"),
    "executor": ("inline", "processes", "ray"),
    "assume": ("h100", "h200", "a100", "rtx4090", "cpu"),
}

MODE_DEFAULT = "both where a GPU is timed in full, else eager"
"""What ``--mode`` is if it is not given."""

HELP = {
    "methods": "methods to compare, with parameters in brackets where wanted: "
    "'one,other(layer=3, mode=name)'; `dyndepth ls methods` lists them",
    "model": "'embedded', a hub id, or a local path",
    "tasks": "tasks or suites; `dyndepth ls tasks` lists them",
    "speedups": "target speedups, dense block FLOPs / executed block FLOPs",
    "phases": "where methods that let one choose skip: in prompt and generation, in generation "
    "only, or as published",
    "recovery": "none, lora or joint, each makes its own cells of every method, dense included: "
    "adapters trained under the method's frozen gates, or together with its routers; with settings "
    "in brackets where wanted: none 'lora(rank=8, steps=100)' 'lora(preset=paper)'",
    "seed": "seeds of the methods: each makes its own cells",
    "sample_seed": "which documents --limit draws; the same for all cells, so that they are paired",
    "limit": "documents a task, drawn at random, 'none' for all of them; and for single tasks: "
    "32,title_generation=8",
    "num_fewshot": "examples before each question; 'none' for what each task's own file says",
    "apply_chat_template": "put prompts in the tokenizer's chat template (true), in that of its "
    "templates which is named, or in none (false); texts that are scored whole stay as they are",
    "fewshot_as_multiturn": "few-shot examples as turns of the conversation (true), or as one text "
    "with the question (false)",
    "system_instruction": "text put before each task's own description",
    "batch_size": "most sequences scored at once; fewer where they are long",
    "device": "auto, cpu, cuda, cuda:1, ..., or spread: one model over all GPUs",
    "one_device": "auto, cpu, cuda, cuda:1, ...",
    "shape": "'embedded', a hub id, or a local path; or shape:NAME: random weights in the shape of "
    "a public model, which `dyndepth ls shapes` lists",
    "dtype": "of weights and arithmetic",
    "attn_implementation": "transformers' attention kernel; the model's own choice unless given",
    "revision": "branch, tag or commit of a hub model",
    "trust_remote_code": "let a hub model run code of its own",
    "include_path": "folder with further lm-eval task files",
    "corpus": "calibration and training text: 'embedded', or a path to a .txt or .jsonl file",
    "timing": "wall-clock measurement of each cell",
    "mode": "how dense and method run while they are timed: eager, graphs (decoding is replayed "
    "from CUDA graphs), or both",
    "timing_shapes": "BATCHxLENGTH[+NEW] in place of the level's shapes, such as 1x512,32x2048: "
    "prompts of LENGTH tokens, and NEW tokens decoded after them (16 unless given, 0 for none)",
    "compiled_dense": "time dense under torch.compile as well, in the same rounds: a second "
    "baseline",
    "resume": "only-missing: compute the cells that are absent or failed; always: keep failed "
    "ones too; never: compute all cells again",
    "output_path": "folder of the run, or a URL that fsspec knows, such as s3://bucket/run",
    "executor": "where cells are computed: inline, one after the other; processes on this machine; "
    "or ray, a cluster (pip install 'dyndepth[ray]'). The tables are the same",
    "workers": "cells at once with processes or ray; each worker holds the model",
    "cpus_per_cell": "cores of a cell with processes or ray",
    "gpus_per_cell": "GPUs of a cell with ray; a fraction lets cells share one",
    "ray_address": "cluster to join, as ray.init takes it; without it one is started for the run",
    "shard": "i/n: of the cells every n-th from the i-th on, for job arrays; shards may share an "
    "--output_path",
    "cell_timeout": "seconds after which a cell is given up and recorded as failed",
    "log_json": "file to which every event is appended as a line of JSON, or - for stderr in place "
    "of the progress lines",
    "trackers": "installed experiment trackers, such as tensorboard or wandb; each cell is a step",
    "dry_run": "print the cells and an estimate of their cost, run nothing",
    "assume": "with --dry_run: plan for another machine",
    "tflops": "with --dry_run: the peak TFLOP/s of the machine to plan for, in the precision of "
    "--dtype",
    "bandwidth": "with --dry_run: the GB/s of its memory",
    "memory_gib": "with --dry_run: the GiB of its memory",
    "debug": "print the whole traceback of every error",
    "speedup": "target speedups, dense block FLOPs / executed block FLOPs; here one",
    "threads": "processor threads; torch's own choice unless given",
    "run": "a sweep's output path",
    "config": "YAML file with any of these settings; flags override it",
}

FORMER = {
    "method": "methods",
    "speedup": "speedups",
    "target_speedup": "speedups",
    "level": "timing",
    "shapes": "timing_shapes",
    "documents": "limit",
    "batch": "batch_size",
    "dtypes": "dtype",
    "formats": "format",
    "phases": "passes",
}
"""What a flag was called in some commands -> what it is called in all: obeyed by each command that
has the second and not the first."""


def run(
    command: str,
    body: Callable[[list[str]], int | None],
    arguments: Sequence[str] | None = None,
    interrupted: str = "interrupted",
) -> int:
    """The exit status of a command whose ``body`` is given its words.

    0, or what ``body`` returns; 2 for wrong input and 1 where what was computed came to no good or
    a method failed, with a sentence on stderr (before it the traceback, with ``--debug``); 130
    after Ctrl-C, with ``interrupted``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    outlive_readers()
    try:
        check_one_tree()
        return body(given) or 0
    except (UserError, RunFailed, FloatingPointError) as fault:
        if "--debug" in given:
            traceback.print_exc()
        print(f"dyndepth.{command}: {fault}", file=sys.stderr)
        return 2 if isinstance(fault, UserError) else 1
    except Exception as fault:
        if not (isinstance(fault, MethodFault) or culprit(fault)):
            raise
        if "--debug" in given:
            traceback.print_exc()
        how = "" if "--debug" in given else "; --debug prints the traceback"
        print(f"dyndepth.{command}: {told(fault)}{how}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED


def worded(name: str, text: str = "") -> str:
    """What argparse is to say of a flag: ``text``, or what ``HELP`` has; and its choices, if that
    does not name them."""
    text = (text or HELP[name]).replace("%", "%%")
    choices = CHOICES.get(name, ())
    named = all(choice in text for choice in choices)
    return text if named else f"{text}; one of {', '.join(choices)}"


_WHOLE = {"methods", "recovery", "runs"}
"""Lists whose words are kept as they are: commas may stand in brackets, or in a path."""


class _TooMany(Exception):
    """Words of a command line that no flag takes."""


class Parser(argparse.ArgumentParser):
    """The command line of ``python -m dyndepth.<command>``, or of ``dyndepth <command>``: flags
    are written out, with dashes or underscores, and complaints are one sentence.

    ``debug``: it has the flag ``--debug``, which ``run`` obeys.
    """

    def __init__(
        self, command: str, description: str, epilog: str = "", debug: bool = True
    ) -> None:
        self.command = command
        script = Path(sys.argv[0]).stem == "dyndepth"
        super().__init__(
            prog=f"dyndepth {command}" if script else f"python -m dyndepth.{command}",
            description=_wrapped(description),
            epilog=_wrapped(f"{epilog}\n\n{_SPELLING}".strip()),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if debug:
            self.add_argument("--debug", action="store_true", help=HELP["debug"])

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, flags with dashes as if they had underscores, and by former names.

        Where a shell asks what may come next, it is told and the process ends.
        """
        if asked():
            offer(self, len(self.command.split()), CHOICES)
        words = [self._spelled(word) for word in (sys.argv[1:] if args is None else args)]
        self._check_flags(words)
        try:
            return super().parse_args(words, namespace)
        except _TooMany as fault:
            self._refuse(fault.args[0], words)

    def error(self, message: str, near: str = "") -> NoReturn:
        unread = message.removeprefix("unrecognized arguments: ")
        if unread != message:
            raise _TooMany(unread)
        raise UserError(f"{' '.join(message.split())}; {near}--help lists the flags")

    def _spelled(self, word: str) -> str:
        """``word``, a flag as it is declared."""
        word = _underscored(word)
        flag, equals, value = word.partition("=")
        now = f"--{FORMER.get(flag[2:], '')}"
        known = self._option_string_actions
        return f"{now}{equals}{value}" if flag not in known and now in known else word

    def _check_flags(self, words: Sequence[str]) -> None:
        """Say which flag is empty, or is none, before it is missed under its right name."""
        known, before = self._option_string_actions, ""
        for word in words:
            flag = word.partition("=")[0]
            if word == "--":
                return
            if flag.startswith("--") and " " not in flag and flag not in known:
                names = [each[2:] for each in known if each.startswith("--")]
                self.error(f"there is no flag {flag}", nearest(flag[2:], names, "--"))
            if word == f"{flag}=" or (not word and before in known):
                self.error(f"{flag or before} is empty; give at least one value")
            before = word

    def _refuse(self, unread: str, words: Sequence[str]) -> NoReturn:
        """Say of words too many whether the first is a flag's second value."""
        for flag, _value, word in zip(words, words[1:], words[2:], strict=False):
            action = self._option_string_actions.get(flag)
            if f"{unread} ".startswith(f"{word} ") and action and action.nargs is None:
                self.error(f"{flag} takes one value here, and {word!r} is a second")
        self.error(f"there is no place for {unread!r}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Of lists, words may be lists with commas."""
        if action.nargs in ("+", "*") and arg_strings and action.dest not in _WHOLE:
            words = [part.strip() for word in arg_strings for part in word.split(",")]
            arg_strings = [word for word in words if word]
            if not arg_strings:
                name = (action.option_strings or [str(action.metavar or action.dest)])[0]
                self.error(f"{name} is empty; give at least one value")
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            flag = (action.option_strings or [str(action.metavar or action.dest)])[0]
            said = f"{flag} takes one of {', '.join(known)}, not {value!r}"
            self.error(said, nearest(str(value), known))

    def shared(self, name: str, default: Any = None, words: str = "", **how: Any) -> None:
        """Add a flag that several commands have, in the words of ``HELP`` for it or ``words``."""
        said = "" if default is None else f" (default: {default})"
        text = worded(name, HELP[words or name]) + said
        self.add_argument(f"--{name}", default=default, metavar=name.upper(), help=text, **how)

    def whole(
        self,
        name: str,
        least: int,
        text: str,
        default: int | None = None,
        below: int = 2**63,  # torch and tables hold no more
        **how: Any,
    ) -> None:
        """Add a flag that takes a whole number of at least ``least`` and ``below`` another."""

        def checked(word: str) -> int:
            try:
                value = int(word)
            except ValueError:
                value = least - 1
            if not least <= value < below:
                most = f" and below {below}" if value >= below else ""
                raise UserError(
                    f"--{name} takes a whole number of at least {least}{most}, not {word}"
                )
            return value

        said = "" if default is None else f" (default: {default})"
        self.add_argument(
            f"--{name}",
            type=checked,
            default=default,
            metavar=name.upper(),
            help=text + said,
            **how,
        )

    def number(
        self,
        name: str,
        fits: Callable[[float], bool],
        wanted: str,
        text: str,
        default: Any = None,
        **how: Any,
    ) -> None:
        """Add a flag that takes a finite number, or several, that ``fits``: ``wanted`` in words."""

        def checked(word: str) -> float:
            try:
                value = float(word)
            except ValueError:
                value = math.nan
            if not (math.isfinite(value) and fits(value)):
                self.error(f"--{name} takes {wanted}, not {word!r}")
            return value

        how = {"metavar": name.upper()} | how
        self.add_argument(f"--{name}", type=checked, default=default, help=text, **how)

    def speedup(self, default: float | None, said: str) -> None:
        """Add ``--speedups`` for a command that takes one; ``said`` is the default in words."""
        text = f"{HELP['speedup']} (default: {said})"
        self.number("speedups", lambda x: x >= 1, "one number of at least 1 here", text, default)

    def method(self, text: str, **how: Any) -> None:
        """Add ``--methods`` for a command that takes one; ``text`` is what happens to it."""
        text = HELP["methods"].replace("methods to compare", f"the one method to {text}")
        text = text.replace("one,other(layer=3, mode=name)", "name(layer=3, mode=name)")
        self.add_argument("--methods", metavar="METHOD", help=text, **how)

    def runs(self) -> None:
        """Add the runs that a command reads."""
        self.add_argument("runs", nargs="+", type=path_of, metavar="RUN", help=HELP["run"])

    def model(self, dtype: bool = True, shapes: bool = False, spread: bool = True) -> None:
        """Add the flags of a model, and of what it computes on.

        ``dtype``: its precision, too; ``shapes``: random weights will do; ``spread``: it may lie
        on several devices.
        """
        self.shared("model", EMBEDDED, "shape" if shapes else "")
        self.shared("device", "auto", "" if spread else "one_device")
        if dtype:
            self.shared("dtype", "float32", choices=CHOICES["dtype"])
        self.shared("attn_implementation", choices=CHOICES["attn_implementation"])
        self.shared("revision")
        self.add_argument(
            "--trust_remote_code", action="store_true", help=HELP["trust_remote_code"]
        )
        self.whole("threads", 1, HELP["threads"], below=2**16)


def _wrapped(text: str) -> str:
    """``text`` in lines that fit the terminal; its own line ends stay."""
    width = max(11, min(shutil.get_terminal_size().columns, PIPE_WIDTH) - 2)
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="  " * line.startswith(" "))
        for line in text.split("\n")
    )


def _underscored(argument: str) -> str:
    """A flag with underscores for dashes, as it is declared; anything else as it is."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    # BooleanOptionalAction spells its negation with a dash.
    negated = name.startswith(("no-", "no_"))
    name = name.removeprefix("no-").removeprefix("no_") if negated else name
    return f"--{'no-' if negated else ''}{name.replace('-', '_')}{equals}{value}"
