"""The borders of docs/architecture.md: who may import what."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "zipage", "experiments")
FORBIDDEN = {
    "kernels": {"zipage", "experiments", "transformers", "datasets", "hydra", "omegaconf", "wandb", "pandas"},
    "zipage": {"experiments", "hydra", "omegaconf", "wandb", "pandas", "datasets", "matplotlib", "pyarrow"},
    "experiments": {"kernels"},
}
KERNELS_MAY = {"torch", "triton", "numpy", "kernels"}
ROOMS = {
    "zipage.scheduling": {"torch", "zipage.engine", "zipage.worker", "zipage.models", "zipage.llm"},
    "zipage.eviction": {"zipage.engine", "zipage.worker", "zipage.scheduling", "zipage.models", "zipage.llm"},
    "zipage.models": {
        "zipage.engine",
        "zipage.worker",
        "zipage.scheduling",
        "zipage.eviction",
        "zipage.llm",
        "zipage.parallel",
    },
    "zipage.worker": {"zipage.engine", "zipage.llm", "zipage.parallel"},
    "zipage.parallel": {"zipage.engine", "zipage.llm"},
    "zipage.engine": {"zipage.llm"},
}
"""Rooms of `zipage`, and what none of their modules may import."""
MOST_LINES = 450


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


ALL = [path for package in PACKAGES for path in modules(package)]


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Every node of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def method_calls(path: Path) -> Iterator[tuple[ast.Call, str, dict[str | None, ast.expr]]]:
    """(call, method, keyword arguments) of every `something.method(...)` in a file."""
    for node in nodes(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node, node.func.attr, {keyword.arg: keyword.value for keyword in node.keywords}


@cache
def imports(path: Path) -> list[tuple[str, list[str]]]:
    """(module, names) of every import in a file."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module, [alias.name for alias in node.names]))
    return found


def dotted(path: Path) -> str:
    """The name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def inside(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def import_graph() -> dict[str, set[str]]:
    """Module -> those of ours that it imports, wherever in its text, packages on the way to them included.

    A package on the way to the module itself is there already, so it is none of them unless it is named.
    """
    files = {dotted(path): path for package in PACKAGES for path in modules(package)}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = set()
        for module, names in imports(path):
            inner = [f"{module}.{imported}" for imported in names]
            named = {module} if not inner or not set(inner) <= set(files) else set()
            for target in named | (set(inner) & set(files)):
                parts = target.split(".")
                way = {".".join(parts[:end]) for end in range(1, len(parts))}
                found |= {target} | {package for package in way if not inside(name, [package])}
        graph[name] = (found & set(files)) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules of which each reaches every other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[start] = seen
    found = [{other for other in reached[name] if name in reached[other]} for name in graph]
    return [circle for index, circle in enumerate(found) if circle and circle not in found[:index]]


def test_no_circle_of_imports():
    """Imports inside of functions and under `TYPE_CHECKING` count: a circle is two modules that are one."""
    graph = import_graph()
    assert len(graph) > 150
    assert [sorted(circle) for circle in circles(graph)] == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


def test_a_file_reads_in_one_sitting():
    assert len(ALL) > 150
    files = [*ALL, *modules("tests")]
    counts = {dotted(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: count for name, count in counts.items() if count > MOST_LINES} == {}, f"at most {MOST_LINES} lines"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_keep_to_themselves(room):
    for path in modules(room.replace(".", "/")):
        for module, names in imports(path):
            for target in (module, *(f"{module}.{name}" for name in names)):
                assert not inside(target, ROOMS[room]), f"{path} imports {target}"


def test_nothing_imports_the_server():
    """And its packages, which are an extra, are imported there alone."""
    extra = {"fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic", "pydantic_core"}
    inner = modules("zipage/serve")
    assert {"fastapi", "uvicorn"} <= {module.split(".")[0] for path in inner for module, _ in imports(path)}
    for path in set(ALL) - set(inner):
        for module, _ in imports(path):
            assert not inside(module, ["zipage.serve"]), f"{path} imports {module}"
            assert module.split(".")[0] not in extra, f"{path} imports {module}"


def outside(path: Path) -> Iterator[str]:
    """The imports of a file that its package may not have."""
    package = path.relative_to(ROOT).parts[0]
    for module, names in imports(path):
        top = module.split(".")[0]
        foreign = package == "kernels" and top not in KERNELS_MAY | sys.stdlib_module_names
        if foreign or top in FORBIDDEN[package]:
            yield f"{path} imports {module}"
        elif package == "experiments" and top == "zipage":
            import zipage

            if module != "zipage" or not set(names) <= set(zipage.__all__):
                yield f"{path} imports {names} from {module}: use zipage's public names"


def test_imports_stay_inside_the_borders():
    wrong = [line for path in ALL for line in outside(path)]
    assert not wrong, "\n".join(wrong)


def test_hydra_ends_where_the_config_is_composed():
    config, plain = ROOT / "experiments" / "config", {"schema.py", "known.py", "check.py", "arms.py", "options.py"}
    for path in modules("experiments"):
        tops = {module.split(".")[0] for module, _ in imports(path)}
        if tops & {"hydra", "omegaconf"}:
            may = path == ROOT / "experiments" / "run.py" or (path.parent == config and path.name not in plain)
            assert may, f"{path} handles Hydra's objects"


def test_nothing_is_uploaded_in_a_way_that_waits_for_the_device():
    wrong = [
        f"{path}:{call.lineno}: torch.{method}(..., device=...) waits: use to_device"
        for path in modules("zipage")
        if "models" not in path.parts
        for call, method, given in method_calls(path)
        if method in ("tensor", "as_tensor") and "device" in given
    ]
    assert not wrong, "\n".join(wrong)


def test_code_of_a_model_is_never_run():
    loads = [
        (f"{path}:{call.lineno}: say trust_remote_code=False", given.get("trust_remote_code"))
        for path in (*modules("zipage"), *modules("experiments"))
        for call, method, given in method_calls(path)
        if method in ("from_pretrained", "from_config")
    ]
    assert loads
    wrong = [line for line, value in loads if not (isinstance(value, ast.Constant) and value.value is False)]
    assert not wrong, "\n".join(wrong)


def test_scheduling_runs_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; "
        "import zipage.scheduling.scheduler, zipage.config, zipage.sampling_params"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_worker_knows_plans_alone_of_scheduling():
    """And a plan knows of no live request, so that it can be sent to a worker in another process."""
    for path in modules("zipage/worker"):
        for module, names in imports(path):
            for target in {module, *(f"{module}.{name}" for name in names)} - {"zipage.scheduling"}:
                if inside(target, ["zipage.scheduling"]):
                    assert inside(target, ["zipage.scheduling.plan"]), f"{path} imports {target}"
    assert not [m for m, _ in imports(ROOT / "zipage/scheduling/plan.py") if inside(m, ["zipage.scheduling"])]
