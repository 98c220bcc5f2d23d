"""Problems of two steps."""

from __future__ import annotations

from experiments.workloads.word_problems.draw import BAKED, BOOKS, FRUIT, GOODS, PLANTS, TOYS, Draw


def two_purchases(d: Draw) -> tuple[str, int]:
    a, n, cost, other = d.person(), d.number(2, 5), d.number(2, 6), d.number(3, 10)
    return (
        f"At the market {a.name} buys {n} bags of rice at ${cost} each and one bottle of oil for ${other}. "
        f"How many dollars does {a.he} spend altogether?",
        n * cost + other,
    )


def change_of_several(d: Draw) -> tuple[str, int]:
    a, goods, n, cost, note = d.person(), d.of(*GOODS), d.number(2, 3), d.number(2, 6), int(d.of("20", "50"))
    return (
        f"A {goods} costs ${cost}. {a.name} buys {n} of them and pays with a ${note} note. "
        f"How many dollars of change does {a.he} get?",
        note - n * cost,
    )


def gain_and_loss(d: Draw) -> tuple[str, int]:
    a, things, x, y = d.person(), d.of(*TOYS), d.number(4, 12), d.number(2, 9)
    z = d.number(2, x + y - 1)
    return (
        f"{a.name} starts the day with {x} {things}. {a.he.capitalize()} finds {y} more and then gives away {z}. "
        f"How many {things} does {a.name} have at the end?",
        x + y - z,
    )


def boxes_less_sold(d: Draw) -> tuple[str, int]:
    fruit, n, each = d.of(*FRUIT), d.number(2, 6), d.number(3, 10)
    sold = d.number(2, n * each - 1)
    return (
        f"A grocer receives {n} boxes of {each} {fruit} and sells {sold} {fruit} the same day. "
        f"How many {fruit} remain unsold?",
        n * each - sold,
    )


def share_the_rest(d: Draw) -> tuple[str, int]:
    a, baked, eaten, friends, each = d.person(), d.of(*BAKED), d.number(1, 5), d.number(2, 5), d.number(2, 6)
    verb = d.of("keeps", "burns", "eats")
    return (
        f"{a.name} makes {friends * each + eaten} {baked}. {a.he.capitalize()} {verb} {eaten} and divides the rest "
        f"equally among {friends} neighbours. How many {baked} does each neighbour receive?",
        each,
    )


def earn_and_spend(d: Draw) -> tuple[str, int]:
    a, wage, hours = d.person(), d.number(5, 12), d.number(2, 5)
    spent = d.number(3, wage * hours - 1)
    job = d.of("washing cars", "walking dogs", "giving lessons", "picking berries")
    return (
        f"{a.name} earns ${wage} an hour by {job}. After {hours} hours of work {a.he} spends ${spent}. "
        f"How many dollars of that pay are left?",
        wage * hours - spent,
    )


def savings(d: Draw) -> tuple[str, int]:
    a, start, weekly, n = d.person(), d.number(4, 20), d.number(2, 6), d.number(2, 6)
    return (
        f"{a.name} has saved ${start} and puts aside another ${weekly} every week. "
        f"How many dollars will {a.he} have after {n} weeks?",
        start + weekly * n,
    )


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


def more_and_together(d: Draw) -> tuple[str, int]:
    a, b, things, x, more = d.person(), d.person(), d.of(*TOYS), d.number(2, 10), d.number(2, 8)
    return (
        f"{a.name} has {x} {things}. {b.name} has {more} {things} more than {a.name}. "
        f"How many {things} do the two of them have together?",
        x + x + more,
    )


def twice_and_together(d: Draw) -> tuple[str, int]:
    a, b, fruit, x = d.person(), d.person(), d.of(*FRUIT), d.number(2, 12)
    return (
        f"{a.name} gathers {x} {fruit} and {b.name} gathers twice as many. How many {fruit} do they gather in total?",
        3 * x,
    )


def daily_reading(d: Draw) -> tuple[str, int]:
    a, book, daily, days, left = d.person(), d.of(*BOOKS), d.number(4, 12), d.number(2, 5), d.number(5, 40)
    return (
        f"A {book} has {daily * days + left} pages. {a.name} reads {daily} pages a day for {days} days. "
        f"How many pages does {a.he} still have to read?",
        left,
    )


def there_and_back(d: Draw) -> tuple[str, int]:
    a, km, days, place = d.person(), d.number(2, 8), d.number(2, 5), d.of("school", "work", "the pool", "the library")
    return (
        f"It is {km} kilometres from {a.name}'s home to {place}. {a.he.capitalize()} cycles there and back on each of "
        f"{days} days. How many kilometres does {a.he} ride?",
        2 * km * days,
    )


def withered(d: Draw) -> tuple[str, int]:
    a, plants, n, each = d.person(), d.of(*PLANTS), d.number(2, 6), d.number(3, 9)
    lost = d.number(2, n * each - 1)
    return (
        f"{a.name} plants {n} rows of {plants} with {each} in every row. In a dry summer {lost} of them wither. "
        f"How many {plants} survive?",
        n * each - lost,
    )


def teams(d: Draw) -> tuple[str, int]:
    size, n = d.number(2, 5), d.number(3, 6)
    girls = d.number(2, size * n - 2)
    return (
        f"A sports club has {girls} girls and {size * n - girls} boys. They form teams of {size}. "
        f"How many teams are there?",
        n,
    )


def eggs_missing(d: Draw) -> tuple[str, int]:
    a, cakes, each = d.person(), d.number(2, 6), d.number(2, 5)
    have = d.number(1, cakes * each - 1)
    return (
        f"{a.name} wants to bake {cakes} cakes, and each takes {each} eggs. {a.he.capitalize()} has {have} eggs. "
        f"How many more eggs does {a.he} need?",
        cakes * each - have,
    )


def filling(d: Draw) -> tuple[str, int]:
    rate, time, start = d.number(2, 8), d.number(2, 8), d.number(4, 20)
    vessel = d.of("tank", "pond", "pool", "barrel")
    return (
        f"A {vessel} that holds {start + rate * time} litres already contains {start} litres. A hose adds {rate} "
        f"litres a minute. After how many minutes is the {vessel} full?",
        time,
    )


def discount(d: Draw) -> tuple[str, int]:
    a, goods, off, paid, n = d.person(), d.of(*GOODS), d.number(1, 4), d.number(2, 8), d.number(2, 5)
    return (
        f"A {goods} usually costs ${paid + off}, but today each one is ${off} cheaper. "
        f"How many dollars does {a.name} pay for {n} of them?",
        paid * n,
    )


def slices(d: Draw) -> tuple[str, int]:
    dish, n, each = d.of("pizzas", "cakes", "pies", "melons"), d.number(2, 4), d.number(4, 10)
    eaten = d.number(2, n * each - 1)
    return (
        f"For a picnic {n} {dish} are cut into {each} slices each, and {eaten} slices are eaten. "
        f"How many slices are left?",
        n * each - eaten,
    )


def fence(d: Draw) -> tuple[str, int]:
    a, length, width, place = d.person(), d.number(4, 15), d.number(2, 10), d.of("garden", "meadow", "yard", "field")
    return (
        f"{a.name}'s rectangular {place} is {length} metres long and {width} metres wide. "
        f"How many metres of fence go all the way around it?",
        2 * (length + width),
    )


def half_and_more(d: Draw) -> tuple[str, int]:
    a, b, things, x, y = d.person(), d.person(), d.of(*TOYS), d.number(2, 10), d.number(2, 9)
    return (
        f"{a.name} has {2 * x} {things}. {a.he.capitalize()} gives half of them to {b.name} and then buys {y} new "
        f"ones. How many {things} does {a.name} have now?",
        x + y,
    )


def pocket_coins(d: Draw) -> tuple[str, int]:
    a, n, rest = d.person(), d.number(2, 12), d.number(1, 9)
    coin = int(d.of("5", "10", "20"))
    return (
        f"In {a.his} pocket {a.name} finds {n} coins of {coin} cents and one lone coin worth {rest} cents. "
        f"How many cents does {a.he} find?",
        n * coin + rest,
    )


def three_days(d: Draw) -> tuple[str, int]:
    a, x, y, z = d.person(), d.number(1, 9), d.number(1, 9), d.number(1, 9)
    what = d.of("laps swims", "letters writes", "drawings makes", "photos takes").split()
    return (
        f"{a.name} {what[1]} {x} {what[0]} on Friday, {y} on Saturday and {z} on Sunday. "
        f"How many {what[0]} is that over the three days?",
        x + y + z,
    )


KINDS = (
    two_purchases,
    change_of_several,
    gain_and_loss,
    boxes_less_sold,
    share_the_rest,
    earn_and_spend,
    savings,
    bus_stop,
    more_and_together,
    twice_and_together,
    daily_reading,
    there_and_back,
    withered,
    teams,
    eggs_missing,
    filling,
    discount,
    slices,
    fence,
    half_and_more,
    pocket_coins,
    three_days,
)
"""In an order that decides which problems a seed draws."""
