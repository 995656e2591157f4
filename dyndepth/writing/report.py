"""What writing a text came to, in a few lines for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dyndepth.writing.comparison import Comparison
    from dyndepth.writing.result import Generated

_COLUMNS = 80
_ENDS = {
    "end": "it ended its text itself",
    "stop": "it came to a text to stop at",
    "limit": "it came to --max_new_tokens",
}


def text_report(text: Generated) -> list[str]:
    """Method, tokens, time and FLOPs, and of drafts what became of them."""
    lines = [
        text.method,
        f"{_tokens(len(text.tokens))} after {text.prompt_tokens}, in {text.seconds:.2f} s "
        f"({text.tokens_per_s:.1f} a second); {_ENDS[text.finish]}",
    ]
    if text.speculation is None:
        lines.append(
            f"FLOPs, dense / executed: {text.block_speedup:.2f} of the blocks, "
            f"{text.total_speedup:.2f} of all"
        )
        return _wrapped(lines)
    found = text.speculation
    share = f" ({text.acceptance:.0%})" if text.acceptance is not None else ""
    each = text.tokens_per_verification
    lines.append(
        f"drafts: {found.drafted} tokens, of which {found.accepted} accepted{share}; "
        f"{len(text.rounds)} verifications"
        + (f", {each:.2f} tokens each" if each is not None else "")
    )
    lines.append(f"time: {found.draft_s:.2f} s drafting, {found.verify_s:.2f} s verifying")
    lines.append(
        f"FLOPs, dense / executed: {text.total_speedup:.2f} of all, drafts and what was taken back "
        "included; none are saved"
    )
    return _wrapped(lines)


def comparison_report(found: Comparison, lossless: bool, drawn: bool) -> list[str]:
    """Whether the text is dense's, and which of them came sooner."""
    if found.equal:
        lines = ["dense writes the same text, to the last token"]
    else:
        why = ""
        if lossless and drawn:
            why = " (tokens were drawn, so the two agree in distribution, not in their draws)"
        elif lossless:
            why = " (by rounding, where two tokens are as good as equally likely)"
        alike = _tokens(found.same) + (" that is" if found.same == 1 else " that are")
        lines = [f"dense writes another text, after {alike} the same{why}"]
    faster = "faster" if found.speedup > 1 else "no faster"
    lines.append(
        f"rough time, {len(found.ratios)} interleaved pairs: dense {found.dense_s:.2f} s, "
        f"this {found.method_s:.2f} s; {found.speedup:.2f}x as fast as dense "
        f"({min(found.ratios):.2f} to {max(found.ratios):.2f}), so {faster}; "
        "`dyndepth timing` measures it"
    )
    return _wrapped(lines)


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _wrapped(lines: list[str]) -> list[str]:
    return [
        part
        for line in lines
        for part in textwrap.wrap(line, _COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
    ]
