"""Completion -> what the task makes of it. A task knows text and schemas, no model and no file.

To add a task: a module with a class that has `read`, its name in `config.TaskName`, a case below,
and `conf/task/NAME.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from batchvlm.config import TaskConfig, TaskName
from batchvlm.records import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a task reads from an answer."""

    parsed: str | None = None
    """The typed value as canonical JSON text."""
    json_valid: bool | None = None
    """Whether the answer has the form that was asked for; None where the task asks for none."""
    failure: Failure | None = None
    is_unfinished: bool = False
    """Whether it is no JSON as far as it goes, and might have become some."""


class Task(Protocol):
    """What the pipeline needs of a task."""

    def read(
        self, text: str, *, json_schema: str | None, choices: Sequence[str] | None = None
    ) -> Reading:
        """Read one answer.

        Args:
            text: the model's answer.
            json_schema: the row's own schema as JSON text, where it brings one.
            choices: the row's own choices, where it brings some.
        """
        ...


def open_task(cfg: TaskConfig) -> Task:
    """The task that the configuration names.

    Raises:
        ConfigError: its schema cannot be read.
    """
    from batchvlm.tasks.extract import Extract
    from batchvlm.tasks.free_text import FreeText

    match cfg.name:
        case TaskName.caption | TaskName.vqa | TaskName.dialog:
            return FreeText(cfg.output)
        case TaskName.extract:
            return Extract(cfg.output)
