"""Answers as a dataset repository of the Hugging Face Hub: the parts as they are, and a card.

The parts go first, so many to a commit; the last commit brings the card and takes away what an
earlier export left and this one has not. `datasets.load_dataset(REPO)` reads it with the features
that the card names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchvlm.errors import BatchvlmError, OutputError
from batchvlm.report.card import card
from batchvlm.report.outputs import Output

log = logging.getLogger(__name__)

_FILES_PER_COMMIT = 100
"""The Hub advises 50 to 100: a commit of many more may time out there."""


def push(output: Output, repo: str, *, is_private: bool = True) -> str:
    """Send a finished job's parts and card to a dataset repository.

    Args:
        output: of a finished job.
        repo: `NAMESPACE/NAME`; made if it is not there. One that is there stays as public as it is.

    Returns:
        The address of the dataset.

    Raises:
        OutputError: the job is not finished; `datasets` has no type for a column; the Hub refuses
            or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    num_left = len(output.run.plan) - len(output.folder.finished_shards(len(output.run.plan)))
    if num_left:
        raise OutputError(
            f"{output.folder} is not finished: {num_left} of {len(output.run.plan)} shards "
            "are left",
            hint="finish the job, then export it",
        )
    features = _features(output.schema)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="batchvlm")
    try:
        address = api.create_repo(repo, repo_type="dataset", private=is_private, exist_ok=True)
        repo = address.repo_id
        before = set(api.list_repo_files(repo, repo_type="dataset"))
        names = {path: f"data/{path.name}" for path in output.parts}
        for start in range(0, len(output.parts), _FILES_PER_COMMIT):
            paths = output.parts[start : start + _FILES_PER_COMMIT]
            api.create_commit(
                repo,
                [CommitOperationAdd(names[path], _content(output, path)) for path in paths],
                repo_type="dataset",
                commit_message=f"{len(paths)} parts from {names[paths[0]]}",
            )
            log.info("%s: %s", repo, names[paths[-1]])
        text = card(output, features=features).encode("utf-8", "replace")
        stale = sorted(
            name
            for name in before - set(names.values())
            if name.startswith("data/") and name.endswith(".parquet")
        )
        api.create_commit(
            repo,
            [
                CommitOperationAdd("README.md", text),
                *(CommitOperationDelete(name) for name in stale),
            ],
            repo_type="dataset",
            commit_message="Dataset card",
        )
    except BatchvlmError:
        raise
    except Exception as error:  # the Hub's, the network's, a name that is none
        raise OutputError(
            f"cannot export to {repo}: {_reason(error)}",
            hint="see to the name and to `hf auth whoami`, then export again: "
            "what is there is not sent again",
        ) from error
    return str(address)


def _content(output: Output, path: Path) -> Any:
    # A path where there is one: the Hub's client then sends only the pieces that it lacks.
    return str(path) if output.folder.is_local else output.folder.open(path)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def _features(schema: pa.Schema) -> Sequence[dict[str, Any]]:
    """The columns as `datasets` types them; pictures that were kept are its images.

    Raises:
        OutputError: it has no type for a column that was kept.
    """
    from datasets import Features, Image, List

    features = Features()
    for field in schema.remove_metadata():
        try:
            features |= Features.from_arrow_schema(pa.schema([field]))
        except ValueError as error:
            raise OutputError(
                f"datasets cannot read column {field.name!r}, which is {field.type}",
                hint="run the job without it in output.keep_columns, into another output.dir",
            ) from error
        if _is_image(field.type):
            features[field.name] = Image()
        elif pa.types.is_list(field.type) and _is_image(field.type.value_type):
            features[field.name] = List(Image())
    typed: Sequence[dict[str, Any]] = features._to_yaml_list()
    return typed


def _is_image(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {field.name for field in kind.fields} == {"bytes", "path"}
