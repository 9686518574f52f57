"""Labelled answers as arrays: what a policy is fitted and checked on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError

__all__ = ["Answers"]


@dataclass(frozen=True)
class Answers:
    """Answers that are known to be right or wrong.

    Attributes:
        features: name → (n,) values.
        right: (n,) bool.
        groups: (n,) integers; answers of one group are about one picture.
    """

    features: Mapping[str, NDArray[np.float64]]
    right: NDArray[np.bool_]
    groups: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        features: Mapping[str, ArrayLike],
        right: ArrayLike,
        groups: Sequence[Hashable] | NDArray[Any] | None = None,
    ) -> Answers:
        """Check and collect arrays.

        Args:
            features: name → n finite numbers.
            right: n of true and false.
            groups: name of each answer's picture; None: every answer is about one of its own.

        Raises:
            ArgumentError: lengths differ, there are none, or a feature is not a finite number.

        Example:
            >>> answers = Answers.of({"entropy": [0.2, 0.9, 0.4]}, [True, False, True], ["cat", "cat", "dog"])
            >>> len(answers), answers.pictures
            (3, 2)
        """
        labels = np.asarray(right)
        count = len(np.atleast_1d(labels))
        if count == 0:
            raise ArgumentError("answers: there are none")
        arrays = {name: np.asarray(values, np.float64) for name, values in features.items()}
        if not arrays:
            raise ArgumentError("features: there are none")
        for name, values in arrays.items():
            if values.shape != (count,):
                raise ArgumentError(f"{name}: expected {count} numbers, one per label, got shape {values.shape}")
            if not np.isfinite(values).all():
                raise ArgumentError(f"{name}: expected finite numbers, got {values[~np.isfinite(values)][0]}")
        if labels.shape != (count,) or not np.isin(labels, (0, 1)).all():
            raise ArgumentError("right: expected one of true and false per answer")
        numbers: dict[Hashable, int] = {}
        names = range(count) if groups is None else groups
        if len(names) != count:
            raise ArgumentError(f"groups: expected {count}, one per label, got {len(names)}")
        indices = [numbers.setdefault(name, len(numbers)) for name in names]
        return cls(arrays, labels.astype(bool), np.array(indices, np.int64))

    def __len__(self) -> int:
        return len(self.right)

    @property
    def pictures(self) -> int:
        """Number of groups."""
        return len(np.unique(self.groups))

    def __getitem__(self, chosen: NDArray[Any]) -> Answers:
        features = {name: values[chosen] for name, values in self.features.items()}
        return Answers(features, self.right[chosen], self.groups[chosen])
