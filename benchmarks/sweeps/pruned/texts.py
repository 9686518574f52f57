"""The texts and questions that the pruned sweep is measured on: files of this repository as one commit has them.

Nothing has to be downloaded, and a commit names them exactly. What the error estimate is calibrated on and what it is
judged by share no file.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Any

from ...common.machine import ROOT

# What results/pruned.json was measured on. The paths below are this commit's: when a file moves today, they stay. Later
# commits, which other figures name, differ in the documents and in the engine's source.
COMMIT = "b4b44dde1370fcd6cd029434f517d5686bf81fd1"


@dataclass(frozen=True)
class Text:
    """Files read one after the other; ordinary next-token targets are taken inside."""

    kind: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about an excerpt, and how its answer begins; the token that the model says next is explained."""

    files: tuple[str, ...]
    question: str
    lead: str = ""


_DOCUMENTS = ("docs/evaluation.md", "docs/methods.md", "docs/troubleshooting.md", "docs/shipped-lvlm.md", "README.md")
_ENGINE = tuple(f"lvlm_fastxai/{name}.py" for name in ("sweep", "attention", "explainer", "relevancy", "targets"))
_EVALUATION = tuple(
    f"lvlm_fastxai/evaluate/{name}.py" for name in ("evaluation", "scores", "metrics", "curves", "output", "plot")
)

TEXTS = {
    "documentation": Text("prose", (*_DOCUMENTS, "LICENSE")),
    "engine": Text("code", _ENGINE),
    "licence": Text("prose", ("LICENSE", *_DOCUMENTS)),
    "evaluation": Text("code", _EVALUATION),
}
QUESTIONS = {
    "licence's name": Question(
        ("LICENSE", *_DOCUMENTS), "What is the name of this license?", "The name of this license is the"
    ),
    "code's language": Question(_ENGINE, "Which programming language is this?", "This is written in"),
    "subject": Question(_DOCUMENTS[1:] + _DOCUMENTS[:1], "What is this text about?", "This text is about"),
}
SUMMARY = Question(("LICENSE", *_DOCUMENTS), "Summarize this text in one sentence.")
# One of prose and one of code, where two are enough.
TWO_TEXTS = {name: TEXTS[name] for name in ("documentation", "engine")}

_HOUSE = ("docs/architecture.md", "docs/extending.md", "CHANGELOG.md")
_KERNEL = ("csrc/cpu/relevancy_product_kernel.cpp",)
_ORACLE = ("tests/oracle.py", "tests/test_oracles.py")
CALIBRATION_TEXTS = {
    "house": Text("prose", _HOUSE),
    "extending": Text("prose", _HOUSE[1:] + _HOUSE[:1]),
    "changes": Text("prose", _HOUSE[2:] + _HOUSE[:2]),
    "scenes": Text("code", ("lvlm_fastxai/tiny/scenes.py",)),
    "layouts": Text("code", ("lvlm_fastxai/families/_layouts.py",)),
    "kernel": Text("code", _KERNEL),
    "oracle": Text("code", _ORACLE),
}
CALIBRATION_QUESTIONS = {
    "build": Question(_HOUSE, "What is built here, and with what?", "It is built with"),
    "drawing": Question(("lvlm_fastxai/tiny/scenes.py",), "What does this program draw?", "The program draws"),
    "extension": Question(_HOUSE[1:] + _HOUSE[:1], "How is a method added?"),
    "news": Question(_HOUSE[2:] + _HOUSE[:2], "What was added?", "The most important addition is"),
    "processor": Question(_KERNEL, "What kind of processor is this code for?", "This code is for"),
    "checking": Question(_ORACLE, "What do these tests check?", "These tests check that the"),
}


@dataclass(frozen=True)
class Reader:
    """Reads files of a commit as tokens.

    Args:
        tokenizer: of the model that is measured.
        commit: a name that git knows.
    """

    tokenizer: Any
    commit: str = COMMIT

    def tokens(self, files: tuple[str, ...], count: int) -> list[int]:
        """Return the first ``count`` tokens of the files, without the rows of Markdown's tables, which are not prose.

        Raises:
            ValueError: the files are too short.
            SystemExit: this is not a git checkout, or the commit or a file is not in it.
        """
        tokens: list[int] = []
        for file in files:
            lines = text_of(file, self.commit).splitlines()
            if file.endswith(".md"):
                lines = [line for line in lines if not line.startswith("|")]
            tokens += self.tokenizer("\n".join(lines) + "\n\n", verbose=False)["input_ids"]
            if len(tokens) >= count:
                return tokens[:count]
        raise ValueError(f"{', '.join(files)}: {len(tokens)} tokens, {count} are needed; choose a smaller length")


def text_of(file: str, commit: str = COMMIT) -> str:
    """Return a file of this repository as a commit has it.

    Raises:
        SystemExit: this is not a git checkout, or the commit or the file is not in it.
    """
    try:
        shown = subprocess.run(["git", "show", f"{commit}:{file}"], cwd=ROOT, capture_output=True, check=True)
    except FileNotFoundError:
        raise SystemExit(f"{file} is read from commit {commit[:7]} of this repository, and there is no git") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip()
        raise SystemExit(
            f"{file} is read from commit {commit[:7]}, which needs a git checkout with its history: {reason}"
        ) from None
    return shown.stdout.decode("utf-8")
