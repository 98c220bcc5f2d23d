"""The borders of docs/architecture.md: who may import what."""

import ast
import subprocess
import sys
from collections.abc import Iterable
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
    "zipage.models": {"zipage.engine", "zipage.worker", "zipage.scheduling", "zipage.eviction", "zipage.llm"},
    "zipage.worker": {"zipage.engine", "zipage.llm"},
    "zipage.engine": {"zipage.llm"},
}
"""Rooms of `zipage`, and what none of their modules may import."""
MOST_LINES = 450


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, list[str]]]:
    """(module, names) of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


@pytest.mark.parametrize("path", [p for package in PACKAGES for p in modules(package)], ids=dotted)
def test_a_file_reads_in_one_sitting(path):
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert count <= MOST_LINES, f"{path} has {count} lines; at most {MOST_LINES}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_keep_to_themselves(room):
    for path in modules(room.replace(".", "/")):
        for module, names in imports(path):
            for target in (module, *(f"{module}.{name}" for name in names)):
                assert not inside(target, ROOMS[room]), f"{path} imports {target}"


@pytest.mark.parametrize("path", [p for package in PACKAGES for p in modules(package)], ids=lambda p: p.stem)
def test_imports_stay_inside_the_borders(path):
    package = path.relative_to(ROOT).parts[0]
    for module, names in imports(path):
        top = module.split(".")[0]
        assert top not in FORBIDDEN[package], f"{path} imports {module}"
        if package == "kernels":
            assert top in KERNELS_MAY or top in sys.stdlib_module_names, f"{path} imports {module}"
        if package == "experiments" and top == "zipage":
            import zipage

            assert module == "zipage", f"{path} imports {module}: use zipage's public names"
            assert set(names) <= set(zipage.__all__), f"{path} imports {names}"


def test_hydra_ends_where_the_config_is_composed():
    config, plain = ROOT / "experiments" / "config", {"schema.py", "known.py", "check.py", "arms.py", "options.py"}
    for path in modules("experiments"):
        tops = {module.split(".")[0] for module, _ in imports(path)}
        if tops & {"hydra", "omegaconf"}:
            may = path == ROOT / "experiments" / "run.py" or (path.parent == config and path.name not in plain)
            assert may, f"{path} handles Hydra's objects"


@pytest.mark.parametrize("path", [p for p in modules("zipage") if "models" not in p.parts], ids=lambda p: p.stem)
def test_nothing_is_uploaded_in_a_way_that_waits_for_the_device(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            on_device = any(keyword.arg == "device" for keyword in node.keywords)
            where = f"{path}:{node.lineno}: torch.{node.func.attr}(..., device=...) waits: use to_device"
            assert not (node.func.attr in ("tensor", "as_tensor") and on_device), where


@pytest.mark.parametrize("path", [*modules("zipage"), *modules("experiments")], ids=lambda p: p.stem)
def test_code_of_a_model_is_never_run(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            if node.func.attr in ("from_pretrained", "from_config"):
                value = named.get("trust_remote_code")
                assert isinstance(value, ast.Constant), f"{path}:{node.lineno}: say trust_remote_code=False"
                assert value.value is False


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
