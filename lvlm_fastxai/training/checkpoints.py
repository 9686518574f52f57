"""The state of a run in one file, from which it goes on after a stop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import ArgumentError, one_line
from ..files import writing


class Stateful(Protocol):
    """What has a state to save: a module, an optimiser, an average, `Generator`."""

    def state_dict(self) -> Any:
        """The state, of tensors and plain Python values."""

    def load_state_dict(self, state: Any) -> Any:
        """Go on from a state."""


class Generator:
    """A generator of random numbers as a part of a `Checkpoint`.

    Args:
        generator: numpy's or torch's.
    """

    def __init__(self, generator: np.random.Generator | torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> Any:
        """The generator's state."""
        if isinstance(self._generator, torch.Generator):
            return self._generator.get_state()
        return self._generator.bit_generator.state

    def load_state_dict(self, state: Any) -> None:
        """Draw from here on what would have been drawn after that state."""
        if isinstance(self._generator, torch.Generator):
            self._generator.set_state(state)
        else:
            self._generator.bit_generator.state = state


class Checkpoint:
    """The parts of a run whose state is kept in one file, which is there whole or not at all.

    Args:
        path: the file.
        parts: name → what has a state: modules, optimisers, averages, generators.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "state.pt"
        >>> Checkpoint(path, {"layer": torch.nn.Linear(2, 2)}).save({"step": 7})
        >>> Checkpoint(path, {"layer": torch.nn.Linear(2, 2)}).load()
        {'step': 7}
    """

    def __init__(self, path: Path, parts: Mapping[str, Stateful]) -> None:
        self.path = path
        self._parts = dict(parts)

    def save(self, values: Mapping[str, Any]) -> None:
        """Write the states of all parts, and plain values beside them (numbers, texts, lists and dicts of these).

        Raises:
            ArgumentError: the file cannot be written; the state that was saved before is untouched.
        """
        states = {name: part.state_dict() for name, part in self._parts.items()}
        with writing(self.path, argument="state") as file:
            torch.save({"parts": states, "values": dict(values)}, file)

    def load(self) -> dict[str, Any] | None:
        """Set every part to its saved state.

        Returns:
            The values that were saved beside them; None where there is no file.

        Raises:
            ArgumentError: the file cannot be read, or is of another run's parts.
        """
        if not self.path.is_file():
            return None
        try:
            # Only tensors and plain values: a file of another origin runs no code.
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            for name, part in self._parts.items():
                part.load_state_dict(saved["parts"][name])
            values: dict[str, Any] = saved["values"]
        except Exception as error:  # torch raises what it likes on damaged files and on states that do not fit
            raise ArgumentError(
                f"state: cannot go on from '{self.path}': {one_line(error)}; remove it to begin anew"
            ) from error
        return values
