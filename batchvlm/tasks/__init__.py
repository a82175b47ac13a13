"""Tasks: read the text of a completion, without access to models or files.

To add a task, add a module with a class that has `read`, its name in `config.TaskName`, a case
below, and `conf/task/NAME.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from batchvlm.config import TaskConfig, TaskName
from batchvlm.records import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The result of reading one answer."""

    parsed: str | None = None
    """The typed value as canonical JSON text."""
    json_valid: bool | None = None
    """Whether the answer has the required form; None if no form is required."""
    failure: Failure | None = None
    is_unfinished: bool = False
    """Whether the answer is not valid JSON but might be the start of it."""


class Task(Protocol):
    """The interface of a task."""

    def read(
        self, text: str, *, json_schema: str | None, choices: Sequence[str] | None = None
    ) -> Reading:
        """Read one answer.

        Args:
            text: the model's answer.
            json_schema: the row's own schema as JSON text; None if it has none.
            choices: the row's own choices; None if it has none.
        """
        ...


def open_task(cfg: TaskConfig) -> Task:
    """Return the task that the configuration names.

    Raises:
        ConfigError: the form in `task.output` cannot be read.
    """
    from batchvlm.tasks.extract import Extract
    from batchvlm.tasks.free_text import FreeText

    match cfg.name:
        case TaskName.caption | TaskName.vqa | TaskName.dialog:
            return FreeText(cfg.output)
        case TaskName.extract:
            return Extract(cfg.output)
