"""Export answers as an OpenAI batch output file, as hosted batch APIs and `vllm run-batch` do.

The file has one line for each row, in input order:

    {"id": ..., "custom_id": ..., "response": {"status_code": 200, "request_id": ...,
     "body": {"choices": [{"message": {"content": ...}, "finish_reason": ...}], "usage": ...}},
     "error": null}

A row without an answer has status code 400 or 500. Its error is in `error` and, as in responses of
the API, in `response.body.error`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from batchvlm.config import TaskName
from batchvlm.errors import ErrorType, ModelError, OutputError
from batchvlm.records import FinishReason, Status
from batchvlm.report.outputs import Output

_COLUMNS = (
    *("id", "row_index", "status", "error_type", "error_message", "generated_text"),
    *("generated_texts", "finish_reason", "finish_reasons", "token_ids", "logprobs"),
    *("prompt_tokens", "completion_tokens", "model"),
)
_SERVER_ERRORS = {ErrorType.TIMEOUT, ErrorType.PREPROCESS, ErrorType.OOM, ErrorType.ENGINE}
"""Errors that are not the request's fault, for which a server would return 500."""

TokenText = Callable[[int], str]


def write_answers(output: Output, path: Path) -> int:
    """Write the answers of all finished shards; the file is complete or not written at all.

    Returns:
        The number of lines.

    Raises:
        OutputError: a part cannot be read, or the file cannot be written.
        ModelError: rows have logprobs, but the model's tokenizer cannot be loaded.
    """
    num_lines = 0
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("w", encoding="utf-8") as file:
                for answer in answers(output):
                    file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                    num_lines += 1
                file.flush()
                # Without fsync the rename can reach the disk before the bytes.
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return num_lines


def answers(output: Output) -> Iterator[dict[str, Any]]:
    """Yield the line of every row of the finished shards, in input order.

    Raises:
        OutputError, ModelError: as for `write_answers`.
    """
    created = int(datetime.fromisoformat(output.run.created_at).timestamp())
    token_text: TokenText | None = None
    is_dialog = output.run.settings["task"]["name"] == TaskName.dialog
    for batch in output.batches(_COLUMNS):
        for row in batch.to_pylist():
            if row.get("logprobs") is not None and token_text is None:
                token_text = _tokens_of(output)
            if is_dialog:  # the answers to turns are not choices; export the last one
                row["generated_texts"] = row["finish_reasons"] = None
            name = f"{output.run.fingerprint}-{row['row_index']}"
            yield _line(row, name, created, token_text)


def _line(
    row: Mapping[str, Any], name: str, created: int, token_text: TokenText | None
) -> dict[str, Any]:
    error = None
    if row["status"] != Status.SUCCESS:
        error = {"code": row["error_type"], "message": row["error_message"]}
    if row["generated_text"] is not None:
        # An answer that is not valid JSON counts as an answer: a server would return it, too.
        code, body = 200, _completion(row, name, created, token_text)
    else:
        code = 500 if row["error_type"] in _SERVER_ERRORS else 400
        kind = "server_error" if code == 500 else "invalid_request_error"
        body = {"error": {**(error or {}), "type": kind, "param": None}}
    return {
        "id": f"batch_req_{name}",
        "custom_id": row["id"],
        "response": {"status_code": code, "request_id": f"req_{name}", "body": body},
        "error": error,
    }


def _completion(
    row: Mapping[str, Any], name: str, created: int, token_text: TokenText | None
) -> dict[str, Any]:
    texts = row.get("generated_texts") or [row["generated_text"]]
    reasons = row.get("finish_reasons") or [row["finish_reason"]]
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            **_finish(reason),
        }
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    if row.get("logprobs") is not None and row.get("token_ids") is not None:
        assert token_text is not None
        pairs = zip(row["token_ids"], row["logprobs"], strict=True)
        content = [_token(token_text(token), logprob) for token, logprob in pairs]
        choices[0]["logprobs"] = {"content": content, "refusal": None}
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": created,
        "model": row["model"],
        "choices": choices,
        "usage": _usage(row["prompt_tokens"], row["completion_tokens"]),
    }


def _usage(num_prompt: int | None, num_answer: int | None) -> dict[str, int] | None:
    if num_prompt is None or num_answer is None:
        return None  # the server that answered did not report usage
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
    }


def _finish(reason: str) -> dict[str, Any]:
    if reason == FinishReason.REPETITION:
        # Clients do not know this reason; like vLLM, put it into a second field.
        return {"finish_reason": FinishReason.LENGTH.value, "stop_reason": reason}
    return {"finish_reason": reason}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": logprob,
        "bytes": list(text.encode()),
        "top_logprobs": [],
    }


def _tokens_of(output: Output) -> TokenText:
    """Return a function from a token id of the run's model to its text.

    Raises:
        ModelError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    model = output.run.settings["model"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model["path"],
            revision=model["revision"],
            trust_remote_code=model["trust_remote_code"],
        )
    except Exception as error:  # files of a repository can cause any error
        raise ModelError(
            f"rows have logprobs, and the tokenizer of {model['path']} that names their tokens "
            f"cannot be loaded: {type(error).__name__}",
            hint="export where the model is",
        ) from error
    return lambda token: str(tokenizer.decode([token]))
