"""Whatever is wrong with a command line or a file: one sentence, a status, and nothing written.

Each case is a real command in a folder of broken things. It must end with its status and say, in
one sentence on stderr, what is wrong and what would be right; afterwards every file in the folder
must be what it was.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cells import cell
from folders import tiny_folder

from dyndepth.cells.cell import Cell
from dyndepth.cells.store import Store
from dyndepth.common.files import cache_root
from dyndepth.results.tables import write_tables

PROGRESS = re.compile(r"|Loading weights: .*it/s\]")
"""Lines on stderr that are no sentences: the bar of a library that loads a model."""

TINY = "--model model --corpus corpus.txt"


@dataclass(frozen=True)
class Case:
    """One wrong command.

    Attributes:
        name: of the test.
        command: what stands behind ``python -m dyndepth.``, words split at blanks; ``''`` stands
            for the empty word.
        culprit, remedy: patterns of what the sentence must name.
        status: of the exit.
        warnings: lines on stderr, each beginning with ``warning:``, beside the sentence.
    """

    name: str
    command: str
    culprit: str
    remedy: str
    status: int = 2
    warnings: int = 0

    def words(self) -> list[str]:
        return ["" if word == "''" else word for word in self.command.split(" ")]


def flags() -> list[Case]:
    """Flags: unknown, misspelt, without value, of a wrong type, out of range, contradictory."""
    least = "whole number of at least"
    help_ = "--help lists the flags"
    return [
        Case("sweep-unknown-flag", "sweep --surprise 1", "--surprise", help_),
        Case("sweep-misspelt-flag", "sweep --methds uls", "--methds", help_),
        Case("sweep-abbreviated-flag", "sweep --meth uls", "--meth", help_),
        Case("sweep-no-value", "sweep --limit", "--limit: expected one argument", help_),
        Case("sweep-stray-word", "sweep uls", "no place for 'uls'", help_),
        Case("sweep-newline-in-flag", "sweep --a\nb", "--a", help_),
        Case("sweep-speedup-below-1", "sweep --speedups 0.9", "not 0.9", "of at least 1"),
        Case("sweep-speedup-text", "sweep --speedups fast", "'fast'", "numbers of at least 1"),
        Case("sweep-speedup-nan", "sweep --speedups nan", "'nan'", "numbers of at least 1"),
        Case("sweep-speedup-infinite", "sweep --speedups inf", "inf", "finite numbers"),
        Case("sweep-speedups-empty", "sweep --speedups ''", "--speedups is empty", "at least one"),
        Case("sweep-limit-zero", "sweep --limit 0", "'0'", f"{least} 1, or none for all"),
        Case("sweep-limit-of-task-zero", "sweep --limit 3,quartz=0", "'0'", "or none for all"),
        Case("sweep-limit-negative", "sweep --limit -3", "'-3'", least),
        Case("sweep-limit-text", "sweep --limit some", "'some'", least),
        Case("sweep-limit-other-task", "sweep --limit 3,piqa=2 " + TINY, "'piqa'", "tasks are"),
        Case("sweep-limit-no-task", "sweep --limit 3,=2 " + TINY, "''", "tasks are"),
        Case("sweep-seed-fraction", "sweep --seed 1.5", "'1.5'", least),
        Case("sweep-seed-beyond", f"sweep --seed {2**80} {TINY}", f"{2**80}", "below 2"),
        Case("sweep-seed-in-time", "sweep --seed 2024-01-01", "'2024-01-01'", least),
        Case("sweep-batch-zero", "sweep --batch_size 0", "--batch_size", least),
        Case("sweep-fewshot-text", "sweep --num_fewshot few", "--num_fewshot.*'few'", least),
        Case("sweep-timing", "sweep --timing slow", "'slow'", "off, quick, full"),
        Case("sweep-mode", "sweep --mode fast", "'fast'", "eager, graphs, both"),
        Case("sweep-graphs", "sweep --device cpu --mode graphs " + TINY, "graphs need", "CUDA"),
        Case("sweep-resume", "sweep --resume perhaps", "'perhaps'", "only-missing, always, never"),
        Case("sweep-dtype", "sweep --dtype float8", "'float8'", "float32, bfloat16, float16"),
        Case("sweep-attention", "sweep --attn_implementation f", "'f'", "sdpa, eager"),
        Case("sweep-phases", "sweep --phases prompt", "'prompt'", "both, generation, published"),
        Case("sweep-methods-empty", "sweep --methods ''", "--methods is empty", "at least one"),
        Case("timing-methods-empty", "timing --methods=", "--methods is empty", "at least one"),
        Case("leaderboard-output-empty", "leaderboard run --output_path ''",
             "--output_path is empty", "at least one"),
        Case("fit-seed-beyond", f"fit uls {TINY} --seed {2**80}", f"{2**80}", "below 9223"),
        Case("fit-threads-beyond", f"fit uls {TINY} --threads {2**80}", "--threads", "below 65536"),
        Case("importance-output-in-file", f"importance last {TINY} --output_path corpus.txt/a",
             "corpus.txt/a", "give a folder"),
        Case("importance-until-nan", "importance --until nan", "'nan'", "share above 0"),
        Case("gpu-minutes", "gpu --minutes inf", "'inf'", "above 0"),
        Case("sweep-two-limits", "sweep --limit 3 4", "'4' is a second", "takes one value"),
        Case("sweep-model-empty", "sweep --model ''", "--model is empty", "at least one"),
        Case("sweep-device", f"sweep {TINY} --device abacus", "'abacus'", "use 'cpu'"),
        Case("sweep-output-is-file", "sweep --output_path corpus.txt", "corpus.txt", "a folder"),
        Case("sweep-output-in-file", f"sweep {TINY} --output_path corpus.txt/a", "corpus.txt/a",
             "give a folder"),
        Case("sweep-output-long", f"sweep --output_path {'a' * 300}", "300 bytes", "shorter"),
        Case("sweep-output-nobody", "sweep --output_path ~nobody.here/a", "nobody.here",
             "can't be a path"),
        Case("sweep-model-long", f"sweep --model {'a' * 300}", "300 bytes", "shorter"),
        Case("sweep-include-missing", "sweep --include_path absent", "absent", "folder"),
        Case("sweep-include-is-file", "sweep --include_path corpus.txt", "corpus.txt", "folder"),
        Case("fit-no-method", "fit", "METHOD is missing", help_),
        Case("fit-unknown-method", "fit ulss", "'ulss'", "did you mean uls"),
        Case("fit-unknown-flag", "fit uls --spacin even", "--spacin", help_),
        Case("fit-parameter", f"fit uls {TINY} --spacing odd", "'odd'", "paper, even"),
        Case("fit-speedup-text", "fit uls --speedups fast", "'fast'", help_),
        Case("fit-speedup-below-1", f"fit uls {TINY} --speedups 0.5", "0.5", "at least 1"),
        Case("fit-speedup-nan", f"fit uls {TINY} --speedups nan", "nan", "at least 1"),
        Case("fit-out-of-reach", f"fit uls {TINY} --speedups 99", "99x", "at most"),
        Case("fit-threads", f"fit uls {TINY} --threads 0", "--threads.*0", least),
        Case("fit-seed-negative", f"fit uls {TINY} --seed -1", "-1", least),
        Case("fit-joint", f"fit uls {TINY} --recovery joint", "uls trains nothing", "lora"),
        Case("fit-output-is-file", "fit uls --output_path corpus.txt", "corpus.txt", "folder"),
        Case("timing-no-method", "timing", "--method", help_),
        Case("timing-unknown-flag", "timing --methods uls --x 1", "--x", help_),
        Case("timing-bound", f"timing --methods oracle {TINY}", "oracle is a bound", "sweep"),
        Case("timing-out-of-reach", f"timing --methods uls --speedups 9 {TINY}", "9", "speedup of"),
        Case("timing-threads", f"timing --methods uls {TINY} --threads 0", "--threads", least),
        Case("timing-dtype", f"timing --methods uls {TINY} --dtype int8", "'int8'", "float32"),
        Case("timing-attention", "timing --methods uls --attn_implementation f", "'f'", "sdpa"),
        Case("timing-level", "timing --methods uls --timing slow", "'slow'", help_),
        Case("timing-mode", "timing --methods uls --mode fast", "'fast'", help_),
        Case("timing-shapes", f"timing --methods uls {TINY} --timing_shapes 512", "'512'",
             "BATCHxLENGTH"),
        Case("timing-shapes-long", f"timing --methods uls {TINY} --timing_shapes 1x9999", "9999",
             "longer"),
        Case("break-even-flag", "timing break-even --lenght 3", "--lenght", help_),
        Case("break-even-fraction", "timing break-even --fractions 1.5", "1.5", "between 0 and 1"),
        Case("break-even-fraction-nan", "timing break-even --fractions nan", "nan", "between 0"),
        Case("break-even-repeats", "timing break-even --repeats 2", "--repeats", f"{least} 6"),
        Case("break-even-output", "timing break-even --output_path model", "model", "name the CSV"),
        Case("limits-tokens", "timing limits --tokens 3", "--tokens", f"{least} 256"),
        Case("importance-criterion", "importance gredy", "'gredy'", "did you mean greedy"),
        Case("importance-unit", "importance angular --unit sublayer", "angular", "must be block"),
        Case("importance-until", "importance --until 0", "not '0'", "share above 0"),
        Case("importance-windows", "importance --windows 0", "windows", "at least 1"),
        Case("importance-keep", f"importance {TINY} --keep_first 9", "9|blocks", "block"),
        Case("importance-output", "importance --output_path corpus.txt", "corpus.txt", "folder"),
        Case("generate-nothing", "generate", "PROMPT", help_),
        Case("generate-picture", "generate a --plot a.gif", "--plot.*'a.gif'", "ends in"),
        Case("generate-drawn", "generate a --top_k 3", "top_k", "temperature above 0"),
        Case("generate-long", f"generate a --max_new_tokens 99999 {TINY}", "99999", "smaller"),
        Case("routes-nothing", "routes", "nothing to record", "--methods"),
        Case("routes-picture", "routes --methods uls --plot a.gif", "--plot.*'a.gif'", "ends in"),
        Case("routes-two-texts", f"routes --methods uls --text a --prompt b {TINY}",
             "--prompt and --text", "give one"),
        Case("routes-both", "routes run --methods uls", "--methods can't be given", "run's folder"),
        Case("routes-documents", "routes run --limit 0", "--limit", least),
        Case("routes-no-cells", "routes empty", "empty holds no", "--output_path of a sweep"),
        Case("routes-text", f"routes --methods uls --text absent.txt --output_path out {TINY}",
             "absent.txt", "can't be read"),
        Case("studies-unknown", "studies skipgptt", "'skipgptt'", "there are .*skipgpt"),
        Case("studies-no-name", "studies", "NAME", help_),
        Case("studies-flag", "studies skipgpt --tasks x", "--tasks", help_),
        Case("studies-model-long", f"studies skipgpt --model {'a' * 300}", "300 bytes", "shorter"),
        Case("studies-speedups", "studies skipgpt --speedups 0", "not 0", "at least 1"),
        Case("studies-report-of-nothing", "studies skipgpt --only_report --output_path empty",
             "empty", "."),
        Case("leaderboard-nothing", "leaderboard", "RUN", help_),
        Case("leaderboard-flag", "leaderboard run --otput_path x", "--otput_path", help_),
        Case("leaderboard-output-is-file", "leaderboard run --output_path corpus.txt",
             "corpus.txt", "give a folder"),
        Case("compare-budget-text", "compare run --at x", "'x'", help_),
        Case("comparison-budget-below-1", "comparison run --at 0.5", "0.5", "at least 1"),
        Case("compare-budget-nan", "compare run --at nan", "nan", "at least 1"),
        Case("compare-task", "compare run --tasks three", "three", "scored were one"),
        Case("compare-output-is-file", "compare run --output_path corpus.txt",
             "corpus.txt", "folder"),
        Case("plots-format", "plots run --format gif", "'gif'", help_),
        Case("plots-output-is-file", "plots run --output_path corpus.txt", "corpus.txt", "folder"),
        Case("tables-nothing", "tables", "RUN", help_),
        Case("verify-sample", "verify run --sample 0", "--sample", least),
        Case("verify-documents", "verify run --limit few", "few", least),
        Case("verify-both", "verify run --all --sample 2", "--all and --sample", "exclude"),
        Case("rerun-flag", "rerun run --mergd", "--mergd", help_),
        Case("rerun-cell", "rerun run zz", "'zz'", "first column"),
        Case("pages-flag", "pages --chek", "--chek", help_),
        Case("ls-what", "ls cats", "'cats'", "methods"),
        Case("ls-two", "ls methods tasks", "'tasks'", help_),
        Case("bench-part", "bench --parts shape", "'shape'", help_),
        Case("bench-repeats", "bench --repeats 0", "--repeats", least),
        Case("recovered-none", f"recovered --methods uls {TINY} --recovery none", "none", "lora"),
        Case("recovered-flag", "recovered --methods uls --x", "--x", help_),
    ]  # fmt: skip


def devices() -> list[Case]:
    """Devices that no machine has, in every command that takes one."""
    out = "--output_path out"
    commands = {
        "sweep": f"sweep {TINY} {out}",
        "fit": f"fit --methods uls {TINY} {out}",
        "recovered": f"recovered --methods uls --speedups 2 {TINY}",
        "importance": f"importance last {TINY}",
        "timing": f"timing --methods uls {TINY}",
        "break-even": "timing break-even --model model",
        "limits": "timing limits --model model",
        "routes": f"routes --methods uls --speedups 2 {TINY} {out}",
        "generate": f"generate a --methods uls --speedups 2 {TINY}",
        "studies": f"studies embedded --speedups 1.5 {TINY} {out}",
        "bench": "bench --model model",
        "gpu": "gpu --small",
        "gpu-checks": "gpu checks --small",
        "gpu-training": "gpu training --small",
    }
    return [
        Case(f"{name}-device-{device}", f"{command} --device {device}", f"'{device}'", "use 'cpu'")
        for name, command in commands.items()
        for device in ("cuda:99", "meta")
    ] + [
        Case("verify-device", "verify run --device cuda:99", "cuda", "--device cpu"),
        Case("verify-device-meta", "verify run --device meta", "'meta'", "use 'cpu'"),
        Case("verify-include", "verify run --include_path absent", "absent", "is no folder"),
    ]


def specs() -> list[Case]:
    """Specifications of methods, recoveries and tasks."""
    sweep = f"sweep {TINY} --output_path out --timing off"
    return [
        Case("method-unknown", f"{sweep} --methods zzz", "'zzz'", "ls methods"),
        Case("method-near", f"{sweep} --methods early_exot", "'early_exot'",
             "did you mean early_exit"),
        Case("method-parameter", f"{sweep} --methods uls(spacin=even)", "'spacin'",
             "did you mean spacing"),
        Case("method-parameter-type", f"{sweep} --methods early_exit(layer=deep)", "'deep'",
             "an integer"),
        Case("method-parameter-choice", f"{sweep} --methods uls(spacing=odd)", "'odd'",
             "one of paper, even"),
        Case("method-parameter-range", f"{sweep} --methods early_exit(every=0)", "every",
             "at least 1"),
        Case("method-bracket", f"{sweep} --methods uls(spacing=even", "uls", "unbalanced"),
        Case("method-closed-twice", f"{sweep} --methods uls)", "uls", "unbalanced"),
        Case("method-quote", f"{sweep} --methods uls(spacing='even)", "uls", "unbalanced"),
        Case("method-twice", f"{sweep} --methods uls(spacing=even,spacing=odd)", "'spacing'",
             "given twice"),
        Case("method-empty-entry", f"{sweep} --methods uls,,dense", "uls,,dense", "empty entry"),
        Case("method-no-equals", f"{sweep} --methods uls(even)", "'even'", "parameter=value"),
        Case("method-code", f"{sweep} --methods __import__('os')", "__import__",
             "unknown method|can't be read"),
        Case("method-own-speedup", f"{sweep} --methods uls(target_speedup=2)", "target_speedup",
             "--speedups"),
        Case("method-out-of-reach", f"{sweep} --methods uls --speedups 99", "99x", "at most"),
        Case("recovery-unknown", f"{sweep} --recovery lorra", "'lorra'", "did you mean lora"),
        Case("recovery-parameter", f"{sweep} --recovery lora(ranc=2)", "'ranc'",
             "did you mean rank"),
        Case("recovery-range", f"{sweep} --recovery lora(rank=0)", "not 0", "at least 1"),
        Case("recovery-infinite", f"{sweep} --recovery lora(rate=inf)", "inf", "positive"),
        Case("recovery-nan", f"{sweep} --recovery lora(alpha=nan)", "nan", "positive"),
        Case("recovery-preset", f"{sweep} --recovery lora(preset=big)", "'big'", "paper"),
        Case("recovery-preset-type", f"{sweep} --recovery lora(preset=3)", "3", "paper"),
        Case("recovery-role", f"{sweep} --recovery lora(targets=querry)", "'querry'",
             "did you mean query"),
        Case("recovery-bracket", f"{sweep} --recovery lora(rank=2", "rank=2", "unbalanced"),
        Case("recovery-joint-untrained", f"{sweep} --methods uls --recovery joint", "uls",
             "use lora"),
        Case("task-unknown", f"{sweep} --tasks quarts", "'quarts'", "did you mean quartz"),
        Case("task-empty", f"{sweep} --tasks ''", "--tasks is empty", "at least one"),
        Case("task-commas", f"{sweep} --tasks ,", "--tasks is empty", "at least one"),
        Case("task-file-broken", f"{sweep} --tasks broken --include_path tasks/broken", "broken",
             "."),
        Case("task-file-incomplete", f"{sweep} --tasks half --include_path tasks/half", "half",
             "cannot be loaded"),
        Case("task-file-listed", f"{sweep} --tasks listed --include_path tasks/listed", "listed",
             "."),
    ]  # fmt: skip


def configs() -> list[Case]:
    """YAML files."""
    cases = [
        ("missing", "absent.yaml", "cannot be read"),
        ("invalid", "invalid.yaml", "not valid YAML"),
        ("list", "list.yaml", "must map settings"),
        ("text", "text.yaml", "must map settings"),
        ("unknown-key", "unknown-key.yaml.*'speed'", "known: .*speedups"),
        ("type-methods", "--methods.*3", "names with parameters"),
        ("type-speedups", "--speedups.*'fast'", "numbers of at least 1"),
        ("type-speedups-mapping", "--speedups", "numbers of at least 1"),
        ("type-seed", "--seed.*True", "whole number"),
        ("type-limit", "--limit.*'few'", "whole number"),
        ("type-dry", "dry_run.*'perhaps'", "true or false"),
        ("type-tasks", "--tasks.*1", "names"),
        ("type-model", "--model.*3", "text"),
        ("type-output", "--output_path", "text"),
        ("null-speedups", "--speedups.*None", "numbers"),
        ("binary", "binary.yaml", "save it as UTF-8"),
        ("folder", "folder.yaml", "cannot be read"),
        ("tag", "tag.yaml", "not valid YAML"),
        ("unhashable", "unhashable.yaml", "not valid YAML"),
        ("deep", "deep.yaml", "not valid YAML"),
        ("recursive", r"\[\[\.\.\.\]\]", "write name"),
        ("date", "date.yaml", "not valid YAML"),
        ("empty-entry", "--methods|uls", "empty entry"),
        ("null-character", "--output_path", "null character"),
    ]
    return [
        Case(f"config-{name}", f"sweep --config configs/{name if name != 'missing' else 'absent'}"
             ".yaml", culprit, remedy)
        for name, culprit, remedy in cases
    ]  # fmt: skip


def loading() -> list[Case]:
    """Models, corpora, routers and checkpoints."""
    sweep = "sweep --corpus corpus.txt --output_path out --timing off --tasks last_word --limit 1"
    fit = "fit skipgpt --model model --corpus corpus.txt --speedups 1.5 --output_path out"
    named = [
        ("missing", "./absent", "give a folder"),
        ("file", "./corpus.txt", "give a folder"),
        ("hub", "nobody/nothing", "use 'embedded'"),
        ("empty", "models/empty", "no config.json"),
        ("garbled", "models/garbled", "can't be read"),
        ("listed", "models/listed", "can't be read"),
        ("binary", "models/binary", "can't be read"),
        ("nameless", "models/nameless", "can't be read"),
        ("mamba", "mamba", "llama"),
        ("bert", "models/bert", "ForCausalLM"),
        ("weightless", "models/weightless", "can't be loaded"),
        ("truncated", "models/truncated", "can't be loaded|incomplete"),
        ("noise", "models/noise", "can't be loaded"),
        ("incomplete", "models/incomplete", "get a complete copy"),
        ("shapes", "models/shapes", "can't be loaded"),
        ("untokenized", "models/untokenized", "tokenizer"),
    ]
    found = [
        Case(f"model-{name}", f"{sweep} --model {'models/mamba' if name == 'mamba' else culprit}",
             culprit, remedy)
        for name, culprit, remedy in named
    ]  # fmt: skip
    corpora = [
        ("missing", "absent.txt", "give a .txt or .jsonl"),
        ("folder", "model", "give a .txt or .jsonl"),
        ("ending", "corpora/text.csv", "neither a .txt nor a .jsonl"),
        ("empty", "corpora/empty.txt", "at least 2 are needed"),
        ("one", "corpora/one.txt", "at least 2 are needed"),
        ("latin", "corpora/latin.txt", "not UTF-8"),
        ("json", "corpora/json.jsonl", "not JSON lines"),
        ("number", "corpora/number.jsonl", "must be a string or an object"),
        ("keyless", "corpora/keyless.jsonl", "must be a string or an object"),
        ("deep", "corpora/deep.jsonl", "not JSON lines"),
        ("short", "too short", "give more text"),
    ]
    for name, culprit, remedy in corpora:
        path = "corpora/short.txt" if name == "short" else culprit
        found.append(
            Case(f"corpus-{name}",
                 f"importance attention --model model --corpus {path} --output_path out",
                 "at least 2|different documents" if name in ("empty", "one") else culprit, remedy)
        )  # fmt: skip
    routers = [
        ("missing", "absent", "no folder with fitted routers"),
        ("file", "corpus.txt", "no folder with fitted routers"),
        ("empty", "routers/empty", "no folder with fitted routers"),
        ("garbled", "routers/garbled", "."),
        ("card", "routers/card", "fit again"),
        ("cardless", "routers/cardless", "no facts.json in it"),
        ("other", "routers/other", "another model"),
        ("shape", "routers|blocks", "."),
        ("changed", "have changed", "asked for"),
    ]
    for name, culprit, remedy in routers:
        path = {"missing": "absent", "file": "corpus.txt", "changed": "routers/good@abc"}.get(
            name, f"routers/{name}"
        )
        found.append(
            Case(f"routers-{name}",
                 f"{fit} --normalise false --threshold zero --routers {path}", culprit, remedy)
        )  # fmt: skip
    return found


def runs() -> list[Case]:
    """What is handed to the commands that read runs."""
    found = []
    for command in ("leaderboard", "compare", "plots", "verify", "tables", "rerun", "routes"):
        only = " --only_stored" if command == "verify" else ""
        for name, path in (("missing", "absent"), ("empty", "empty"), ("file", "corpus.txt")):
            found.append(
                Case(f"{command}-of-{name}", f"{command} {path}{only}", path,
                     "output_path of a sweep|sweep's --output_path")
            )  # fmt: skip
    for name in ("truncated", "garbled", "format", "renamed", "packed"):
        found += [
            Case(f"leaderboard-cell-{name}", f"leaderboard cells/{name}", f"cells/{name} holds no",
                 "--output_path of a sweep", warnings=1),
            Case(f"compare-cell-{name}", f"compare cells/{name}", f"cells/{name} holds no",
                 "--output_path of a sweep", warnings=1),
        ]  # fmt: skip
    found += [
        Case("sweep-into-other-model", f"sweep {TINY} --output_path run", "model tiny",
             "choose another --output_path"),
        Case("leaderboard-mixed-data", "leaderboard run otherdata", "evaluation data",
             "separate leaderboards"),
        Case("leaderboard-mixed-versions", "leaderboard run otherversion", "task one has version",
             "separate leaderboards"),
        Case("leaderboard-rows-missing", "leaderboard rows/missing", "cell .*no metric", "verify"),
        Case("leaderboard-rows-text", "leaderboard rows/text", "tokens='many'", "not a number"),
        Case("compare-rows-missing", "compare rows/missing", "cell .*no metric", "verify"),
        Case("compare-rows-outcomes", "compare rows/outcomes", "outcomes='{'", "a JSON"),
        Case("compare-rows-flops", "compare rows/flops", "no block_flops", "sweep again"),
    ]  # fmt: skip
    tables = [
        ("columnless", "leaderboard.csv: column 'sell'"),
        ("truncated", "leaderboard.csv can't be read as a table"),
        ("text", "leaderboard.csv.*'fast' is no number"),
        ("binary", "leaderboard.csv.*can't be read"),
        ("bare", "leaderboard.csv.*can't be read"),
        ("accuracy-columnless", "accuracy.csv: column 'tusk'"),
        ("accuracy-text", "accuracy.csv.*'good' is no number"),
        ("routing-truncated", "routing.parquet.*can't be read"),
        ("routing-columnless", "routing.parquet: column 'executed' is missing"),
    ]
    found += [
        Case(f"plots-table-{name}", f"plots tables/{name}", culprit, "dyndepth.tables RUN")
        for name, culprit in tables
    ]
    return found


CASES = [*flags(), *devices(), *specs(), *configs(), *loading(), *runs()]

CONFIGS: dict[str, str | bytes] = {
    "invalid": "methods: [uls",
    "list": "- methods\n- uls",
    "text": "methods",
    "unknown-key": "speed: 2",
    "type-methods": "methods: 3",
    "type-speedups": "speedups: [2, fast]",
    "type-speedups-mapping": "speedups: {a: 2}",
    "type-seed": "seed: [true]",
    "type-limit": "limit: {quartz: few}",
    "type-dry": "dry_run: perhaps",
    "type-tasks": "tasks: [1]",
    "type-model": "model: 3",
    "type-output": "output_path: [a]",
    "null-speedups": "speedups: null",
    "binary": b"\x80\x81\xfe\xff\x00",
    "tag": "!!python/object/apply:os.mkdir [hacked]",
    "unhashable": "? [a]\n: 1\n? {b: 1}\n: 2",
    "deep": "a: " + "[" * 5000,
    "recursive": "methods: &a [*a]",
    "date": "limit: 2024-99-99",
    "empty-entry": "methods: uls,,dense",
    "null-character": 'output_path: "a\\0b"',
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of broken things, with a sound ``model``, ``corpus.txt`` and ``run`` in it."""
    folder = tiny_folder(tmp_path_factory.mktemp("scene"))
    for name in ("empty", "models", "corpora", "configs", "tasks", "routers"):
        (folder / name).mkdir()
    for name, text in CONFIGS.items():
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "configs" / f"{name}.yaml").write_bytes(content)
    (folder / "configs" / "folder.yaml").mkdir()
    _corpora(folder / "corpora")
    _tasks(folder / "tasks")
    _models(folder)
    _routers(folder)
    _runs(folder)
    return folder


def _corpora(folder: Path) -> None:
    texts: dict[str, str | bytes] = {
        "text.csv": "a,b",
        "empty.txt": "",
        "one.txt": "one document only",
        "latin.txt": "caf\xe9\n\nth\xe9".encode("latin-1"),
        "json.jsonl": '"one"\n{"text": \n',
        "number.jsonl": '"one"\n2\n"three"',
        "keyless.jsonl": '{"txt": "one"}\n{"text": "two"}',
        "deep.jsonl": "[" * 100_000,
        "short.txt": "one\n\ntwo\n\nthree",
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def _tasks(folder: Path) -> None:
    texts = {"broken": "task: broken\ndataset_path: [", "half": "task: half\n", "listed": "- a"}
    for name, text in texts.items():
        (folder / name).mkdir()
        (folder / name / f"{name}.yaml").write_text(text)


def _models(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    def spoilt(name: str, spoil: Callable[[Path], Any]) -> None:
        spoil(Path(shutil.copytree(folder / "model", folder / "models" / name)))

    def configured(**changes: Any) -> Callable[[Path], Any]:
        def spoil(path: Path) -> None:
            config = json.loads((path / "config.json").read_text())
            changed = {key: value for key, value in (config | changes).items() if value is not None}
            (path / "config.json").write_text(json.dumps(changed))

        return spoil

    def incomplete(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        del tensors["model.layers.2.mlp.up_proj.weight"]
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    def cut(path: Path) -> None:
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[: len(content) // 2])

    (folder / "models" / "empty").mkdir()
    spoilt("garbled", lambda path: (path / "config.json").write_text("{model_type:"))
    spoilt("listed", lambda path: (path / "config.json").write_text("[1, 2]"))
    spoilt("binary", lambda path: (path / "config.json").write_bytes(b"\x80\xff\x00"))
    spoilt("nameless", configured(model_type=None))
    spoilt("mamba", configured(model_type="mamba", architectures=["MambaForCausalLM"]))
    spoilt("bert", configured(model_type="bert", architectures=["BertForMaskedLM"]))
    spoilt("weightless", lambda path: (path / "model.safetensors").unlink())
    spoilt("truncated", cut)
    spoilt("noise", lambda path: (path / "model.safetensors").write_bytes(b"\x07" * 4096))
    spoilt("incomplete", incomplete)
    spoilt("shapes", configured(hidden_size=32))

    def untokenized(path: Path) -> None:
        for file in path.glob("tokenizer*"):
            file.unlink()

    spoilt("untokenized", untokenized)


def _routers(folder: Path) -> None:
    import torch
    from conftest import make_tiny

    from dyndepth.common.registry import load_method
    from dyndepth.fitting.fits import save_fit
    from dyndepth.models.fingerprints import fingerprint
    from dyndepth.models.loading import ModelInfo, load_model

    model = load_model(str(folder / "model"))
    other = make_tiny(hidden_size=16)
    other.dyndepth = ModelInfo("other", fingerprint(other), None)

    def made(name: str, model: Any, blocks: int = 4) -> Path:
        method = load_method("skipgpt(normalise=false, threshold=zero)", target_speedup=1.5)
        method.tensors = {"weight": torch.zeros(blocks, 2, 16), "bias": torch.ones(blocks, 2)}
        method.facts = {"threshold": 0.0, "normalise": False}
        save_fit(method, model, folder / "routers" / name)
        return folder / "routers" / name

    (folder / "routers" / "empty").mkdir()
    made("good", model)
    made("other", other)
    made("shape", model, blocks=3)
    (made("garbled", model) / "tensors.safetensors").write_bytes(b"\x00" * 64)
    (made("card", model) / "facts.json").write_text("{")
    (made("cardless", model) / "facts.json").unlink()


def made_cell(right: list[int] = [1, 0, 1, 1], **changes: Any) -> Cell:  # noqa: B006
    """A finished cell that can be compared with others."""
    speedup = {} if "method" not in changes else {"target_speedup": 1.5}
    made = cell(right, **speedup, **changes)
    for row in made.samples:
        row.update(block_flops=1e6 / made.identity["target_speedup"], dense_block_flops=1e6)
        row.update(total_flops=2e6, dense_total_flops=2e6)
    for row in made.compute:
        row["block_speedup"] = made.identity["target_speedup"]
    return made


def _runs(folder: Path) -> None:
    def run(name: str, **changes: Any) -> Path:
        store = Store(folder / name)
        for made in (made_cell(**changes), made_cell([1, 0, 0, 1], method="uls", **changes)):
            store.write(made)
        write_tables(store.all(), store.path)
        return store.path

    run("run")
    run("otherdata", data_fingerprint="y", git_commit="z")
    newer = Store(folder / "otherversion")
    made = made_cell(method="uls", seed=1)
    made.accuracy[0]["task_version"] = 2.0
    newer.write(made)

    def one(name: str, change: Callable[[Path], Any]) -> None:
        store = Store(folder / "cells" / name)
        store.write(made_cell())
        change(store.files()[0])

    def other_format(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))

    def packed(path: Path) -> None:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
        path.unlink()

    one("truncated", lambda path: path.write_bytes(path.read_bytes()[:200]))
    one("garbled", lambda path: path.write_bytes(b"\x80\x81"))
    one("format", other_format)
    one("renamed", lambda path: path.rename(path.with_name("dense-000000000000.json")))
    one("packed", packed)

    def rows(name: str, change: Callable[[Any], Any]) -> None:
        store, made = Store(folder / "rows" / name), made_cell()
        change(made)
        store.write(made)

    rows("missing", lambda made: made.accuracy[0].pop("metric"))
    rows("text", lambda made: made.compute[0].update(tokens="many"))
    rows("outcomes", lambda made: made.samples[0].update(outcomes="{"))
    rows("flops", lambda made: made.samples[0].pop("block_flops"))

    def table(name: str, file: str, change: Callable[[bytes], bytes]) -> None:
        place = run(f"tables/{name}") / file
        place.write_bytes(change(place.read_bytes()))

    def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
        def change(content: bytes) -> bytes:
            assert old in content
            return content.replace(old, new, 1)

        return change

    table("columnless", "leaderboard.csv", replaced(b"cell,", b"sell,"))
    table("truncated", "leaderboard.csv", lambda content: content[:-40] + b'"')
    table("text", "leaderboard.csv", replaced(b",0.75,", b",fast,"))
    table("binary", "leaderboard.csv", lambda content: b"\x80\x81\xfe\x00" * 64)
    table("bare", "leaderboard.csv", lambda content: b"")
    table("accuracy-columnless", "accuracy.csv", replaced(b",task,", b",tusk,"))
    table("accuracy-text", "accuracy.csv", replaced(b",0.75,", b",good,"))
    table("routing-truncated", "routing.parquet", lambda content: content[:-40])
    table("routing-columnless", "routing.parquet", lambda content: _without(content, "executed"))


def _without(content: bytes, column: str) -> bytes:
    import io

    import pandas

    table = pandas.read_parquet(io.BytesIO(content)).drop(columns=column)
    return bytes(table.to_parquet())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of its own: the shared assets, but no fits."""
    folder = tmp_path_factory.mktemp("cache")
    for part in ("assets", "models", "wheels"):
        if (cache_root() / part).is_dir():
            (folder / part).symlink_to(cache_root() / part)
    return folder


@pytest.fixture
def place(scene: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scene as working directory; the handler of SIGTERM is put back."""
    from dyndepth import tasks
    from dyndepth.models import loading

    def never() -> Path:
        raise AssertionError("a wrong command got as far as loading the embedded model")

    offline = tasks._manager
    monkeypatch.chdir(scene)
    monkeypatch.setenv("DYNDEPTH_CACHE", str(cache))
    monkeypatch.setattr(loading, "prepare_embedded", never)
    # Reading lm-eval's own 14,000 task files takes 20 seconds, and none of them is asked for.
    monkeypatch.setattr(tasks, "_manager", lambda path, include_defaults: offline(path, False))
    kept = signal.getsignal(signal.SIGTERM)
    yield scene
    signal.signal(signal.SIGTERM, kept)


def _content(folder: Path) -> dict[str, str]:
    """Every file and folder, with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


def _main(words: list[str]) -> int:
    """The exit status of a command, run in this process."""
    if words[0] == "import":
        from dyndepth.methods.skipgpt.published import main

        words = words[1:]
    else:
        from dyndepth.__main__ import main
    status = main(words)
    assert isinstance(status, int)
    return status


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_wrong_input_gets_one_sentence_and_changes_nothing(case: Case, place: Path, capfd) -> None:
    before = _content(place)
    status = _main(case.words())
    said = capfd.readouterr()
    lines = [line for line in said.err.splitlines() if not PROGRESS.fullmatch(line)]
    sentences = [line for line in lines if not line.startswith("warning: ")]
    assert status == case.status, said.out + said.err
    assert "Traceback" not in said.out + said.err
    assert len(sentences) == 1, said.err
    assert len(lines) - 1 == case.warnings, said.err
    assert re.search(case.culprit, sentences[0]), sentences[0]
    assert re.search(case.remedy, sentences[0]), sentences[0]
    after = _content(place)
    assert after == before, sorted(set(after.items()) ^ set(before.items()))


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (f"sweep {TINY} --methods zzz", "zzz"),
        ("fit uls --speedups 0.5", "not '0.5'"),
        ("importance gredy", "gredy"),
        ("routes", "nothing to record"),
        ("studies skipgptt", "skipgptt"),
        ("verify absent", "absent"),
    ],
)
def test_debug_shows_where_it_came_from(words, culprit, place, capfd):
    """The traceback, and after it the same sentence."""
    assert _main([*words.split(), "--debug"]) == 2
    told = capfd.readouterr().err.splitlines()
    assert told[0] == "Traceback (most recent call last):"
    assert any(line.startswith("  File ") for line in told)
    assert re.fullmatch(rf"dyndepth\.\w+: .*{culprit}.*", told[-1])
    assert _main(words.split()) == 2
    assert capfd.readouterr().err.splitlines() == told[-1:]


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ("sweep --methods uls(spacing=even --output_path out", "unbalanced"),
        ("sweep --config configs/tag.yaml --output_path out", "not valid YAML"),
        ("leaderboard cells/truncated --output_path out", "holds no cells"),
        ("plots tables/text", "'fast' is no number"),
    ],
)
def test_processes_end_with_the_status_and_no_traceback(words, culprit, place):
    before = _content(place)
    command, *arguments = words.split()
    done = subprocess.run(
        [sys.executable, "-m", f"dyndepth.{command}", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    sentence = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert sentence.startswith(f"dyndepth.{command}: ")
    assert culprit in sentence
    assert "Traceback" not in done.stdout + done.stderr
    assert _content(place) == before


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        ("leaderboard.csv", lambda content: content[:-40], "leaderboard.csv"),
        ("accuracy.csv", lambda content: content.replace(b",task,", b",tusk,", 1), "without task"),
        ("accuracy.csv", lambda content: content.replace(b",0.75,", b",good,", 1), "good"),
        ("compute.csv", lambda content: b"\x80\x81", "cannot be read"),
        ("routing.parquet", lambda content: content[:-40], "cannot be read"),
        ("samples.parquet", lambda content: b"", "cannot be read"),
        ("timing.csv", None, "table is missing"),
        ("cells", None, "file cannot be read as a cell"),
        ("manifest.json", lambda content: b"{", "cannot be read"),
    ],
)
def test_verify_names_what_was_damaged_and_fails(file, change, what, place, tmp_path, capfd):
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    manifest = run / "manifest.json"
    manifest.write_text('{"format": 1, "cells": {}}')
    if file == "cells":
        next((run / "cells").iterdir()).write_bytes(b"{")
    elif change is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(change((run / file).read_bytes()))
    before = _content(run)
    assert _main(["verify", str(run), "--only_stored"]) == 1
    said = capfd.readouterr()
    found = [line for line in said.out.splitlines() if "FAILED" in line]
    assert any(file.partition(".")[0] in line or "cell" in line for line in found)
    assert what in said.out
    assert "Traceback" not in said.out + said.err
    assert re.search(r"cells read, none computed again: \d+ failures?, \d+ notes?\.", said.out)
    assert _content(run) == before


def test_a_figure_that_cannot_be_drawn_is_named_and_the_others_are_drawn(place, tmp_path, capfd):
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    (run / "routes").mkdir()
    (run / "routes" / "cut.safetensors").write_bytes(b"\x07" * 64)
    assert _main(["plots", str(run), "--format", "svg"]) == 0
    said = capfd.readouterr()
    assert re.search(r"not drawn: routing/cut: .*cut\.safetensors", said.out)
    assert (run / "figures" / "accuracy_vs_flops.svg").is_file()
    assert "Traceback" not in said.out + said.err


def test_unreadable_cells_are_named_and_left_out(place, tmp_path, capfd):
    """The others make the table; each bad file is one warning."""
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    for number, content in enumerate((b"", b"{", b"[]", b"\x80\x81", b'{"format": 1}')):
        (run / "cells" / f"bad{number}.json").write_bytes(content)
    (run / "cells" / "bad.json.gz").write_bytes(b"\x1f\x8b\x00")
    assert _main(["leaderboard", str(run)]) == 0
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 6
    assert all(
        re.match(r"warning: .*bad\d?\.json.* cannot be read as a cell", line) for line in told
    )
