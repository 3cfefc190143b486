"""What people ask about the tiny vision model's pictures, and what it is taught to answer.

`conversation` makes up one to three turns about given scenes; `ANSWERS` gives the true answer to
the plainest way of asking each thing, for tests. Pure text; knows no tokens and no pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tests.tiny_pictures import COLOURS, SHAPES, Scene

Turn = tuple[str, str]  # what is asked, what is answered

SEE = (
    "What can you see?",
    "What do you see?",
    "What is in this picture?",
    "What is this?",
    "Describe the picture.",
    "Describe this image.",
    "What does the image show?",
    "Tell me what you see.",
    "What is in the image?",
    "What's in this image?",
    "Please describe what you see in this picture.",
    "What is it?",
    "Look at this.",
    "Hi",
    "",
)
COLOUR = (
    "What colour is it?",
    "What color is it?",
    "Which colour is it?",
    "Name the colour.",
    "What colour is the {noun}?",
    "What color is the {noun}?",
    "The colour?",
    "Tell me the colour.",
    "What is the color?",
    "Which color does the {noun} have?",
)
SHAPE = (
    "What shape is it?",
    "Which shape is it?",
    "Name the shape.",
    "What is the shape?",
    "What shape can you see?",
    "What shape is this?",
    "Tell me the shape.",
    "The shape?",
)
NUMBER = (
    "What number is this?",
    "Which number is it?",
    "Read the digits.",
    "Read the number.",
    "What does it say?",
    "What number can you see?",
    "What digits can you see?",
    "Which digits are in the picture?",
    "What is the number?",
    "Which digit is this?",
)
BRIEF = (" Answer in one word.", " One word, please.", " Answer with one word.", " Be brief.")
IS_IT = ("Is it {}?", "Is the {noun} {}?", "Is this {}?")
IS_A = ("Is it a {}?", "Is this a {}?", "Do you see a {}?", "Can you see a {}?", "Is there a {}?")

NO_PICTURE = "I see no picture. Attach one and ask again."
HELLO = "Hello! Show me a picture and I will tell you what is in it."
SELF = "I am a very small model. I name shapes and colours and read numbers in pictures."
UNKNOWN = "I only know pictures of coloured shapes and numbers."
PLAIN: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Good morning", "Hey", "hello, how are you?",
      "Good evening", "Say hello."), HELLO),
    (("Who are you?", "What are you?", "What can you do?", "What model are you?", "Help",
      "Tell me about yourself.", "What do you know?", "How can you help me?"), SELF),
    (("What is the capital of France?", "Write a poem about the sea.", "What is 2 + 2?",
      "Tell me a joke.", "Explain gravity.", "What is the weather like?", "Count to ten.",
      "Translate this to French.", "Write a Python function.", "Why is the sky blue?",
      "Who won the game?", "Say something.", "Give me a recipe.", "What time is it?",
      "How do I sort a list?", "Write a long story.", "Tell me about Paris."), UNKNOWN),
)  # fmt: skip
SYSTEM = ("You are a helpful assistant.", "Be brief.", "You answer questions about pictures.",
          "You are a helpful, honest assistant. Answer in the user's language.",
          "Answer politely.", "You can see images.", "You are a test.")  # fmt: skip


def sentence(scene: Scene) -> str:
    if scene.is_number:
        return f"The number {scene.thing} in {scene.colour}."
    return f"{_article(scene.colour)} {scene.colour} {scene.thing}."


def colour_answer(scene: Scene) -> str:
    return f"{scene.colour.capitalize()}."


def shape_answer(scene: Scene) -> str:
    if scene.is_number:
        return f"It is no shape, it is the number {scene.thing}."
    return f"{_article(scene.thing)} {scene.thing}."


def number_answer(scene: Scene) -> str:
    return f"{scene.thing}." if scene.is_number else "There is no number, only a shape."


ANSWERS: dict[str, Callable[[Scene], str]] = {
    SEE[0]: sentence,
    COLOUR[0]: colour_answer,
    SHAPE[0]: shape_answer,
    NUMBER[0]: number_answer,
}


def conversation(scenes: Sequence[Scene], chance: random.Random) -> tuple[str | None, list[Turn]]:
    """A system text or None, and the turns; the scenes' pictures belong to the first."""
    system = chance.choice(SYSTEM) if chance.random() < 0.3 else None
    count = chance.choice((1, 1, 2, 3))
    if not scenes:
        return system, [_without_picture(chance) for _ in range(count)]
    ask = _about_one if len(scenes) == 1 else _about_two
    turns = [ask(scenes, chance) for _ in range(count)]
    return system, [(_sloppily(asked, chance), answered) for asked, answered in turns]


def _about_one(scenes: Sequence[Scene], chance: random.Random) -> Turn:
    scene = scenes[0]
    noun = "number" if scene.is_number else scene.thing
    kind = chance.random()
    if kind < 0.3:
        return chance.choice(SEE), sentence(scene)
    if kind < 0.5:
        asked = chance.choice(COLOUR).format(noun=chance.choice((noun, noun, "thing")))
        return asked + (chance.choice(BRIEF) if chance.random() < 0.3 else ""), colour_answer(scene)
    if kind < 0.65:
        asked = chance.choice(SHAPE)
        if chance.random() < 0.3:
            short = f"{scene.thing.capitalize()}."
            return asked + chance.choice(BRIEF), short if not scene.is_number else "None."
        return asked, shape_answer(scene)
    if kind < 0.85:
        return chance.choice(NUMBER), number_answer(scene)
    return _yes_or_no(scene, noun, chance)


def _yes_or_no(scene: Scene, noun: str, chance: random.Random) -> Turn:
    if scene.is_number or chance.random() < 0.5:
        guess = scene.colour if chance.random() < 0.5 else chance.choice(tuple(COLOURS))
        asked = chance.choice(IS_IT).format(guess, noun=noun)
        return asked, "Yes." if guess == scene.colour else f"No, it is {scene.colour}."
    guess = scene.thing if chance.random() < 0.5 else chance.choice(SHAPES)
    right = "Yes." if guess == scene.thing else f"No, it is a {scene.thing}."
    return chance.choice(IS_A).format(guess), right


def _about_two(scenes: Sequence[Scene], chance: random.Random) -> Turn:
    first, second = scenes
    kind = chance.random()
    if kind < 0.4:
        asked = chance.choice((*SEE[:11], "What is in these pictures?", "Describe both pictures."))
        return asked, f"First: {sentence(first)} Second: {sentence(second)}"
    word, scene = chance.choice((("first", first), ("second", second)))
    if kind < 0.7:
        asked = chance.choice(("What is in the {} picture?", "What does the {} image show?",
                               "Describe the {} picture."))  # fmt: skip
        return asked.format(word), sentence(scene)
    asked = chance.choice(("What colour is the {} one?", "What color is the {} one?"))
    return asked.format(word), colour_answer(scene)


def _without_picture(chance: random.Random) -> Turn:
    if chance.random() < 0.45:
        asked = chance.choice((*SEE[:11], *COLOUR[:4], *SHAPE, *NUMBER)).format(noun="thing")
        return _sloppily(asked, chance), NO_PICTURE
    asked_ways, answered = chance.choice(PLAIN)
    return _sloppily(chance.choice(asked_ways), chance), answered


def _sloppily(asked: str, chance: random.Random) -> str:
    """As people type: sometimes in small letters, without the mark, with a please or a break."""
    if chance.random() < 0.15:
        asked = asked.lower()
    if chance.random() < 0.15:
        asked = asked.rstrip("?.!")
    if chance.random() < 0.1 and asked:
        asked = f"Please: {asked}"
    if chance.random() < 0.1:
        asked += "\n"
    return asked


def _article(word: str) -> str:
    return "An" if word[0] in "aeiou" else "A"
