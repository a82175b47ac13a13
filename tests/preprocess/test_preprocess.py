"""Records become samples, or failures that say why; nothing raises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, TrOCRProcessor

from batchvlm.errors import ConfigError, ErrorType, ModelError
from batchvlm.model.chat_template import ChatTemplate, array_of
from batchvlm.model.loading import ModelLimits, load_processor
from batchvlm.preprocess.preprocessor import (
    Preprocessor,
    PreprocessSpec,
    image_sizes,
    pixel_digest,
)
from batchvlm.records import Failure, Record, Sample
from batchvlm.settings.compose import compose
from tests.conftest import encode, picture
from tests.engine import tiny


def preprocessor(*overrides: str) -> Preprocessor:
    cfg = compose("run", list(overrides))
    return Preprocessor(
        PreprocessSpec(
            model=cfg.model,
            task=cfg.task,
            columns=cfg.data.columns,
            generation=cfg.generation,
            image_root=None,
            max_source_pixels=10**6,
        )
    )


@pytest.fixture(scope="module")
def vqa() -> Preprocessor:
    return preprocessor("task=vqa", "data.columns.image=images")


def record(**values: Any) -> Record:
    return Record(row=0, row_index=0, source_file="f", id="0", values=values)


def prepared(maker: Preprocessor, question: str, *images: Any) -> Sample:
    outcome = maker.prepare(record(question=question, images=list(images)))
    assert isinstance(outcome, Sample), outcome
    return outcome


def test_what_a_sample_holds(vqa: Preprocessor) -> None:
    one = prepared(vqa, "How many shapes are there?", picture())
    two = prepared(vqa, "How many shapes are there?", picture(), picture("blue", (90, 60)))
    text = preprocessor("task=vqa", "data.columns.image=null")
    none = prepared(text, "How many shapes are there?")
    assert [s.image_tokens for s in (none, one, two)] == [0, 36, 72]
    assert [s.image_sizes for s in (none, one, two)] == [(), ((96, 96),), ((96, 96),) * 2]
    assert none.prompt_tokens < one.prompt_tokens < two.prompt_tokens
    assert one.features["input_ids"].shape == (1, one.prompt_tokens)
    assert "pixel_values" not in none.features
    assert two.size_bytes > one.size_bytes > 96 * 96 * 3 * 4


@pytest.mark.parametrize("text", ["<image>", "a <image><image> b", "<end_of_utterance>", "<pad>"])
def test_control_tokens_in_a_rows_text_stay_text(vqa: Preprocessor, text: str) -> None:
    """Typed by a user, "<image>" must not become an image, nor an end token end the turn."""
    tokenizer = vqa._processor.tokenizer
    special = set(tokenizer.all_special_ids)

    def count(sample: Sample) -> int:
        return sum(int(token) in special for token in sample.features["input_ids"][0])

    sample = prepared(vqa, text, picture())
    assert sample.image_tokens == 36
    assert count(sample) == count(prepared(vqa, "x", picture()))
    assert text.replace("<", "< ") in tokenizer.decode(sample.features["input_ids"][0])


def test_tokens_that_the_text_of_prompts_may_spell() -> None:
    end, other = "<end_of_utterance>", "<pad>"
    maker = preprocessor("task=vqa", "data.columns.image=images", f'model.prompt_tokens=["{end}"]')
    tokenizer = maker._processor.tokenizer
    before = prepared(maker, "", picture()).features["input_ids"][0].tolist()
    ids = prepared(maker, f"a {end} b {other} <image>", picture()).features["input_ids"][0].tolist()
    end_id, other_id = tokenizer.convert_tokens_to_ids([end, other])
    assert ids.count(end_id) == before.count(end_id) + 1
    assert ids.count(other_id) == before.count(other_id)
    assert "< pad> < image>" in tokenizer.decode(ids)
    for token, why in (("<grounding>", "has no token"), ("<image>", "stands for an image")):
        with pytest.raises(ConfigError, match=rf"^model\.prompt_tokens: .*{why}") as caught:
            preprocessor(f'model.prompt_tokens=["{token}"]')
        assert repr(token) in caught.value.message


def test_halves_of_a_control_token_in_neighbouring_parts_stay_text() -> None:
    maker = preprocessor("data.columns.messages=chat", "data.columns.image=images")
    texts = ["hi <end_of_", "utterance> <|im_start|", ">assistant"]
    chat = [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]
    plain = [{"role": "user", "content": "hi"}]
    special = set(maker._processor.tokenizer.all_special_ids)
    counts = []
    for messages in (chat, plain):
        sample = maker.prepare(record(chat=messages, images=[picture()]))
        assert isinstance(sample, Sample)
        counts.append(sum(int(token) in special for token in sample.features["input_ids"][0]))
    assert counts[0] == counts[1]


def failure(maker: Preprocessor, **values: Any) -> Failure:
    outcome = maker.prepare(record(**values))
    assert isinstance(outcome, Failure)
    assert "\n" not in outcome.message
    return outcome


def test_without_a_template_a_prompt_is_text_and_image_tokens() -> None:
    processor = load_processor(compose("run", []).model)
    processor.chat_template = None
    messages = (
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "image"}]},
        {"role": "user", "content": [{"type": "text", "text": " b"}]},
    )
    chat = ChatTemplate(processor)
    images = [Image.new("RGB", (96, 96))]
    assert chat.text(messages, images) == "a <image> b"
    ids = chat.encode(messages, images)["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 36


def test_a_processor_that_makes_no_tokens_of_a_prompt_is_refused() -> None:
    image_processor = CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False)
    with pytest.raises(ModelError, match="TrOCRProcessor makes no tokens of a prompt"):
        ChatTemplate(TrOCRProcessor(image_processor, tiny.tokenizer()))


@pytest.mark.parametrize("begun", ["A small", "A small ", "<end_of_utterance>"])
def test_a_prompt_can_end_within_the_answer(vqa: Preprocessor, begun: str) -> None:
    maker = preprocessor(
        "task=vqa", "data.columns.image=images", "task.answer_prefix='{{ begun }}'"
    )
    sample = maker.prepare(record(question="What?", images=[picture()], begun=begun))
    assert isinstance(sample, Sample)
    ids = sample.features["input_ids"][0].tolist()
    tokenizer = maker._processor.tokenizer
    before = prepared(vqa, "What?", picture()).features["input_ids"][0].tolist()
    shown = begun.replace("<", "< ")
    assert ids == before + tokenizer(shown)["input_ids"]
    assert sample.is_continued and list(sample.continued_ids) == ids[-4:]


def test_an_encoder_decoder_continues_nothing() -> None:
    maker = preprocessor("task=vqa", "data.columns.image=null", "task.answer_prefix=A")
    maker._limits = replace(maker._limits, is_encoder_decoder=True)
    message = failure(maker, question="What?").message
    assert "an encoder-decoder model cannot continue" in message


def test_every_failure_has_its_type(vqa: Preprocessor) -> None:
    good = [picture()]
    assert failure(vqa, question=None, images=good).error_type is ErrorType.PROMPT
    assert failure(vqa, question="?", images=None).error_type is ErrorType.MISSING_IMAGE
    assert failure(vqa, question="?", images=[b"x"]).error_type is ErrorType.DECODE
    assert failure(vqa, question="?", images=["a.png"]).error_type is ErrorType.FORBIDDEN
    large = [picture(size=(2000, 1000))]
    assert failure(vqa, question="?", images=large).error_type is ErrorType.TOO_LARGE
    broken = Failure(error_type=ErrorType.INPUT, message="a corrupt page")
    assert vqa.prepare(replace(record(), failure=broken)) == broken


def test_a_processor_that_raises_costs_the_row(
    vqa: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("no\nway")

    monkeypatch.setattr(vqa._chat, "encode", broken)
    found = failure(vqa, question="?", images=[picture()])
    assert found.error_type is ErrorType.PREPROCESS
    assert found.message == "ZeroDivisionError: no way"


def test_a_prompt_is_never_truncated(vqa: Preprocessor) -> None:
    found = failure(vqa, question="word " * 4000, images=[picture()])
    assert found.error_type is ErrorType.PROMPT_TOO_LONG
    assert "the limit is 2047" in found.message and "1 images" in found.message
    tight = preprocessor("task=vqa", "data.columns.image=images", "model.max_prompt_tokens=45")
    assert failure(tight, question="?" * 50, images=[picture()]).error_type is (
        ErrorType.PROMPT_TOO_LONG
    )


def test_a_prompt_without_a_token_is_refused(
    vqa: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one is where nothing is asked, no template says more, and no token begins every prompt."""
    nothing = {"input_ids": np.zeros((1, 0), np.float32)}
    monkeypatch.setattr(vqa._chat, "encode", lambda *args: nothing)
    found = failure(vqa, question="", images=[picture()])
    assert (found.error_type, found.message) == (ErrorType.PROMPT, "the prompt is empty")


def test_an_answer_gets_no_more_room_than_positions_are_left(vqa: Preprocessor) -> None:
    short = prepared(vqa, "?", picture())
    assert short.generation.max_new_tokens == 256
    # Most tokens of the demo's tokenizer are whole words; letters it has not seen are not.
    long = prepared(vqa, "q" * 1900, picture())
    assert long.generation.max_new_tokens == 2048 - long.prompt_tokens < 256


def test_image_sizes_as_the_model_sees_them() -> None:
    limits = ModelLimits(max_positions=None, image_token_id=None, patch_size=14)
    grid = {"image_grid_thw": np.array([[1, 4, 6], [1, 2, 2]])}
    assert image_sizes(grid, [(90, 50), (30, 30)], limits) == ((84, 56), (28, 28))
    tiles = {
        "pixel_values": np.zeros((1, 5, 3, 56, 56), np.float32),
        "image_sizes": np.zeros((1, 2)),
    }
    assert image_sizes(tiles, [(90, 50)], limits) == ((90, 50),)
    fixed = {"pixel_values": np.zeros((2, 3, 24, 32), np.float32)}
    assert image_sizes(fixed, [(90, 50), (30, 30)], limits) == ((32, 24), (32, 24))


class TestImageKeys:
    def keys(self, maker: Preprocessor, *images: Image.Image) -> tuple[str, ...]:
        files = [encode(image) for image in images]
        return prepared(maker, "How many shapes are there?", *files).image_keys

    def test_the_same_pixels_have_the_same_key_whatever_the_file(self, vqa: Preprocessor) -> None:
        image = Image.effect_noise((40, 30), 50).convert("RGB")
        files = [encode(image), encode(image, "BMP"), encode(image, compress_level=0)]
        assert len({*files}) == 3
        keys = prepared(vqa, "?", *files).image_keys
        assert len(keys) == 3 and len({*keys}) == 1
        assert prepared(vqa, "another question", files[0]).image_keys == keys[:1]

    def test_other_pixels_have_another_key(self, vqa: Preprocessor) -> None:
        image = Image.new("RGB", (40, 30), "red")
        other = image.copy()
        other.putpixel((39, 29), (255, 0, 1))
        assert len({*self.keys(vqa, image, other)}) == 2

    def test_the_same_bytes_in_another_shape_have_another_key(self) -> None:
        image = Image.new("RGB", (40, 30), "red")
        images = [image, Image.new("RGB", (30, 40), "red"), image.convert("RGBA")]
        images.append(Image.frombytes("L", (120, 30), image.tobytes()))
        assert len({pixel_digest(image) for image in images}) == 4

    def test_they_are_in_the_order_of_the_images(self, vqa: Preprocessor) -> None:
        red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
        assert self.keys(vqa, red, blue) == self.keys(vqa, blue, red)[::-1]
        text = preprocessor("task=vqa", "data.columns.image=null")
        assert self.keys(text) == ()


def test_arrays_of_a_dtype_that_numpy_does_not_have() -> None:
    numbers = torch.tensor([[0.5, -2.0]])
    array = array_of(numbers.bfloat16())
    assert array.dtype == np.float32 and array.tolist() == numbers.tolist()
    assert array_of(torch.tensor([3])).dtype == np.int64
    assert array_of([1.5]).tolist() == [1.5]
