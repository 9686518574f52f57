"""Typed errors. Each also derives from the built-in a caller would expect, so `except ValueError` keeps working."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "BackendUnavailableError",
    "FastXAIError",
    "ModelMismatchError",
    "NotDifferentiableError",
    "UnknownFamilyError",
    "UnsupportedModelError",
]


class FastXAIError(Exception):
    """Base of every error raised by this package."""


class ArgumentError(FastXAIError, ValueError):
    """An argument is wrong; the message names it, what was expected and what came."""


class BackendUnavailableError(FastXAIError, RuntimeError):
    """The backend that was asked for cannot serve the problem; the message says why."""


class ModelMismatchError(FastXAIError, ValueError):
    """What was made for one model was given another; the message names both."""


class NotDifferentiableError(FastXAIError, RuntimeError):
    """A gradient was asked of an operation that has none."""


class UnsupportedModelError(FastXAIError, TypeError):
    """The model, or a mask it builds, cannot be explained; the message says what stands in the way."""


class UnknownFamilyError(FastXAIError, LookupError):
    """The model family's image grid is not known; the message names the missing data and where to add it."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
