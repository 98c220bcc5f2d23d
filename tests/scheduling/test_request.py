"""Who writes which field of a request: what its docstring says, and what the code does."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import zipage
from zipage.scheduling.request import Request

ROOM = Path(zipage.__file__).parent
NAMES = {"request", "sample", "sibling", "donor", "other", "victim", "oldest", "r"}
"""Variables that hold requests."""
CHANGES = {"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort", "popleft"}


def documented() -> dict[str, set[str]]:
    """Class that writes -> fields."""
    writers = defaultdict(set)
    for line in Request.__doc__.splitlines():
        if head := re.fullmatch(r"    By `(\w+)`.*:", line):
            writer = head[1]
        elif entry := re.match(r"        ((?:\w+, )*\w+): ", line):
            writers[writer] |= set(entry[1].split(", "))
    return dict(writers)


def written(node: ast.AST) -> list[ast.expr]:
    """What a statement or call changes."""
    if isinstance(node, ast.Assign | ast.Delete):
        return node.targets
    if isinstance(node, ast.AugAssign | ast.AnnAssign):
        return [node.target]
    is_change = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES
    return [node.func.value] if is_change else []


def fields_of_requests(target: ast.expr, names: set[str]) -> list[str]:
    """Fields of requests that a target is, or is a part of."""
    if isinstance(target, ast.Tuple):
        return [field for element in target.elts for field in fields_of_requests(element, names)]
    while isinstance(target, ast.Subscript):
        target = target.value
    is_field = isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in names
    return [target.attr] if is_field and target.attr in Request.__slots__ else []


def found() -> dict[str, set[str]]:
    """Class that writes -> fields, constructors apart."""
    writers = defaultdict(set)
    for path in ROOM.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        aliases = {
            node.targets[0].id: node.value.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Attribute)
            and isinstance(node.value.value, ast.Name)
            and node.value.value.id in NAMES
        }
        for part in tree.body:
            names = NAMES | {"self"} if getattr(part, "name", "") == "Request" else NAMES
            bodies = part.body if isinstance(part, ast.ClassDef) else [part]
            for body in bodies:
                if getattr(body, "name", "") == "__init__":
                    continue
                for node in ast.walk(body):
                    for target in written(node):
                        if isinstance(target, ast.Name) and isinstance(node, ast.Call) and target.id in aliases:
                            writers[getattr(part, "name", path.stem)].add(aliases[target.id])
                        writers[getattr(part, "name", path.stem)] |= set(fields_of_requests(target, names))
    return {writer: fields for writer, fields in writers.items() if fields}


def test_every_field_of_a_request_has_one_writer_the_documented_one():
    said = documented()
    fields = [field for of_writer in said.values() for field in of_writer]
    assert sorted(fields) == sorted(Request.__slots__), "each field is documented once"
    for writer, of_writer in found().items():
        assert of_writer <= said.get(writer, set()), f"{writer} writes {sorted(of_writer - said.get(writer, set()))}"
    for writer in ("Scheduler", "CompressionScheduler", "QuerySlots", "PrefixLookup", "EngineCore", "Request"):
        missing = said[writer] - found()[writer]
        assert not missing, f"{writer} does not write {sorted(missing)}"
