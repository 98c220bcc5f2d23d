"""What a server's /metrics says: Zipage's names and vLLM's."""

from __future__ import annotations

import asyncio
import contextlib
import re

GAUGES = {"running": "vllm:num_requests_running", "waiting": "vllm:num_requests_waiting"}
BLOCKS = "zipage:kv_blocks_used"
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "pauses": "zipage:pauses_total",
    "compressions": "zipage:compressions_total",
    "server_tokens": "vllm:generation_tokens_total",
}
LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)", flags=re.MULTILINE)


def parse(text: str) -> dict[str, float]:
    """Name -> value, summed over labels."""
    values: dict[str, float] = {}
    for name, value in LINE.findall(text):
        values[name] = values.get(name, 0.0) + float(value)
    return values


async def get(host: str, port: int, path: str = "/metrics", seconds: float = 10.0) -> tuple[int, str]:
    """Status and body.

    Raises:
        OSError, ValueError, TimeoutError: the server does not answer, or not by HTTP.
    """

    async def ask() -> tuple[int, str]:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        if b"transfer-encoding: chunked" in head.lower():
            body = _joined(body)
        try:
            return int(head.split()[1]), body.decode()
        except (IndexError, ValueError) as error:
            raise ValueError(f"{path}: not HTTP: {head[:50]!r}") from error

    return await asyncio.wait_for(ask(), seconds)


def _joined(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        parts.append(rest[:length])
        body = rest[length + 2 :]
    return b"".join(parts)


async def metrics(host: str, port: int) -> dict[str, float]:
    """`parse` of /metrics. Raises as `get`."""
    return parse((await get(host, port))[1])


async def wait_until_idle(host: str, port: int, seconds: float) -> int:
    """Wait until nothing runs or waits.

    Returns:
        The requests that still do after so many seconds: 0 where all went well.

    Raises:
        OSError, ValueError, TimeoutError: as `get`.
    """
    end = asyncio.get_running_loop().time() + seconds
    while True:
        values = await metrics(host, port)
        left = int(sum(values.get(name, 0) for name in GAUGES.values()))
        if not left or asyncio.get_running_loop().time() > end:
            return left
        await asyncio.sleep(0.1)


class Poll:
    """Asks for /metrics once in a while.

    Attributes:
        samples: (time on the loop's clock, values).
    """

    def __init__(self, host: str, port: int, period: float = 1.0) -> None:
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._where, self._period = (host, port), period

    async def run(self) -> None:
        """Until it is cancelled; a server that does not answer in time is asked again."""
        while True:
            await self.ask()
            await asyncio.sleep(self._period)

    async def ask(self) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            self.samples.append((asyncio.get_running_loop().time(), await metrics(*self._where)))

    def figures(self, begin: float, end: float) -> dict[str, float | None]:
        """Gauges between two times, mean and most; counters from the first sample to the last."""
        found: dict[str, float | None] = {}
        inside = [values for time, values in self.samples if begin <= time <= end] or [v for _, v in self.samples]
        for name, metric in GAUGES.items():
            values = [sample[metric] for sample in inside if metric in sample]
            found[name] = sum(values) / len(values) if values else None
            found[f"most_{name}"] = max(values, default=None)
        for name, metric in COUNTERS.items():
            values = [sample[metric] for _, sample in self.samples if metric in sample]
            found[name] = values[-1] - values[0] if len(values) > 1 else None
        return found
