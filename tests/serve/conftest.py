from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.serve.running import ENGINE, POLICY, REASONER, RunningServer
from zipage import LLM


@pytest.fixture(scope="session", name="shared_server")
def session_server() -> Iterator[RunningServer]:
    server = RunningServer()
    yield server
    server.stop()


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    """Every test leaves it as it was."""
    yield shared_server
    shared_server.check_empty()


@pytest.fixture
def start():
    """Starts servers that end with the test."""
    servers = []

    def start(make=None, **config) -> RunningServer:
        servers.append(RunningServer(make, **config))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def offline() -> LLM:
    """The same engine without a server."""
    return LLM(REASONER, **ENGINE, **POLICY)
