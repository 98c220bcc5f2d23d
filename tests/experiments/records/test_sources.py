"""Which code a result is known by."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments.config.compose import load_experiment
from experiments.config.options import label
from experiments.errors import UsageError
from experiments.records import file_hash, load_runs, sources

POLICY = """
from dataclasses import dataclass
from typing import ClassVar

from own_policies import signs
from zipage.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Mine(Policy):
    name: ClassVar[str] = "mine"
    variant: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    window: ClassVar[int] = 16

    def rank(self, event):
        return +event.attention("all", group="mean", window="mean") * signs.SIGN
"""
OWN = ("policy.name=own_policies.mine:Mine", "policy.budget_tokens=48", "engine.block_size=16")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of one's own policies; `edit` changes a file of it as an editor would before the next command."""
    folder = tmp_path / "own_policies"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def edit(name: str, text: str) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        for module in [module for module in sys.modules if module.startswith("own_policies")]:
            monkeypatch.delitem(sys.modules, module)

    edit("__init__.py", "")
    edit("mine.py", POLICY)
    edit("signs.py", "SIGN = 1\n")
    edit("other.py", "")
    yield edit
    edit("mine.py", "")


def hashes(*options: str) -> dict[str, str]:
    return sources.hashes(load_experiment(options))


def test_edited_policy_of_ones_own_is_another_run(launch, results, package, capsys):
    def runs() -> int:
        assert launch(*OWN) == 0
        return len(load_runs(results))

    assert runs() == 1
    assert runs() == 1
    package("other.py", "what no policy imports")
    assert runs() == 1, "nothing of it has changed"
    package("mine.py", POLICY.replace("return +", "return -"))
    assert runs() == 2
    package("signs.py", "SIGN = -1\n")
    assert runs() == 3, "a module that it imports"
    assert "already done" in capsys.readouterr().out
    package("mine.py", POLICY)
    package("signs.py", "SIGN = 1\n")
    assert runs() == 3, "as it was at first"


def test_policy_of_ones_own_knows_what_it_imports(package):
    assert sources.own_policies(load_experiment(OWN)).keys() == {
        "own_policies.mine",
        "own_policies.signs",
        "own_policies",
    }
    assert sources.own_policies(load_experiment(["policy=zipage"])) == {}
    example = load_experiment(["policy.name=examples.my_policy:MyPolicy", "policy.budget_tokens=256"])
    assert sources.own_policies(example).keys() == {"examples.my_policy"}


@pytest.fixture
def pip_list(monkeypatch, tmp_path):
    """RECORD of a package, in a folder on the path that has another one beside it."""
    folder = tmp_path / "target"
    for name in ("installed_there", "beside_it"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("")
    (folder / "installed_there-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder / "installed_there-1.0.dist-info" / "RECORD"


def test_what_pip_installs_into_a_folder_is_not_ones_own(package, pip_list):
    """With `--target` it lies where a policy of one's own might; vLLM and all its imports took 100 s to read."""
    pip_list.write_text("installed_there/__init__.py,sha256=abc,0\ninstalled_there-1.0.dist-info/RECORD,,\n")
    package("signs.py", "import installed_there\nimport beside_it\nSIGN = 1\n")
    own = sources.own_policies(load_experiment(OWN))
    assert "beside_it" in own
    assert "installed_there" not in own


def test_an_odd_list_of_what_pip_installed_costs_no_run(package, pip_list):
    """Names that are not UTF-8, names with a comma, which are quoted, and lines that name nothing."""
    lines = ['"a,b.py",,', "caf\u00e9.py,,", ",,", ".,,", "../../bin/tool,,", "installed_there/__init__.py,,"]
    pip_list.write_text("\n".join(lines), "latin-1")
    package("signs.py", "import installed_there\nimport beside_it\nSIGN = 1\n")
    own = sources.own_policies(load_experiment(OWN))
    assert "beside_it" in own
    assert "installed_there" not in own


@pytest.mark.parametrize(
    ("use", "name"),
    [
        ("import own_policies.deep.er\nSIGN = own_policies.deep.SIGN", "deep/__init__.py"),
        ("import importlib\nSIGN = importlib.import_module('own_policies.other').SIGN", "other.py"),
        ("import importlib\nSIGN = importlib.import_module('.other', __package__).SIGN", "other.py"),
        ("SIGN = __import__('own_policies.other').other.SIGN", "other.py"),
        ("from pathlib import Path\nexec(Path(__file__).with_name('sign.txt').read_text())", "sign.txt"),
        ("from pathlib import Path\nexec((Path(__file__).parent / 'deep/sign.txt').read_text())", "deep/sign.txt"),
        ("from calendar import SIGN", "../calendar.py"),
    ],
)
def test_however_a_policy_comes_by_it_its_edit_is_seen(package, monkeypatch, use, name):
    for file in ("deep/__init__.py", "deep/er.py"):
        package(file, "")
    seen = set()
    for sign in (1, -1):
        monkeypatch.delitem(sys.modules, "calendar", raising=False)
        package(name, f"SIGN = {sign}\n")
        package("mine.py", POLICY.replace("from own_policies import signs", use).replace("signs.SIGN", "SIGN"))
        own = sources.own_policies(load_experiment(OWN))
        assert sign == sys.modules["own_policies.mine"].SIGN
        seen.add(str(own))
    assert len(seen) == 2


def test_an_edit_that_imports_another_module_is_followed(package):
    """Also by a process that has read the module as it was."""
    assert "own_policies.other" not in sources.own_policies(load_experiment(OWN))
    package("signs.py", "from own_policies import other\nSIGN = 1\n")
    assert "own_policies.other" in sources.own_policies(load_experiment(OWN))


def test_a_file_that_an_option_of_ones_own_policy_names_is_hashed(package, tmp_path):
    package("mine.py", POLICY.replace("window: ClassVar[int]", 'weights: str = ""\n    window: ClassVar[int]'))
    path, seen = tmp_path / "weights.txt", set()
    for text in ("1", "2"):
        path.write_text(text)
        seen.add(str(sources.own_policies(load_experiment([*OWN, f"policy.options.weights={path}"]))))
    assert len(seen) == 2


def test_a_policy_without_a_file_is_refused(package, monkeypatch):
    experiment = load_experiment(OWN)
    mine = sys.modules["own_policies.mine"].Mine
    monkeypatch.setattr(mine, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    assert sources.own_policies(experiment)["__main__"] == file_hash(Path(__file__)), "of a script"
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    sources._policy.cache_clear()
    with pytest.raises(UsageError, match=r"policy\.name=.*: the source of Mine is in no file, .* put it into a module"):
        sources.own_policies(experiment)


def test_edited_chat_template_is_another_run(launch, results, tmp_path):
    template = tmp_path / "own.jinja"
    for number, text in enumerate(("{{ messages }}", "{{ messages }} think"), 1):
        template.write_text(text)
        for _ in range(2):
            assert launch(f"model.chat_template={template}") == 0
            assert len(load_runs(results)) == number


def test_a_run_is_named_by_the_content_of_its_calibration(launch, results, tmp_path, capsys):
    paths = [tmp_path / name for name in ("one", "other", "copy_of_one")]
    for path in paths:
        path.write_text("1" if "one" in path.name else "2")
    for path, count in zip(paths, (1, 2, 2), strict=True):
        options = (f"policy.options.calibration={path}", "policy.budget_tokens=48", "engine.block_size=16")
        assert launch("policy=q_filters", *options) == 0
        assert len(load_runs(results)) == count
    runs = load_runs(results)
    assert set(runs["provenance.calibration"]) == {file_hash(path) for path in paths}
    assert set(runs.apply(label, axis=1)) == {f"q_filters@{file_hash(path)[:8]}" for path in paths}
    assert launch("policy=q_filters", "policy.options.calibration=none", *options[1:]) == 2
    assert (
        "policy.options.calibration=none: there is no such file; experiments.calibrate makes it"
        in capsys.readouterr().err
    )
    assert launch("policy=q_filters", *options[1:]) == 2
    assert "q_filters.calibration: give the calibration file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "engine", "policy", "grader"),
    [
        ("zipage/scheduling/scheduler.py", True, False, False),
        ("kernels/paged_decode.py", True, False, False),
        ("zipage/eviction/event.py", True, False, False),
        ("experiments/running/prompts.py", True, False, False),
        ("zipage/eviction/policies/h2o.py", False, True, False),
        ("zipage/eviction/policies/snapkv.py", False, False, False),
        ("experiments/graders/boxed.py", False, False, True),
        ("experiments/graders/number.py", False, False, True),
        ("experiments/graders/f1.py", False, False, False),
        ("experiments/report.py", False, False, False),
        ("kernels/bench.py", False, False, False),
    ],
)
def test_each_part_is_what_decides_it(other_code, name, engine, policy, grader):
    options = ("policy=h2o", "workload.grader=math")
    before = hashes(*options)
    other_code(name)
    after = hashes(*options)
    assert [before[part] != after[part] for part in ("engine", "policy", "grader")] == [engine, policy, grader]


def test_programs_of_the_sandbox_are_a_part_of_its_grader(other_code):
    before = sources._grader("code")
    other_code("experiments/sandbox/examiner.py")
    assert sources._grader("code") != before


def test_adapters_of_other_engines_do_not_depend_on_this_one(other_code):
    before = hashes("backend=vllm")
    other_code("zipage/scheduling/scheduler.py")
    assert hashes("backend=vllm") == before
    other_code("experiments/backends/vllm.py")
    assert hashes("backend=vllm")["engine"] != before["engine"]


def test_unknown_policy_of_requests_is_one_line():
    with pytest.raises(UsageError, match=r"sampling\.policy=zipge: unknown policy"):
        hashes("sampling.policy=zipge")


def test_stale_run_says_so_and_is_made_again_when_asked(launch, results, capsys, other_code):
    options = ("policy=zipage", "policy.budget_tokens=48", "engine.block_size=16")
    launch(*options)
    launch(*options)
    assert "note:" not in capsys.readouterr().out
    other_code("zipage/scheduling/scheduler.py")
    before = load_runs(results)
    assert launch(*options) == 0
    out = capsys.readouterr().out
    assert "note: this run is stale: the engine has changed since; force=stale runs it again" in out
    assert load_runs(results)["seconds"].tolist() == before["seconds"].tolist()
    assert launch(*options, "force=stale") == 0
    after = load_runs(results)
    assert after["run"].tolist() == before["run"].tolist(), "shipped code is no part of the id"
    assert after["seconds"].tolist() != before["seconds"].tolist()
    assert launch(*options, "force=stale", fail_at=0) == 0, "it is as the code is"


def test_record_without_hashes_is_stale():
    assert sources.changes(None, {"engine": "a"}) == sources.UNKNOWN
    assert sources.changes({"engine": "a"}, {"engine": "a"}) is None
    assert (
        sources.changes({"engine": "a"}, {"engine": "b", "policy": "c"})
        == "the engine and the policy have changed since"
    )


def test_a_file_edited_under_way_is_recorded_as_it_was_read(launch, results, package, monkeypatch):
    from experiments.running import job

    serve = job.serve

    def edit_then_serve(*arguments):
        with Path(sys.modules["own_policies.mine"].__file__).open("a") as file:
            file.write("# for the next run")
        return serve(*arguments)

    before = sources.hashes(load_experiment(OWN))
    monkeypatch.setattr(job, "serve", edit_then_serve)
    assert launch(*OWN) == 0
    assert load_runs(results)["provenance.sources.policy"].tolist() == [before["policy"]]
