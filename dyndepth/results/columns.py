"""What every column of every table means, and which values it may have: said once, here.

``dyndepth.results.schema`` checks tables against it, and the reference of the documentation is made
from it. Indices count from 0; an empty field is a missing value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dyndepth.cells.identity import ADDED, LEADING
from dyndepth.common.modes import EAGER, MODES


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        dtype: ``text``, ``integer``, ``number``, ``boolean`` or ``any``.
        nullable: whether the field may be empty.
        description: one sentence: meaning, unit, and what empty means.
        checks: bounds ``ge``, ``gt``, ``le`` and choices ``isin``, by name; empty fields pass.
    """

    dtype: str
    nullable: bool
    description: str
    checks: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        row: what one row is.
        columns: by name, in the order in which they are written.
        key: columns whose values together stand in one row only.
        ordered: triples of columns, low <= value <= high.
        optional: columns that a file may lack.
        defaults: columns that files from before lack, and what they are read as there.
        former: columns that files from before have, and that are not read any more.
    """

    row: str
    columns: Mapping[str, Column]
    key: tuple[str, ...] = ()
    ordered: tuple[tuple[str, str, str], ...] = ()
    optional: frozenset[str] = field(default_factory=frozenset)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    former: frozenset[str] = field(default_factory=frozenset)

    def may_lack(self, column: str) -> bool:
        """Whether a file may be without ``column``: an optional one, or one that is new."""
        return column in self.optional or column in {*ADDED, *SINCE, *self.defaults}

    def today(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row, perhaps from before, as it is today: without ``former`` columns, and with what
        it lacks of ``defaults``."""
        return {**self.defaults, **{key: row[key] for key in row if key not in self.former}}

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the columns after those that lead every table."""
        return tuple(name for name in self.columns if name not in LEADING)


def _text(description: str, *, nullable: bool = False, isin: Sequence[str] = ()) -> Column:
    return Column("text", nullable, description, {"isin": tuple(isin)} if isin else {})


def _integer(description: str, *, nullable: bool = False, least: int | None = 0) -> Column:
    return Column("integer", nullable, description, {} if least is None else {"ge": least})


def _number(description: str, *, nullable: bool = True, **checks: float) -> Column:
    return Column("number", nullable, description, checks)


def _boolean(description: str, *, nullable: bool = False) -> Column:
    return Column("boolean", nullable, description)


def _fraction(description: str, *, nullable: bool = True) -> Column:
    return Column("number", nullable, description, {"ge": 0, "le": 1})


def _speedup(description: str, *, nullable: bool = True) -> Column:
    return Column("number", nullable, description, {"gt": 0})


def _flops(description: str, *, nullable: bool = True) -> Column:
    return Column("number", nullable, description, {"ge": 0})


_EVALUATION_PHASES = ("all", "prompt", "generation")
_STATUS = _text(
    "`done`, or `error`: the cell failed, or its timing did and its scores stand.",
    isin=("done", "error"),
)

IDENTITY = {
    "cell": _text("Name of the cell: 12 hex digits of SHA-256 over what changes its numbers."),
    "model": _text("Model as it was asked for: `embedded`, a hub id or a path; not hashed."),
    "model_fingerprint": _text("Digest of the model's weights, configuration and settings."),
    "tokenizer_fingerprint": _text(
        "Digest of what the tokenizer does; empty in cells of before it was recorded.",
        nullable=True,
    ),
    "revision": _text(
        "Revision of the model where it came from, or digest of a folder's weights; empty if none.",
        nullable=True,
    ),
    "method": _text("Name of the method."),
    "parameters": _text(
        "The method's parameters as `name=value`; empty if it has none.", nullable=True
    ),
    "phases": _text("Where the method skips: `both`, or `generation`: prompts at full depth."),
    "target_speedup": _number(
        "What was asked for: dense block FLOPs / executed block FLOPs (a ratio).",
        nullable=False,
        ge=1,
    ),
    "seed": _integer("Seed of the fit and of random choices.", least=None),
    "recovery": _text("Adapter trained under the method: `none`, or the recipe in full."),
    "fit_version": Column("any", False, "Version of the fitting code's layout (whole number)."),
    "dtype": _text("Type of the weights and activations, as torch names it."),
    "device": _text("Kind of device: `cpu` or `cuda`."),
    "attn_implementation": _text("Attention implementation of transformers, such as `sdpa`."),
    "tasks": _text("All tasks of the cell, joined by commas."),
    "limit": _text(
        "Documents drawn of each task as `task=count`; `all` for a whole task; empty if every "
        "task is whole.",
        nullable=True,
    ),
    "sample_seed": Column("any", False, "Seed of the draw of documents (whole number)."),
    "num_fewshot": Column(
        "any", True, "Examples before each question; empty: as each task's own file says."
    ),
    "apply_chat_template": _text(
        "Name of the chat template that prompts are put in, `default` for the tokenizer's own; "
        "empty: plain text.",
        nullable=True,
    ),
    "chat_template_fingerprint": _text(
        "Digest of that template's text; empty: plain text.", nullable=True
    ),
    "fewshot_as_multiturn": _text(
        "`yes` if few-shot examples are turns of the conversation, `no` if they are one text "
        "with the question; empty: plain text.",
        nullable=True,
    ),
    "system_instruction": _text("Text put before the task's own description.", nullable=True),
    "batch_size": Column("any", False, "Most contexts in one forward while scoring."),
    "data_fingerprint": _text("Digest of the evaluation data, and of own tasks."),
    "corpus_fingerprint": _text(
        "Digest of the text that the method was fitted on; empty if there was none.", nullable=True
    ),
    "torch": _text("Version of torch, as `torch==...`."),
    "transformers": _text("Version of transformers, as `transformers==...`."),
    "lm_eval": _text("Version of lm-eval, as `lm_eval==...`."),
    "dyndepth": _text("Version of this suite, as `dyndepth==...`."),
    "harness_code": _text("Digest of the suite's code that every score runs through."),
    "method_code": _text(
        "Digest of the method's code and of what it imports to be fitted; with a recovery, of what "
        "trains that as well."
    ),
    "git_commit": _text(
        "Commit of the code; `+changes` if it was edited; empty outside a repository; not hashed.",
        nullable=True,
    ),
    "bound": _boolean("True if the method chooses by the answers: a bound, no competitor."),
    "lossless": _boolean(
        "True if the method drafts what the whole model verifies: it writes what dense writes, "
        "saves no FLOPs, and is no competitor; its target speedup is that of the draft. False in "
        "files from before there was such a column."
    ),
    "remote_code": _boolean(
        "True if code that came with the model had been loaded (`--trust_remote_code`); empty in "
        "cells from before this was recorded.",
        nullable=True,
    ),
}
"""The columns that lead every table: ``identity.LEADING``."""

SINCE: Mapping[str, str] = {"lossless": "FALSE"}
"""Those of them that files from before lack, and what they are read as there."""

_TASK = _text("Name of the task.")
_PHASE = _text(
    "Tokens that the row is about: `prompt` (contexts), `generation` (continuations) or `all`.",
    isin=_EVALUATION_PHASES,
)

ACCURACY = Table(
    "cell x task x metric x filter; a cell without scores has one row that says so in `status`",
    IDENTITY
    | {
        "status": _STATUS,
        "task": _text("Name of the task; empty if the cell has no scores.", nullable=True),
        "metric": _text(
            "Metric as lm-eval names it; empty if the cell has no scores.", nullable=True
        ),
        "filter": _text("lm-eval's filter, `none` for plain answers.", nullable=True),
        "value": _number(
            "Value of the metric over the documents, in its own unit (accuracies and ROUGE-L from "
            "0 to 1, bits per byte in bits); empty if there is none."
        ),
        "stderr": _number(
            "Standard error of the value over documents; empty where no formula is known.", ge=0
        ),
        "n": _integer("Documents in the value.", nullable=True),
        "higher_is_better": _boolean(
            "True if larger values are better; empty if the task does not say.", nullable=True
        ),
        "task_version": _text("Version of the task's definition.", nullable=True),
        "chance": _fraction(
            "Accuracy of guesses, the mean over documents of 1 / choices; empty where there is "
            "nothing to choose from, and for other metrics than `acc` and `acc_norm`."
        ),
    },
    key=("cell", "task", "metric", "filter"),
    optional=frozenset({"chance"}),
)

_ELSE = "in phase `generation` only; empty where nothing was drafted."
_COUNTED_DRAFTS = {
    "drafted": _integer(f"Tokens that the method drafted, {_ELSE}", nullable=True),
    "accepted": _integer(
        "Drafted tokens that the whole model takes, those after the end of a text among them, "
        f"{_ELSE}",
        nullable=True,
    ),
    "verifications": _integer(
        f"Passes of the whole model that verified drafts, the prompts' left out, {_ELSE}",
        nullable=True,
    ),
    "written": _integer(
        "Tokens that these passes have written: the accepted ones and one more each, fewer at the "
        f"end of a text, {_ELSE}",
        nullable=True,
    ),
}
"""What became of drafts, of compute.csv."""

COMPUTE = Table(
    "cell x task x phase",
    IDENTITY
    | {
        "task": _TASK,
        "phase": _PHASE,
        "tokens": _integer("Tokens that were scored or read, each as often as it is billed."),
        "block_flops_per_token": _flops(
            "Executed FLOPs per token in the blocks (attention and MLP); two per multiply-add."
        ),
        "total_flops_per_token": _flops(
            "Executed FLOPs per token in all, LM head and the method's own work included."
        ),
        "block_speedup": _speedup(
            "Dense block FLOPs / executed block FLOPs; empty if no block was executed."
        ),
        "total_speedup": _speedup(
            "Dense total FLOPs / executed total FLOPs, everything the method adds included."
        ),
        "attention": _flops("FLOPs per token in attention sublayers, projections included."),
        "mlp": _flops("FLOPs per token in MLP sublayers."),
        "kv_projection": _flops(
            "FLOPs per token for keys and values of tokens that skip attention."
        ),
        "router": _flops(
            "FLOPs per token in routers, controllers and what replaces skipped updates."
        ),
        "readout": _flops(
            "FLOPs per token for reading the residual stream out before the last block."
        ),
        "lm_head": _flops("FLOPs per token in the final LM head, at the scored positions only."),
        "draft": _flops(
            "FLOPs per token in drafts, and in verifying drafted tokens that do not stand; 0 for "
            "methods that do not speculate, empty in cells from before there were drafts."
        ),
        "padding": _flops(
            "FLOPs per token that no document needed, in no total: padding tokens, sublayers "
            "computed for all tokens because that was faster, a bound's look-ahead; filled in "
            "phase `all` only."
        ),
        "reused": _number(
            "FLOPs per token that were billed to several documents and computed once (negative), "
            "in no total; filled in phase `all` only.",
            le=0,
        ),
        **_COUNTED_DRAFTS,
    },
    key=("cell", "task", "phase"),
    optional=frozenset({"padding", "reused", "draft", *_COUNTED_DRAFTS}),
)

ROUTING = Table(
    "cell x task x phase x sublayer",
    IDENTITY
    | {
        "task": _text("`all`: over the tokens of all tasks."),
        "phase": _PHASE,
        "layer": _integer("Block, counted from 0, next to the embedding."),
        "sublayer": _text("Residual branch of the block.", isin=("attention", "mlp")),
        "executed": _fraction("Fraction of the tokens that executed the sublayer.", nullable=False),
    },
    key=("cell", "task", "phase", "layer", "sublayer"),
)

_OF_SIDE = {"dense": "dense", "method": "the method", "compiled": "dense under `torch.compile`"}
_IF_ASKED = "; empty unless asked for (`--compiled_dense`) or where `compiled_error` says why"
_TTFT = (
    "Time to first token of {}, ms: median of the passes over the whole prompts of the batch, the "
    "first token's choice included; empty in `decode`"
)
_TPOT = (
    "Time per output token of {}, ms: median over passes of the mean step; a step adds a token to "
    "every sequence of the batch; empty in `prefill`"
)
_RATE = (
    "Tokens a second of {}, of the whole batch: in `decode` those that are made (batch / TPOT), in "
    "`prefill` those of the prompts that are read (batch x length / TTFT)"
)


def _with_ends(name: str, description: str, *, of: str) -> dict[str, Column]:
    """A time's column and those of its interval."""
    return {
        name: _number(f"{description}.", gt=0),
        f"{name}_low": _number(f"Lower end of its 95% interval ({of}).", ge=0),
        f"{name}_high": _number(f"Upper end of its 95% interval ({of}).", gt=0),
    }


def _ordered(columns: Mapping[str, Column]) -> tuple[tuple[str, str, str], ...]:
    """The triples of ``Table.ordered`` of columns that have their ends beside them."""
    names = (name.removesuffix("_low") for name in columns if name.endswith("_low"))
    return tuple((f"{name}_low", name, f"{name}_high") for name in names)


def _speeds_of(side: str) -> dict[str, Column]:
    """Latency and throughput of one side, of timing.csv."""
    more, whose = _IF_ASKED if side == "compiled" else "", _OF_SIDE[side]
    orders = "from order statistics of the passes"
    return {
        **_with_ends(f"{side}_ttft_ms", _TTFT.format(whose) + more, of=orders),
        **_with_ends(f"{side}_tpot_ms", _TPOT.format(whose) + more, of=orders),
        **_with_ends(f"{side}_tokens_per_s", _RATE.format(whose) + more, of=orders),
    }


def _memory_of(side: str) -> dict[str, Column]:
    """Memory of one side, of timing.csv."""
    return {
        f"{side}_peak_bytes": _integer(
            f"Most bytes that torch's allocator held in the phase with {_OF_SIDE[side]}, weights "
            "and all else included (`torch.cuda.max_memory_allocated`, of a pass that is not "
            "timed); empty on a CPU and in graphs mode.",
            nullable=True,
        ),
        f"{side}_peak_above_bytes": _integer(
            "The same beyond what was held before the prompt: cache, activations, the method's "
            "working memory; on a CPU by the profiler's record of allocations; empty in graphs "
            "mode, whose memory lies ready.",
            nullable=True,
            least=None,
        ),
        f"{side}_cache_bytes": _integer(
            f"Bytes of the keys and values that {_OF_SIDE[side]} keeps at the end of the phase, "
            "for the whole batch: exact, from the cache's tensors (median over passes).",
            nullable=True,
        ),
    }


_SERVING = {
    **_speeds_of("dense"),
    **_speeds_of("method"),
    **_memory_of("dense"),
    **_memory_of("method"),
    **_speeds_of("compiled"),
    **_with_ends(
        "speedup_over_compiled",
        f"Compiled dense's time / method time: median over the pairs{_IF_ASKED}",
        of="from order statistics of the pairs",
    ),
    "compiled_error": _text(
        "Why dense could not be timed under `torch.compile`; empty if it was, or was not to be.",
        nullable=True,
    ),
}
"""Latency, throughput and memory, of timing.csv."""

_NO_DRAFTS = "empty in `prefill`, and for methods that draft nothing"
_DRAFTS = {
    "acceptance": _fraction(f"Accepted / drafted tokens of the timed passes; {_NO_DRAFTS}."),
    "tokens_per_verify": _number(
        "Tokens written for each verification, a pass of the whole model, its own token among "
        f"them; {_NO_DRAFTS}.",
        ge=1,
    ),
    "draft_ms": _number(f"Time of a drafted token, ms, mean; {_NO_DRAFTS}.", gt=0),
    "verify_ms": _number(
        "Time of a verification with its verdict, ms, mean; on a GPU this and `draft_ms` are of "
        f"further passes, in which the clock waits for it; {_NO_DRAFTS}.",
        gt=0,
    ),
    "predicted_speedup": _speedup(
        "Speedup that the bytes of weights allow that drafts and verifications read, at the "
        f"measured acceptance and the drafts' own lengths; {_NO_DRAFTS}."
    ),
    "predicted_by_times": _speedup(
        f"The same by `draft_ms` and `verify_ms` in the place of bytes; {_NO_DRAFTS}."
    ),
    "fit_s": _number(
        "Seconds that the fit took when it was made, a search for the draft included, and where "
        f"it was not interrupted; {_NO_DRAFTS}.",
        ge=0,
    ),
}
"""What drafts came to, of timing.csv."""

_TIMING = {
    "phase": _text(
        "`prefill`: one pass over the prompts; `decode`: one step that adds a token to each.",
        isin=("prefill", "decode"),
    ),
    "batch": _integer("Sequences in the batch.", least=1),
    "length": _integer("Tokens of each prompt.", least=1),
    "mode": _text(
        "How both sides ran: `eager`, or `graphs`: decoding replayed from CUDA graphs, phase "
        "`decode` alone; files from before there was a choice are read as `eager`.",
        isin=MODES,
    ),
    "temperature": _number(
        "At which both sides drew their tokens, so that a speedup compares drawing with drawing; "
        "0: the likeliest, as files from before there was a choice are read.",
        ge=0,
    ),
    "new_tokens": _integer("Steps decoded after each prompt; 0 in `prefill`.", nullable=True),
    "repeats": _integer("Interleaved pairs of dense and method that were timed.", nullable=True),
    "dense_median_s": _number("Median of the dense model's times, seconds per pass or step.", gt=0),
    "method_median_s": _number("Median of the method's times, seconds per pass or step.", gt=0),
    "wall_speedup": _speedup("Dense time / method time: median over the pairs, host's clock."),
    "wall_speedup_low": _number(
        "Lower end of its 95% interval, from order statistics of the pairs.", ge=0
    ),
    "wall_speedup_high": _speedup(
        "Upper end of its 95% interval, from order statistics of the pairs."
    ),
    "wall_efficiency": _speedup(
        "`wall_speedup / total_speedup`; 1.0: all saved arithmetic became saved time; empty for "
        "drafts, which save none."
    ),
    "block_speedup": _speedup("Dense / executed block FLOPs of the timed passes (median)."),
    "total_speedup": _speedup("Dense / executed total FLOPs of the timed passes (median)."),
    **_DRAFTS,
    **_SERVING,
    "dense_busy_s": _number(
        "Of as much work as `dense_median_s`, seconds in which the GPU computes or copies (union "
        "of the profiler's records over streams, of passes that are not timed); empty on a CPU.",
        gt=0,
    ),
    "method_busy_s": _number("As `dense_busy_s`, of the method; empty on a CPU.", gt=0),
    "busy_speedup": _speedup("`dense_busy_s / method_busy_s`; empty on a CPU."),
    "dense_host_share": _fraction(
        "Share of dense's time in which the GPU waits for the host, 1 - `dense_busy_s / "
        "dense_median_s`, at least 0; empty on a CPU."
    ),
    "method_host_share": _fraction("As `dense_host_share`, of the method; empty on a CPU."),
    "suspect": _boolean(
        "True if faster than the FLOPs allow by more than 5%, or with drafts than the tokens of a "
        "verification do: the measurement is in doubt.",
        nullable=True,
    ),
    "reproduces_scores": _boolean(
        "True if the timed object gave the scored log-likelihoods; empty if nothing was compared.",
        nullable=True,
    ),
    "score_gap": _number(
        "Largest difference to the scored log-likelihoods, nats; empty if none was computed.", ge=0
    ),
    "check_error": _text("Why no scores were compared; empty if they were.", nullable=True),
    "attach_s": _number("Seconds that attaching the method takes, outside of the clock.", ge=0),
    "level": _text("How thorough the timing was.", nullable=True, isin=("quick", "full", "custom")),
    "shapes": _text(
        "Who chose batch and length: `level`, or `asked` (`--timing_shapes`); empty in times of "
        "before one could ask: the level.",
        nullable=True,
        isin=("level", "asked"),
    ),
    "device_name": _text("Name of the processor or GPU.", nullable=True),
    "threads": _integer("Threads that torch used.", nullable=True, least=1),
    "cores": _integer("Logical processors of the machine.", nullable=True, least=1),
    "vector_units": _text("Vector instructions that torch used on the CPU.", nullable=True),
    "allocator": _text("Settings of the memory allocator.", nullable=True),
    "gather_limits": _text(
        "Under token masks: the largest executed fractions of attention and of MLP, and the least "
        "tokens per forward, at which tokens are gathered; else a sublayer runs for all tokens.",
        nullable=True,
    ),
    "load_average": _number(
        "The system's load over the last minute; well above `threads`, it hints at other work.",
        ge=0,
    ),
    "gpu": _text(
        "Clocks, power limit and temperature of the GPU, and the kernels that torch may choose of "
        "for attention; empty on a CPU.",
        nullable=True,
    ),
    "timing_code": _text(
        "Digest of the suite's code that takes times; empty for times of before there was one.",
        nullable=True,
    ),
}

TIMING = Table(
    "cell x phase x batch x length x mode x temperature; one shape may have several, which differ "
    "in `new_tokens`, `level` or `shapes`",
    IDENTITY | _TIMING,
    key=(
        *("cell", "phase", "batch", "length", "mode", "temperature"),
        *("new_tokens", "level", "shapes"),
    ),
    ordered=(
        ("wall_speedup_low", "wall_speedup", "wall_speedup_high"),
        *_ordered(_SERVING),
    ),
    optional=frozenset(_TIMING) - {"phase", "batch", "length", "mode"},
    defaults={"mode": EAGER, "temperature": 0.0},
    # Seconds between events on the device: they held its waiting, and were no time of its work.
    former=frozenset({"dense_device_s", "method_device_s", "device_speedup"}),
)

_SAMPLE_COST = {
    "weight": _number("Weight of the document in the task's value (bytes, words, or 1).", ge=0),
    "tokens": _integer("Tokens billed to the document.", nullable=True),
    "block_flops": _flops("Executed block FLOPs of the document."),
    "total_flops": _flops("Executed FLOPs of the document in all."),
    "dense_block_flops": _flops("Block FLOPs of the document at full depth."),
    "dense_total_flops": _flops("FLOPs of the document in all at full depth."),
}
_SAMPLE_TEXTS = {
    "loglikelihoods": _text(
        "Log-likelihoods of the requests, JSON list, nats; empty where text was generated.",
        nullable=True,
    ),
    "response": _text("Generated text; empty where likelihoods were scored.", nullable=True),
    "target": _text("The right answer as the task has it; empty for whole texts.", nullable=True),
}

SAMPLES = Table(
    "cell x task x document",
    IDENTITY
    | {
        "task": _TASK,
        "doc_id": _integer("Index of the document in the task's data, counted from 0."),
        "doc_hash": _text("Digest of the document."),
        "metric": _text("The task's main metric and filter, as `metric,filter`."),
        "outcome": _number("Value of that metric on this document alone; empty where it has none."),
        "outcomes": _text("All metrics of the document, JSON object by `metric,filter`."),
        **_SAMPLE_TEXTS,
        **_SAMPLE_COST,
    },
    key=("cell", "task", "doc_id"),
    optional=frozenset({*_SAMPLE_TEXTS, *_SAMPLE_COST}),
)

_END = "end of the 95% interval; empty where there is none."

_GRAPHS = {
    "wall_decode_graphs_speedup": _speedup(
        "As `wall_decode_speedup`, in graphs mode: both sides decode through CUDA graphs (prompts "
        "run eagerly there, too, and have no column of their own); empty if not timed so."
    ),
    "wall_decode_graphs_low": _number(f"Decode speedup in graphs mode, lower {_END}", ge=0),
    "wall_decode_graphs_high": _speedup(f"Decode speedup in graphs mode, upper {_END}"),
}


def _on_board(column: str) -> Column:
    """A column of timing.csv as a leaderboard has it."""
    described = _SERVING[column]
    text = described.description
    if not column.endswith(("_low", "_high")):
        text = f"As `{column}` of timing.csv, {_WHICH[column.partition('_')[2]]}"
    return Column(described.dtype, True, text, described.checks)


_AT = "of the shape of the wall speedups, eager mode; empty if not measured."
_WHICH = {
    "ttft_ms": f"{_AT}",
    "tpot_ms": f"{_AT}",
    "tokens_per_s": f"of decode, {_AT}",
    "peak_bytes": f"the larger of prefill and decode, {_AT}",
    "peak_above_bytes": f"the larger of prefill and decode, {_AT}",
    "cache_bytes": f"after the last phase, {_AT}",
}
_BOARD_SERVING = {
    column: _on_board(column)
    for side in ("dense", "method")
    for column in (*_speeds_of(side), *_memory_of(side))
}
for _phase in ("prefill", "decode"):
    _BOARD_SERVING |= _with_ends(
        f"{_phase}_over_compiled",
        f"As `speedup_over_compiled` of timing.csv in {_phase}, {_AT[:-1]}",
        of="from order statistics of the pairs",
    )

_IF_DRAFTED = "empty where nothing was drafted"
_BOARD_DRAFTS = {
    "acceptance": _fraction(
        "Accepted / drafted tokens over all tasks, wherever texts ended: it is the draft's; "
        f"{_IF_DRAFTED}."
    ),
    "acceptance_by_task": _text(
        f"The same task by task, as `task=share,task=share`; {_IF_DRAFTED}.", nullable=True
    ),
    "tokens_per_verify": _number(
        "Tokens written for each pass of the whole model over all tasks, its own token among them; "
        f"{_IF_DRAFTED}.",
        ge=0,
    ),
    "wall_drawn_speedup": _speedup(
        "As `wall_decode_speedup` and of its shape, of drafts whose tokens are drawn (temperature "
        "above 0), not the likeliest: against dense that draws its tokens, too; empty if not timed "
        "so."
    ),
    "wall_drawn_low": _number(f"Decode speedup of drawn tokens, lower {_END}", ge=0),
    "wall_drawn_high": _speedup(f"Decode speedup of drawn tokens, upper {_END}"),
    "predicted_speedup": _speedup(
        "As `predicted_speedup` of timing.csv, beside `wall_decode_speedup`; empty if not timed."
    ),
}
"""What drafts came to, of leaderboard.csv."""

_OF_TIMES = ("wall_loaded", "wall_repeats", "wall_load")

LEADERBOARD = Table(
    "cell",
    IDENTITY
    | {
        "status": _STATUS,
        "mean_acc": _fraction("Accuracy (`acc` alone), mean over tasks; empty if no task has one."),
        "mean_acc_low": _fraction(f"Mean accuracy, lower {_END}"),
        "mean_acc_high": _fraction(f"Mean accuracy, upper {_END}"),
        "chance": _fraction(
            "Mean accuracy of guesses, 0 for a task without choices; empty if no task has any."
        ),
        "documents": _integer(
            "Documents behind the mean accuracy. Where a task has fewer than 10, no interval of a "
            "score is given."
        ),
        "retained": _number(
            "Mean accuracy / dense's on the same documents (1 = dense, not percent); empty "
            "without a dense cell of the same setting.",
            ge=0,
        ),
        "retained_low": _number(f"Retained fraction, lower {_END}", ge=0),
        "retained_high": _number(f"Retained fraction, upper {_END}", ge=0),
        "bits_per_byte": _number(
            "Bits per byte, mean over tasks; lower is better; empty if no task has it.", ge=0
        ),
        "bits_per_byte_low": _number(f"Value - 1.96 standard errors, at least 0: lower {_END}"),
        "bits_per_byte_high": _number(f"Value + 1.96 standard errors: upper {_END}", ge=0),
        "rouge_l": _fraction("ROUGE-L, mean over tasks; empty if no task has it."),
        "rouge_l_low": _number(f"Value - 1.96 standard errors, at least 0: lower {_END}"),
        "rouge_l_high": _number(f"Value + 1.96 standard errors, at most 1: upper {_END}"),
        "block_speedup": _speedup(
            "Achieved: dense / executed block FLOPs over the tokens of all tasks; empty if none."
        ),
        "total_speedup": _speedup(
            "Achieved: dense / executed FLOPs in all, the method's own work included."
        ),
        "wall_prefill_speedup": _speedup(
            "Dense time / method time in prefill, eager mode; empty if not timed."
        ),
        "wall_prefill_low": _number(f"Prefill speedup, lower {_END}", ge=0),
        "wall_prefill_high": _speedup(f"Prefill speedup, upper {_END}"),
        "wall_decode_speedup": _speedup(
            "Dense time / method time in decode, eager mode; empty if not timed."
        ),
        "wall_decode_low": _number(f"Decode speedup, lower {_END}", ge=0),
        "wall_decode_high": _speedup(f"Decode speedup, upper {_END}"),
        **_GRAPHS,
        "wall_suspect": _text(
            "Those of the wall speedups that are faster than the FLOPs allow by more than 5%, "
            "such as `decode`, or `drawn`; empty if none is.",
            nullable=True,
        ),
        "wall_loaded": _text(
            "Those of the wall speedups that were timed while other work wanted more processors "
            "than the timing left free (in timing.csv `load_average` - `threads` above `cores` - "
            "`threads`, and above 0.5).",
            nullable=True,
        ),
        "wall_repeats": _integer(
            "Interleaved pairs of dense and method, the fewest of the wall speedups.",
            nullable=True,
        ),
        "wall_load": _number(
            "The system's load over the minute before, the highest of the wall speedups'.", ge=0
        ),
        "wall_batch": _integer(
            "Sequences in the batch of all wall speedups (the smallest that was timed); empty if "
            "not timed.",
            nullable=True,
            least=1,
        ),
        "wall_length": _integer(
            "Tokens of the timed prompts of all wall speedups (at that batch the longest of those "
            "timed in most phases and modes); empty if not timed.",
            nullable=True,
            least=1,
        ),
        **_BOARD_DRAFTS,
        **_BOARD_SERVING,
        "paper": _text("Source of the method's rule, as the method states it.", nullable=True),
        "needs_training": _boolean("True if the method has trained parts.", nullable=True),
        "device_name": _text("Name of the processor or GPU.", nullable=True),
        "threads": _integer("Threads that torch used.", nullable=True, least=1),
        "error": _text("Why the cell failed; empty if it did not.", nullable=True),
    },
    key=("cell",),
    ordered=(
        ("mean_acc_low", "mean_acc", "mean_acc_high"),
        ("retained_low", "retained", "retained_high"),
        ("bits_per_byte_low", "bits_per_byte", "bits_per_byte_high"),
        ("rouge_l_low", "rouge_l", "rouge_l_high"),
        ("wall_prefill_low", "wall_prefill_speedup", "wall_prefill_high"),
        ("wall_decode_low", "wall_decode_speedup", "wall_decode_high"),
        ("wall_decode_graphs_low", "wall_decode_graphs_speedup", "wall_decode_graphs_high"),
        ("wall_drawn_low", "wall_drawn_speedup", "wall_drawn_high"),
        *_ordered(_BOARD_SERVING),
    ),
    optional=frozenset(
        {"chance", *_GRAPHS, "wall_suspect", *_OF_TIMES, *_BOARD_DRAFTS, *_BOARD_SERVING}
    ),
    # Prompts are not repeated from graphs: those were times of eager prompts.
    former=frozenset(f"wall_prefill_graphs_{what}" for what in ("speedup", "low", "high")),
)
