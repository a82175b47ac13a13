"""Normalizes chat messages of several formats to lists of text parts and image slots.

Accepted: a list of `{"role", "content"}`, or the same as JSON text. The content is a string or a
list of parts: `{"type": "text", "text"}`, `{"type": "image"}` (a slot for the next image of the
image columns), `{"type": "image", "image"|"path"|"url"|"bytes"|"base64"}`, OpenAI's
`{"type": "image_url", "image_url": {"url"}}`, and Anthropic's
`{"type": "image", "source": {"data"|"url"}}`. A part may omit its type if its keys imply it.

LLaVA's and ShareGPT's `{"from": "human"|"gpt"|"system", "value"}` is another spelling. In a human's
text, `<image>` is a slot.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from batchvlm.errors import ErrorType, RowError
from batchvlm.records import ImageRef
from batchvlm.words import one_line

Message = dict[str, Any]

_INLINE = ("image", "path", "url", "bytes", "image_url", "base64", "source")
_UNSUPPORTED_IMAGE_KEYS = ("file_id", "data")
"""Keys by which other APIs refer to an image, and which are not supported."""
_UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "function_call", "images")
"""Keys of a message that would change the prompt, and which are not supported."""
_SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    "system": "system",
}
"""LLaVA's and ShareGPT's `from` -> role."""
_PLACEHOLDER = "<image>"
"""An image in their texts of users."""
# No nested brackets, so that matching takes linear time.
_MARKDOWN = re.compile(r"!\[[^\[\]]*\]\([ \t]{0,8}([^()\s]+)[ \t]{0,8}\)")
_ROLE = re.compile(r"[A-Za-z_]{1,32}")
# A colon alone does not make a URL: photo:1.png and C:/images are paths.
_ADDRESS = re.compile(r"(file|https?|[a-z][a-z0-9+.\-]+(?=://)):/", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.\-]+://", re.IGNORECASE)
# Signatures of the formats that `images` opens, long enough that no path matches by chance.
_IMAGE_FILE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|BM.{4}\0{4}|II\*\0|MM\0\*"
    rb"|.{4}ftypavi[fs]|\0{3}\x0cjP  ",
    re.DOTALL,
)
_MIN_BASE64_CHARS = 40
"""The smallest image files have about 30 bytes."""
_MAX_PATH_CHARS = 4096
"""Longest path on any supported system."""
_URL_SAFE = str.maketrans("-_", "+/")
_NO_BASE64 = re.compile(r"[^A-Za-z0-9+/=\s_-]")


def image_refs(value: Any, where: str) -> list[ImageRef]:
    """Return the images of a cell: a struct, bytes, path, URL, `data:` URI, base64, or a list.

    Args:
        value: the cell as a Python value.
        where: its column, for error messages.

    Raises:
        RowError: a null or empty image (`missing_image`), a broken data URI or base64 (`decode`), a
            file: address or one without a host (`forbidden`), or any other value (`prompt`).
    """
    if isinstance(value, list | tuple):
        return [ref for i, item in enumerate(value) for ref in image_refs(item, f"{where}[{i}]")]
    if value is None:
        raise RowError(ErrorType.MISSING_IMAGE, f"{where} is null")
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if data is None and path is None and (url := value.get("url")) is not None:
            return image_refs(url, f"{where}.url")
        return [_image_ref(data, where) if data is not None else _image_ref(path, where)]
    return [_image_ref(value, where)]


def has_no_image(value: Any) -> bool:
    """Whether a cell is null, an empty text or list, or a struct without bytes, path and URL."""
    if isinstance(value, Mapping):
        return all(value.get(key) is None for key in ("bytes", "path", "url"))
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _image_ref(value: Any, where: str) -> ImageRef:
    if isinstance(value, bytes | bytearray | memoryview):
        if not len(value):
            raise RowError(ErrorType.MISSING_IMAGE, f"{where} holds no bytes")
        return ImageRef(data=bytes(value))
    if value is None:
        raise RowError(ErrorType.MISSING_IMAGE, f"{where} has neither bytes nor path")
    if not isinstance(value, str):
        raise RowError(
            ErrorType.PROMPT,
            f"{where} is {type(value).__name__}; an image is bytes, a path, a data: URI, base64, "
            "a struct of bytes and path, or a list of these",
        )
    if not value.strip():
        raise RowError(ErrorType.MISSING_IMAGE, f"{where} is an empty path")
    if value[:5].lower() == "data:":
        return ImageRef(data=_decode_data_uri(value, where))
    address = _ADDRESS.match(value)
    if address and _URL.match(value) and address.group(1).lower() != "file":
        return ImageRef(url=value)
    if address:
        raise RowError(
            ErrorType.FORBIDDEN,
            f"{where} is a {address.group(1).lower()}: address; "
            "images come from bytes, data: URIs, or paths below data.image_root",
        )
    data = _decode_image(value, where)
    return ImageRef(path=value) if data is None else ImageRef(data=data)


def _decode_image(text: str, where: str) -> bytes | None:
    """Decode a base64 image without a `data:` prefix; None if the text is a path.

    Raises:
        RowError: it starts like an image in base64 but is invalid, and not a path (`decode`).
    """
    if len(text) < _MIN_BASE64_CHARS:
        return None
    try:
        # The first 20 characters rule out most paths without decoding the whole text.
        head = _from_base64(text.lstrip()[:20])
    except ValueError:
        return None
    if not _IMAGE_FILE.match(head):
        return None
    try:
        return _from_base64(text)
    except ValueError as error:
        if len(text) < _MAX_PATH_CHARS and _NO_BASE64.search(text):
            return None
        raise RowError(ErrorType.DECODE, f"{where} is an image in broken base64") from error


def _from_base64(text: str) -> bytes:
    """Decode standard or URL-safe base64, with white space and with or without padding."""
    text = "".join(text.split()).translate(_URL_SAFE).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _decode_data_uri(uri: str, where: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise RowError(ErrorType.DECODE, f"{where} is a data: URI without a comma")
    try:
        if "".join(header.split()).lower().endswith(";base64"):
            data = _from_base64(unquote(payload) if "%" in payload else payload)
        else:
            data = unquote_to_bytes(payload)
    except (binascii.Error, ValueError) as error:
        raise RowError(ErrorType.DECODE, f"{where} is a data: URI that is no base64") from error
    if not data:
        raise RowError(ErrorType.MISSING_IMAGE, f"{where} is an empty data: URI")
    return data


def read_messages(value: Any, where: str) -> list[Message]:
    """Normalize a cell of chat messages: the content becomes a list of parts.

    The key `prefix` of a last message of the assistant's, as in Mistral's API, is kept if it is
    true.

    Raises:
        RowError: the cell is null or does not hold chat messages (`prompt`).
    """
    if isinstance(value, str):
        value = read_json(value, where)
    if not isinstance(value, list) or not value:
        raise RowError(ErrorType.PROMPT, f"{where} holds no list of messages")
    messages: list[Message] = []
    for i, message in enumerate(value):
        message = _respelled(message, f"{where}[{i}]")
        role = message.get("role") if isinstance(message, Mapping) else None
        if isinstance(message, Mapping) and "role" not in message:
            keys = one_line(", ".join(map(str, message)))
            raise RowError(
                ErrorType.PROMPT,
                f"{where}[{i}] has no key 'role' (its keys: {keys}); it needs role and content, or "
                "from and value",
            )
        # A role is inserted into the prompt unescaped, so it must not hold control tokens.
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise RowError(ErrorType.PROMPT, f"{where}[{i}] has no role that is a plain word")
        if found := [key for key in _UNSUPPORTED_MESSAGE_KEYS if message.get(key)]:
            raise RowError(ErrorType.PROMPT, f"{where}[{i}].{found[0]} is not supported")
        messages.append({"role": role, "content": list(_parts(message, f"{where}[{i}]"))})
        if message.get("prefix") is True:
            if role != "assistant" or i < len(value) - 1:
                raise RowError(
                    ErrorType.PROMPT,
                    f"{where}[{i}].prefix is set; it belongs in a last message of the assistant's",
                )
            messages[i]["prefix"] = True
    return messages


def _respelled(message: Any, where: str) -> Any:
    """Return a message with `from` and `value` as one with role and content; others unchanged.

    Raises:
        RowError: it has keys of both spellings, or no known speaker or text (`prompt`).
    """
    if not isinstance(message, Mapping):
        return message
    # A Parquet struct has the keys of all messages; null ones are treated as absent.
    keys = {key for key in ("role", "content", "from", "value") if message.get(key) is not None}
    if not keys & {"from", "value"}:
        return message
    if keys & {"role", "content"}:
        problem = "has keys of two spellings: keep role and content, or from and value"
    elif len(keys) == 1:
        problem = "needs both from and value"
    elif not isinstance(message["from"], str) or message["from"] not in _SPEAKERS:
        problem = f"from is none of {', '.join(_SPEAKERS)}"
    elif not isinstance(text := message["value"], str):
        problem = "value is no text"
    else:
        role = _SPEAKERS[message["from"]]
        content = list(_split_at_placeholders(text)) if role == "user" else text
        return {**message, "role": role, "content": content}
    raise RowError(ErrorType.PROMPT, f"{where} {problem}")


def _split_at_placeholders(text: str) -> Iterator[dict[str, Any]]:
    """Yield the parts of a text with placeholders, without the line breaks that set these apart."""
    pieces = text.split(_PLACEHOLDER)
    for i, piece in enumerate(pieces):
        if i > 0:
            yield {"type": "image"}
            piece = piece.lstrip("\r\n")
        if i < len(pieces) - 1:
            piece = piece.rstrip("\r\n")
        if piece or len(pieces) == 1:
            yield {"type": "text", "text": piece}


def check_continued(message: Message, where: str) -> None:
    """Refuse a final assistant message that an answer cannot continue.

    Raises:
        RowError: it holds an image, or no text (`prompt`).
    """
    parts = message["content"]
    if any(part["type"] == "image" for part in parts):
        raise RowError(ErrorType.PROMPT, f"{where}: the message to continue holds an image")
    if not "".join(part["text"] for part in parts).strip():
        raise RowError(ErrorType.PROMPT, f"{where}: the message to continue holds no text")


def read_json(text: str, where: str) -> Any:
    """Parse a cell of JSON text.

    Raises:
        RowError: it is no JSON, or holds half a surrogate pair (`prompt`).
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError(
            ErrorType.PROMPT, f"{where} holds half a surrogate pair, which is no text"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RowError(ErrorType.PROMPT, f"{where} is text that is no JSON") from error
    return value


def read_turns(value: Any, where: str) -> list[Message]:
    """Normalize a cell of user turns to messages.

    Accepted: a list whose items are texts, lists of parts, or user messages, optionally after a
    system message; or the same as JSON text. The assistant's messages are left out.

    Raises:
        RowError: the cell is null or does not hold user turns (`prompt`).
    """
    if isinstance(value, str):
        if value.strip() and value.strip()[0] not in '[{"':
            raise RowError(
                ErrorType.PROMPT,
                f"turns must be a list of texts, or JSON text of one; column {where!r} holds plain "
                "text",
            )
        value = read_json(value, where)
    if not isinstance(value, list) or not value:
        raise RowError(ErrorType.PROMPT, f"{where} holds no list of turns")
    messages = read_messages(
        [t if isinstance(t, Mapping) else {"role": "user", "content": t} for t in value], where
    )
    # Answers of a dataset: the turns before them are answered anew.
    turns = [m for m in messages if m["role"] != "assistant" or "prefix" in m]
    roles = [turn["role"] for turn in turns]
    if roles[:1] == ["system"]:
        del roles[0]
    if set(roles) != {"user"}:
        raise RowError(
            ErrorType.PROMPT,
            f"{where} holds no turn of the user's"
            if "user" not in roles
            else f"{where} holds messages besides a first system message, the user's turns and "
            "answers to them",
        )
    return turns


def _parts(message: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        yield {"type": "text", "text": content}
        return
    if not isinstance(content, list):
        raise RowError(ErrorType.PROMPT, f"{where}.content is neither text nor a list of parts")
    for i, part in enumerate(content):
        if isinstance(part, str):
            yield {"type": "text", "text": part}
            continue
        if not isinstance(part, Mapping):
            raise RowError(ErrorType.PROMPT, f"{where}.content[{i}] is no part")
        # A Parquet struct has the keys of all parts; null ones are treated as absent.
        part = {key: item for key, item in part.items() if item is not None}
        match part.get("type", _untyped(part)):
            case "text" | "input_text" | "output_text":
                if not isinstance(part.get("text"), str):
                    raise RowError(ErrorType.PROMPT, f"{where}.content[{i}] has no text")
                yield {"type": "text", "text": part["text"]}
            case "image" | "image_url" | "input_image":
                inline = {key: part[key] for key in _INLINE if key in part}
                if not inline and (
                    named := [key for key in _UNSUPPORTED_IMAGE_KEYS if key in part]
                ):
                    raise RowError(
                        ErrorType.PROMPT, f"{where}.content[{i}] names its image by {named[0]!r}"
                    )
                yield {"type": "image", **({"inline": inline} if inline else {})}
            case kind:
                raise RowError(
                    ErrorType.PROMPT,
                    f"{where}.content[{i}] is of type {kind!r}; text and image are supported",
                )


def _untyped(part: Mapping[str, Any]) -> str | None:
    """Infer the type of a part from its keys; None if they are ambiguous."""
    kinds = ["text"] * ("text" in part) + ["image"] * any(key in part for key in _INLINE)
    return kinds[0] if len(kinds) == 1 else None


def with_markdown_images(messages: Sequence[Message]) -> list[Message]:
    """Turn each `![any words](URL, path or data: URI)` in user messages into an image part."""
    return [
        {**message, "content": list(_split_markdown(message["content"]))}
        if message["role"] == "user"
        else message
        for message in messages
    ]


def _split_markdown(parts: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for part in parts:
        if part["type"] != "text":
            yield part
            continue
        # Every second piece is the pattern's captured group.
        for i, piece in enumerate(_MARKDOWN.split(part["text"])):
            if i % 2:
                yield {"type": "image", "inline": {"url": piece}}
            elif piece:
                yield {"type": "text", "text": piece}


def fill_slots(
    messages: Sequence[Message], images: Sequence[ImageRef], where: str
) -> tuple[list[Message], tuple[ImageRef, ...]]:
    """Assign images to image slots, in order.

    An image part with an inline image keeps it. Bare slots take the images of the image columns in
    order. If there is no bare slot, slots for all of those are inserted at the start of the first
    user message.

    Returns:
        The messages, with every image part reduced to `{"type": "image"}`, and the images in slot
        order.

    Raises:
        RowError: more slots than images (`missing_image`) or more images than slots (`prompt`).
    """
    parts = [part for message in messages for part in message["content"]]
    num_bare = sum(part["type"] == "image" and "inline" not in part for part in parts)
    if num_bare == 0 and images:
        messages = _with_leading_images(messages, len(images), where)
        num_bare = len(images)
    if num_bare != len(images):
        kind = ErrorType.MISSING_IMAGE if num_bare > len(images) else ErrorType.PROMPT
        raise RowError(
            kind, f"{where} holds {num_bare} image slots and the row brings {len(images)} images"
        )
    rest = iter(images)
    filled: list[ImageRef] = []
    out: list[Message] = []
    for i, message in enumerate(messages):
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                filled += (
                    _inline_refs(part["inline"], f"{where}[{i}]")
                    if "inline" in part
                    else [next(rest)]
                )
                part = {"type": "image"}
            content.append(part)
        out.append({"role": message["role"], "content": content})
    return out, tuple(filled)


def _with_leading_images(messages: Sequence[Message], count: int, where: str) -> list[Message]:
    slots = [{"type": "image"} for _ in range(count)]
    for i, message in enumerate(messages):
        if message["role"] == "user":
            first = {**message, "content": [*slots, *message["content"]]}
            return [*messages[:i], first, *messages[i + 1 :]]
    raise RowError(ErrorType.PROMPT, f"{where} holds no user message to show the images in")


def _inline_refs(inline: Mapping[str, Any], where: str) -> list[ImageRef]:
    key, value = next(iter(inline.items()))
    if key == "source" and isinstance(value, Mapping):
        key, value = ("base64", value["data"]) if value.get("data") else ("url", value.get("url"))
    if key == "base64" and isinstance(value, str) and value[:5].lower() != "data:":
        value = f"data:;base64,{value}"
    refs = image_refs(value, where)
    if len(refs) != 1:
        raise RowError(ErrorType.PROMPT, f"{where} has a part with {len(refs)} images")
    return refs
