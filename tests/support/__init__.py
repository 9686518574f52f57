"""What several test modules share."""

from pathlib import Path

import pytest

# So that its asserts, too, show their values.
pytest.register_assert_rewrite(*(f"support.{path.stem}" for path in Path(__file__).parent.glob("[!_]*.py")))
