"""Arithmetic word problems, generated from a seed: every answer is a positive integer that one or two steps reach.

A kind of problem is a function that draws its people, things and numbers and returns the question with its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from experiments.workloads.problem import Problem

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
KINDS: dict[str, tuple[int, Kind]] = {}
"""Name of a kind -> its number of steps, its function."""


def kind(steps: int) -> Callable[[Kind], Kind]:
    def register(function: Kind) -> Kind:
        KINDS[function.__name__] = (steps, function)
        return function

    return register


def generate(seed: int, count: int = 256, steps: Sequence[int] = (1, 2)) -> list[Problem]:
    """Problems that differ from each other; every kind comes once before any comes again.

    The first problems do not depend on `count`: a smaller set is a prefix of a larger one.

    Args:
        seed: decides everything.
        count: how many.
        steps: numbers of arithmetic steps that are wanted.

    Raises:
        ValueError: no kind has the wanted number of steps, or there are not `count` different problems.
    """
    names = [name for name, (n, _) in KINDS.items() if n in steps]
    if not names or count < 1:
        raise ValueError(f"count={count}, steps={list(steps)}: count must be at least 1, steps of 1 or 2")
    seen: set[str] = set()
    problems = []
    for number in range(count):
        turn, place = divmod(number, len(names))
        name = Random(f"{seed}/order/{turn}").sample(names, len(names))[place]
        question, answer = _new(KINDS[name][1], f"{seed}/{number}", seen)
        seen.add(question)
        problems.append(Problem(id=f"{number:05d}", question=question, gold=str(answer), kind=name))
    return problems


def _new(function: Kind, dice: str, seen: set[str]) -> tuple[str, int]:
    for attempt in range(1000):
        question, answer = function(Draw(Random(f"{dice}/{attempt}")))
        if question not in seen:
            return question, answer
    raise ValueError(f"{function.__name__} has no more new questions after {len(seen)} problems: lower count")


# One step


@kind(1)
def gain(d: Draw) -> tuple[str, int]:
    a, b, things, x, y = d.person(), d.person(), d.of(*TOYS), d.number(3, 12), d.number(2, 9)
    ending = d.of("does {} have now", "are there in {}'s collection now").format(a.name)
    return f"{a.name} has {x} {things}. {b.name} gives {a.name} {y} more. How many {things} {ending}?", x + y


@kind(1)
def loss(d: Draw) -> tuple[str, int]:
    a, things, y, left = d.person(), d.of(*TOYS), d.number(2, 9), d.number(3, 12)
    what = d.of("loses", "gives away", "sells")
    return f"{a.name} has {left + y} {things} and {what} {y} of them. How many {things} are left?", left


@kind(1)
def together(d: Draw) -> tuple[str, int]:
    a, b, fruit, x, y = d.person(), d.person(), d.of(*FRUIT), d.number(3, 15), d.number(3, 12)
    return (
        f"In the orchard, {a.name} picks {x} {fruit} and {b.name} picks {y} {fruit}. "
        f"How many {fruit} do they pick together?",
        x + y,
    )


@kind(1)
def more_than(d: Draw) -> tuple[str, int]:
    a, b, y, more = d.person(), d.person(), d.number(3, 15), d.number(2, 9)
    what = d.of("pages", "chapters")
    return (
        f"This week {a.name} read {y + more} {what} and {b.name} read {y} {what}. "
        f"How many more {what} did {a.name} read than {b.name}?",
        more,
    )


@kind(1)
def equal_groups(d: Draw) -> tuple[str, int]:
    fruit, boxes, each = d.of(*FRUIT), d.number(2, 9), d.number(2, 10)
    holder = d.of("boxes", "baskets", "crates")
    return f"A shop has {boxes} {holder} with {each} {fruit} in each. How many {fruit} are there in all?", boxes * each


@kind(1)
def share(d: Draw) -> tuple[str, int]:
    a, baked, friends, each = d.person(), d.of(*BAKED), d.number(2, 9), d.number(2, 9)
    return (
        f"{a.name} bakes {friends * each} {baked} and shares them equally among {friends} friends. "
        f"How many {baked} does each friend get?",
        each,
    )


@kind(1)
def price(d: Draw) -> tuple[str, int]:
    goods, cost, n = d.of(*GOODS), d.number(2, 10), d.number(2, 6)
    return f"One {goods} costs ${cost}. How many dollars do {n} of them cost?", cost * n


@kind(1)
def change(d: Draw) -> tuple[str, int]:
    a, goods, note = d.person(), d.of(*GOODS), int(d.of("10", "20"))
    cost = d.number(3, note - 2)
    return (
        f"{a.name} buys a {goods} for ${cost} and pays with a ${note} note. How many dollars does {a.he} get back?",
        note - cost,
    )


@kind(1)
def distance(d: Draw) -> tuple[str, int]:
    a, hours = d.person(), d.number(2, 5)
    verb, speed = ("walks", d.number(3, 6)) if d.number(0, 1) else ("cycles", d.number(10, 20))
    return f"{a.name} {verb} {speed} kilometres every hour. How far does {a.he} get in {hours} hours?", speed * hours


@kind(1)
def age_later(d: Draw) -> tuple[str, int]:
    a, age, years = d.person(), d.number(5, 30), d.number(2, 10)
    return f"{a.name} is {age} years old today. How old will {a.he} be in {years} years?", age + years


@kind(1)
def younger(d: Draw) -> tuple[str, int]:
    a, b, age, years = d.person(), d.person(), d.number(4, 20), d.number(2, 9)
    return f"{a.name} is {age + years} years old. {b.name} is {years} years younger. How old is {b.name}?", age


@kind(1)
def rows(d: Draw) -> tuple[str, int]:
    place, n, seats = d.of("cinema", "lecture hall", "theatre", "bus"), d.number(3, 10), d.number(4, 12)
    return f"A {place} has {n} rows of {seats} seats each. How many seats does it have?", n * seats


@kind(1)
def twice(d: Draw) -> tuple[str, int]:
    a, b, things, x = d.person(), d.person(), d.of(*TOYS), d.number(2, 20)
    return f"{a.name} owns {x} {things}. {b.name} owns twice as many. How many {things} does {b.name} own?", 2 * x


@kind(1)
def half(d: Draw) -> tuple[str, int]:
    a, x, drink = d.person(), d.number(1, 20), d.of("water", "juice", "milk", "tea")
    return (
        f"A barrel holds {2 * x} litres of {drink}. {a.name} pours out half of it. "
        f"How many litres of {drink} stay in the barrel?",
        x,
    )


@kind(1)
def weeks(d: Draw) -> tuple[str, int]:
    a, n = d.person(), d.number(2, 12)
    place = d.of("on an island", "in the mountains", "at the coast", "in a big city")
    return f"{a.name} stays {n} weeks {place}. How many days is that?", 7 * n


@kind(1)
def legs(d: Draw) -> tuple[str, int]:
    animal, number = d.of("spiders 8", "beetles 6", "horses 4", "goats 4", "ants 6", "hens 2").split()
    a, n = d.person(), d.number(3, 12)
    return f"{a.name} draws {n} {animal}, each with {number} legs. How many legs is that in total?", n * int(number)


@kind(1)
def warmer(d: Draw) -> tuple[str, int]:
    town, x, y = d.of("Bergen", "Porto", "Quito", "Oslo", "Kyoto", "Tunis"), d.number(2, 15), d.number(2, 9)
    return (
        f"In {town} it is {x} degrees in the morning. By noon it is {y} degrees warmer. "
        f"How many degrees is it at noon?",
        x + y,
    )


@kind(1)
def packs(d: Draw) -> tuple[str, int]:
    a, n, size = d.person(), d.number(2, 9), d.number(3, 10)
    what = d.of("paper plates", "cups", "napkins", "candles", "balloons")
    return (
        f"For {a.his} party {a.name} needs {n * size} {what}. They are sold in packs of {size}. "
        f"How many packs does {a.he} need?",
        n,
    )


@kind(1)
def left_over(d: Draw) -> tuple[str, int]:
    baked, size, full = d.of(*BAKED), d.number(4, 9), d.number(2, 9)
    rest = d.number(1, size - 1)
    return (
        f"A baker has {size * full + rest} {baked} and puts them into boxes of {size} until no more box can be filled. "
        f"How many {baked} are left over?",
        rest,
    )


@kind(1)
def pages_left(d: Draw) -> tuple[str, int]:
    a, book, read, left = d.person(), d.of(*BOOKS), d.number(5, 60), d.number(5, 40)
    return f"{a.name} has read {read} of the {read + left} pages of a {book}. How many pages are left to read?", left


@kind(1)
def minutes(d: Draw) -> tuple[str, int]:
    a, hours = d.person(), d.number(2, 6)
    what = d.of("paints", "practises the violin", "works in the garden", "plays chess", "studies")
    return f"{a.name} {what} for {hours} hours. How many minutes is that?", 60 * hours


# Two steps


@kind(2)
def two_purchases(d: Draw) -> tuple[str, int]:
    a, n, cost, other = d.person(), d.number(2, 5), d.number(2, 6), d.number(3, 10)
    return (
        f"At the market {a.name} buys {n} bags of rice at ${cost} each and one bottle of oil for ${other}. "
        f"How many dollars does {a.he} spend altogether?",
        n * cost + other,
    )


@kind(2)
def change_of_several(d: Draw) -> tuple[str, int]:
    a, goods, n, cost, note = d.person(), d.of(*GOODS), d.number(2, 3), d.number(2, 6), int(d.of("20", "50"))
    return (
        f"A {goods} costs ${cost}. {a.name} buys {n} of them and pays with a ${note} note. "
        f"How many dollars of change does {a.he} get?",
        note - n * cost,
    )


@kind(2)
def gain_and_loss(d: Draw) -> tuple[str, int]:
    a, things, x, y = d.person(), d.of(*TOYS), d.number(4, 12), d.number(2, 9)
    z = d.number(2, x + y - 1)
    return (
        f"{a.name} starts the day with {x} {things}. {a.he.capitalize()} finds {y} more and then gives away {z}. "
        f"How many {things} does {a.name} have at the end?",
        x + y - z,
    )


@kind(2)
def boxes_less_sold(d: Draw) -> tuple[str, int]:
    fruit, n, each = d.of(*FRUIT), d.number(2, 6), d.number(3, 10)
    sold = d.number(2, n * each - 1)
    return (
        f"A grocer receives {n} boxes of {each} {fruit} and sells {sold} {fruit} the same day. "
        f"How many {fruit} remain unsold?",
        n * each - sold,
    )


@kind(2)
def share_the_rest(d: Draw) -> tuple[str, int]:
    a, baked, eaten, friends, each = d.person(), d.of(*BAKED), d.number(1, 5), d.number(2, 5), d.number(2, 6)
    verb = d.of("keeps", "burns", "eats")
    return (
        f"{a.name} makes {friends * each + eaten} {baked}. {a.he.capitalize()} {verb} {eaten} and divides the rest "
        f"equally among {friends} neighbours. How many {baked} does each neighbour receive?",
        each,
    )


@kind(2)
def earn_and_spend(d: Draw) -> tuple[str, int]:
    a, wage, hours = d.person(), d.number(5, 12), d.number(2, 5)
    spent = d.number(3, wage * hours - 1)
    job = d.of("washing cars", "walking dogs", "giving lessons", "picking berries")
    return (
        f"{a.name} earns ${wage} an hour by {job}. After {hours} hours of work {a.he} spends ${spent}. "
        f"How many dollars of that pay are left?",
        wage * hours - spent,
    )


@kind(2)
def savings(d: Draw) -> tuple[str, int]:
    a, start, weekly, n = d.person(), d.number(4, 20), d.number(2, 6), d.number(2, 6)
    return (
        f"{a.name} has saved ${start} and puts aside another ${weekly} every week. "
        f"How many dollars will {a.he} have after {n} weeks?",
        start + weekly * n,
    )


@kind(2)
def bus_stop(d: Draw) -> tuple[str, int]:
    vehicle, x, off, on = (
        d.of("bus", "tram", "ferry", "train carriage"),
        d.number(8, 20),
        d.number(2, 7),
        d.number(2, 9),
    )
    return (
        f"There are {x} passengers aboard a {vehicle}. At the next stop {off} get off and {on} get on. "
        f"How many passengers does it carry then?",
        x - off + on,
    )


@kind(2)
def more_and_together(d: Draw) -> tuple[str, int]:
    a, b, things, x, more = d.person(), d.person(), d.of(*TOYS), d.number(2, 10), d.number(2, 8)
    return (
        f"{a.name} has {x} {things}. {b.name} has {more} {things} more than {a.name}. "
        f"How many {things} do the two of them have together?",
        x + x + more,
    )


@kind(2)
def twice_and_together(d: Draw) -> tuple[str, int]:
    a, b, fruit, x = d.person(), d.person(), d.of(*FRUIT), d.number(2, 12)
    return (
        f"{a.name} gathers {x} {fruit} and {b.name} gathers twice as many. How many {fruit} do they gather in total?",
        3 * x,
    )


@kind(2)
def daily_reading(d: Draw) -> tuple[str, int]:
    a, book, daily, days, left = d.person(), d.of(*BOOKS), d.number(4, 12), d.number(2, 5), d.number(5, 40)
    return (
        f"A {book} has {daily * days + left} pages. {a.name} reads {daily} pages a day for {days} days. "
        f"How many pages does {a.he} still have to read?",
        left,
    )


@kind(2)
def there_and_back(d: Draw) -> tuple[str, int]:
    a, km, days, place = d.person(), d.number(2, 8), d.number(2, 5), d.of("school", "work", "the pool", "the library")
    return (
        f"It is {km} kilometres from {a.name}'s home to {place}. {a.he.capitalize()} cycles there and back on each of "
        f"{days} days. How many kilometres does {a.he} ride?",
        2 * km * days,
    )


@kind(2)
def withered(d: Draw) -> tuple[str, int]:
    a, plants, n, each = d.person(), d.of(*PLANTS), d.number(2, 6), d.number(3, 9)
    lost = d.number(2, n * each - 1)
    return (
        f"{a.name} plants {n} rows of {plants} with {each} in every row. In a dry summer {lost} of them wither. "
        f"How many {plants} survive?",
        n * each - lost,
    )


@kind(2)
def teams(d: Draw) -> tuple[str, int]:
    size, n = d.number(2, 5), d.number(3, 6)
    girls = d.number(2, size * n - 2)
    return (
        f"A sports club has {girls} girls and {size * n - girls} boys. They form teams of {size}. "
        f"How many teams are there?",
        n,
    )


@kind(2)
def eggs_missing(d: Draw) -> tuple[str, int]:
    a, cakes, each = d.person(), d.number(2, 6), d.number(2, 5)
    have = d.number(1, cakes * each - 1)
    return (
        f"{a.name} wants to bake {cakes} cakes, and each takes {each} eggs. {a.he.capitalize()} has {have} eggs. "
        f"How many more eggs does {a.he} need?",
        cakes * each - have,
    )


@kind(2)
def filling(d: Draw) -> tuple[str, int]:
    rate, time, start = d.number(2, 8), d.number(2, 8), d.number(4, 20)
    vessel = d.of("tank", "pond", "pool", "barrel")
    return (
        f"A {vessel} that holds {start + rate * time} litres already contains {start} litres. A hose adds {rate} "
        f"litres a minute. After how many minutes is the {vessel} full?",
        time,
    )


@kind(2)
def discount(d: Draw) -> tuple[str, int]:
    a, goods, off, paid, n = d.person(), d.of(*GOODS), d.number(1, 4), d.number(2, 8), d.number(2, 5)
    return (
        f"A {goods} usually costs ${paid + off}, but today each one is ${off} cheaper. "
        f"How many dollars does {a.name} pay for {n} of them?",
        paid * n,
    )


@kind(2)
def slices(d: Draw) -> tuple[str, int]:
    dish, n, each = d.of("pizzas", "cakes", "pies", "melons"), d.number(2, 4), d.number(4, 10)
    eaten = d.number(2, n * each - 1)
    return (
        f"For a picnic {n} {dish} are cut into {each} slices each, and {eaten} slices are eaten. "
        f"How many slices are left?",
        n * each - eaten,
    )


@kind(2)
def fence(d: Draw) -> tuple[str, int]:
    a, length, width, place = d.person(), d.number(4, 15), d.number(2, 10), d.of("garden", "meadow", "yard", "field")
    return (
        f"{a.name}'s rectangular {place} is {length} metres long and {width} metres wide. "
        f"How many metres of fence go all the way around it?",
        2 * (length + width),
    )


@kind(2)
def half_and_more(d: Draw) -> tuple[str, int]:
    a, b, things, x, y = d.person(), d.person(), d.of(*TOYS), d.number(2, 10), d.number(2, 9)
    return (
        f"{a.name} has {2 * x} {things}. {a.he.capitalize()} gives half of them to {b.name} and then buys {y} new "
        f"ones. How many {things} does {a.name} have now?",
        x + y,
    )


@kind(2)
def pocket_coins(d: Draw) -> tuple[str, int]:
    a, n, rest = d.person(), d.number(2, 12), d.number(1, 9)
    coin = int(d.of("5", "10", "20"))
    return (
        f"In {a.his} pocket {a.name} finds {n} coins of {coin} cents and one lone coin worth {rest} cents. "
        f"How many cents does {a.he} find?",
        n * coin + rest,
    )


@kind(2)
def three_days(d: Draw) -> tuple[str, int]:
    a, x, y, z = d.person(), d.number(1, 9), d.number(1, 9), d.number(1, 9)
    what = d.of("laps swims", "letters writes", "drawings makes", "photos takes").split()
    return (
        f"{a.name} {what[1]} {x} {what[0]} on Friday, {y} on Saturday and {z} on Sunday. "
        f"How many {what[0]} is that over the three days?",
        x + y + z,
    )
