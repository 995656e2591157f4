"""What a run on a GPU says: what held, what fell short, what was never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dyndepth.bench.goals import GPU_GOALS, MET, check
from dyndepth.bench.lines import Lines, numbers, speed
from dyndepth.gpu.parts import MODEL, RECORD, parts
from dyndepth.gpu.training import GOAL
from dyndepth.results.noise import legend

Facts = dict[str, Any]


def read(folder: Path) -> Facts | None:
    """The record in ``folder`` and what its parts left; None if there is none."""
    record = _json(folder / RECORD)
    if record is None:
        return None
    for name in ("bench", "checks", "training"):
        record[name] = _json(folder / f"{name}.json")
    return record


def _json(file: Path) -> Facts | None:
    try:
        found: Facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def failures(facts: Facts) -> list[str]:
    """What failed, in words; what fell short of a goal is no failure."""
    found = [
        f"{name}: {part['status']}, {part['why']}"
        for name, part in facts["parts"].items()
        if part["status"] in ("failed", "cut off")
    ]
    checks = facts.get("checks") or {}
    return found + [
        f"check {name!r}: {each['why']}"
        for name, each in checks.items()
        if each["status"] == "failed"
    ]


def page(facts: Facts, heading: str = "#") -> str:
    """The run as Markdown."""
    held, short, never = _sorted(facts)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{heading} {facts['card']}, {facts['date']}",
        "",
        f"Commit {facts['commit'] or 'unknown (an installed package)'}; {versions}, Python "
        f"{facts['python']}, CUDA {facts['cuda'] or 'none'}"
        + ("; the small variant, which is for trying out." if facts["small"] else "."),
    ]
    for title, found in (("Held", held), ("Fell short", short), ("Not run", never)):
        lines += ["", f"{heading}# {title}", "", *(f"- {each}" for each in found or ["nothing"])]
    bench = _lines(facts)
    if bench:
        model = facts["bench"]["about"]["model"]
        lines += [
            "",
            f"{heading}# Speed",
            "",
            f"`python -m dyndepth.bench --model {model}`, interleaved rounds with dense in the "
            "same mode; brackets are 95% intervals.",
            "",
            "| work | speedup | FLOP ideal | byte ideal |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {name} | {speed(line)} | {line['flop_ideal']:.2f} | {line['byte_ideal']:.2f} |"
            for name, line in bench.items()
        ]
        told = legend(map(speed, bench.values()))
        lines += ["", f"{told}."] if told else []
    return "\n".join(lines) + "\n"


def _lines(facts: Facts) -> Lines:
    """What the bench measured."""
    return numbers((facts.get("bench") or {}).get("bench") or {})


def outcome(facts: Facts) -> str:
    """How many checks failed and which parts are not done, in a few words."""
    checks = [each["status"] for each in (facts.get("checks") or {}).values()]
    failed = checks.count("failed")
    said = ["all checks held" if checks else "nothing was checked"]
    if failed:
        said = [f"{failed} check{'s' * (failed > 1)} failed"]
    statuses = {
        part.name: facts["parts"].get(part.name, {}).get("status", "not run")
        for part in parts(facts["small"], "")
        if not (failed and part.name == "checks")
    }
    for status in ("failed", "cut off", "not run"):
        own = [name for name, found in statuses.items() if found == status]
        if own:
            said.append(f"{len(own)} part{'s' * (len(own) > 1)} {status}: {', '.join(own)}")
    return ", ".join(said)


def _left(facts: Facts) -> dict[str, list[str]]:
    """Lines of the bench that were not measured, by why."""
    found: dict[str, list[str]] = {}
    for name, why in ((facts.get("bench") or {}).get("left") or {}).items():
        found.setdefault(why, []).append(name)
    return found


def _sorted(facts: Facts) -> tuple[list[str], list[str], list[str]]:
    """Sentences on what held, fell short and was not run."""
    held: list[str] = []
    short = failures(facts)
    never: list[str] = []
    for name, each in (facts.get("checks") or {}).items():
        if each["status"] == "held":
            held.append(f"check: {name}")
        elif each["status"] == "not here":
            never.append(f"check: {name} ({each['why']})")
    bench = facts.get("bench")
    if bench and bench["about"]["model"] == MODEL:
        for each in check(_lines(facts), GPU_GOALS):
            said = " ".join(str(each).split())
            (held if each.verdict == MET else short).append(f"goal: {said}")
    training = facts.get("training")
    if training and not facts["small"]:
        rate = training["tokens_a_second"]
        said = (
            f"goal: training reads {rate:,.0f} tokens a second of {training['model']} in "
            f"{training['dtype']}, {GOAL:,} wanted"
        )
        (held if rate >= GOAL else short).append(said)
    for part in parts(facts["small"], ""):
        told = facts["parts"].get(part.name)
        if told is None or told["status"] == "not run":
            why = f": {told['why']}" if told else ""
            never.append(f"{part.name} ({part.what}){why}")
        elif told["status"] == "done":
            held.append(f"{part.name} ran whole: {part.what}, {told['seconds']:.0f} s")
    never += [f"bench: {', '.join(names)} ({why})" for why, names in _left(facts).items()]
    return held, short, never


def never_run() -> list[str]:
    """All that a run on a GPU would show, where there is none."""
    return [f"{part.name}: {part.what}" for part in parts(False, "")]
