"""What a word problem is drawn from: people, things and numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

SHE = (
    "Ada Amara Anna Aisha Beatriz Chloe Dana Elena Emma Farah Freya Grace Hana Ines Ivy Julia Kavya Lena Lucy Mei Mira"
)
HE = "Adam Ali Ben Carlos Dev David Emil Felix Hugo Ivan Jack Kofi Leo Luis Marco Noah Omar Oscar Pavel Ravi Sam Tom"
TOYS = ("marbles", "stickers", "toy cars", "beads", "trading cards", "shells", "postcards", "coins", "buttons")
FRUIT = ("apples", "pears", "plums", "oranges", "peaches", "lemons", "mangoes", "figs", "bananas")
BAKED = ("cookies", "muffins", "rolls", "tarts", "pretzels", "scones", "waffles")
GOODS = ("notebook", "pencil case", "mug", "candle", "scarf", "poster", "puzzle", "cap", "plant", "board game")
PLANTS = ("tulips", "roses", "tomato plants", "sunflowers", "cabbages", "bean plants", "daisies")
BOOKS = ("novel", "mystery", "biography", "travel book", "comic", "history book")


@dataclass(frozen=True)
class Person:
    name: str
    he: str
    his: str


class Draw:
    """The dice of one problem."""

    def __init__(self, random: Random) -> None:
        self._random = random
        people = [Person(name, "she", "her") for name in SHE.split()] + [
            Person(name, "he", "his") for name in HE.split()
        ]
        self._people = random.sample(people, 3)

    def person(self) -> Person:
        """Someone not met before in this problem."""
        return self._people.pop()

    def of(self, *choices: str) -> str:
        return self._random.choice(choices)

    def number(self, low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        return self._random.randint(low, high)


Kind = Callable[[Draw], tuple[str, int]]
"""Draws the people, things and numbers of a problem; returns the question with its answer."""
