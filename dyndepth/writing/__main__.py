"""The command line ``python -m dyndepth.generate``: a text, written under any method.

The text goes to standard output, what it came to to standard error; with ``--json`` both are one
document.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dyndepth.cells.cell import DENSE
from dyndepth.common.commands import Parser, run
from dyndepth.common.errors import NothingSkipped, UserError
from dyndepth.common.paths import EMBEDDED, check_folder, path_of

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod
    from dyndepth.writing.result import Generated

PICTURES = (".png", ".svg", ".pdf")
STDIN = "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 for wrong input."""
    return run("generate", _generate, arguments)


def _parser() -> Parser:
    built = Parser(
        "generate",
        "Write a text under any method, and say what it took.",
        "One of the kind that `dyndepth ls methods` calls lossless writes what dense does, from "
        "drafts by part of the model: give it --speedups above 1.",
    )
    add = built.add_argument
    add("prompt", metavar="PROMPT", help="words to go on after; - for standard input")
    add("--chat", action="store_true", help="PROMPT is what a user says in a conversation")
    built.method("write by", default=DENSE)
    built.speedup(None, "what the method names")
    built.model()
    built.shared("corpus", EMBEDDED)
    built.whole("max_new_tokens", 1, "most tokens to write", 128)
    built.number(
        "temperature",
        lambda x: x >= 0,
        "a number of at least 0",
        "what logits are divided by before a token is drawn; at 0 the likeliest is taken "
        "(default: 0)",
        0.0,
    )
    built.whole("top_k", 1, "draw among so many of the likeliest tokens (default: all)")
    built.number(
        "top_p",
        lambda x: 0 < x <= 1,
        "a number above 0 and at most 1",
        "draw among the likeliest tokens that together have this probability (default: all)",
    )
    add("--stop", action="append", metavar="TEXT", help="text that ends what is written, without "
        "it; can be given several times")  # fmt: skip
    built.whole("seed", 0, "of what is drawn", 0)
    add(
        "--compare",
        action="store_true",
        help="write dense's text as well, say whether they are equal, and time both in turns",
    )
    add(
        "--plot",
        metavar="FILE",
        help="draw what was drafted and what stands of it, as PNG, SVG or PDF by the file's ending",
    )
    add("--json", action="store_true", help="print one JSON document in place of text and lines")
    return built


def _generate(given: list[str]) -> None:
    options = vars(_parser().parse_args(given))
    picture = _picture(options["plot"])
    words = sys.stdin.read() if options["prompt"] == STDIN else options["prompt"]
    prompt: Any = [{"role": "user", "content": words}] if options["chat"] else words
    method = _method(options)
    if picture and not method.speculates:
        raise UserError(f"--plot draws drafts, and {method.name} makes none; leave it out")

    from dyndepth.models.loading import load_tokenizer, loaded, named
    from dyndepth.writing.generate import texts_by
    from dyndepth.writing.prompts import tokens_of
    from dyndepth.writing.settings import checked

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    settings = checked(options["stop"] or (), **{name: options[name] for name in names})
    tokenizer = load_tokenizer(*named(options))
    ids = tokens_of(tokenizer, prompt, "the prompt")
    model = loaded(options)
    streamer = _streamer(tokenizer) if _streams(options) else None
    with _told_if_nothing_is_skipped():
        (text,), method = texts_by(
            method, model, tokenizer, [prompt], settings, corpus=options["corpus"],
            streamer=streamer,
        )  # fmt: skip
    found: dict[str, Any] = {"text": text.text, "tokens": list(text.tokens)} | text.statistics()
    if not options["json"]:
        if streamer is None:
            print(text.text, flush=True)
        _say(*_told(text))
    if options["compare"]:
        (dense,), _ = texts_by(DENSE, model, tokenizer, [prompt], settings)
        found["compared"] = _compare(
            model, method, tokenizer, ids, settings, text, dense, options["json"]
        )
    if picture:
        from dyndepth.plots.rounds import drafts

        drafts(text, picture, count=len(text.proposals) + 1)
        found["plot"] = str(picture)
        _say(f"written: {picture}")
    if options["json"]:
        print(json.dumps({"generate": found}), flush=True)


def _method(options: dict[str, Any]) -> DynamicDepthMethod:
    """The method that the flags describe, checked, not fitted."""
    from dyndepth.common.registry import load_method

    target = options["speedups"]
    return load_method(options["methods"], **({} if target is None else {"target_speedup": target}))


def _picture(file: str | None) -> Any:
    """Where the picture goes. Raises UserError where it cannot, before anything is computed."""
    if file is None:
        return None
    path = path_of(file)
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"--plot takes a file that ends in {', '.join(PICTURES)}, not {file!r}")
    check_folder("plot", path.parent)
    return path


def _streams(options: dict[str, Any]) -> bool:
    """Whether words are shown as they come: to people, and where none is taken back at its end."""
    return sys.stdout.isatty() and not options["json"] and not options["stop"]


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _compare(
    model: Any,
    method: DynamicDepthMethod,
    tokenizer: Any,
    ids: list[int],
    settings: Any,
    text: Generated,
    dense: Generated,
    quiet: bool,
) -> dict[str, Any]:
    """Dense's text beside the method's, told unless ``quiet``, and as JSON."""
    from dyndepth.writing.comparison import compared
    from dyndepth.writing.report import comparison_report

    found = compared(model, method, tokenizer, ids, settings, text, dense)
    if not quiet:
        lines = comparison_report(found, method.speculates, settings.temperature > 0)
        _say("", *lines, *([] if found.equal else ["", "dense's text:", dense.text]))
    return found.statistics()


def _told(text: Generated) -> list[str]:
    from dyndepth.writing.report import text_report

    return ["", *text_report(text)]


@contextmanager
def _told_if_nothing_is_skipped() -> Iterator[None]:
    """Afterwards it is said in a line; other warnings are as ever."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", NothingSkipped)
        yield
    for each in said:
        if issubclass(each.category, NothingSkipped):
            _say(f"dyndepth.generate: {each.message}")
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _say(*lines: str) -> None:
    print("\n".join(lines), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
