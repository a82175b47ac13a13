"""What an answer depends on, as the fingerprint sees it.

Listed here: the input's content, the prompt, the schema, the model with its processor, the
generation settings. Not here: batch sizes, devices, workers, flush intervals, attention kernels.
A setting that changes answers and is missing here lets a rerun mix two kinds of answers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from batchvlm.config import JobConfig, ModelConfig, TaskConfig
from batchvlm.loading import resolve_backend
from batchvlm.records import InputFile
from batchvlm.schemas import read_schema
from batchvlm.settings import to_plain

# Up to here every file is named in a mismatch; beyond, the list is a digest.
_MAX_FILES_NAMED = 200
# Weights are known by their size, their head (in safetensors, the index) and their tail.
_EDGE_BYTES = 1 << 20

_PACKAGES = ("batchvlm", "torch", "transformers", "tokenizers", "pillow", "pyarrow", "datasets")


def answer_identity(cfg: JobConfig, files: Sequence[InputFile]) -> dict[str, Any]:
    """Everything that an answer of this job depends on, as JSON values.

    Raises:
        ConfigError: the schema cannot be read.
        ModelError: the image backend asked for does not work here.
    """
    return {
        "input": _input_identity(files),
        "data": {
            "columns": to_plain(cfg.data.columns),
            "max_source_pixels": cfg.data.max_source_pixels,
        },
        "task": _task_identity(cfg.task),
        "model": _model_identity(cfg.model),
        "generation": to_plain(cfg.generation),
    }


def output_layout(cfg: JobConfig) -> dict[str, Any]:
    """What the output files depend on besides."""
    return {
        "data.max_rows": cfg.data.max_rows,
        "output.rows_per_shard": cfg.output.rows_per_shard,
        "output.keep_columns": list(cfg.output.keep_columns),
        "output.token_ids": cfg.output.token_ids,
    }


def package_versions() -> dict[str, str]:
    """Versions of what computes the answers, for the record."""
    versions = {}
    for name in (*_PACKAGES, "torchvision"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def model_name(cfg: ModelConfig) -> str:
    """The model's name in the output: as set, else its hub name or the last part of its folder."""
    name = cfg.name or (Path(cfg.path).name if os.path.isdir(cfg.path) else cfg.path)
    return f"{name}@{cfg.revision}" if cfg.revision else name


def _input_identity(files: Sequence[InputFile]) -> dict[str, Any]:
    listed = {file.name: f"{file.num_rows} rows, {file.identity[:16]}" for file in files}
    if len(listed) > _MAX_FILES_NAMED:
        text = "\n".join(f"{name}\t{identity}" for name, identity in listed.items())
        listed = {"digest": hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()}
    return {"num_files": len(files), "files": listed}


def _task_identity(cfg: TaskConfig) -> dict[str, Any]:
    schema = cfg.output.json_schema
    return {
        **to_plain(cfg),
        "output": {
            "json_schema": None
            if schema is None
            else read_schema(schema, "task.output.json_schema"),
            "json_schema_column": cfg.output.json_schema_column,
        },
    }


def _model_identity(cfg: ModelConfig) -> dict[str, Any]:
    identity = {
        "name": cfg.name,
        "revision": cfg.revision,
        "dtype": cfg.dtype,
        "image_backend": resolve_backend(cfg.image_backend).value,
        "max_image_pixels": cfg.max_image_pixels,
        "max_prompt_tokens": cfg.max_prompt_tokens,
        "processor_kwargs": to_plain(cfg.processor_kwargs),
    }
    if os.path.isdir(cfg.path):
        # The folder may lie elsewhere on the next machine; what is in it must not differ.
        return identity | {"files": _folder_digest(Path(cfg.path))}
    return identity | {"path": cfg.path, "commit": _hub_commit(cfg)}


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        size_bytes = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size_bytes}\0".encode())
        with path.open("rb") as file:
            if size_bytes <= 2 * _EDGE_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(_EDGE_BYTES))
                file.seek(-_EDGE_BYTES, os.SEEK_END)
                digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


def _hub_commit(cfg: ModelConfig) -> str | None:
    from transformers import AutoConfig

    from batchvlm.loading import explained

    with explained(cfg, "config"):
        config = AutoConfig.from_pretrained(
            cfg.path, revision=cfg.revision or "main", trust_remote_code=cfg.trust_remote_code
        )
    commit = getattr(config, "_commit_hash", None)
    return str(commit) if commit else None
