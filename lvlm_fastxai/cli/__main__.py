"""``python -m lvlm_fastxai.cli``, as launchers of several processes call it."""

from __future__ import annotations

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
