"""Export an output as a dataset repository of the Hugging Face Hub: unchanged parts and a card.

The parts are uploaded first, up to `_FILES_PER_COMMIT` in a commit. The last commit adds the card
and deletes Parquet files of earlier exports that this one does not have.
`datasets.load_dataset(REPO)` reads the repository with the features in the card.
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
from batchvlm.words import first_line

log = logging.getLogger(__name__)

_FILES_PER_COMMIT = 100
"""The Hub recommends 50 to 100, because larger commits may time out."""


def push(output: Output, repo: str, *, is_private: bool = True) -> str:
    """Upload a finished job's parts and card to a dataset repository.

    Args:
        output: output of a finished job.
        repo: `NAMESPACE/NAME`; created if it does not exist.
        is_private: visibility of a new repository; that of an existing one does not change.

    Returns:
        The URL of the dataset.

    Raises:
        OutputError: the job is not finished, `datasets` has no type for a column, or the Hub
            refuses or cannot be reached.
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
    except Exception as error:  # errors of the Hub or the network, or an invalid name
        raise OutputError(
            f"cannot export to {repo}: {first_line(error)}",
            hint="check the name and `hf auth whoami`, then export again: "
            "what is there is not sent again",
        ) from error
    return str(address)


def _content(output: Output, path: Path) -> Any:
    # Given a path, the Hub's client uploads only the chunks that the Hub lacks.
    return str(path) if output.folder.is_local else output.folder.open(path)


def _features(schema: pa.Schema) -> Sequence[dict[str, Any]]:
    """Return the columns as features of `datasets`; kept images have the feature `Image`.

    Raises:
        OutputError: `datasets` has no type for a column.
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
