"""Takes `page.png`: the server's page while the shipped reasoner traces programs under a budget of 256 entries.

PYTHONPATH=. python docs/figures/page.py
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from threading import Thread

from PIL import Image

from experiments.workloads import program_trace
from tests.page_in_browser import NAMES, chromium
from tests.serve.browser import Browser
from tests.serve.running import REASONER, RunningServer, wait_until
from zipage import LLM

WIDTH, HEIGHT, COLOURS = 1300, 900, 256
ENGINE = {"device": "cpu", "block_size": 16, "num_blocks": 256, "max_num_seqs": 8, "max_model_len": 4096}
POLICY = {"policy": "r_kv", "budget_tokens": 256, "protection": "prompt"}
FIELDS = {"length": "2000", "temperature": "0"}
TOKENS = 900
"""Of the text at which the picture is taken."""


def main() -> int:
    path = chromium()
    if path is None:
        print(f"no browser: none of {', '.join(NAMES)} is in PATH", file=sys.stderr)
        return 2
    mine, *others = [problem.question for problem in program_trace.generate(seed=1, count=4, iterations=9)]
    server, browser = RunningServer(lambda: LLM(REASONER, **ENGINE, **POLICY)), Browser(path)
    threads = [Thread(target=ask, args=(server, others[0], {}), daemon=True)]
    threads += [Thread(target=ask, args=(server, others[1], {"policy": "full"}), daemon=True)]
    threads += [Thread(target=ask, args=(server, others[2], {"policy": "random"}), daemon=True)]
    try:
        browser.show(WIDTH, HEIGHT, "light")
        browser.open(f"{server.url}/")
        browser.wait("!document.querySelector('#send').disabled")
        for name, value in (FIELDS | {"question": mine}).items():
            browser.type(f"#{name}", value)
        browser.click("#send")
        for thread in threads:
            thread.start()
        browser.wait(f"rows.get(watched?.key)?.history.points.at(-1)[1] > {TOKENS}", 120)
        browser.evaluate("scrollTo(0, 0)")
        picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB").quantize(COLOURS)
        picture.save(Path(__file__).with_name("page.png"), optimize=True)
    finally:
        browser.close()
        server.engine.abort_all()
        wait_until(lambda: server.is_empty)
        server.stop()
    return 0


def ask(server: RunningServer, question: str, fields: dict[str, str]) -> None:
    body = {"messages": [{"role": "user", "content": question}], "max_completion_tokens": 2000, "temperature": 0}
    server.post("/v1/chat/completions", body | fields, timeout=120)


if __name__ == "__main__":
    sys.exit(main())
