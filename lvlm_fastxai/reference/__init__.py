"""Dense twins: the readable definition of every operator, used as the referee in tests and benchmarks.

Every module here holds the twin of its own name, which is also found as an attribute of this package.
"""

from __future__ import annotations

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    globals()[_found.name] = getattr(importlib.import_module(f"{__name__}.{_found.name}"), _found.name)
