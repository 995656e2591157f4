"""The sweep's command line and YAML file, as one checked ``Settings``; nothing heavy is imported.

Flags carry lm-eval's names where lm-eval has one. A flag overrides the file, the file the default.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dyndepth.cells.mirror import is_url, mirrored
from dyndepth.cells.recipe import NONE, parse_recoveries
from dyndepth.cells.times import Shape
from dyndepth.common.commands import CHOICES, HELP, MODE_DEFAULT, Parser, worded
from dyndepth.common.errors import UserError
from dyndepth.common.files import read_text
from dyndepth.common.paths import EMBEDDED, check_folder, check_path, expanded, path_of, slug
from dyndepth.evaluation.chat import DEFAULT, Chat
from dyndepth.models.shapes import refuse_shape
from dyndepth.timing.levels import parse_shapes

SUITE = "offline"

LISTS = frozenset({"methods", "tasks", "speedups", "recovery", "seed", "trackers", "timing_shapes"})
"""Settings that take several values."""

PATHS = frozenset({"model", "include_path", "corpus", "log_json"})
"""Settings that are paths, or may be; ``output_path`` is looked at apart."""

BARE = {"apply_chat_template": DEFAULT, "fewshot_as_multiturn": "true"}
"""Flags that need no value, and what they are without one."""

MACHINES = CHOICES["assume"]
"""What a dry run can plan for, of ``estimate/machines.json``."""

PLANNING = ("assume", "tflops", "bandwidth", "memory_gib")
"""Settings that say which machine a dry run plans for."""

OTHERS = "*"
"""In a limit by task: every task that is not named."""

DEFAULT_LIMIT: dict[str, dict[str, int | None]] = {
    EMBEDDED: {OTHERS: 24, "last_word": 8, "wikipedia_bpb": 4, "title_generation": 4}
}
"""Documents by task, by model name: what three methods at three speedups can be scored on in a few
minutes on two cores, fewer where a document is long. Every other model is scored on all documents
unless --limit says otherwise."""


@dataclass(frozen=True)
class Settings:
    """Everything the user decided, checked one by one; what needs a registry or a model is not.

    ``methods`` is a specification for ``registry.parse_methods``, ``recovery`` holds canonical
    texts of ``recipe.parse_recovery``. ``timing_shapes`` are timed in place of those of the level
    ``timing``, if there are any. ``limit`` is documents by
    task (None: all of them), ``OTHERS`` standing for those not named; ``device`` is ``auto`` or
    what torch calls it; ``mode`` None is what ``timing.levels.modes_of`` makes of it. From
    ``executor`` on nothing changes what is computed. ``workers`` None is as many as the executor
    finds room for; ``shard`` is (which, of how many), from 1; ``cell_timeout`` is in seconds.
    ``PLANNING`` is the machine that a dry run plans for: its name, TFLOP/s, GB/s and GiB.
    """

    model: str = EMBEDDED
    methods: str = ""
    tasks: tuple[str, ...] = (SUITE,)
    speedups: tuple[float, ...] = (1.25, 1.5, 2.0)
    phases: str = "both"
    recovery: tuple[str, ...] = (NONE,)
    seed: tuple[int, ...] = (0,)
    sample_seed: int = 0
    limit: dict[str, int | None] = field(default_factory=lambda: {OTHERS: None})
    num_fewshot: int | None = None
    apply_chat_template: str | None = None
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    batch_size: int = 32
    device: str = "auto"
    dtype: str = "float32"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    include_path: str | None = None
    corpus: str = EMBEDDED
    timing: str = "quick"
    timing_shapes: tuple[Shape, ...] = ()
    mode: str | None = None
    compiled_dense: bool = False
    resume: str = "only-missing"
    output_path: Path = Path("runs")
    executor: str = "inline"
    workers: int | None = None
    cpus_per_cell: float | None = None
    gpus_per_cell: float | None = None
    ray_address: str | None = None
    shard: tuple[int, int] = (1, 1)
    cell_timeout: float | None = None
    log_json: str | None = None
    trackers: tuple[str, ...] = ()
    dry_run: bool = False
    assume: str | None = None
    tflops: float | None = None
    bandwidth: float | None = None
    memory_gib: float | None = None
    debug: bool = False


OPTIONAL = frozenset(
    {"attn_implementation", "revision", "include_path", "num_fewshot", "mode", "workers"}
    | {"apply_chat_template", "fewshot_as_multiturn", "system_instruction"}
    | {"cpus_per_cell", "gpus_per_cell", "ray_address", "cell_timeout", "log_json"}
    | set(PLANNING)
)
"""Settings that may be None."""


def parser() -> Parser:
    """The command line. Values are checked later, the same way as those of a YAML file."""
    built = Parser(
        "sweep",
        "Score, count and time methods at several speedups; write tidy tables.",
        debug=False,
    )
    for setting in fields(Settings):
        name, default = setting.name, setting.default
        text = worded(name)
        if isinstance(default, bool):
            built.add_argument(
                f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text
            )
            continue
        built.add_argument(
            f"--{name}",
            nargs="+" if name in LISTS else "?" if name in BARE else None,
            const=BARE.get(name),
            metavar=name.upper(),
            help=f"{text} (default: {_shown(name, default)})",
        )
    built.add_argument("--config", metavar="FILE", help=HELP["config"])
    return built


def _shown(name: str, default: Any) -> str:
    special = {
        "limit": f"{limit_text(DEFAULT_LIMIT[EMBEDDED])} for the embedded model, else all",
        "output_path": "runs/<model>",
        "methods": "dense alone",
        "attn_implementation": "the model's",
        "revision": "the newest",
        "include_path": "none",
        "num_fewshot": "as each task's file says",
        "timing_shapes": "those of the level",
        "apply_chat_template": "plain text",
        "fewshot_as_multiturn": "true with --apply_chat_template",
        "system_instruction": "none",
        "mode": MODE_DEFAULT,
        "workers": "one a GPU, or as many as the cores hold",
        "cpus_per_cell": "an equal share of the cores for processes, 1 for ray",
        "gpus_per_cell": "1 where there are any",
        "ray_address": "a cluster of one's own",
        "shard": "1/1",
        "cell_timeout": "none",
        "log_json": "none",
        "trackers": "none",
        **dict.fromkeys(PLANNING, "this machine's"),
    }
    if name in special:
        return special[name]
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def read(arguments: Sequence[str]) -> Settings:
    """Settings from command-line arguments and the YAML file that they may name.

    Raises:
        UserError: an unknown flag or key, or a value of the wrong kind.
    """
    flags = vars(parser().parse_args(list(arguments)))
    config = flags.pop("config")
    chosen = read_config(path_of(config)) if config else {}
    chosen |= {key: value for key, value in flags.items() if value is not None}
    return settings(chosen)


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, with underscored keys.

    Raises:
        UserError: there is no such file, it is no mapping, or a key is no setting.
    """
    import yaml

    try:
        content = yaml.safe_load(read_text(path, f"--config {path}")) or {}
        repr(content)  # a message could not quote an integer of thousands of digits
    except OSError as fault:
        raise UserError(f"--config {path} cannot be read: {fault.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        reason = " ".join(str(fault).split())
        raise UserError(f"--config {path} is not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must map settings to values, not be a {_kind(content)}")
    known = [setting.name for setting in fields(Settings)]
    found = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in found:
        if key not in known:
            raise UserError(
                f"--config {path} has the unknown key {key!r}; known: {', '.join(known)}"
            )
    return found


def settings(chosen: dict[str, Any]) -> Settings:
    """``Settings`` from raw values of flags or YAML.

    Raises:
        UserError: a value that is not what its setting takes.
    """
    values = dict(chosen)
    for name, value in values.items():
        values[name] = _checked(name, value)
    model = values.get("model", EMBEDDED)
    values.setdefault("limit", DEFAULT_LIMIT.get(model, {OTHERS: None}))
    values.setdefault("output_path", Path("runs") / slug(model))
    found = Settings(**values)
    chat_of(found)
    _check_planning(found)
    _check_timing(found)
    return found


def chat_of(settings: Settings) -> Chat:
    """How prompts are put. Raises UserError for settings that do not go together."""
    applied = settings.apply_chat_template or False
    return Chat(applied, settings.fewshot_as_multiturn, settings.system_instruction)


def _check_planning(found: Settings) -> None:
    """Raises UserError for a shape that is to be scored, and for a machine that is only thought of,
    outside of a dry run, or not described."""
    if not found.dry_run:
        refuse_shape(found.model)
    given = [name for name in PLANNING if getattr(found, name) is not None]
    if given and not found.dry_run:
        raise UserError(f"--{given[0]} says which machine to plan for; add --dry_run")
    if found.assume is None and given and None in (found.tflops, found.bandwidth):
        raise UserError(
            "a machine is described by --tflops and --bandwidth together; or name one by "
            f"--assume {', '.join(MACHINES)}"
        )


def _check_timing(found: Settings) -> None:
    """Raises UserError for what is to be timed where nothing is."""
    for name in ("timing_shapes", "compiled_dense"):
        if found.timing == "off" and getattr(found, name):
            raise UserError(f"--timing off times nothing; leave it or --{name} out")


def _checked(name: str, value: Any) -> Any:
    if name == "methods":
        return _specs(name, value)
    if name == "recovery":
        found = parse_recoveries([_specs(name, NONE if value is None else value)])
        if not found:
            raise UserError("--recovery is empty; give at least one value")
        return found
    if name == "tasks":
        return tuple(dict.fromkeys(_items(name, value)))
    if name == "speedups":
        return tuple(dict.fromkeys(_speedup(item) for item in _items(name, value)))
    if name == "seed":
        return tuple(dict.fromkeys(_integer(name, item, 0) for item in _items(name, value)))
    if name == "limit":
        return _limit(value)
    if name == "num_fewshot" and str(value).strip().lower() == "none":
        return None
    if name in ("num_fewshot", "sample_seed"):
        return _integer(name, value, 0)
    if name == "batch_size":
        return _integer(name, value, 1)
    if name in ("trust_remote_code", "compiled_dense", "dry_run", "debug"):
        if not isinstance(value, bool):
            raise UserError(f"{name} is true or false, not {value!r}")
        return value
    if name in OPTIONAL and value is None:
        return None
    if name == "apply_chat_template" and _word(value) in _TRUTH:
        return DEFAULT if _truth(name, value) else None
    if name == "fewshot_as_multiturn":
        return _truth(name, value)
    if name == "workers":
        return _integer(name, value, 1)
    if name in ("cpus_per_cell", "gpus_per_cell", "cell_timeout", *PLANNING[1:]):
        return _amount(name, value)
    if name == "shard":
        return _shard(value)
    if name == "timing_shapes":
        return parse_shapes(",".join(map(str, _items(name, value))))
    if name == "trackers":
        return tuple(dict.fromkeys(_items(name, value)))
    if name in CHOICES:
        # YAML reads a bare off as false.
        word = "off" if value is False else str(value)
        if word not in CHOICES[name]:
            raise UserError(f"--{name} is one of {', '.join(CHOICES[name])}, not {word!r}")
        return word
    if not isinstance(value, str | Path) or not str(value):
        raise UserError(f"--{name} takes a text, not {value!r}")
    if name == "system_instruction":
        return value
    check_path(name, value)
    if name in PATHS:
        value = expanded(value)
    if name == "include_path" and not Path(value).is_dir():
        raise UserError(f"--include_path {value} is no folder")
    if name == "output_path":
        return mirrored(str(value)) if is_url(str(value)) else check_folder(name, Path(value))
    return str(value)


def _limit(value: Any) -> dict[str, int | None]:
    """Documents by task, from a number, ``"32,task=8"`` or a mapping of YAML."""
    found: dict[str, int | None] = {OTHERS: None}
    if isinstance(value, dict):
        entries = list(value.items())
    else:
        entries = []
        for item in _items("limit", value):
            task, equals, number = str(item).partition("=")
            entries.append((task.strip(), number) if equals else (OTHERS, task))
    for task, number in entries:
        whole = str(number).strip().lower() == "none"
        found[str(task)] = None if whole else _integer("limit", number, 1, ", or none for all")
    return found


def limit_text(limit: dict[str, int | None]) -> str:
    """A limit as ``--limit`` takes it."""
    others = "none" if limit[OTHERS] is None else str(limit[OTHERS])
    single = [f"{task}={number or 'none'}" for task, number in limit.items() if task != OTHERS]
    return ",".join([others, *single])


def _specs(setting: str, value: Any) -> str:
    """One specification from a flag's words, or from YAML: a text, a list, or name: parameters."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [{name: parameters} for name, parameters in value.items()]
    if not isinstance(value, list | tuple):
        raise UserError(f"--{setting} takes names with parameters in brackets, not {value!r}")
    parts = []
    for item in value:
        if isinstance(item, dict):
            for name, parameters in item.items():
                if not isinstance(parameters, dict | None):
                    raise UserError(
                        f"{setting}: {name} must map parameters to values, not be {parameters!r}"
                    )
                inner = ", ".join(f"{key}={_written(it)}" for key, it in (parameters or {}).items())
                parts.append(f"{name}({inner})" if inner else str(name))
        else:
            parts.append(_written(item))
    # A flag's words may break inside brackets: "name(a=1," "b=2)".
    return ",".join(part.strip().strip(",") for part in parts)


def _written(value: Any) -> str:
    return "none" if value is None else str(value)


def _items(name: str, value: Any) -> list[Any]:
    """The entries of a list given as YAML list, as words, or separated by commas."""
    raw = value if isinstance(value, list | tuple) else [value]
    found: list[Any] = []
    for item in raw:
        if isinstance(item, str):
            found += [part.strip() for part in item.split(",") if part.strip()]
        else:
            found.append(item)
    if not found:
        raise UserError(f"--{name} is empty; give at least one value")
    if name == "tasks" and not all(isinstance(item, str) for item in found):
        raise UserError(f"--tasks takes names, not {found!r}")
    return found


def _speedup(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise UserError(f"--speedups takes numbers of at least 1, and {value!r} is not a number")
    if number < 1 or math.isinf(number):
        raise UserError(f"--speedups takes finite numbers of at least 1, not {value}")
    return number


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _truth(name: str, value: Any) -> bool:
    if _word(value) not in _TRUTH:
        raise UserError(f"--{name} is true or false, not {value!r}")
    return _TRUTH[_word(value)]


def _word(value: Any) -> str:
    return str(value).strip().lower()


def _amount(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"--{name} takes a number above 0, not {value!r}")
    return number


def _shard(value: Any) -> tuple[int, int]:
    parts = value if isinstance(value, list | tuple) else str(value).split("/")
    if len(parts) == 2 and all(str(part).strip().isdecimal() for part in parts):
        which, count = (int(str(part)) for part in parts)
        if 1 <= which <= count:
            return which, count
    raise UserError(f"--shard takes i/n with i from 1 to n, such as 1/4, not {value!r}")


def _integer(name: str, value: Any, least: int, besides: str = "") -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if isinstance(value, bool) or not least <= number < 2**63:  # tables and torch hold no more
        most = " and below 2**63" if number >= 2**63 else ""
        wanted = f"a whole number of at least {least}{most}{besides}"
        raise UserError(f"--{name} takes {wanted}, not {value!r}")
    return number


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else type(value).__name__
