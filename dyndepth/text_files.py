"""Users' text files, read alike wherever they were written: with a byte-order mark or without, with
any line ends. What is no UTF-8 is refused."""

from __future__ import annotations

from typing import Protocol

from dyndepth.errors import UserError

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""Byte-order marks of UTF-16, and of UTF-32 behind the first."""


class Readable(Protocol):
    """A path, or a file inside a package."""

    def read_bytes(self) -> bytes: ...


def read_text(file: Readable, what: str = "") -> str:
    """The text of ``file`` without byte-order mark, each line ended by one line feed.

    Raises OSError as reading does, and UserError in the name of ``what`` (default: the path) for
    another encoding than UTF-8.
    """
    content, name = file.read_bytes(), what or repr(str(file))
    # Latin text in UTF-16 is valid UTF-8 with a null beside each letter.
    if content.startswith(_UTF_16) or 4 * content.count(0) > len(content):
        raise UserError(f"{name} is not UTF-8 text but UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise UserError(
            f"{name} is not UTF-8 text: byte {fault.start} is {content[fault.start]:#04x}; "
            "save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def paragraphs(text: str) -> list[str]:
    """The parts of ``text`` between blank lines; a line of white space alone is one."""
    lines = ("" if line.isspace() else line for line in text.split("\n"))
    return "\n".join(lines).split("\n\n")
