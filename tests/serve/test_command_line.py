"""`zipage serve`: every option of the engine is a flag, and a wrong one is refused with what to do."""

import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from zipage.config import EngineConfig
from zipage.serve import cli
from zipage.serve.config import ServeConfig
from zipage.serve.flags import descriptions, flag

ROOT = Path(__file__).parents[2]
WORDS = {
    "load_format": "dummy",
    "dtype": "float32",
    "device": "cpu",
    "policy": "streaming",
    "policy_options": '{"a": 1}',
    "protection": "prompt",
    "allocation": "pyramid",
    "trigger": "pressure",
    "scheduling": "constrained",
    "gpu_memory_utilization": "0.5",
    "shutdown_grace": "0.5",
    "block_size": "32",
    "max_num_batched_tokens": "1024",
    "host": "::1",
    "chat_template": "{{ messages }}",
    "served_model_name": "x",
    "api_key": "x",
}
NEEDS = {
    "budget_tokens": ["--policy=random"],
    "protection": ["--policy=random", "--budget-tokens=512"],
    "policy": ["--budget-tokens=512"],
}


@pytest.mark.parametrize("f", [*fields(EngineConfig)[1:], *fields(ServeConfig)], ids=lambda f: f.name)
def test_every_option_is_a_flag(f):
    if f.name == "policy_options":
        arguments, expected = ["--policy=r_kv", "--budget-tokens=512", '--policy-options={"window": 8}'], {"window": 8}
    elif f.name == "allocation_options":
        arguments, expected = ["--allocation=pyramid", '--allocation-options={"beta": 2}'], {"beta": 2}
    elif isinstance(f.default, bool) or f.name in ("async_scheduling", "engine_process", "show_prompts"):
        expected = not f.default
        arguments = [flag(f.name) if expected else f"--no-{flag(f.name)[2:]}"]
    else:
        word = WORDS.get(f.name, "768")
        arguments, expected = [flag(f.name), word, *NEEDS.get(f.name, ())], word
    engine, server = cli.parse(["model", *arguments])
    value = getattr(engine if hasattr(engine, f.name) else server, f.name)
    default = None if f.default is MISSING else f.default
    assert value != default
    assert value == (expected if isinstance(expected, bool | dict) else type(value)(_plain(expected, value)))


def _plain(word, value):
    return (word,) if isinstance(value, tuple) else word


def test_what_is_not_given_is_the_default():
    assert cli.parse(["model"]) == (EngineConfig(model="model"), ServeConfig())


def test_spellings():
    engine, server = cli.parse(["m", "--max_model_len=64", "--tensor-parallel-size", "2", "--api-key", "a", "b"])
    assert (engine.max_model_len, engine.tensor_parallel_size, server.api_key) == (64, 2, ("a", "b"))
    _, server = cli.parse(["m", "--served-model-name", "a", "--served-model-name", "b"])
    assert server.served_model_name == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: MODEL"),
        (["m", "--max-model-length=5"], "unknown flag --max-model-length=5; did you mean --max-model-len?"),
        (["m", "--budget", "5"], "unknown flag --budget; did you mean --budget-tokens?"),
        (["m", "--nonsense"], "unknown flag --nonsense; --help shows all"),
        (["m", "n"], "unexpected argument 'n'"),
        (["m", "--quantization", "awq"], "--quantization is not supported: load FP8 in blocks or a GGUF file"),
        (["m", "--no-enable-lora"], "--no-enable-lora is not supported: merge the adapter"),
        (["m", "--block-size=20"], "block_size=20: must be a power of two from 16 to 256"),
        (["m", "--block-size=x"], "argument --block-size: invalid int value: 'x'"),
        (["m", "--policy-options", "{"], "must be JSON"),
        (["m", "--policy", "zipag"], "did you mean 'zipage'"),
        (["m", "--port", "70000"], "port=70000: must be in [0, 65535]"),
        (["m", "--max-n", "0"], "max_n=0: must be at least 1"),
        (["m", "--chat-template", "nowhere.jinja"], "chat_template='nowhere.jinja': must be a template or a file"),
    ],
)
def test_a_wrong_option_is_refused(arguments, message, capsys):
    assert cli.main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("zipage serve: ")
    assert message in line


def test_help_describes_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for cls in (EngineConfig, ServeConfig):
        assert descriptions(cls).keys() == {f.name for f in fields(cls)}
        for f in fields(cls):
            assert f.name == "model" or flag(f.name) in shown


def test_the_program(capsys):
    assert cli.main(["--help"]) == 0
    assert "zipage serve MODEL" in capsys.readouterr().out
    assert cli.main([]) == cli.main(["server"]) == 2
    assert "usage: zipage serve MODEL" in capsys.readouterr().err


def test_options_are_read_without_torch_and_without_the_extra():
    code = (
        "import sys; sys.modules.update(torch=None, fastapi=None, uvicorn=None); from zipage.serve import cli; "
        "cli.parse(['m', '--port', '1']); sys.exit(cli.serve(['m']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "pip install 'zipage[serve]'" in done.stderr
