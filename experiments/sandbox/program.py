"""Runs a model's program as Python would after `import site`; copied into the sandbox."""

from __future__ import annotations

import builtins
import sys
from _sitebuiltins import Quitter
from types import CodeType, ModuleType

BOX = "/box"


def run(module: ModuleType) -> None:
    """Execute the program behind its setup in the namespace of `module`."""
    builtins.exit, builtins.quit = Quitter("exit", "Ctrl-D"), Quitter("quit", "Ctrl-D")
    sys.path.append(f"{BOX}/site")
    sys.modules[module.__name__] = module
    with open(f"{BOX}/setup.txt", encoding="utf-8") as setup, open(f"{BOX}/program.txt", encoding="utf-8") as program:
        code = compile_behind(setup.read(), program.read())
    exec(code, vars(module))


def compile_behind(setup: str, program: str) -> CodeType:
    """The two as one source; `from __future__` at the head of the program counts as at the head of all."""
    source = f"{setup}\n{program}"
    if "__future__" not in program:
        return compile(source, "program.py", "exec", dont_inherit=True)
    import ast

    def futures(body: list[ast.stmt]) -> slice:
        """Where the imports from the future are: at the head, behind a docstring."""
        begin = end = int(ast.get_docstring(ast.Module(body, [])) is not None)
        while end < len(body) and isinstance(node := body[end], ast.ImportFrom) and node.module == "__future__":
            end += 1
        return slice(begin, end)

    tree = ast.parse(source)
    first_line = setup.count("\n") + 2
    before = [node for node in tree.body if node.lineno < first_line]
    behind = [node for node in tree.body if node.lineno >= first_line]
    head, moved = futures(before).stop, futures(behind)
    tree.body = [*before[:head], *behind[moved], *before[head:], *behind[: moved.start], *behind[moved.stop :]]
    return compile(tree, "program.py", "exec", dont_inherit=True)
