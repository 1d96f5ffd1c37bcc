"""``python -m rlsched`` is the ``rlsched`` command."""

import sys

from rlsched.cli import main

if __name__ == "__main__":
    sys.exit(main())
