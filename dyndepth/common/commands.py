"""What every command does alike: it reads flags and prints tables."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NoReturn

from dyndepth.common.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


PIPE_WIDTH = 200
"""Columns where no terminal tells its width; rich would fold everything into 80."""


def print_table(table: Table) -> None:
    """Print ``table`` to standard output."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=PIPE_WIDTH)).print(table)


CHOICES = {
    "phases": ("both", "generation", "published"),
    "timing": ("off", "quick", "full"),
    "resume": ("only-missing", "always", "never"),
    "dtype": ("float32", "bfloat16", "float16"),
    "attn_implementation": ("sdpa", "eager"),
    "executor": ("inline", "processes", "ray"),
}


HELP = {
    "methods": "methods to compare, with parameters in brackets where wanted: "
    "'one,other(layer=3, mode=name)'; `python -m dyndepth ls methods` lists them",
    "model": "'embedded', a hub id or a local path",
    "tasks": "tasks or suites; `python -m dyndepth ls tasks` lists them",
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
    "batch_size": "most sequences scored at once; fewer where they are long",
    "device": "auto, cpu, cuda, cuda:1, ..., or spread: one model over all GPUs",
    "dtype": "of weights and arithmetic",
    "attn_implementation": "transformers' attention kernel; the model's own choice unless given",
    "revision": "branch, tag or commit of a hub model",
    "trust_remote_code": "let a hub model run code of its own",
    "include_path": "folder with further lm-eval task files",
    "corpus": "calibration and training text: 'embedded', or a path to a .txt or .jsonl file",
    "timing": "wall-clock measurement of each cell",
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
    "debug": "print the whole traceback of every error",
    "config": "YAML file with any of these settings; flags override it",
}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())}; --help lists the flags")


def underscored(argument: str) -> str:
    """A flag with underscores for dashes, as it is declared; anything else as it is."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    # BooleanOptionalAction spells its negation with a dash.
    negated = name.startswith(("no-", "no_"))
    name = name.removeprefix("no-").removeprefix("no_") if negated else name
    return f"--{'no-' if negated else ''}{name.replace('-', '_')}{equals}{value}"
