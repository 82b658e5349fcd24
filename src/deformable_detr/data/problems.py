"""Problems that the annotation readers report: training raises the first one, `check` collects all."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.errors import UserError

MAX_TEXT = 400  # characters of the record and of the message in a line


@dataclass(frozen=True)
class Problem:
    """One record that a reader cannot use, or uses with a doubt.

    Attributes:
        code: The kind, a key of `validate.issues.ISSUE_TYPES`.
        file: The annotation, label or image file.
        record: Place in the file, such as 'annotations[3] (id 7)'; empty for the whole file.
        message: What is wrong.
        hint: What to do; empty for the hint of the kind.
        section: List of the COCO dict: 'images', 'annotations' or 'categories'.
        position: Index in that list; -1 if the problem is about no single record.
        image: Image file that shows the problem.
        box: xywh in pixels of that image.
        fatal: Whether the record cannot be used.
    """

    code: str
    file: Path
    record: str
    message: str
    hint: str = ""
    section: str = ""
    position: int = -1
    image: Path | None = None
    box: tuple[float, ...] | None = None
    fatal: bool = True

    @classmethod
    def from_error(cls, code: str, file: Path, error: UserError, **details: Any) -> Problem:
        """Turn an error about a file into a problem: its last clause is the hint."""
        message, _, hint = str(error).removeprefix(f"{file}: ").rpartition("; ")
        return cls(code, file, "", message or hint, hint if message else "", **details)

    @property
    def line(self) -> str:
        """File, record, message and hint on one line."""
        record, message = (
            text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…" for text in (self.record, self.message)
        )
        line = f"{self.file}: {record}{' ' if record else ''}{message}{'; ' if self.hint else ''}{self.hint}"
        # File names may contain bytes that are not text, which a terminal rejects.
        return " ".join(line.split()).encode(errors="backslashreplace").decode()


OnProblem = Callable[[Problem], object]


def raise_problem(problem: Problem) -> None:
    """Raise a fatal problem as a `UserError`; ignore others."""
    if problem.fatal:
        raise UserError(problem.line)


def ignore_problem(problem: Problem) -> None:
    """Leave the record out without a report."""


def split_command_hint(root: Path | str) -> str:
    """Return the hint to create a validation split with the `split` command."""
    return f"split it with deformable-detr split {shlex.quote(str(root))} --out NEW"
