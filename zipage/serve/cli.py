"""`zipage serve MODEL [options]`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields

from zipage.config import EngineConfig
from zipage.serve.config import ServeConfig
from zipage.serve.flags import add_flags, refusal

USAGE = "zipage serve MODEL [options]"
PACKAGES = ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client")
EXTRA = "the server needs packages that are not installed ({}): pip install 'zipage[serve]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program `zipage`: its first argument is a command, of which there is one."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["serve"]:
        return serve(arguments[1:])
    asks = bool(arguments) and arguments[0] in ("-h", "--help")
    print(f"usage: {USAGE}\n\n`zipage serve --help` shows the options.", file=sys.stdout if asks else sys.stderr)
    return 0 if asks else 2


def serve(arguments: Sequence[str] | None = None) -> int:
    """Serve a model until a signal ends it.

    Returns:
        The exit status: 0 after SIGTERM or SIGINT, 1 where the engine could not start or has failed, 2 for wrong
        options.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        engine, server = parse(arguments)
    except ValueError as error:
        print(f"zipage serve: {error}", file=sys.stderr)
        return 2
    try:
        from zipage.serve.server import run
    except ModuleNotFoundError as missing:
        if missing.name not in PACKAGES:
            raise
        print(f"zipage serve: {EXTRA.format(missing.name)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return run(engine, server)


def parse(arguments: Sequence[str]) -> tuple[EngineConfig, ServeConfig]:
    """The options, checked.

    Raises:
        ValueError: one is unknown, not supported or out of range; the message is one line.
    """
    given, unknown = make_parser().parse_known_args([_dashed(argument) for argument in arguments])
    known = [f.name for cls in (EngineConfig, ServeConfig) for f in fields(cls)]
    if unknown:
        raise ValueError(refusal(unknown[0], known))
    options = vars(given)
    own = {f.name: options.pop(f.name) for f in fields(ServeConfig) if f.name in options}
    return EngineConfig.from_kwargs(**options), ServeConfig(**own)


def _dashed(argument: str) -> str:
    """`--max_model_len=8` as `--max-model-len=8`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="zipage serve",
        usage=USAGE,
        description="Serve a model by OpenAI's HTTP interface.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="local folder, hub id or GGUF file")
    add_flags(parser, ServeConfig, "server")
    add_flags(parser, EngineConfig, "engine, as in LLM(...)", without=["model"])
    return parser
