"""The source behind a result: which files decide it, and whether they are still those that made a record.

Three parts: the **engine** (of the run's backend, and what puts its questions and sums up its answers), the **policy**
beside it, and the **grader**. Shipped code is not part of a run's id, so a record outlives a commit; where a part has
changed since, the record is stale. The source of a user's own policy is part of the id: an edit makes another run. So
are the modules that it imports and the files that it, or its options, name in full; a name that it computes as it runs
is not known here.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from experiments.config.schema import Experiment, calibration_file
from experiments.errors import UsageError
from experiments.graders import GRADERS
from experiments.records import CALIBRATION, PROVENANCE, content_hash, damage, file_hash, flatten, is_complete
from experiments.sandbox import HERE
from zipage import find_policy

SHIPPED = ("zipage", "kernels", "experiments")
ENGINES = {
    "zipage": (("zipage.llm",), ("zipage", "kernels")),
    "transformers": (("experiments.backends.transformers",), ("experiments.backends",)),
    "vllm": (("experiments.backends.vllm",), ("experiments.backends",)),
    "vllm_matched": (("experiments.backends.vllm",), ("experiments.backends",)),
}
"""Backend -> its modules, and the packages into which their imports are followed."""

HARNESS = (
    *("experiments.running.prompts", "experiments.running.scenarios", "experiments.running.outcomes"),
    *("experiments.running.turns", "experiments.records.schemas"),
    *("experiments.analysis.metrics", "experiments.analysis.loops"),
)
"""What every run goes through."""

UNKNOWN = "its record is from before records kept hashes of the code"


def hashes(experiment: Experiment) -> dict[str, str]:
    """A hash of each part of the code that decides what a run measures."""
    engine, policies = _engine(experiment.backend), _policies(experiment)
    if experiment.scenario.kind == "simulate":
        engine = engine | _simulator()
    return {
        "engine": content_hash(engine),
        "policy": content_hash({name: digest for name, digest in policies.items() if name not in engine}),
        "grader": content_hash(_grader(experiment.workload.grader)),
    }


def own_policies(experiment: Experiment) -> dict[str, str]:
    """Module -> sha256, of the policies that do not come with Zipage, what they import of that kind, and their data.

    Raises:
        UsageError: there is no such policy.
    """
    return own(_policies(experiment))


def own(files: Mapping[str, str]) -> dict[str, str]:
    """Those of the files, by module, that do not come with Zipage."""
    return {name: digest for name, digest in files.items() if not _inside(name, SHIPPED)}


def own_policy(name: str) -> dict[str, str]:
    """`own_policies` of a policy by its name, which is known."""
    return own(_policy(name, find_policy(name)))


def changes(recorded: Mapping[str, str] | None, now: Mapping[str, str]) -> str | None:
    """What has changed since a record was made, in words; None where nothing has.

    Args:
        recorded: `hashes` as the record has them; None where it has none.
        now: those of the code here.
    """
    if recorded is None:
        return UNKNOWN
    parts = [part for part in now if recorded.get(part) != now[part]]
    return f"the {' and the '.join(parts)} {'have' if len(parts) > 1 else 'has'} changed since" if parts else None


@dataclass(frozen=True)
class Standing:
    """What there is of a run.

    Attributes:
        state: "missing", "damaged", "stale" (made by other code) or "done".
        reason: why, where it is damaged or stale.
    """

    state: str
    reason: str | None = None

    def is_kept(self, force: str) -> bool:
        """Whether the record stands under this `force`, so that there is nothing to do."""
        return self.state in {"false": ("done", "stale"), "stale": ("done",), "true": ()}[force]


def standing(folder: Path, now: Mapping[str, str]) -> Standing:
    """How the record in `folder` stands to `hashes` of the code here."""
    if not is_complete(folder):
        return Standing("missing")
    if reason := damage(folder):
        return Standing("damaged", reason)
    reason = changes(json.loads((folder / PROVENANCE).read_text(encoding="utf-8")).get("sources"), now)
    return Standing("stale", reason) if reason else Standing("done")


def of_benchmarks(kind: str) -> dict[str, str]:
    """`hashes` of the code that decides what a benchmark of this kind measures."""
    if kind == "serve_bench":
        server = _files(("zipage.serve.server",), ("zipage",))
        modules = ("experiments.bench.serve", "experiments.serving.drive", "experiments.serving.guard")
        packages = ("experiments.bench", "experiments.serving", "experiments.backends")
        return {"engine": content_hash(_engine("zipage") | server), "client": content_hash(_files(modules, packages))}
    modules = ("kernels.bench", "experiments.bench.engine", "experiments.bench.kernels")
    return {"engine": content_hash(_engine("zipage") | _files(modules, ("kernels", "experiments.bench")))}


@lru_cache
def _engine(backend: str) -> dict[str, str]:
    modules, packages = ENGINES.get(backend, ENGINES["zipage"])
    return _files(modules, packages) | {name: file_hash(_source(name)) for name in HARNESS}


@lru_cache
def _simulator() -> dict[str, str]:
    return _files(("zipage.simulation.llm", "experiments.simulation.backend"), ("zipage", "experiments.simulation"))


@lru_cache
def _grader(name: str) -> dict[str, str]:
    files = _files((GRADERS[name].__module__,), ("experiments.graders",))
    if name == "code":  # its parts are programs that nothing imports
        files |= {f"sandbox/{file.name}": file_hash(file) for file in sorted(HERE.glob("*.py"))}
    return files


def _policies(experiment: Experiment) -> dict[str, str]:
    found: dict[str, str] = {}
    named = {"policy.name": experiment.policy.name, "sampling.policy": experiment.sampling.policy}
    if isinstance(base := experiment.policy.options.get("base"), str):  # of `critical`
        named["policy.options.base"] = base
    for option, name in named.items():
        try:
            found |= {} if name is None else _policy(name, find_policy(name))
        except ValueError as error:
            raise UsageError(f"{option}={name}: {error}") from error
    if own(found):
        texts = (value for value in flatten(experiment.policy.options).values() if isinstance(value, str))
        found |= {f"policy.options/{text}": file_hash(path) for text in texts for path in _named(text, Path.cwd())}
    return found


def calibration(experiment: Experiment) -> str | None:
    """sha256 of the calibration file that the policy reads; None where it reads none.

    Raises:
        UsageError: there is no such file.
    """
    file = calibration_file(experiment)
    if file is None:
        return None
    if not file.is_file():
        raise UsageError(
            f"{CALIBRATION}={file}: there is no such file; experiments.calibrate makes it, or experiments.train_scorer"
        )
    return file_hash(file)


@lru_cache
def _policy(name: str, policy: type) -> dict[str, str]:
    """Of the place where it is named, of its class and of all that these derive from.

    Raises:
        ValueError: it is in no file, such as one of a notebook.
    """
    modules = {name.partition(":")[0]} if ":" in name else set()
    modules |= {base.__module__ for base in policy.__mro__}
    found = _files(tuple(modules), ("zipage", "kernels", *{module.partition(".")[0] for module in modules}))
    if policy.__module__ not in found:
        raise ValueError(
            f"the source of {policy.__qualname__} is in no file, so an edit would go unnoticed: put it into a module"
        )
    return found


def _files(modules: Iterable[str], packages: tuple[str, ...]) -> dict[str, str]:
    """Module -> sha256 of its file, of these modules and what they import, directly or not.

    Imports are followed into `packages`, and into whatever is neither shipped nor installed: code of the user's own.
    Of that, the packages around a module count too, and the data files that it names.
    """
    found: dict[str, str] = {}
    waiting = [*modules]
    while waiting:
        name = waiting.pop()
        if name in found or not (_inside(name, packages) or _is_own(name.partition(".")[0])):
            continue
        file = _source(name)
        if file is not None:
            found[name] = file_hash(file)
            waiting += _imports(name, file, found[name])
        if not _inside(name, SHIPPED):
            waiting += [name.rpartition(".")[0]] if "." in name else []
            found |= {} if file is None else {f"{name}/{text}": file_hash(path) for text, path in _data(file)}
    return found


def _inside(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _source(name: str) -> Path | None:
    """The file of a module; None where there is none of that name, or it is not Python source."""
    module, parent = sys.modules.get(name), name.rpartition(".")[0]
    if module is None and parent and (above := _source(parent)) is not None and above.name != "__init__.py":
        return None  # what a module defines; asking Python would run the module, and import torch and transformers
    try:
        spec = getattr(module, "__spec__", None) or importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):  # a script has no spec
        spec = None
    origin = getattr(module, "__file__", None) if spec is None else spec.origin
    file = Path(origin) if origin else None
    return file if file is not None and file.suffix == ".py" and file.is_file() else None


@lru_cache
def _is_own(package: str) -> bool:
    """Whether a package is neither shipped nor installed nor Python's."""
    if package in SHIPPED:
        return False
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    origins = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    places += [*site.getsitepackages(), site.getusersitepackages()]
    files = [Path(origin) for origin in origins if origin is not None and Path(origin).is_absolute()]
    if not files or any(file.is_relative_to(place) for file in files for place in places):
        return False
    places = [Path(place).parent for place in (spec.submodule_search_locations or files)]
    return not any(package in _installed_in(place) for place in places)


@lru_cache
def _installed_in(folder: Path) -> set[str]:
    """Packages and modules that an installer has put into a folder, such as pip with `--target`."""
    records = (record.read_text("utf-8", errors="replace") for record in folder.glob("*.dist-info/RECORD"))
    paths = (Path(line.partition(",")[0]) for record in records for line in record.splitlines())
    return {path.parts[0].removesuffix(".py") for path in paths if path.parts}


@cache
def _imports(name: str, file: Path, digest: str) -> list[str]:
    """What a module imports anywhere in its text; for `from a import b` both a and a.b, which may be a module.

    The digest is that of the text, which is parsed once: many modules are behind several of the policies.
    """
    return [*_imported(name, file)]


def _imported(name: str, file: Path) -> Iterator[str]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in _nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    with contextlib.suppress(ImportError):  # above the topmost package
                        yield importlib.util.resolve_name(argument.value, package)


def _called(call: ast.Call) -> str:
    """The last part of the name of what is called."""
    return getattr(call.func, "attr", None) or getattr(call.func, "id", "")


def _nodes(file: Path) -> Iterator[ast.AST]:
    """All of a module's text; nothing of one that can't be read as Python, which nothing has imported then."""
    with contextlib.suppress(SyntaxError):
        yield from ast.walk(ast.parse(file.read_bytes()))


def _data(file: Path) -> Iterator[tuple[str, Path]]:
    """The files that texts in a module name, beside it or from the current folder."""
    for node in _nodes(file):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((node.value, path) for path in _named(node.value, file.parent, Path.cwd()))


def _named(text: str, *folders: Path) -> list[Path]:
    """The file that a text names in the first of the folders that has it, if any does."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # too long for a name; not one; ~ of an unknown user
        return [path for folder in folders if (path := folder / Path(text).expanduser()).is_file()][:1]
    return []
