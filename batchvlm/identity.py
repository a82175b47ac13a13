"""Everything that an answer depends on: the input of the fingerprint.

It includes the input's content, the prompt, the schema, the model with its processor, and the
generation settings. It excludes batch sizes, devices, workers, flush intervals and attention
kernels. If a setting changes answers but is missing here, a rerun mixes two kinds of answers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from batchvlm.config import (
    EndpointConfig,
    EngineName,
    JobConfig,
    ModelConfig,
    SourceKind,
    TaskConfig,
)
from batchvlm.errors import ModelError
from batchvlm.forms.forms import run_form
from batchvlm.model.adapters import pin_adapter
from batchvlm.model.loading import explained, resolve_backend
from batchvlm.records import InputFile
from batchvlm.settings.compose import to_plain

# Up to this many files are listed by name, so that a mismatch can name them; more become a digest.
_MAX_FILES_NAMED = 200
# The digest of a large safetensors file covers its index and this much at the start and in the
# middle of every tensor, because merges of one base model may differ in only a few tensors.
_SAMPLE_BYTES = 4096
_MAX_WHOLE_BYTES = 64 << 20
_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")

_PACKAGES = ("batchvlm", "torch", "transformers", "tokenizers", "pillow", "pyarrow", "datasets")


def answer_identity(cfg: JobConfig, files: Sequence[InputFile]) -> dict[str, Any]:
    """Everything that an answer of this job depends on, as JSON values.

    Raises:
        ConfigError: the schema cannot be read.
        ModelError: the requested image backend does not work here, or the model's files cannot be
            read.
    """
    columns = to_plain(cfg.data.columns)
    if not cfg.data.columns.image_optional:
        del columns["image_optional"]  # outputs from before this setting existed stay valid
    # As before it existed, when a request of a batch file with variables was an error.
    is_batch = cfg.data.source is SourceKind.openai
    if columns["chat_template_kwargs"] == ("chat_template_kwargs" if is_batch else None):
        del columns["chat_template_kwargs"]
    generation = to_plain(cfg.generation)
    if cfg.generation.skip_special_tokens:
        del generation["skip_special_tokens"]
    return {
        "input": input_identity(files),
        "data": {
            "columns": columns,
            # Below another root the paths in rows are other files.
            "image_root": cfg.data.image_root,
            "allow_remote": cfg.data.allow_remote,
            "allow_hosts": sorted(cfg.data.allow_hosts),
            "max_image_bytes": cfg.data.max_image_bytes,
            "max_source_pixels": cfg.data.max_source_pixels,
        },
        "task": _task_identity(cfg.task),
        "model": _served_identity(cfg.model, cfg.engine.endpoint)
        if cfg.engine.name is EngineName.endpoint
        else _model_identity(cfg.model),
        "generation": generation,
    }


def output_layout(cfg: JobConfig) -> dict[str, Any]:
    """The settings besides `answer_identity` that the output files depend on."""
    return {
        "data.max_rows": cfg.data.max_rows,
        "model.name": model_name(cfg.model),
        "output.rows_per_shard": cfg.output.rows_per_shard,
        "output.keep_columns": list(cfg.output.keep_columns),
        "output.token_ids": cfg.output.token_ids,
    }


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that compute the answers, to be stored with the run."""
    versions = {}
    for name in (*_PACKAGES, "torchvision", "llguidance", "xgrammar"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def pin_model(cfg: ModelConfig) -> ModelConfig:
    """Set `revision` to the commit that the branch or tag points to now; keep a folder as it is.

    Every process that later loads a part of the model then loads the same commit.

    Raises:
        ModelError: there is no such model.
    """
    cfg = pin_adapter(cfg)
    if os.path.isdir(cfg.path):
        if not os.path.exists(os.path.join(cfg.path, "config.json")):
            raise ModelError(
                f"model.path={cfg.path}: no config.json there, so this is no model folder",
                hint="name the folder that save_pretrained wrote, or a model of the Hub",
            )
        return cfg
    if os.path.exists(cfg.path) or cfg.path.startswith((".", "~", os.sep)):
        raise ModelError(
            f"model.path={cfg.path}: no such folder",
            hint="check the spelling; a model of the Hub is named user/model",
        )
    from transformers import AutoConfig

    with explained(cfg, "config"):
        config = AutoConfig.from_pretrained(
            cfg.path, revision=cfg.revision or "main", trust_remote_code=cfg.trust_remote_code
        )
    return replace(cfg, revision=getattr(config, "_commit_hash", None) or cfg.revision)


def served_model(cfg: ModelConfig, endpoint: EndpointConfig) -> ModelConfig:
    """The model by its name on the server, without a revision, as its files are not here."""
    if endpoint.model is None:
        return replace(cfg, revision=None)
    return replace(cfg, path=endpoint.model, name=endpoint.model, revision=None)


def model_name(cfg: ModelConfig) -> str:
    """The model's name in the output, as set or its Hub or folder name, then `@` and revision."""
    name = cfg.name or (Path(cfg.path).name if os.path.isdir(cfg.path) else cfg.path)
    return f"{name}@{cfg.revision}" if cfg.revision else name


def input_identity(files: Sequence[InputFile]) -> dict[str, Any]:
    """The part of the identity that describes the input files."""
    listed = {file.name: f"{file.num_rows} rows, {file.identity[:16]}" for file in files}
    if len(listed) > _MAX_FILES_NAMED:
        text = "\n".join(f"{name}\t{identity}" for name, identity in listed.items())
        listed = {"digest": hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()}
    return {"num_files": len(files), "files": listed}


def _task_identity(cfg: TaskConfig) -> dict[str, Any]:
    form = run_form(cfg.output)
    asked: dict[str, Any] = {
        # By content, since a file, a class and an inline schema may be the same form.
        "form": None if form is None else [form.kind.value, form.text],
        "json_schema_column": cfg.output.json_schema_column,
        "choice_column": cfg.output.choice_column,
    }
    if form is not None or cfg.output.json_schema_column or cfg.output.choice_column:
        asked["guided"] = cfg.output.guided.value
    identity = {**to_plain(cfg), "output": asked}
    # Left out unless set, so that outputs from before these settings existed stay valid.
    for name in ("scores", "answer_prefix", "continue_final_message"):
        if not identity[name]:
            del identity[name]
    return identity


def _model_identity(cfg: ModelConfig) -> dict[str, Any]:
    identity = {
        "dtype": to_plain(cfg.dtype),
        "image_backend": resolve_backend(cfg.image_backend).value,
        "max_image_pixels": cfg.max_image_pixels,
        "max_prompt_tokens": cfg.max_prompt_tokens,
        "processor_kwargs": to_plain(cfg.processor_kwargs),
    }
    # Included only if set, so that outputs from before these settings existed stay valid.
    if cfg.chat_template_kwargs:
        identity["chat_template_kwargs"] = to_plain(cfg.chat_template_kwargs)
    if cfg.prompt_tokens:
        identity["prompt_tokens"] = sorted(cfg.prompt_tokens)
    if cfg.quantization is not None:
        skip = cfg.quantization_skip
        identity["quantization"] = cfg.quantization.value
        identity["quantization_skip"] = None if skip is None else sorted(skip)
    if cfg.adapter is not None:
        identity["adapter"] = _adapter_identity(cfg)
    if os.path.isdir(cfg.path):
        # The folder's path may differ on the next machine, its content must not.
        with explained(cfg, "files"):
            return identity | {"files": _folder_digest(Path(cfg.path))}
    return identity | {"path": cfg.path, "commit": cfg.revision}


def _adapter_identity(cfg: ModelConfig) -> dict[str, Any]:
    assert cfg.adapter is not None
    if not os.path.isdir(cfg.adapter):
        where = {"path": cfg.adapter, "commit": cfg.adapter_revision}
        return where | {"subfolder": cfg.adapter_subfolder}
    with explained(cfg, "adapter"):
        return {"files": _folder_digest(Path(cfg.adapter, cfg.adapter_subfolder or ""))}


def _served_identity(cfg: ModelConfig, endpoint: EndpointConfig) -> dict[str, Any]:
    # Not the address, because a server moves from node to node. Which weights it has loaded under
    # the name cannot be known here.
    return {
        "served": cfg.path,
        "max_image_pixels": cfg.max_image_pixels,
        "image_format": endpoint.image_format.value,
        "response_format": endpoint.response_format.value,
        "extra_body": to_plain(endpoint.extra_body),
    }


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if is_hidden or path.suffix not in _MODEL_FILES or not path.is_file():
            continue
        size_bytes = path.stat().st_size
        digest.update(f"{name}\0{size_bytes}\0".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors" and size_bytes > _MAX_WHOLE_BYTES:
                for piece in _samples(file):
                    digest.update(piece)
            else:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _samples(file: BinaryIO) -> Iterator[bytes]:
    """Yield a safetensors file's index, then a piece of the start and middle of every tensor."""
    num_header_bytes = int.from_bytes(file.read(8), "little")
    header = file.read(num_header_bytes)
    yield header
    tensors = json.loads(header)
    tensors.pop("__metadata__", None)
    for start, end in sorted(tensor["data_offsets"] for tensor in tensors.values()):
        for offset in (start, (start + end) // 2):
            file.seek(8 + num_header_bytes + offset)
            yield file.read(min(_SAMPLE_BYTES, end - offset))
