"""Faults of transformers that are worked around; what comes of it is in tests/engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from batchvlm.model.workarounds import patch_model, patch_processor


class Inner(nn.Module):
    def forward(self, output: Any) -> Any:
        return output


def test_llama4_reads_a_field_that_its_language_model_does_not_return() -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type="llama4"), language_model=Inner())
    patch_model(model)
    assert model.language_model(SimpleNamespace()).image_outputs is None
    assert model.language_model(SimpleNamespace(image_outputs=1)).image_outputs == 1
    other = SimpleNamespace(config=SimpleNamespace(model_type="llava"), language_model=Inner())
    patch_model(other)
    assert not hasattr(other.language_model(SimpleNamespace()), "image_outputs")


def test_a_processor_returns_the_token_types_that_its_model_needs() -> None:
    class Cosmos3EdgeProcessor:
        return_mm_token_type_ids = False

    class OtherProcessor(Cosmos3EdgeProcessor):
        pass

    for kind, expected in ((Cosmos3EdgeProcessor, True), (OtherProcessor, False)):
        processor = kind()
        patch_processor(processor)
        assert processor.return_mm_token_type_ids is expected
