"""The leaderboard in Markdown: the same data as the page, for places that show text."""

from __future__ import annotations

from collections.abc import Sequence

from dyndepth.cells.identity import Row
from dyndepth.leaderboard_page import BOUNDS, CONTROLS, PAPERS, SCORES, SEEDS, Board


def markdown(found: Board) -> str:
    """Markdown of what ``leaderboard_page.board`` gives: competitors and controls, bounds, failed
    cells, what papers report, conditions."""
    fixed = [score for score in found["scores"] if any(score["key"] == key for key, *_ in SCORES)]
    competitors = [entry for entry in found["entries"] if not entry["bound"]]
    bounds = [entry for entry in found["entries"] if entry["bound"]]
    lines = ["# Leaderboard", ""]
    lines += [_sentence(competitors, bounds, found["failed"]), ""]
    lines += _entries(competitors, fixed)
    if found["chance"] and any(score["key"] == "mean_acc" for score in fixed):
        lines += ["", f"Mean accuracy by {found['chance']}."]
    if any(len(entry["seeds"]) > 1 for entry in found["entries"]):
        lines += ["", SEEDS]
    if any(entry["control"] for entry in competitors):
        lines += ["", CONTROLS]
    if bounds:
        lines += ["", "## Bounds", "", BOUNDS, "", *_entries(bounds, fixed)]
    if found["failed"]:
        lines += ["", "## Failed cells", "", _line(["method", "target", "seed", "cell", "error"])]
        lines.append(_line(["---"] * 5))
        for one in found["failed"]:
            texts = [one["label"], f"{one['target']:g}x", str(one["seed"]), one["cell"]]
            lines.append(_line([*texts, one["error"]]))
    if found["published"]:
        lines += ["", "## Reported by papers", "", PAPERS, "", *_papers(found["published"])]
    lines += ["", "## Conditions", ""]
    lines += [f"- {key}: {_cell('; '.join(values))}" for key, values in found["conditions"].items()]
    return "\n".join(lines) + "\n"


def _entries(entries: Sequence[Row], scores: Sequence[Row]) -> list[str]:
    several = len({entry["model"] for entry in entries}) > 1
    heads = ["model"] if several else []
    heads += ["method", "target", "seeds", *(score["label"] for score in scores)]
    heads += ["block FLOPs", "total FLOPs", "prefill", "decode"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for entry in entries:
        texts = [entry["model"]] if several else []
        name = ", ".join(filter(None, (entry["name"], entry["apart"])))
        name += " (control)" if entry["control"] else ""
        texts += [name, f"{entry['target']:g}x", str(len(entry["seeds"]))]
        texts += [
            _interval(entry["scores"].get(score["key"]), score["factor"], score["digits"])
            for score in scores
        ]
        texts += [_interval(entry[key], 1, 2, "x") for key in ("block", "total")]
        texts += [_interval(entry[key], 1, 2, "x") for key in ("prefill", "decode")]
        lines.append(_line(texts))
    return lines


def _papers(rows: Sequence[Row]) -> list[str]:
    heads = ["method", "model", "budget", "task", "metric", "dense", "reported", "measured nearest"]
    heads += ["source", "note"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        near = row["measured"]
        beside = ""
        if near is not None:
            kept = _interval(near["retained"], 100, 0, "% of dense's accuracy")
            bits = _interval(near["bits_per_byte"], 1, 3, " bits per byte")
            beside = (
                f"{near['label']} at {near['block']:.2f}x: {', '.join(filter(None, (kept, bits)))}"
            )
        recovery = row.get("recovery") or ""
        method = " ".join(filter(None, (row["method"], row["parameters"])))
        method += f" + {recovery}" if recovery not in ("", "none") else ""
        texts = [method, row["model"], f"{row['speedup']:g}x {row['unit_of_speedup']}"]
        texts += [row["task"], row["metric"], _plain(row["dense_value"]), _plain(row["value"])]
        lines.append(_line([*texts, beside, row["source"], row["note"]]))
    return lines


def _sentence(competitors: Sequence[Row], bounds: Sequence[Row], failed: Sequence[Row]) -> str:
    controls = [entry for entry in competitors if entry["control"]]
    methods = len({entry["method"] for entry in competitors if not entry["control"]})
    return (
        f"{methods} methods in {len(competitors) - len(controls)} settings, {len(controls)} "
        f"settings of controls, {len(bounds)} of bounds, {len(failed)} failed cells. Intervals "
        "are 95%; speedups are ratios to dense: achieved block and total FLOPs, and measured time "
        "in prefill and decode."
    )


def _interval(
    found: Sequence[float | None] | None, factor: float, digits: int, unit: str = ""
) -> str:
    if found is None or found[0] is None:
        return ""
    texts = [f"{value * factor:.{digits}f}" for value in found if value is not None]
    return f"{texts[0]}{unit}" + (f" [{texts[1]}, {texts[2]}]" if len(texts) == 3 else "")


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, texts))} |"


def _cell(text: str) -> str:
    """Text that stays in its field: no line breaks, no bars, no markup."""
    text = " ".join(str(text).split())
    for letter in "\\|*`":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("<", "&lt;").replace("](", "]\\(")
