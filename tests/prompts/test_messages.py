"""Images and chat messages in the shapes that other tools leave them in."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from PIL import Image

from batchvlm.errors import ErrorType, RowError
from batchvlm.prompts.messages import (
    fill_slots,
    image_refs,
    read_messages,
    read_turns,
    with_markdown_images,
)
from batchvlm.records import ImageRef
from tests.conftest import encode, picture

PNG = b"\x89PNG..."
PAYLOAD = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{PAYLOAD}"


def error_type(call: Any, *args: Any) -> ErrorType:
    with pytest.raises(RowError) as caught:
        call(*args)
    assert "\n" not in caught.value.message
    return caught.value.error_type


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"bytes": PNG, "path": None}, [ImageRef(data=PNG)]),
        ({"bytes": PNG, "path": "a.png"}, [ImageRef(data=PNG)]),
        ({"bytes": None, "path": "a.png"}, [ImageRef(path="a.png")]),
        (PNG, [ImageRef(data=PNG)]),
        (bytearray(PNG), [ImageRef(data=PNG)]),
        ("folder/a.png", [ImageRef(path="folder/a.png")]),
        ("C:\\images\\a.png", [ImageRef(path="C:\\images\\a.png")]),
        ("photo:1.png", [ImageRef(path="photo:1.png")]),
        ({"bytes": None, "path": "16:9/a.png"}, [ImageRef(path="16:9/a.png")]),
        (URI, [ImageRef(data=PNG)]),
        ("data:text/plain,%89PNG...", [ImageRef(data=PNG)]),
        ({"bytes": None, "path": URI}, [ImageRef(data=PNG)]),
        ({"url": URI}, [ImageRef(data=PNG)]),
        # Whether an address may be asked is for others to say; nothing here reads it.
        ("https://example.com/a.png", [ImageRef(url="https://example.com/a.png")]),
        ({"bytes": None, "path": "HTTP://x/"}, [ImageRef(url="HTTP://x/")]),
        ("s3://bucket/a.png", [ImageRef(url="s3://bucket/a.png")]),
        (
            [PNG, "a.png", {"bytes": PNG}],
            [ImageRef(data=PNG), ImageRef(path="a.png"), ImageRef(data=PNG)],
        ),
        ([], []),
    ],
)
def test_image_refs(value: Any, expected: list[ImageRef]) -> None:
    assert image_refs(value, "image") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ErrorType.MISSING_IMAGE),
        ({"bytes": None, "path": None}, ErrorType.MISSING_IMAGE),
        ({"bytes": b"", "path": None}, ErrorType.MISSING_IMAGE),
        (b"", ErrorType.MISSING_IMAGE),
        ("", ErrorType.MISSING_IMAGE),
        ([PNG, None], ErrorType.MISSING_IMAGE),
        ("data:image/png;base64,", ErrorType.MISSING_IMAGE),
        ("data:image/png;base64,@@@", ErrorType.DECODE),
        ("data:nonsense", ErrorType.DECODE),
        ("file:///etc/passwd", ErrorType.FORBIDDEN),
        ("FILE:/etc/passwd", ErrorType.FORBIDDEN),
        ("file://localhost/etc/passwd", ErrorType.FORBIDDEN),
        ("http:/localhost/a.png", ErrorType.FORBIDDEN),
        (3, ErrorType.PROMPT),
        ({"bytes": 3}, ErrorType.PROMPT),
    ],
)
def test_image_refs_refuse(value: Any, expected: ErrorType) -> None:
    assert error_type(image_refs, value, "image") is expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("width", [16, 17, 18])
def test_base64_alone_is_an_image_where_it_decodes_to_one(kind: str, width: int) -> None:
    data = encode(Image.new("RGB", (width, 4), "red"), kind)
    text = base64.b64encode(data).decode()
    wrapped = base64.encodebytes(data).decode()
    for value in (text, wrapped, {"bytes": text}, {"url": text}, {"bytes": None, "path": text}):
        assert image_refs(value, "image") == [ImageRef(data=data)]


@pytest.mark.parametrize(
    "value",
    [
        base64.b64encode(b"a note, and no picture").decode(),
        base64.b64encode(picture()).decode() + ".png",
        "/9j/photos/red",
        "iVBORw0KGgo",
        "Qk12",
        "R0lGODlh",
    ],
)
def test_other_text_stays_a_path(value: str) -> None:
    assert image_refs(value, "image") == [ImageRef(path=value)]


NOISE = bytes(range(256)) * 3


@pytest.mark.parametrize("num_bytes", [64, 65, 66])
def test_base64_may_be_url_safe_and_unpadded(num_bytes: int) -> None:
    data = (picture()[:32] + NOISE[200:])[:num_bytes]
    plain = base64.b64encode(data).decode()
    safe = base64.urlsafe_b64encode(data).decode()
    assert plain != safe
    for text in (plain, safe, plain.rstrip("="), safe.rstrip("=")):
        assert image_refs(text, "image") == [ImageRef(data=data)]
        for header in ("data:image/png;base64", "data:image/png; base64", "data: ; BASE64 "):
            assert image_refs(f"{header},{text}", "image") == [ImageRef(data=data)]
    encoded = "data:image/png;base64," + plain.replace("+", "%2B").replace("=", "%3D")
    assert image_refs(encoded, "image") == [ImageRef(data=data)]


@pytest.mark.parametrize("text", ["A" * 5, "A" * 3000 + "." + "A" * 3000])
def test_an_image_in_broken_base64_is_no_path(text: str) -> None:
    value = base64.b64encode(picture()[:48]).decode() + text
    assert error_type(image_refs, value, "image") is ErrorType.DECODE


def test_a_message_never_repeats_the_payload() -> None:
    with pytest.raises(RowError) as caught:
        image_refs("file:///home/secret", "image")
    assert "secret" not in caught.value.message


TEXT = {"type": "text", "text": "What is this?"}


@pytest.mark.parametrize(
    "content",
    [
        "What is this?",
        ["What is this?"],
        [TEXT],
        [{"text": "What is this?"}],
        [{**TEXT, "image_url": None}],  # Parquet's union of all keys
        [{"type": "input_text", "text": "What is this?"}],
        [{"type": "output_text", "text": "What is this?", "annotations": []}],
    ],
)
def test_contents_of_text(content: Any) -> None:
    expected = [{"role": "user", "content": [TEXT]}]
    value = [{"role": "user", "content": content}]
    assert read_messages(value, "messages") == expected
    assert read_messages(json.dumps(value), "messages") == expected


@pytest.mark.parametrize(
    "value",
    [
        None,
        "no json",
        [],
        {},
        {"role": "user", "content": "x"},
        [{"content": "x"}],
        [{"role": "user"}],
        [{"role": "user<end_of_utterance>", "content": "x"}],
        [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [3]}],
        [{"role": "user", "content": [{"text": "Is it this?", "image": URI}]}],
        [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}],
        [{"role": "user", "content": "What is this?", "images": ["a.png"]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}],
        ["user"],
    ],
)
def test_what_is_no_chat_is_refused(value: Any) -> None:
    assert error_type(read_messages, value, "messages") is ErrorType.PROMPT


def test_messages_under_other_keys_are_named() -> None:
    with pytest.raises(RowError, match=r"chat\[0\] has no key 'role' \(its keys: by, text\)"):
        read_messages([{"by": "human", "text": "What?"}], "chat")


SLOT = {"type": "image"}
A, B = ImageRef(path="a"), ImageRef(path="b")


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def llava(speaker: Any, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value, **more}


def test_messages_as_llava_and_sharegpt_spell_them() -> None:
    # A Parquet struct has the keys of both spellings.
    value = [
        llava("system", "Be brief.", role=None, content=None),
        llava("human", "<image>\nWhat is this?", weight=None),
        llava("gpt", "An <image>\nof a cat.", weight=1.0),
        llava("user", "And this?"),
        llava("assistant", "A dog."),
        {"role": "user", "content": "And <image>?", "from": None, "value": None},
    ]
    expected = [
        {"role": "system", "content": [words("Be brief.")]},
        user({"type": "image"}, words("What is this?")),
        {"role": "assistant", "content": [words("An <image>\nof a cat.")]},
        user(words("And this?")),
        {"role": "assistant", "content": [words("A dog.")]},
        user(words("And <image>?")),
    ]
    assert read_messages(value, "conversations") == expected
    assert read_messages(json.dumps(value), "conversations") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("What is this?\n<image>", ["What is this?", None]),
        ("<image>\r\n<image>\n\nWhich?", [None, None, "Which?"]),
        ("Is <image> like\n<image> ?", ["Is ", None, " like", None, " ?"]),
        ("<image>", [None]),
        ("<Image>\n< image>", ["<Image>\n< image>"]),
        ("\n" * 300_000, ["\n" * 300_000]),
    ],
)
def test_placeholders_are_slots(value: str, expected: list[str | None]) -> None:
    (message,) = read_messages([llava("human", value)], "m")
    assert [part.get("text") for part in message["content"]] == expected


def test_placeholders_stand_for_the_rows_images_in_order() -> None:
    value = [llava("human", "<image>\nOne?"), llava("gpt", "Yes."), llava("human", "<image> two?")]
    filled, images = fill_slots(read_messages(value, "m"), [A, B], "m")
    assert images == (A, B)
    assert [part["type"] for part in filled[2]["content"]] == ["image", "text"]
    for some in ([], [A], [A, B, A]):
        with pytest.raises(RowError, match=f"m holds 2 image slots and the row brings {len(some)}"):
            fill_slots(read_messages(value, "m"), some, "m")
    # Without a placeholder, images come before the first question.
    value = [llava("system", "Be brief."), llava("human", "What?")]
    filled, _ = fill_slots(read_messages(value, "m"), [A], "m")
    assert [part["type"] for part in filled[1]["content"]] == ["image", "text"]


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "user", "content": "x", "value": "x"}, "has keys of two spellings"),
        ({"from": "human", "content": "x"}, "has keys of two spellings"),
        ({"role": "user", "value": "x"}, "has keys of two spellings"),
        ({"from": "human"}, "needs both from and value"),
        ({"value": "x"}, "needs both from and value"),
        (llava("tool", "x"), "from is none of human, user, gpt, assistant, system"),
        (llava(["human"], "x"), "from is none of human"),
        (llava("human", [words("x")]), "value is no text"),
        ({"from": None, "value": None}, "has no key 'role'"),
    ],
)
def test_a_spelling_that_is_neither_is_refused(message: Any, what: str) -> None:
    with pytest.raises(RowError, match=rf"chat\[1\].*{what}") as caught:
        read_messages([llava("human", "Hello."), message], "chat")
    assert caught.value.error_type is ErrorType.PROMPT


def test_turns_of_a_conversation_are_its_users() -> None:
    value = [llava("human", "<image>\nOne?"), llava("gpt", "Yes."), llava("human", "Two?")]
    turns = [user({"type": "image"}, words("One?")), user(words("Two?"))]
    assert read_turns(value, "m") == turns
    assert read_turns([*value, llava("gpt", "No.")], "m") == turns
    system = llava("system", "Be brief.")
    assert [turn["role"] for turn in read_turns([system, *value], "m")] == [
        "system",
        "user",
        "user",
    ]
    said = {"role": "assistant", "content": "A cat."}
    assert read_turns(["One?", said, "Two?"], "m") == [user(words("One?")), user(words("Two?"))]


@pytest.mark.parametrize(
    "value",
    [
        {"role": "user", "content": "One?"},
        [llava("gpt", "Yes.")],
        [llava("human", "One?"), llava("system", "Be brief."), llava("human", "Two?")],
        [llava("human", "One?"), {"role": "assistant", "content": "Yes", "prefix": True}],
    ],
)
def test_what_is_no_list_of_users_turns_is_refused(value: Any) -> None:
    assert error_type(read_turns, value, "turns") is ErrorType.PROMPT


def test_bare_slots_take_the_columns_images_in_order() -> None:
    messages = read_messages([user(SLOT, "one"), user(SLOT, "two")], "m")
    filled, images = fill_slots(messages, [A, B], "m")
    assert images == (A, B)
    assert filled[1]["content"][0] == SLOT


def test_inline_images_stand_where_they_are_written() -> None:
    inline = {"type": "image_url", "image_url": {"url": URI}}
    messages = read_messages([user(SLOT, "one", inline, SLOT)], "m")
    filled, images = fill_slots(messages, [A, B], "m")
    assert images == (A, ImageRef(data=PNG), B)
    assert [part["type"] for part in filled[0]["content"]] == ["image", "text", "image", "image"]
    assert all(set(p) == {"type"} for p in filled[0]["content"] if p["type"] == "image")


@pytest.mark.parametrize(
    "inline",
    [
        {"base64": PAYLOAD},
        {"base64": URI},
        {"source": {"type": "base64", "media_type": "image/png", "data": PAYLOAD, "url": None}},
        {"source": {"type": "url", "data": None, "url": URI}},
    ],
)
def test_an_image_of_its_own_is_no_slot(inline: dict[str, Any]) -> None:
    messages = read_messages([user(SLOT, {"type": "image", **inline})], "m")
    assert fill_slots(messages, [A], "m")[1] == (A, ImageRef(data=PNG))


@pytest.mark.parametrize("part", [{"image_url": {"url": URI}}, {"image": URI}, {"base64": PAYLOAD}])
def test_an_image_may_leave_its_type_out(part: dict[str, Any]) -> None:
    messages = read_messages([user({"text": "What is this?"}, part)], "m")
    assert fill_slots(messages, [], "m")[1] == (ImageRef(data=PNG),)


def test_messages_without_slots_get_the_images_before_the_first_user_text() -> None:
    messages = read_messages([{"role": "system", "content": "Be brief."}, user("one")], "m")
    filled, images = fill_slots(messages, [A, B], "m")
    assert images == (A, B)
    assert filled[0]["content"] == [{"type": "text", "text": "Be brief."}]
    assert [part["type"] for part in filled[1]["content"]] == ["image", "image", "text"]
    assert len(filled) == 2
    said = [user("one"), {"role": "assistant", "content": "yes"}, user("two")]
    filled, _ = fill_slots(read_messages(said, "m"), [A], "m")
    assert [[part["type"] for part in message["content"]] for message in filled] == [
        ["image", "text"],
        ["text"],
        ["text"],
    ]


@pytest.mark.parametrize(
    ("messages", "images", "expected"),
    [
        ([user(SLOT, SLOT)], [A], ErrorType.MISSING_IMAGE),
        ([user(SLOT)], [], ErrorType.MISSING_IMAGE),
        ([user(SLOT)], [A, B], ErrorType.PROMPT),
        ([{"role": "system", "content": "x"}], [A], ErrorType.PROMPT),
        (
            [user({"type": "image", "image": "../../etc/x", "path": None}, SLOT)],
            [],
            ErrorType.MISSING_IMAGE,
        ),
        ([user({"type": "image", "url": "file:///etc/passwd"})], [], ErrorType.FORBIDDEN),
    ],
)
def test_images_that_do_not_match_slots(messages: Any, images: Any, expected: ErrorType) -> None:
    assert error_type(fill_slots, read_messages(messages, "m"), images, "m") is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"![]({URI})What is this?", [URI, "What is this?"]),
        (
            "Is ![a (b)](a.png) like ![](https://x/b.png)?",
            ["Is ", "a.png", " like ", "https://x/b.png", "?"],
        ),
        ("![]( a.png )", ["a.png"]),
        ("no ![image] (a.png), ![]() or [a](b.png)", ["no ![image] (a.png), ![]() or [a](b.png)"]),
    ],
)
def test_markdown_images(text: str, expected: list[str]) -> None:
    (message,) = with_markdown_images(read_messages([user(text)], "m"))
    found = [p["text"] if p["type"] == "text" else p["inline"]["url"] for p in message["content"]]
    assert found == expected


def test_markdown_in_what_others_say_is_text() -> None:
    said = [{"role": role, "content": "![](a.png)"} for role in ("system", "assistant")]
    messages = read_messages(said, "m")
    assert with_markdown_images(messages) == messages


@pytest.mark.parametrize("piece", ["![", "![](", "![]( ", "![](a ", "![" + " " * 9])
def test_markdown_of_any_length_is_read_in_one_go(piece: str) -> None:
    text = piece * 300_000
    (message,) = with_markdown_images(read_messages([user(text)], "m"))
    assert message["content"] == [{"type": "text", "text": text}]
