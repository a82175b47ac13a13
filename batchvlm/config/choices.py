"""The names that settings choose among."""

from __future__ import annotations

from enum import StrEnum


class SourceKind(StrEnum):
    """Where records come from."""

    parquet = "parquet"
    hf = "hf"
    folder = "folder"
    jsonl = "jsonl"
    openai = "openai"
    webdataset = "webdataset"


class TaskName(StrEnum):
    """What is made of an answer."""

    caption = "caption"
    vqa = "vqa"
    extract = "extract"
    dialog = "dialog"


class EngineName(StrEnum):
    """What turns batches into completions."""

    auto = "auto"
    slots = "slots"
    generate = "generate"
    endpoint = "endpoint"


class Quantization(StrEnum):
    """How weights are made smaller, by which library."""

    quanto_int8 = "quanto_int8"
    quanto_int4 = "quanto_int4"
    quanto_float8 = "quanto_float8"
    bnb_int8 = "bnb_int8"
    bnb_nf4 = "bnb_nf4"
    torchao_int8 = "torchao_int8"
    torchao_int8_dynamic = "torchao_int8_dynamic"
    torchao_float8 = "torchao_float8"


class ImageFormat(StrEnum):
    """How an image travels to a server."""

    png = "png"
    jpeg = "jpeg"


class ResponseFormat(StrEnum):
    """How a server is told the form of an answer."""

    json_schema = "json_schema"
    tgi = "tgi"
    vllm = "vllm"
    vllm_guided = "vllm_guided"
    none = "none"


class OnMismatch(StrEnum):
    """What happens where the output folder holds the answers to another question."""

    error = "error"
    new_folder = "new_folder"
    overwrite = "overwrite"


class Guided(StrEnum):
    """How far answers are held to the form that is asked for while they are decoded."""

    auto = "auto"
    strict = "strict"
    off = "off"


class Instructions(StrEnum):
    """Whether the prompt says which form the answer must have."""

    auto = "auto"
    off = "off"


class ImageBackend(StrEnum):
    """Which library resizes and normalises images in the model's processor."""

    auto = "auto"
    pil = "pil"
    torchvision = "torchvision"
