"""Prompts from a row's columns; settings from the row over the run's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from batchvlm.config import (
    ColumnsConfig,
    GenerationColumnsConfig,
    GenerationConfig,
    TaskConfig,
    TaskName,
    TaskOutputConfig,
)
from batchvlm.errors import ErrorType, InputError, RowError
from batchvlm.prompts.builder import PromptBuilder
from batchvlm.records import Completion, FinishReason, ImageRef, Prompt, Record


def record(row_index: int = 0, **values: Any) -> Record:
    return Record(row=0, row_index=row_index, source_file="f", id="f:0", values=values)


def builder(
    prompt: str = "Describe.",
    *,
    system: str | None = None,
    generation: GenerationConfig | None = None,
    schema_column: str | None = None,
    **columns: Any,
) -> PromptBuilder:
    output = TaskOutputConfig(json_schema_column=schema_column)
    return PromptBuilder(
        task=TaskConfig(name=TaskName.caption, prompt=prompt, system=system, output=output),
        columns=ColumnsConfig(**columns),
        generation=generation or GenerationConfig(),
    )


def texts(message: Mapping[str, Any]) -> list[str]:
    return [part["text"] for part in message["content"] if part["type"] == "text"]


def text_of(prompt: Prompt) -> list[str]:
    return [text for message in prompt.messages for text in texts(message)]


def test_a_template_over_columns() -> None:
    build = builder("{{ question }} Answer in {{ n }} words.", system="You know {{ topic }}.")
    prompt = build.build(record(question="What?", n=3, topic="cats"))
    assert [m["role"] for m in prompt.messages] == ["system", "user"]
    assert text_of(prompt) == ["You know cats.", "What? Answer in 3 words."]
    assert build.needed_columns() == {
        "question": "task.prompt",
        "n": "task.prompt",
        "topic": "task.system",
    }


def test_markdown_images_are_images_where_asked_for() -> None:
    one = record(question="![](a.png)What is this?", image=b"\x89PNG")
    assert builder("{{ question }}", image="image").build(one).images == (
        ImageRef(data=b"\x89PNG"),
    )
    task = TaskConfig(name=TaskName.vqa, prompt="{{ question }}", markdown_images=True)
    for column, images in ((None, []), ("image", [ImageRef(data=b"\x89PNG")])):
        columns = ColumnsConfig(image=column)
        build = PromptBuilder(task=task, columns=columns, generation=GenerationConfig())
        prompt = build.build(one)
        assert list(prompt.images) == [*images, ImageRef(path="a.png")]
        assert text_of(prompt) == ["What is this?"]


def test_a_column_whose_name_is_no_identifier() -> None:
    build = builder("{{ row['my question'] }}")
    assert build.needed_columns() == {"my question": "task.prompt"}
    assert text_of(build.build(record(**{"my question": "Why?"}))) == ["Why?"]


def test_text_of_a_row_is_never_a_template() -> None:
    prompt = builder("{{ question }}").build(record(question="{{ 7 * 7 }}"))
    assert text_of(prompt) == ["{{ 7 * 7 }}"]


def test_a_null_is_an_error_unless_allowed() -> None:
    with pytest.raises(RowError, match="null") as caught:
        builder("{{ question }}").build(record(question=None))
    assert caught.value.error_type is ErrorType.PROMPT
    prompt = builder("Look. {{ question or '' }}").build(record(question=None))
    assert text_of(prompt) == ["Look. "]


def test_images_of_several_columns_come_first_and_in_order() -> None:
    build = builder(image=["left", "right"])
    prompt = build.build(record(left="a.png", right=["b.png", b"..."]))
    assert [ref.path for ref in prompt.images] == ["a.png", "b.png", None]
    assert [p["type"] for p in prompt.messages[0]["content"]] == ["image"] * 3 + ["text"]
    assert set(build.needed_columns()) == {"left", "right"}


@pytest.mark.parametrize("empty", [[], [[]], ()])
def test_a_column_without_an_image_is_a_missing_image(empty: Any) -> None:
    for columns in ("a", ["a"], ["b", "a"]):
        with pytest.raises(RowError, match="a holds no image") as caught:
            builder(image=columns).build(record(a=empty, b="b.png"))
        assert caught.value.error_type is ErrorType.MISSING_IMAGE


NO_IMAGE = [None, "", " ", [], {"bytes": None, "path": None}]


@pytest.mark.parametrize("empty", NO_IMAGE)
def test_an_image_may_be_optional(empty: Any) -> None:
    build = builder(image=["a", "b"], image_optional=True)
    assert build.build(record(a=empty, b="b.png")).images == (ImageRef(path="b.png"),)
    alone = build.build(record(a=empty, b=empty))
    assert (alone.images, text_of(alone)) == ((), ["Describe."])


@pytest.mark.parametrize("broken", [b"", ["a.png", None], {"bytes": b"", "path": None}, 7])
def test_an_optional_image_that_is_broken_is_an_error(broken: Any) -> None:
    with pytest.raises(RowError):
        builder(image="a", image_optional=True).build(record(a=broken))


def test_messages_say_themselves_how_many_images_they_show() -> None:
    build = builder(image="images", messages="chat")
    text = [{"role": "user", "content": "Hello."}]
    for none in ([], None):
        assert build.build(record(images=none, chat=text)).images == ()
    slot = [{"role": "user", "content": [{"type": "image"}, "What is this?"]}]
    with pytest.raises(RowError, match="holds 1 image slots and the row brings 0") as caught:
        build.build(record(images=None, chat=slot))
    assert caught.value.error_type is ErrorType.MISSING_IMAGE


def test_a_row_of_text_alone() -> None:
    assert builder().build(record()).images == ()


def test_messages_pass_through_and_take_the_system_prompt() -> None:
    build = builder("unused {{ x }}", messages="chat", image="image", system="Be brief.")
    assert set(build.needed_columns()) == {"chat", "image"}
    chat = [{"role": "user", "content": "What?"}]
    prompt = build.build(record(chat=chat, image="a.png"))
    assert [m["role"] for m in prompt.messages] == ["system", "user"]
    own = [{"role": "system", "content": "Mine."}, *chat]
    assert text_of(build.build(record(chat=own, image="a.png"))) == ["Mine.", "What?"]


def test_messages_that_end_with_an_answer_ask_nothing() -> None:
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    llava = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    for ended in (chat, llava):
        with pytest.raises(RowError, match=r"nothing to answer.*turns=chat answers") as caught:
            builder(messages="chat").build(record(chat=ended))
        assert caught.value.error_type is ErrorType.PROMPT


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


ASKED = {"role": "user", "content": "What?"}


def continuing(columns: ColumnsConfig, **task: Any) -> PromptBuilder:
    task = {"name": TaskName.vqa, "prompt": "What?", **task}
    return PromptBuilder(task=TaskConfig(**task), columns=columns, generation=GenerationConfig())


def test_an_answer_can_begin_with_given_text() -> None:
    build = continuing(ColumnsConfig(), answer_prefix="{{ start or '' }}")
    assert build.needed_columns() == {"start": "task.answer_prefix"}
    prompt = build.build(record(start="I see"))
    assert prompt.is_continued
    assert [(m["role"], *texts(m)) for m in prompt.messages] == [
        ("user", "What?"),
        ("assistant", "I see"),
    ]
    assert not build.build(record(start=None)).is_continued
    with pytest.raises(RowError, match=r"task\.answer_prefix: the message .* no text"):
        build.build(record(start=" "))


@pytest.mark.parametrize(
    ("task", "last"),
    [
        ({"continue_final_message": True}, said("I see")),
        ({}, said([{"type": "text", "text": "I see"}], prefix=True)),
        ({"continue_final_message": True, "answer_prefix": "It"}, said("I see")),
    ],
)
def test_a_last_message_of_the_assistant_is_continued(
    task: dict[str, Any], last: dict[str, Any]
) -> None:
    prompt = continuing(ColumnsConfig(messages="chat"), **task).build(record(chat=[ASKED, last]))
    assert prompt.is_continued
    assert text_of(prompt) == ["What?", "I see"]
    assert all(message.keys() == {"role", "content"} for message in prompt.messages)


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([ASKED, said("")], "chat: the message to continue holds no text"),
        ([ASKED, said([])], "chat: the message to continue holds no text"),
        (
            [ASKED, said([{"type": "image", "image": "a.png"}, "a"])],
            "chat: the message to continue holds an image",
        ),
        ([said("a", prefix=True), ASKED], r"chat\[0\].prefix"),
        ([{**ASKED, "prefix": True}], r"chat\[0\].prefix"),
    ],
)
def test_what_no_answer_can_continue(chat: Any, words: str) -> None:
    build = continuing(ColumnsConfig(messages="chat"), continue_final_message=True)
    with pytest.raises(RowError, match=words) as caught:
        build.build(record(chat=chat))
    assert caught.value.error_type is ErrorType.PROMPT


def test_each_turn_of_a_dialog_begins_with_the_prefix() -> None:
    build = continuing(
        ColumnsConfig(turns="turns"), name=TaskName.dialog, prompt="", answer_prefix="I see"
    )
    answered = Completion(
        row_index=0, token_ids=(), text=" a star.", finish_reason=FinishReason.STOP, latency_s=0
    )
    first = build.build(record(turns=["One?", "Two?"]))
    assert text_of(first) == ["One?", "I see"]
    second = build.build(replace(record(turns=["One?", "Two?"]), answers=(answered,)))
    assert text_of(second) == ["One?", "I see a star.", "Two?", "I see"]


def columns(**named: str) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=9, columns=GenerationColumnsConfig(**named))


def test_a_rows_own_settings_lie_over_the_runs() -> None:
    build = builder(
        generation=columns(max_new_tokens="limit", temperature="t", stop="s", seed="seed")
    )
    mine = build.build(record(limit=3, t=1, s="END", seed=7)).generation
    assert (mine.max_new_tokens, mine.temperature, mine.stop, mine.seed) == (3, 1.0, ("END",), 7)
    default = build.build(record(limit=None, t=None, s=None, seed=None)).generation
    assert (default.max_new_tokens, default.temperature, default.stop) == (9, 0.0, ())
    assert (
        build.build(record(limit=3.0, t=0.5, s=["a", "b"], seed=1)).generation.max_new_tokens == 3
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "3"),
        ("max_new_tokens", True),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("seed", -1),
        ("stop", [""]),
        ("stop", 3),
        ("ignore_eos", 1),
    ],
)
def test_a_bad_setting_is_the_rows_error(setting: str, value: Any) -> None:
    build = builder(generation=columns(**{setting: "column"}))
    with pytest.raises(RowError) as caught:
        build.build(record(column=value))
    assert caught.value.error_type is ErrorType.PROMPT
    assert "column" in caught.value.message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"low": 4, "high": 3}, "low=4 must be at most high=3"),
        ({"low": 10, "high": None}, "low=10 must be at most generation.max_new_tokens=9"),
        ({"low": None, "high": 1}, "generation.min_new_tokens=2 must be at most high=1"),
        ({"low": 4, "high": 4}, None),
        ({"low": None, "high": None}, None),
    ],
)
def test_a_row_cannot_ask_for_more_tokens_than_it_allows(
    row: dict[str, Any], words: str | None
) -> None:
    named = GenerationColumnsConfig(min_new_tokens="low", max_new_tokens="high")
    build = builder(generation=GenerationConfig(max_new_tokens=9, min_new_tokens=2, columns=named))
    if words is None:
        build.build(record(**row))
        return
    with pytest.raises(RowError) as caught:
        build.build(record(**row))
    assert (caught.value.error_type, caught.value.message) == (ErrorType.PROMPT, words)


def test_a_rows_own_variables_of_the_chat_template() -> None:
    build = builder(chat_template_kwargs="more")
    assert build.needed_columns() == {"more": "data.columns.chat_template_kwargs"}
    # A Parquet struct has the keys of all rows.
    for given in ({"thinks": False, "budget": None}, '{"thinks": false}'):
        assert build.build(record(more=given)).template_variables == {"thinks": False}
    for none in (None, {}, "{}"):
        assert build.build(record(more=none)).template_variables == {}
    assert builder().build(record()).template_variables == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "more is int"),
        ([], "more is list"),
        ("thinks", "more is text that is no JSON"),
        ("[1]", "more is list"),
        ({"a": b"x"}, "more holds a value that is no JSON"),
        ({"a": [float("nan")]}, "more holds a value that is no JSON"),
    ],
)
def test_variables_that_are_no_json_object_are_the_rows_error(given: Any, words: str) -> None:
    with pytest.raises(RowError, match=words) as caught:
        builder(chat_template_kwargs="more").build(record(more=given))
    assert caught.value.error_type is ErrorType.PROMPT


INTEGERS = [pa.int8(), pa.uint64(), pa.float32(), pa.null(), pa.dictionary(pa.int8(), pa.int64())]
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.null()]
LISTS = [pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.null())]


@pytest.mark.parametrize(
    ("setting", "fit", "unfit"),
    [
        ("max_new_tokens", INTEGERS, [*TEXTS[:3], *LISTS, pa.bool_(), pa.decimal128(3)]),
        ("temperature", INTEGERS, [pa.string(), pa.binary(), pa.date32(), pa.struct([])]),
        ("seed", INTEGERS, [pa.bool_(), pa.timestamp("s")]),
        ("stop", [*TEXTS, *LISTS], [pa.int64(), pa.binary(), pa.list_(pa.int8())]),
        ("ignore_eos", [pa.bool_(), pa.null()], [pa.int8(), pa.string()]),
    ],
)
def test_a_column_of_a_type_without_a_setting_is_refused(
    setting: str, fit: list[Any], unfit: list[Any]
) -> None:
    build = builder(generation=GenerationConfig(columns=GenerationColumnsConfig(**{setting: "c"})))
    for kind in fit:
        build.check_types(pa.schema([("c", kind), ("other", pa.string())]))
    for kind in unfit:
        with pytest.raises(InputError, match=rf"generation\.columns\.{setting} names column 'c'"):
            build.check_types(pa.schema([("c", kind)]))


def test_rows_draw_differently_and_each_always_the_same() -> None:
    build = builder()
    seeds = [build.build(record(row_index=i)).generation.seed for i in range(100)]
    assert len(set(seeds)) == 100
    assert seeds[3] == builder().build(record(row_index=3)).generation.seed
    other = builder(generation=GenerationConfig(seed=1))
    assert other.build(record(row_index=3)).generation.seed != seeds[3]


def test_a_row_that_makes_no_prompt_has_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    build = builder(schema_column="schema", image=None)
    bad = record(schema=b'{"type": "object"}')
    assert build.addresses(bad) == []
    with pytest.raises(RowError) as caught:
        build.build(bad)
    assert caught.value.error_type is ErrorType.PROMPT

    def fail(*_: object) -> None:
        raise RecursionError

    monkeypatch.setattr(build, "whole", fail)
    assert build.addresses(bad) == []


def test_a_rows_own_schema() -> None:
    build = builder(schema_column="schema")
    schema = '{"type": "object"}'
    assert build.build(record(schema=schema)).json_schema == schema
    assert build.build(record(schema={"type": "object"})).json_schema == schema
    assert build.build(record(schema=None)).json_schema is None
    for broken in ("no json", '{"type": 3}', "[]"):
        with pytest.raises(RowError) as caught:
            build.build(record(schema=broken))
        assert caught.value.error_type is ErrorType.PROMPT


@pytest.mark.parametrize(
    ("choices", "what"),
    [
        (("a", "b"), "is tuple"),
        ('"a"', "is str"),
        ("[]", "is an empty list"),
        ([], "is an empty list"),
        (["a", ""], "holds an empty text"),
        (["a", 1], "holds int"),
        (["a", None], "holds a null"),
    ],
)
def test_choices_that_are_no_list_of_strings(choices: Any, what: str) -> None:
    task = TaskConfig(
        name=TaskName.extract, prompt="Which?", output=TaskOutputConfig(choice_column="options")
    )
    build = PromptBuilder(task=task, columns=ColumnsConfig(), generation=GenerationConfig())
    with pytest.raises(RowError, match=f"options {what}; choices are a list"):
        build.build(record(options=choices))
    with pytest.raises(RowError, match="options is text that is no JSON"):
        build.build(record(options="['a', 'b']"))
    assert build.build(record(options='["a", "b"]')).choices == ("a", "b")


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.float32(), pa.bool_(), pa.timestamp("ns"), pa.decimal128(5, 2)]
)
def test_a_column_of_numbers_holds_no_image_turns_or_schema(kind: pa.DataType) -> None:
    schema = pa.schema([("label", kind), ("other", pa.null())])
    for setting, build in (
        ("data.columns.image", builder(image=["other", "label"])),
        ("data.columns.turns", builder(turns="label")),
        ("data.columns.messages", builder(messages="label")),
        ("data.columns.chat_template_kwargs", builder(chat_template_kwargs="label")),
        ("task.output.json_schema_column", builder(schema_column="label")),
    ):
        with pytest.raises(InputError) as caught:
            build.check_types(schema)
        assert str(caught.value).startswith(f"{setting} names column 'label', which is {kind}; ")
    builder("{{ label }}", image=["other"]).check_types(schema)
