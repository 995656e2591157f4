"""The model card of an export: what it is, what was measured, how to use and to cite it."""

from __future__ import annotations

import re
from typing import Any

from dyndepth.export.record import RECORD

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def card(record: dict[str, Any], name: str) -> str:
    """The card as Markdown with the hub's header. ``name`` is the folder's."""
    parts = [_header(record), f"# {name}", _what(record), _use(record, name), _measured(record)]
    parts += [_made(record), _cite(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(record: dict[str, Any]) -> str:
    base = record["base"]["name"]
    lines = ["---", "tags:", "- dyndepth", "- pruned" if record["kind"] == "checkpoint" else None]
    if record["model"]:
        lines.append("library_name: transformers")
        lines.append("pipeline_tag: text-generation")
    if _HUB_ID.fullmatch(base):
        lines += ["base_model:", f"- {base}"]
    return "\n".join(line for line in [*lines, "---"] if line)


def _what(record: dict[str, Any]) -> str:
    base, recovery = record["base"], record["recovery"]
    adapter = f" Recovery adapters (`{recovery}`) are merged into its weights."
    licence = (
        "The licence of the base model applies to what is derived from it: look it up there, and "
        "pass it on with this folder."
    )
    if record["kind"] == "checkpoint":
        gone = [block for block in range(record["blocks"]) if block not in record["kept"]]
        said = f"`{base['name']}` with {len(record['kept'])} of its {record['blocks']} blocks."
        if gone:
            said += f" Left out, counted from 0: {', '.join(map(str, gone))}."
        said += f" They were chosen by `{record['method']}`." if gone else ""
        said += adapter * (recovery != "none")
        said += " It is an ordinary checkpoint: nothing but its loader is needed."
        return f"{said}\n\n{licence}"
    said = f"The method `{record['method']}`, fitted on "
    said += (
        f"the model in the folder `{record['model']}`, which is `{base['name']}`.{adapter}"
        if record["model"]
        else f"`{base['name']}`, whose weights are not in here."
    )
    return f"{said}\n\nNo plain checkpoint can hold it: {record['reason']}.\n\n{licence}"


def _use(record: dict[str, Any], name: str) -> str:
    if record["kind"] == "checkpoint":
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({name!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        ]
        extra = ""
        if record["irregular"]:
            named = " and ".join(f"`{each}`" for each in record["irregular"])
            extra = (
                f"\n\nRead {named} from `config.json`. A program that works out from a block's "
                "index of which kind it is, as converters and engines do for some families, "
                "computes something else."
            )
    else:
        model = f"{name}/{record['model']}" if record["model"] else record["base"]["name"]
        commit = record["base"]["commit"] if not record["model"] else None
        pinned = f", revision={commit!r}" if commit else ""
        lines = [
            "from dyndepth import attach, load_method, load_model",
            "",
            f"model, method = load_model({model!r}{pinned}), load_method({name!r})",
            "with attach(model, method):",
            "    ...  # model(...) and model.generate(...) as ever",
        ]
        extra = "\n\nThe method is refused on any other model than the one it was fitted on."
    return "\n".join(["## Use", "", "```python", *lines, "```"]) + extra


def _measured(record: dict[str, Any]) -> str:
    found, agreed, job = record["measured"], record["agreement"], record["job"]
    where = " of generation" if found["phases"] == "generation" else ""
    rows = [
        ("target speedup", f"{record['target_speedup']:g}x"),
        (f"achieved speedup, block FLOPs{where}", f"{found['block_flops_speedup']:.3f}x"),
        (f"achieved speedup, total FLOPs{where}", f"{found['total_flops_speedup']:.3f}x"),
        ("over", f"{found['windows']} windows of {found['length']} tokens of the corpus"),
        ("largest difference of a logit", f"{agreed['logits']:.2g}"),
        ("tolerated", f"{agreed['tolerance']:.2g}"),
        ("equal tokens of greedy decoding", f"{agreed['tokens']}"),
    ]
    table = [
        "| measured | value |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in rows),
    ]
    how = (
        "The differences are between the model with the method attached and this export as "
        f"another process read it, in {job['dtype']} on {job['device']}, over "
        f"{len(job['windows'])} windows of {len(job['windows'][0])} tokens. FLOPs are relative to "
        "the base model; no time and no quality was measured here."
    )
    if record["kind"] == "checkpoint":
        how += " `python -m dyndepth.sweep --model` and this folder scores it."
    return "\n".join(["## What was measured", "", *table, "", how])


def _made(record: dict[str, Any]) -> str:
    base, kept = record["base"], record["versions"]
    rows = [
        ("method", f"`{record['method']}`"),
        ("recovery", f"`{record['recovery']}`"),
        ("base model", f"`{base['name']}`, revision `{base['revision'] or 'not known'}`"),
        ("fingerprint of the base model", f"`{base['fingerprint']}`"),
        ("fingerprint of the model to use", f"`{record['fingerprint']}`"),
        ("fingerprint of the corpus", f"`{record['corpus']}`"),
        ("fingerprint of the tokenizer", f"`{record['tokenizer']}`"),
        ("versions", ", ".join(f"{name} {version}" for name, version in kept.items())),
        ("commit", f"`{record['commit'] or 'not known'}`"),
        ("command", f"`{record['command']}`" if record["command"] else "from Python"),
    ]
    table = ["| made from | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    last = (
        f"`{RECORD}` has the same for programs, the hashes of all files and the logits of fixed "
        "tokens. `python -m dyndepth.export --check` and this folder compares with them."
    )
    return "\n".join(["## How it was made", "", *table, "", last])


def _cite(record: dict[str, Any]) -> str:
    paper = record["paper"]
    source = f"the paper of the method ({paper}), " if paper not in ("control", "") else ""
    return (
        "## Cite\n\n"
        f"Cite the base model as its authors ask, {source}and dyndepth "
        f"{record['versions']['dyndepth']}, with its commit ({record['commit'] or 'not known'}); "
        "its `CITATION.cff` has the entry."
    )
