"""The values of settings with a fixed set of choices."""

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
    """How an answer is processed."""

    caption = "caption"
    vqa = "vqa"
    extract = "extract"
    dialog = "dialog"


class EngineName(StrEnum):
    """The engine that turns batches into completions."""

    auto = "auto"
    slots = "slots"
    generate = "generate"
    endpoint = "endpoint"


class Quantization(StrEnum):
    """The library and format that quantize the weights."""

    quanto_int8 = "quanto_int8"
    quanto_int4 = "quanto_int4"
    quanto_float8 = "quanto_float8"
    bnb_int8 = "bnb_int8"
    bnb_nf4 = "bnb_nf4"
    torchao_int8 = "torchao_int8"
    torchao_int8_dynamic = "torchao_int8_dynamic"
    torchao_float8 = "torchao_float8"


class ImageFormat(StrEnum):
    """The encoding of images sent to a server."""

    png = "png"
    jpeg = "jpeg"


class ResponseFormat(StrEnum):
    """The request field that tells a server the form of an answer."""

    json_schema = "json_schema"
    tgi = "tgi"
    vllm = "vllm"
    vllm_guided = "vllm_guided"
    none = "none"


class OnMismatch(StrEnum):
    """What to do if the output folder holds a run with another fingerprint or fixed settings."""

    error = "error"
    new_folder = "new_folder"
    overwrite = "overwrite"


class Guided(StrEnum):
    """How strictly decoding enforces the requested form of answers."""

    auto = "auto"
    strict = "strict"
    off = "off"


class Instructions(StrEnum):
    """Whether the prompt states the requested form of the answer."""

    auto = "auto"
    off = "off"


class ImageBackend(StrEnum):
    """The library that resizes and normalises images in the model's processor."""

    auto = "auto"
    pil = "pil"
    torchvision = "torchvision"
