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


def printable(text: object, *, keep: str = "") -> str:
    """Spell out what a terminal must not be given raw: control characters, and bytes of names that are not UTF-8.

    Args:
        text: from outside: a question, an answer, a file's name.
        keep: characters that stay as they are, such as the line ends of a text of several lines.

    Example:
        >>> print(printable("a\\x1b[2Jb\\udce9.png"))
        a\\x1b[2Jb\\xe9.png
    """
    return "".join(c if c.isprintable() or c in keep else _spelled(c) for c in str(text))


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, fit to be printed, or the error's type where it has no message.

    Example:
        >>> one_line(ValueError("too long\\nsee the manual"))
        'too long'
        >>> one_line(KeyboardInterrupt())
        'KeyboardInterrupt'
    """
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def _spelled(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is no UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
