"""One streamed request, timed: bytes come at scripted times, and the figures are exact."""

import json

import pytest

from experiments.serving import stream
from experiments.serving.stream import Stream
from tests.experiments.serving.fake_server import chunk, wrapped

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = chunk({"choices": [], "usage": {"completion_tokens": 3}}) + wrapped(b"data: [DONE]\n\n") + b"0\r\n\r\n"
TOKEN = chunk({"choices": [{"index": 0, "text": "x", "finish_reason": None}], "usage": None})


class Wire:
    """asyncio's transport."""

    def __init__(self) -> None:
        self.written, self.is_closed, self.is_aborted = b"", False, False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_aborted = True


@pytest.fixture
def at(monkeypatch):
    """Sets the clock."""
    now = [0.0]
    monkeypatch.setattr(stream, "clock", lambda: now[0])

    def set_to(seconds: float) -> None:
        now[0] = seconds

    return set_to


def played(at, script, due=10.0, asked=3, **options) -> Stream:
    """A stream that was sent at 10.004, and got these bytes at these times."""
    one = Stream(b'{"stream": true}', due, asked, **options)
    at(10.004)
    one.connection_made(Wire())
    for time, data in script:
        at(time)
        one.data_received(data)
    return one


def test_times_of_an_answer(at):
    heard, ended = [], []
    script = [(10.1, HEAD), (10.25, TOKEN), (10.26, TOKEN), (10.3, TOKEN), (10.301, END)]
    one = played(at, script, heard=lambda *what: heard.append(what), ended=ended.append)
    assert one.outcome == "finished"
    assert one.sent - one.due == pytest.approx(0.004)
    assert one.ttft == pytest.approx(0.25), "from when it was due"
    assert list(one.gaps) == pytest.approx([0.01, 0.04])
    assert one.tpot == pytest.approx(0.025)
    assert one.e2e == pytest.approx(0.3)
    assert one.tokens == 3
    assert [tokens for _, tokens in heard] == [1, 1, 1]
    assert ended == [one]
    one.connection_lost(None)
    assert one.outcome == "finished"


def test_bytes_may_be_cut_anywhere(at):
    script = [(11 + i / 1000, bytes([byte])) for i, byte in enumerate(HEAD + TOKEN + TOKEN + TOKEN + END)]
    one = played(at, script)
    assert (one.outcome, one.tokens, len(one.gaps)) == ("finished", 3, 2)


def test_what_one_read_brings_is_one_arrival(at):
    """Three tokens that reached the user together were not three fast ones."""
    one = played(at, [(10.2, HEAD + TOKEN), (10.3, TOKEN + TOKEN + END)])
    assert (one.outcome, one.tokens) == ("finished", 3)
    assert list(one.gaps) == pytest.approx([0.1])
    assert one.tpot == pytest.approx(0.05)


@pytest.mark.parametrize("told", ["usage at the end", "token ids", "usage in each"])
def test_a_chunk_may_bring_several_tokens(at, told):
    def event(tokens: int, so_far: int) -> bytes:
        choice = {"text": "xx"} | ({"token_ids": [1] * tokens} if told == "token ids" else {})
        usage = {"completion_tokens": so_far} if told == "usage in each" else None
        return chunk({"choices": [choice], "usage": usage})

    heard = []
    script = [(10.1, HEAD + event(1, 1)), (10.2, event(2, 3)), (10.4, END)]
    one = played(at, script, heard=lambda *what: heard.append(what))
    assert one.tokens == 3
    assert one.tpot == pytest.approx(0.05)
    counts = [1, 1] if told == "usage at the end" else [1, 2]
    assert [tokens for _, tokens in heard] == counts
    assert one.events == sum(counts)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"HTTP/1.1 429 Busy\r\n\r\n" + json.dumps({"error": {"message": "queue\nfull"}}).encode(), "429: queue full"),
        (b"HTTP/1.1 502 Bad\r\n\r\n<html>", "status 502: <html>"),
        (HEAD + TOKEN, "the connection closed before the answer's end"),
        (b"", "the connection closed before the answer's end"),
        (HEAD + chunk({"error": {"message": "the engine has failed"}}), "the engine has failed"),
        (HEAD + chunk({"choices": [{"text": "", "finish_reason": "abort"}]}), "the server ended it: abort"),
        (HEAD + wrapped(b"data: {]\n\n"), "an event is not as it should be"),
        (HEAD + wrapped(b"data: {}\n\n"), "an event is not as it should be"),
        (b"nonsense\r\n\r\n", "no HTTP"),
    ],
)
def test_failures_say_why(at, data, error):
    one = played(at, [(10.1, data)])
    one.connection_lost(None)
    assert one.outcome == "failed"
    assert error in one.error
    assert "\n" not in one.error


def test_an_aborted_request_closes_its_connection(at):
    ended = []
    one = played(at, [(10.1, HEAD + TOKEN)], ended=ended.append)
    one.abort()
    assert one.outcome == "aborted"
    assert one._transport.is_aborted
    one.connection_lost(None)
    one.data_received(TOKEN)
    assert (one.outcome, one.tokens, ended) == ("aborted", 1, [one])


def test_one_that_was_aborted_before_its_connection_sends_nothing(at):
    one, wire = Stream(b"{}", 1.0, 1), Wire()
    one.abort()
    one.connection_made(wire)
    assert wire.is_aborted
    assert not wire.written
    assert one.sent is None
