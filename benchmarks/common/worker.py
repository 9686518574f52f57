"""Call one function in a fresh process: ``python -m benchmarks.common.worker MODULE:FUNCTION JSON-LIST-OF-ARGUMENTS``.

Prints what the function returns. `benchmarks.common.memory.in_fresh_process` starts it.
"""

from __future__ import annotations

import importlib
import json
import sys


def main(named: str, arguments: str) -> None:
    """Print what the function returns for these arguments."""
    module, function = named.split(":")
    print(getattr(importlib.import_module(module), function)(*json.loads(arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
