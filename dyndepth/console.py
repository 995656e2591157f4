"""Prints tables, on a terminal as wide as it is and into a pipe as wide as they need."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

PIPE_WIDTH = 200
"""Columns where no terminal tells its width; rich would fold everything into 80."""


def print_table(table: Table) -> None:
    """Print ``table`` to standard output."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=PIPE_WIDTH)).print(table)
