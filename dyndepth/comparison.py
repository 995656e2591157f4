"""The former name of ``dyndepth.compare``."""

import sys

from dyndepth.compare import main

if __name__ == "__main__":
    sys.exit(main())
