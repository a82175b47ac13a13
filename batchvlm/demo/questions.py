"""Generate questions with correct answers about scenes.

A kind is a family of questions. `caption` and `json` have long answers, the VQA kinds a word or
two, and the pair kinds are about two images. A kind is skipped for scenes for which it has no
unambiguous question.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.random import Generator

from batchvlm.demo import world
from batchvlm.demo.world import COLOR_NAMES, SHAPES, Object, Scene

T = TypeVar("T")

LONG_KINDS: Final = ("caption", "json")
VQA_KINDS: Final = (
    "color",
    "color_at",
    "shape_at",
    "shape_of",
    "count",
    "count_x",
    "exists",
    "where",
    "size",
    "background",
)
SINGLE_KINDS: Final = LONG_KINDS + VQA_KINDS
PAIR_KINDS: Final = ("more", "which")
KINDS: Final = SINGLE_KINDS + PAIR_KINDS

# {x} is a noun phrase, {p} a place ("at the top"), {c} a color.
TEMPLATES: Final = {
    "caption": (
        "Describe the image.",
        "Describe this image.",
        "What is in this image?",
        "Write a caption for this image.",
        "Caption this image.",
        "What do you see?",
        "Describe the picture in one sentence.",
    ),
    "json": (
        "List the objects as JSON.",
        "List the shapes as JSON.",
        "Return the objects in this image as JSON.",
        "Describe the image as JSON.",
        "Extract all shapes as JSON.",
        "Give me a JSON list of the objects with shape, color, size and position.",
    ),
    "color": (
        "What color is the {x}?",
        "What is the color of the {x}?",
        "Which color is the {x}?",
        "What colour is the {x}?",
        "Tell me the color of the {x}.",
    ),
    "color_at": (
        "What color is the shape {p}?",
        "Which color is the object {p}?",
        "What is the color of the shape {p}?",
    ),
    "shape_at": (
        "What shape is {p}?",
        "Which shape is {p}?",
        "What is {p}?",
        "Name the shape {p}.",
    ),
    "shape_of": ("Which shape is {c}?", "What shape is {c}?", "What is the {c} shape?"),
    "count": (
        "How many shapes are there?",
        "How many objects are in the image?",
        "Count the shapes.",
        "What is the number of shapes?",
        "How many shapes do you see?",
    ),
    "count_x": (
        "How many {x} are there?",
        "Count the {x}.",
        "How many {x} do you see?",
        "What is the number of {x}?",
    ),
    "exists": (
        "Is there {x}?",
        "Is there {x} in the image?",
        "Does the image contain {x}?",
        "Can you see {x}?",
    ),
    "where": (
        "Where is the {x}?",
        "What is the position of the {x}?",
        "In which part of the image is the {x}?",
    ),
    "size": ("Is the {x} large or small?", "What size is the {x}?", "How big is the {x}?"),
    "background": (
        "Is the background light or dark?",
        "What is the background like, light or dark?",
        "How bright is the background?",
    ),
    "more": (
        "Which image has more shapes?",
        "Which image contains more objects?",
        "Which of the two images has more shapes?",
    ),
    "which": (
        "Which image contains {x}?",
        "Which image has {x}?",
        "In which image is there {x}?",
    ),
}
SUFFIXES: Final = ("", "", "", "", " Answer briefly.", " Be brief.", " Answer in a few words.")

_PLACES: Final = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the center",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)

# Independent random streams: the first word of each generator's seed.
TRAINING_STREAM: Final = 1
HELD_OUT_STREAM: Final = 2
SAMPLES_STREAM: Final = 3
CORPUS_STREAM: Final = 4


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its only correct answer."""

    kind: str
    """One of `KINDS`."""

    text: str
    """The question."""

    answer: str
    """The answer, which a model must match exactly."""


@dataclass(frozen=True, kw_only=True)
class HeldOutItem:
    """One question of the held-out set with its encoded images."""

    scene_index: int
    """Index of its scene; of a pair, of the second one."""

    kind: str
    """One of `KINDS`."""

    question: str
    """The question."""

    answer: str
    """The correct answer."""

    images: tuple[bytes, ...]
    """One or two JPEG or PNG files."""


def caption(scene: Scene) -> str:
    """Return the correct caption: one sentence with every object in row-major order."""
    parts = [f"a {obj.size} {obj.color} {obj.shape} {_PLACES[obj.cell]}" for obj in scene.objects]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{text[0].upper()}{text[1:]}."


def objects_json(scene: Scene) -> str:
    """Return the correct compact JSON: every object in row-major order, and their count."""
    objects = [
        {"shape": obj.shape, "color": obj.color, "size": obj.size, "position": obj.position}
        for obj in scene.objects
    ]
    return json.dumps({"objects": objects, "count": len(objects)}, separators=(",", ":"))


def ask(scene: Scene, kind: str, rng: Generator) -> Question | None:
    """Sample a question of one of the `SINGLE_KINDS`; None if the scene has no unambiguous one."""
    if kind == "caption":
        return Question(kind=kind, text=_pick(TEMPLATES[kind], rng), answer=caption(scene))
    if kind == "json":
        return Question(kind=kind, text=_pick(TEMPLATES[kind], rng), answer=objects_json(scene))
    drawn = _draw_vqa(scene, kind, rng)
    if drawn is None:
        return None
    slots, answer = drawn
    text = _pick(TEMPLATES[kind], rng).format(**slots) + _pick(SUFFIXES, rng)
    return Question(kind=kind, text=text, answer=answer)


def ask_pair(first: Scene, second: Scene, kind: str, rng: Generator) -> Question:
    """Sample a question about two images, of kind `more` or `which`."""
    template = _pick(TEMPLATES[kind], rng)
    if kind == "more":
        num_first, num_second = len(first.objects), len(second.objects)
        answer = (
            "same" if num_first == num_second else "first" if num_first > num_second else "second"
        )
        return Question(kind=kind, text=template, answer=answer)
    assert kind == "which", kind
    shape, color = _draw_subject(_pick((first, second), rng), rng, p_present=0.85)
    match _has(first, shape, color), _has(second, shape, color):
        case True, True:
            answer = "both"
        case True, False:
            answer = "first"
        case False, True:
            answer = "second"
        case _:
            answer = "neither"
    text = template.format(x=_with_article(shape, color))
    return Question(kind=kind, text=text, answer=answer)


def held_out(num_scenes: int, seed: int = 0) -> list[HeldOutItem]:
    """Return the held-out set: for each scene every kind that fits, and one question for each pair.

    It has its own random stream, so training never uses its images. Consecutive scenes are a pair;
    `more` and `which` alternate.

    Returns:
        Items in order of their scenes; the first n scenes are the same for any `num_scenes`.
    """
    rng = np.random.default_rng([HELD_OUT_STREAM, seed])
    items: list[HeldOutItem] = []
    previous: tuple[Scene, bytes] | None = None
    for index in range(num_scenes):
        scene = world.draw_scene(rng)
        picture = world.render(scene, rng, *world.draw_size(rng))
        # Alternate every two scenes, so that each kind of pair gets all mixtures of encodings.
        quality = int(rng.integers(75, 96))
        encoded = (
            world.encode_jpeg(picture, quality) if index // 2 % 2 else world.encode_png(picture)
        )
        asked: list[tuple[Question | None, tuple[bytes, ...]]] = [
            (ask(scene, kind, rng), (encoded,)) for kind in SINGLE_KINDS
        ]
        if previous is not None:
            pair = ask_pair(previous[0], scene, PAIR_KINDS[index % 2], rng)
            asked.append((pair, (previous[1], encoded)))
        items += [
            HeldOutItem(
                scene_index=index,
                kind=question.kind,
                question=question.text,
                answer=question.answer,
                images=images,
            )
            for question, images in asked
            if question is not None
        ]
        previous = scene, encoded
    return items


def corpus(num_scenes: int = 3000) -> Iterator[str]:
    """Yield questions and answers to train a tokenizer on; they are always the same."""
    rng = np.random.default_rng([CORPUS_STREAM])
    for _ in range(num_scenes):
        scene, other = world.draw_scene(rng), world.draw_scene(rng)
        asked = [ask(scene, kind, rng) for kind in SINGLE_KINDS]
        asked += [ask_pair(scene, other, kind, rng) for kind in PAIR_KINDS]
        for question in asked:
            if question is not None:
                yield question.text
                yield question.answer


def _draw_vqa(scene: Scene, kind: str, rng: Generator) -> tuple[dict[str, str], str] | None:
    """Sample the values of a template's slots, and the answer; None if none is unambiguous."""
    namings: tuple[tuple[str, ...], ...]
    match kind:
        case "count":
            return {}, str(len(scene.objects))
        case "background":
            return {}, scene.background
        case "color_at" | "shape_at":
            obj = _pick(scene.objects, rng)
            answer = obj.color if kind == "color_at" else obj.shape
            return {"p": _PLACES[obj.cell]}, answer
        case "count_x":
            by_shape = rng.random() < 0.5
            shape, color = _draw_subject(scene, rng, p_present=0.75, by_shape=by_shape)
            plural = f"{color} shapes" if shape is None else shape + _plural_ending(shape)
            return {"x": plural}, str(sum(_fits(obj, shape, color) for obj in scene.objects))
        case "exists":
            shape, color = _draw_exists(scene, rng)
            answer = "yes" if _has(scene, shape, color) else "no"
            return {"x": _with_article(shape, color)}, answer
        case "color":
            namings = (("shape",), ("size", "shape"))
        case "shape_of":
            namings = (("color",),)
        case "where":
            namings = (("shape",), ("color", "shape"), ("color",), ("size", "shape"))
        case "size":
            namings = (("shape",), ("color", "shape"), ("color",))
        case _:
            raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(SINGLE_KINDS)}")
    references = _references(scene, namings)
    if not references:
        return None
    phrase, obj = _pick(references, rng)
    if kind == "shape_of":
        return {"c": obj.color}, obj.shape
    answer = {"color": obj.color, "where": obj.position, "size": obj.size}[kind]
    return {"x": phrase}, answer


def _references(scene: Scene, namings: tuple[tuple[str, ...], ...]) -> list[tuple[str, Object]]:
    """Return noun phrases that fit exactly one object, each with that object.

    A naming lists the properties in the phrase, in their English order.
    """
    references = []
    for obj in scene.objects:
        for naming in namings:
            values = [getattr(obj, name) for name in naming]
            fitting = [
                other
                for other in scene.objects
                if [getattr(other, name) for name in naming] == values
            ]
            if len(fitting) == 1:
                noun = [] if "shape" in naming else ["shape"]
                references.append((" ".join(values + noun), obj))
    return references


def _draw_subject(
    scene: Scene, rng: Generator, *, p_present: float, by_shape: bool | None = None
) -> tuple[str | None, str | None]:
    """Sample a shape or a color to ask for; it is taken from the scene with `p_present`."""
    if by_shape is None:
        by_shape = rng.random() < 0.65
    is_present = rng.random() < p_present
    if by_shape:
        return (_pick(scene.objects, rng).shape if is_present else _pick(SHAPES, rng)), None
    return None, (_pick(scene.objects, rng).color if is_present else _pick(COLOR_NAMES, rng))


def _draw_exists(scene: Scene, rng: Generator) -> tuple[str | None, str | None]:
    """Sample a shape, a color or both; near misses are common, so guessing scores badly."""
    if rng.random() < 0.4:
        obj = _pick(scene.objects, rng)
        shape, color = obj.shape, obj.color
    else:
        shape = _pick(scene.objects, rng).shape if rng.random() < 0.5 else _pick(SHAPES, rng)
        color = _pick(scene.objects, rng).color if rng.random() < 0.5 else _pick(COLOR_NAMES, rng)
    naming = int(rng.integers(3))
    return (None if naming == 1 else shape), (None if naming == 0 else color)


def _fits(obj: Object, shape: str | None, color: str | None) -> bool:
    return (shape is None or obj.shape == shape) and (color is None or obj.color == color)


def _has(scene: Scene, shape: str | None, color: str | None) -> bool:
    return any(_fits(obj, shape, color) for obj in scene.objects)


def _with_article(shape: str | None, color: str | None) -> str:
    phrase = " ".join(word for word in (color, shape or "shape") if word is not None)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _plural_ending(noun: str) -> str:
    return "es" if noun.endswith("s") else "s"


def _pick(choices: Sequence[T], rng: Generator) -> T:
    return choices[int(rng.integers(len(choices)))]
