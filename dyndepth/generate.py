"""The command line ``python -m dyndepth.generate``; the door itself is in ``dyndepth.writing``.

To be run, not imported: a module of this name would stand where the function
``dyndepth.generate`` does.
"""

import sys

if __name__ != "__main__":
    raise ImportError("dyndepth.generate is a function; use: from dyndepth import generate")

from dyndepth.writing.__main__ import main

sys.exit(main())
