"""Texts as people and keyboards spoil them. The same seed spoils a text in the same way."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_PLACES = {letter: (row, at) for row, letters in enumerate(_ROWS) for at, letter in enumerate(letters)}
_NEAR = {
    letter: [
        other
        for other, (r, a) in _PLACES.items()
        if other != letter and abs(r - row) <= 1 and abs(a - at) <= 1
    ]
    for letter, (row, at) in _PLACES.items()
}  # fmt: skip


def typos(text: str, draw: random.Random, rate: float) -> str:
    """This part of the letters is hit wrongly: the key beside it, twice, or not at all. At least one is."""
    letters = list(text)
    for place in _some(letters, draw, rate):
        letter = letters[place]
        near = _NEAR.get(letter.lower()) or list(string.ascii_lowercase)
        wrong = draw.choice(near)
        letters[place] = draw.choice((wrong.upper() if letter.isupper() else wrong, letter * 2, ""))
    return "".join(letters)


def swaps(text: str, draw: random.Random, rate: float) -> str:
    """This part of the letters changes places with the next one of its word. At least one does."""
    letters = list(text)
    places = [
        place
        for place in range(len(letters) - 1)
        if letters[place].isalpha() and letters[place + 1].isalpha() and letters[place] != letters[place + 1]
    ]
    free = set(places)
    for place in draw.sample(places, min(len(places), max(1, round(rate * len(places))))):
        if place in free:
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
            free -= {place - 1, place, place + 1}
    return "".join(letters)


def _some(letters: list[str], draw: random.Random, rate: float) -> list[int]:
    places = [place for place, letter in enumerate(letters) if letter.isalpha()]
    return draw.sample(places, min(len(places), max(1, round(rate * len(places)))))


def upper(text: str, draw: random.Random) -> str:
    """In capitals."""
    return text.upper()


def lower(text: str, draw: random.Random) -> str:
    """Without capitals."""
    return text.lower()


def mixed_case(text: str, draw: random.Random) -> str:
    """Each letter in the other case as often as not."""
    return "".join(char.swapcase() if draw.random() < 0.5 else char for char in text)


def spaces(text: str, draw: random.Random) -> str:
    """One of six spaces is missing, one of six is double. At least one is."""
    places = [place for place, char in enumerate(text) if char == " "]
    chosen = {place: draw.choice(("", "  ")) for place in places if draw.random() < 1 / 3}
    if places and not chosen:
        chosen[draw.choice(places)] = "  "
    return "".join(chosen.get(place, char) for place, char in enumerate(text))


Change = Callable[[str, random.Random], str]
TEXT_CHANGES: dict[str, Change] = {
    "typos in 2 % of the letters": lambda text, draw: typos(text, draw, 0.02),
    "typos in 10 %": lambda text, draw: typos(text, draw, 0.10),
    "neighbours swapped, 5 %": lambda text, draw: swaps(text, draw, 0.05),
    "capitals": upper,
    "no capitals": lower,
    "mixed case": mixed_case,
    "spaces missing or double": spaces,
}


def changed(texts: list[str], change: Change, seed: int) -> list[str]:
    """Each of them changed, by random numbers of its own place and the seed."""
    return [change(text, random.Random(f"{seed}:{number}")) for number, text in enumerate(texts)]


# What a model was hardly made for, where nothing else is given.
OUTSIDE = [
    "def solve(n):\n    return [x ** 2 for x in range(n) if x % 3 == 0]",
    "SELECT name, COUNT(*) FROM orders WHERE paid = 0 GROUP BY name HAVING COUNT(*) > 4;",
    "Die Fähre legt um sieben Uhr ab, wenn der Wind nicht stärker wird.",
    "Il a plu toute la nuit, et la rivière est sortie de son lit.",
    "La receta lleva dos huevos, una taza de harina y un poco de sal.",
    "昨日は雨が降ったので、試合は中止になりました。",
    "Поезд опоздал на сорок минут, и мы не успели на пересадку.",
    "3.14159 26535 89793 23846 26433 83279 50288 41971",
    "ACGT TTGA CCAT GGAT CCTA AGCT TTAG GACC",
    "O wild west wind, thou breath of the season's last red leaf, the dead are driven before thee.",
    "The party of the first part shall indemnify the party of the second part against all claims.",
    "Whisk the egg whites until stiff, fold in the sugar, and bake for ninety minutes at 100 °C.",
    "mov eax, [ebp+8]; add eax, 4; ret",
    '{"id": 17, "tags": ["a", "b"], "nested": {"ok": true}}',
    "E4 e5 Nf3 Nc6 Bb5 a6 Ba4 Nf6 O-O Be7 Re1 b5",
    "lol idk brb, c u l8r @ the thing!!! 🙂🙂",
]


def shuffled_letters(texts: list[str], seed: int) -> list[str]:
    """The letters of each text in any order: as many of each, and no words."""
    found = []
    for number, text in enumerate(texts):
        letters = list(text)
        random.Random(f"{seed}:{number}").shuffle(letters)
        found.append("".join(letters))
    return found
