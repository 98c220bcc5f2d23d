"""Messages and documents name what exists: options, files, functions."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from experiments.config.compose import load_experiment
from experiments.config.known import BESIDE
from experiments.config.schema import HOMES, LauncherConfig, ModelConfig, to_dict
from experiments.workloads import GENERATORS
from zipage import EngineConfig, SamplingParams
from zipage.eviction import registry

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "results" / "README.md",
]

FOLDERS = ("conf", "docs", "examples", "experiments", "kernels", "models", "notebooks", "results", "tests", "zipage")

NO_OPTIONS = {
    "OPTION",  # the form of an override
    # arguments of the public functions that raise them
    *(
        "request_id",
        "prompt",
        "prompts",
        "stream",
        "messages",
        "add_generation_prompt",
        "continue_final_message",
        "batch_tokens",
        "learning_rate",
        "ridge",
        "target",
        "slots",
        "resamples",
    ),
    # of `PagedEvent`, `Budget` and `Compressor`, which only code of ours calls
    *("window", "event.window", "max_blocks", "interval_blocks", "stride"),
    # of a load in conf/bench/
    *("staggered", "arrivals"),
    # of Hydra's command line and of the environment
    *("CUDA_VISIBLE_DEVICES", "OMP_WAIT_POLICY"),
}
"""What messages write as NAME=VALUE and is no option."""


@cache
def options() -> frozenset[str]:
    """Names of all options, as they are written in Python and on the command line."""
    classes = (EngineConfig, SamplingParams, ModelConfig, LauncherConfig)
    names = {"launcher", *BESIDE, *(f.name for cls in classes for f in fields(cls)), *HOMES.values()}
    for name in registry.POLICIES:
        names |= set(registry.find(name).known_options())
    for generator in GENERATORS.values():
        names |= set(inspect.signature(generator).parameters)
    for group, value in to_dict(load_experiment()).items():
        names |= {group, *(value if isinstance(value, dict) else ())}
    return frozenset(names)


def messages(path: Path) -> Iterator[str]:
    """The texts in calls that raise or warn; what a message is filled with is {}."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _says(node)):
            yield from filter(None, map(_text, ast.walk(node)))


def _says(call: ast.Call) -> bool:
    return ast.unparse(call.func).rpartition(".")[2] in ("UsageError", "RunError", "warning", "_require", "print")


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) or "{}" for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@pytest.mark.parametrize("package", ["zipage", "experiments"])
def test_options_in_messages_exist(package):
    unknown = []
    for path in sorted((ROOT / package).rglob("*.py")):
        if "models" in path.parts:  # speaks of fields of config.json
            continue
        for message in messages(path):
            named = re.findall(r"(?<![\w.}])([A-Za-z_][\w.]*)=(?=[\w{'\"\[])", message)
            named += re.findall(r"\b(?:raise|lower) (\w+)(?= or\b|,|$)", message)
            unknown += [
                f"{path.relative_to(ROOT)}: {name} in {message!r}"
                for name in named
                if name not in NO_OPTIONS and name.rpartition(".")[2] not in options()
            ]
    assert not unknown


@cache
def words() -> frozenset[str]:
    """All words of code and configuration, and of the paths of all files."""
    paths = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        paths += [path for path in (ROOT / folder).rglob("*") if "runs" not in path.parts]
    found = set(re.findall(r"\w+", " ".join(str(path.relative_to(ROOT)) for path in paths)))
    for path in paths:
        if path.suffix in (".py", ".yaml", ".toml") or path.name in ("Makefile", "config.json"):
            found |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return frozenset(found)


FOREIGN = {"jupyter", "lab", "cp", "bulk", "prefetch", "L2", "activate"} | {"NAME_reference", "NAME_triton"}
"""Words of other programs in code spans, and placeholders."""
HEX = re.compile(r"[0-9a-f]{5,}|[0-9]\w*|\w")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_of_code_in_documents_exist(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    unknown = {
        f"{word} in `{span}`"
        for span in re.findall(r"`([^`]+)`", text)
        for word in re.findall(r"\w+", span)
        if word not in words() and word not in FOREIGN and not HEX.fullmatch(word)
    }
    assert not unknown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    broken = []
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        path = document.parent / file if file else document
        if not path.exists() or (heading and heading not in headings(path)):
            broken.append(target)
    assert not broken


def headings(path: Path) -> list[str]:
    """As links name them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def section(path: Path, heading: str) -> str:
    """The text of a page below this heading, with what stands below smaller ones."""
    text = path.read_text(encoding="utf-8")
    found = dict(zip(headings(path), re.finditer(r"^(#+) ", text, flags=re.MULTILINE), strict=True))
    begin, level = found[heading].end(), len(found[heading][1])
    end = re.search(rf"^#{{1,{level}}} ", text[begin:], flags=re.MULTILINE)
    return text[begin : begin + end.start()] if end else text[begin:]


def test_no_figure_stands_among_the_aims_alone():
    """Each is one of a section that its row links to, so that there is one place to keep."""
    page, missing = ROOT / "docs" / "aims.md", []
    for row in re.findall(r"^\| (?!what).+$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        links = re.findall(r"\]\(([^)#]+)#([^)]+)\)", row)
        assert links, row
        there = " ".join(section((page.parent / file).resolve(), heading) for file, heading in links)
        figures = set(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"\]\([^)]*\)", "]", row.split("|", 2)[2])))
        missing += [
            (figure, row) for figure in figures if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d|[.,]\d)", there)
        ]
    assert not missing


def test_the_readme_is_short_and_every_page_can_be_reached_from_it():
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 130
    reached, waiting = set(), [readme]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            targets = re.findall(r"\]\((?!https?:)([^)#]+\.md)[)#]", page.read_text(encoding="utf-8"))
            waiting += [found for target in targets if (found := (page.parent / target).resolve()).exists()]
    assert set(DOCUMENTS) <= reached


@pytest.mark.parametrize("document", DOCUMENTS[:-1], ids=lambda path: str(path.relative_to(ROOT)))
def test_options_in_documents_exist(document):
    """Those that are written with their group: `engine.block_size`."""
    files = {"py", "md", "json", "safetensors"}
    groups = "model|engine|policy|workload|sampling|scenario|tracking|hardware"
    text = document.read_text(encoding="utf-8")
    named = re.findall(rf"(?<![\w./])(?:{groups})\.([a-z_]+)", text)
    unknown = {name for name in named if name not in options() | files | {"name"}}
    assert not unknown
