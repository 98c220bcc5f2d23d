"""Problems of one step."""

from __future__ import annotations

from experiments.workloads.word_problems.draw import BAKED, BOOKS, FRUIT, GOODS, TOYS, Draw


def gain(d: Draw) -> tuple[str, int]:
    a, b, things, x, y = d.person(), d.person(), d.of(*TOYS), d.number(3, 12), d.number(2, 9)
    ending = d.of("does {} have now", "are there in {}'s collection now").format(a.name)
    return f"{a.name} has {x} {things}. {b.name} gives {a.name} {y} more. How many {things} {ending}?", x + y


def loss(d: Draw) -> tuple[str, int]:
    a, things, y, left = d.person(), d.of(*TOYS), d.number(2, 9), d.number(3, 12)
    what = d.of("loses", "gives away", "sells")
    return f"{a.name} has {left + y} {things} and {what} {y} of them. How many {things} are left?", left


def together(d: Draw) -> tuple[str, int]:
    a, b, fruit, x, y = d.person(), d.person(), d.of(*FRUIT), d.number(3, 15), d.number(3, 12)
    return (
        f"In the orchard, {a.name} picks {x} {fruit} and {b.name} picks {y} {fruit}. "
        f"How many {fruit} do they pick together?",
        x + y,
    )


def more_than(d: Draw) -> tuple[str, int]:
    a, b, y, more = d.person(), d.person(), d.number(3, 15), d.number(2, 9)
    what = d.of("pages", "chapters")
    return (
        f"This week {a.name} read {y + more} {what} and {b.name} read {y} {what}. "
        f"How many more {what} did {a.name} read than {b.name}?",
        more,
    )


def equal_groups(d: Draw) -> tuple[str, int]:
    fruit, boxes, each = d.of(*FRUIT), d.number(2, 9), d.number(2, 10)
    holder = d.of("boxes", "baskets", "crates")
    return f"A shop has {boxes} {holder} with {each} {fruit} in each. How many {fruit} are there in all?", boxes * each


def share(d: Draw) -> tuple[str, int]:
    a, baked, friends, each = d.person(), d.of(*BAKED), d.number(2, 9), d.number(2, 9)
    return (
        f"{a.name} bakes {friends * each} {baked} and shares them equally among {friends} friends. "
        f"How many {baked} does each friend get?",
        each,
    )


def price(d: Draw) -> tuple[str, int]:
    goods, cost, n = d.of(*GOODS), d.number(2, 10), d.number(2, 6)
    return f"One {goods} costs ${cost}. How many dollars do {n} of them cost?", cost * n


def change(d: Draw) -> tuple[str, int]:
    a, goods, note = d.person(), d.of(*GOODS), int(d.of("10", "20"))
    cost = d.number(3, note - 2)
    return (
        f"{a.name} buys a {goods} for ${cost} and pays with a ${note} note. How many dollars does {a.he} get back?",
        note - cost,
    )


def distance(d: Draw) -> tuple[str, int]:
    a, hours = d.person(), d.number(2, 5)
    verb, speed = ("walks", d.number(3, 6)) if d.number(0, 1) else ("cycles", d.number(10, 20))
    return f"{a.name} {verb} {speed} kilometres every hour. How far does {a.he} get in {hours} hours?", speed * hours


def age_later(d: Draw) -> tuple[str, int]:
    a, age, years = d.person(), d.number(5, 30), d.number(2, 10)
    return f"{a.name} is {age} years old today. How old will {a.he} be in {years} years?", age + years


def younger(d: Draw) -> tuple[str, int]:
    a, b, age, years = d.person(), d.person(), d.number(4, 20), d.number(2, 9)
    return f"{a.name} is {age + years} years old. {b.name} is {years} years younger. How old is {b.name}?", age


def rows(d: Draw) -> tuple[str, int]:
    place, n, seats = d.of("cinema", "lecture hall", "theatre", "bus"), d.number(3, 10), d.number(4, 12)
    return f"A {place} has {n} rows of {seats} seats each. How many seats does it have?", n * seats


def twice(d: Draw) -> tuple[str, int]:
    a, b, things, x = d.person(), d.person(), d.of(*TOYS), d.number(2, 20)
    return f"{a.name} owns {x} {things}. {b.name} owns twice as many. How many {things} does {b.name} own?", 2 * x


def half(d: Draw) -> tuple[str, int]:
    a, x, drink = d.person(), d.number(1, 20), d.of("water", "juice", "milk", "tea")
    return (
        f"A barrel holds {2 * x} litres of {drink}. {a.name} pours out half of it. "
        f"How many litres of {drink} stay in the barrel?",
        x,
    )


def weeks(d: Draw) -> tuple[str, int]:
    a, n = d.person(), d.number(2, 12)
    place = d.of("on an island", "in the mountains", "at the coast", "in a big city")
    return f"{a.name} stays {n} weeks {place}. How many days is that?", 7 * n


def legs(d: Draw) -> tuple[str, int]:
    animal, number = d.of("spiders 8", "beetles 6", "horses 4", "goats 4", "ants 6", "hens 2").split()
    a, n = d.person(), d.number(3, 12)
    return f"{a.name} draws {n} {animal}, each with {number} legs. How many legs is that in total?", n * int(number)


def warmer(d: Draw) -> tuple[str, int]:
    town, x, y = d.of("Bergen", "Porto", "Quito", "Oslo", "Kyoto", "Tunis"), d.number(2, 15), d.number(2, 9)
    return (
        f"In {town} it is {x} degrees in the morning. By noon it is {y} degrees warmer. "
        f"How many degrees is it at noon?",
        x + y,
    )


def packs(d: Draw) -> tuple[str, int]:
    a, n, size = d.person(), d.number(2, 9), d.number(3, 10)
    what = d.of("paper plates", "cups", "napkins", "candles", "balloons")
    return (
        f"For {a.his} party {a.name} needs {n * size} {what}. They are sold in packs of {size}. "
        f"How many packs does {a.he} need?",
        n,
    )


def left_over(d: Draw) -> tuple[str, int]:
    baked, size, full = d.of(*BAKED), d.number(4, 9), d.number(2, 9)
    rest = d.number(1, size - 1)
    return (
        f"A baker has {size * full + rest} {baked} and puts them into boxes of {size} until no more box can be filled. "
        f"How many {baked} are left over?",
        rest,
    )


def pages_left(d: Draw) -> tuple[str, int]:
    a, book, read, left = d.person(), d.of(*BOOKS), d.number(5, 60), d.number(5, 40)
    return f"{a.name} has read {read} of the {read + left} pages of a {book}. How many pages are left to read?", left


def minutes(d: Draw) -> tuple[str, int]:
    a, hours = d.person(), d.number(2, 6)
    what = d.of("paints", "practises the violin", "works in the garden", "plays chess", "studies")
    return f"{a.name} {what} for {hours} hours. How many minutes is that?", 60 * hours


KINDS = (
    gain,
    loss,
    together,
    more_than,
    equal_groups,
    share,
    price,
    change,
    distance,
    age_later,
    younger,
    rows,
    twice,
    half,
    weeks,
    legs,
    warmer,
    packs,
    left_over,
    pages_left,
    minutes,
)
"""In an order that decides which problems a seed draws."""
