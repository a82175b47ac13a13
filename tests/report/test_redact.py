"""What is shown may be passed on: no password, no signature, no token."""

from __future__ import annotations

import pytest

from batchvlm.report.redact import redact, redact_all


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/a.parquet", "s3://bucket/a.parquet"),
        ("s3://key:sec/ret@bucket/a.parquet", "s3://bucket/a.parquet"),
        ("https://user@host/a?X-Amz-Signature=abc#x", "https://host/a"),
        ("simplecache::https://u:p@host/a", "simplecache::https://host/a"),
        ("hf://datasets/user/repo@main/a.parquet", "hf://datasets/user/repo@main/a.parquet"),
        ("cannot open 'https://h/a?token=b': 403", "cannot open 'https://h/a': 403"),
        ("hf_" + "a" * 30, "hf_***"),
        ("/home/user/a.parquet", "/home/user/a.parquet"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_setting_whose_name_says_secret_is_hidden_whole() -> None:
    settings = {
        "model": {"processor_kwargs": {"token": "x", "api_key": "y", "min_pixels": 4}},
        "generation": {"max_new_tokens": 5, "stop": ["https://u:p@h/"]},
    }
    assert redact_all(settings) == {
        "model": {"processor_kwargs": {"token": "***", "api_key": "***", "min_pixels": 4}},
        "generation": {"max_new_tokens": 5, "stop": ["https://h/"]},
    }
