"""The page at `/`, as a person uses it."""

import json
import re
import struct
import time
from html.parser import HTMLParser
from itertools import pairwise

import httpx
import pytest

from tests.page_in_browser import NAMES, chromium
from tests.serve.browser import Browser
from tests.serve.running import ENGINE, POLICY, REASONER, RunningServer, wait_until
from zipage import LLM, SamplingParams
from zipage.serve import live as live_module
from zipage.serve import reasoning
from zipage.serve.page import PAGE

QUESTION = """k=565
r=323
A for i in range(100,104):
B  if k%2: k=(k*7)%1000
C  r=(r+k)%1000
D print(r)"""
HTML = "<img src=x onerror='window.hacked=1'><b class=evil>x</b>"
WIDTHS = (1300, 390)
COLOURS = ("--ink", "--muted", "--text", "--cache", "--wrong")


@pytest.fixture(scope="module", name="shared_browser")
def one_browser():
    path = chromium()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is in PATH")
    browser = Browser(path)
    yield browser
    browser.close()


@pytest.fixture
def browser(shared_browser):
    """Every test begins with a wide, light window, and leaves no complaint. It comes after the server, so that the page
    is left before the server ends."""
    shared_browser.complaints.clear()
    shared_browser.requested.clear()
    shared_browser.show(1300, 1000, "light")
    yield shared_browser
    shared_browser.open("about:blank")
    assert shared_browser.complaints == []


def open_page(browser: Browser, server: RunningServer) -> None:
    browser.open(f"{server.url}/")
    browser.wait("document.querySelector('#connection').textContent === 'live'")


def ask(browser: Browser, question: str = QUESTION, length: int = 200, **fields: str) -> None:
    browser.type("#question", question)
    for name, value in ({"length": str(length), "temperature": "0"} | fields).items():
        browser.type(f"#{name}", value)
    browser.click("#send")


def lines(browser: Browser) -> tuple[list[float], list[float]]:
    """Of the watched request, the tokens of its text and the entries of a head over time, as they are drawn."""
    tokens, *drawn = browser.evaluate(
        "(row => [row.querySelector('.ends .of-text').textContent, ...['of-text', 'of-cache'].map(name =>"
        " row.querySelector(`polyline.${name}`).getAttribute('points'))])"
        "(document.querySelector('.row[aria-pressed=true]'))"
    )
    heights = [[100 - float(y) for y in re.findall(r",(\S+)", points)] for points in drawn]
    scale = int(tokens.split()[0]) / heights[0][-1]
    return tuple([height * scale for height in line] for line in heights)


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG defines it."""

    def luminance(colour: str) -> float:
        digits = colour.strip().lstrip("#")
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_question_its_answer_and_its_cache(server, offline, browser, monkeypatch):
    step = server.engine.llm.step
    monkeypatch.setattr(server.engine.llm, "step", lambda: time.sleep(0.015) or step())  # of a large model
    open_page(browser, server)
    assert browser.evaluate("document.activeElement === document.body")
    ask(browser)
    browser.wait("document.querySelector('#progress').textContent === 'answering'")
    browser.wait("!document.querySelector('#map').hidden")
    browser.wait("document.querySelector('#map-about').textContent.includes('held by no head')")

    # While it runs: the text grows, the cache is flat, and the map is of some entries
    browser.wait("parseInt(document.querySelector('.row[aria-pressed=true] .ends')?.textContent) > 230")
    text, cache = lines(browser)
    assert len(text) == len(cache) > 3
    assert text == sorted(text)
    assert text[0] < 200 < 230 < text[-1]
    assert 63 < min(cache[-3:]) <= max(cache[-3:]) < 81
    assert re.fullmatch(r"\d+ of 128", browser.text("#blocks"))
    assert browser.text("#running") == "1"
    assert browser.text(".row[aria-pressed=true] .prompt").startswith("<|user|>k=565 r=323 A for i in")
    assert "r_kv · budget 64 · " in browser.text(".row[aria-pressed=true] .facts")
    colours = browser.evaluate(
        "(c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size)"
        "(document.querySelector('#heads'))"
    )
    assert colours >= 3, "held, evicted, and where the prompt ends"

    # At its end
    browser.wait("document.querySelector('#progress').textContent.includes(' s.')")
    params = SamplingParams(temperature=0, max_tokens=200)
    (output,) = offline.chat([{"role": "user", "content": QUESTION}], params, use_tqdm=False)
    sample = output.outputs[0]
    browser.wait(f"document.querySelector('#content').textContent.length === {len(sample.text)}")
    assert browser.text("#content") == sample.text
    assert f": {len(sample.token_ids)} tokens in " in browser.text("#progress")
    browser.wait(
        "document.querySelector('#map-about').textContent.startsWith('It has ended. Last seen: 8 layers × 2 KV')"
    )
    assert browser.text(".row[aria-pressed=true] .status") == "ended"
    assert browser.text("#ask-wrong") == ""

    # With the keyboard
    browser.evaluate("document.querySelector('#heads').focus()")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        browser.press(key)
    assert browser.text("#readout").startswith("layer 0, KV head 1, position")
    assert browser.evaluate("document.querySelector('#heads').getAttribute('aria-label')").startswith(
        "Map of the entries"
    )
    names = browser.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button, canvas, meter')].filter(e => !e.hidden)"
        ".map(e => [e.id || e.className, e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label')"
        " || e.getAttribute('aria-labelledby')])"
    )
    assert [name for name, label in names if not label] == [], "everything has a label"

    # In both colour schemes, wide and narrow
    backgrounds = set()
    for scheme in ("light", "dark"):
        for width in WIDTHS:
            browser.show(width, 900, scheme)
            beyond = (
                "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > " + f"{width})"
            )
            assert browser.evaluate(f"{beyond}.map(e => `${{e.tagName}} ${{e.id}} ${{e.getAttribute('class')}}`)") == []
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, (scheme, width)
            png = browser.screenshot()
            assert struct.unpack(">II", png[16:24]) == (width, 900)
        get = "getComputedStyle(document.documentElement).getPropertyValue"
        values = {name: browser.evaluate(f"{get}('{name}')") for name in (*COLOURS, "--card", "--on-cache")}
        for name in COLOURS:
            assert contrast(values[name], values["--card"]) >= 4.5, (scheme, name)
        assert contrast(values["--on-cache"], values["--cache"]) >= 4.5
        backgrounds.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    assert {httpx.URL(url).port for url in browser.requested} == {httpx.URL(server.url).port}, "nothing from elsewhere"


def test_options_and_stop(server, browser):
    open_page(browser, server)
    browser.choose("#kind", "completion")
    browser.choose("#policy", "random")
    browser.type("#question", QUESTION)
    for name, value in {"budget": "32", "protection": "sink:4", "length": "400", "temperature": "1.5"}.items():
        browser.type(f"#{name}", value)
    browser.evaluate("document.querySelector('#question').focus()")
    browser.press("Enter", modifiers=2)
    facts = "document.querySelector('.row[aria-pressed=true] .facts')"
    browser.wait(
        f"{facts} && {facts}.textContent.startsWith('random · budget 32 · 4 protected · prompt {len(QUESTION)}')"
    )
    assert not browser.evaluate("document.querySelector('#stop').disabled")
    browser.click("#stop")
    browser.wait("document.querySelector('#progress').textContent === 'Stopped.'")
    wait_until(lambda: server.engine.view.stats.num_running == 0)
    browser.wait("document.querySelector('#map-about').textContent.startsWith('It has ended.')")
    assert not browser.evaluate("document.querySelector('#send').disabled")


def test_a_chosen_request_among_many(server, browser, monkeypatch):
    monkeypatch.setattr(live_module, "MOST_ROWS", 3)
    body = {"prompt": "x=1+2", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 5}
    with server.http.stream("POST", "/v1/completions", json=body):
        open_page(browser, server)
        browser.wait("document.querySelectorAll('.row').length === 3")
        browser.wait("document.querySelector('#more').textContent === 'and 2 more that run or wait'")
        assert browser.evaluate("document.querySelector('#map').hidden"), "nobody has chosen one"
        assert not [url for url in browser.requested if "/held" in url]
        browser.evaluate("document.querySelectorAll('.row')[1].focus()")
        browser.press("Enter")
        browser.wait("!document.querySelector('#map').hidden")
        assert browser.evaluate("document.querySelectorAll('.row[aria-pressed=true]').length") == 1
    browser.wait("document.querySelectorAll('.row').length === 1")
    assert browser.text(".row .status") == "ended"


def test_the_page_stays_small(server, browser):
    """However long it is open: histories and rows are bounded."""
    open_page(browser, server)
    points = "(h => { for (let t = 0; t < 50_000; t++) h.add([t, t]); return h.points; })(new History(MOST_POINTS))"
    times = [time for time, _ in browser.evaluate(points)]
    assert 60 <= len(times) <= 121
    assert (times[0], times[-1]) == (0, 49_999)
    assert max(after - before for before, after in pairwise(times)) < 50_000 / 40, "all of its life is there"
    told = {"time": 0, "counts": dict.fromkeys(("running", "compressing", "waiting", "paused"), 1), "num_more": 0}
    told |= {"blocks": {"used": 1, "total": 2, "cached": 0}, "compressions": 0, "entries_evicted": 0}
    told |= {"output_tokens": 0, "requests_finished": 0}
    row = {"index": 0, "status": "running", "prompt": None, "policy": "full", "budget_tokens": None}
    row |= dict.fromkeys(("prompt_tokens", "tokens", "entries", "blocks", "protected"), 5)
    row |= dict.fromkeys(("compressions", "pauses", "preemptions"), 0)
    sizes = browser.evaluate(
        f"for (let t = 0; t < 2000; t++) {{ const told = {{...{json.dumps(told)}, time: 1e9 + t, output_tokens: t}};"
        f"showTotals(told); showRequests({{...told, requests: [{{...{json.dumps(row)}, id: `r${{t}}`}}]}}); }}"
        "[speeds.length, seen.length, rows.size, document.querySelectorAll('#requests li').length]"
    )
    assert sizes == [240, 3, 1, 1]


def test_texts_of_users_are_texts(start, browser):
    server = start(served_model_name=[HTML])
    body = {"prompt": HTML, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body):
        open_page(browser, server)
        browser.wait("document.querySelectorAll('.row').length === 1")
        assert HTML in browser.text(".row .prompt")
        assert browser.text("#model") == HTML
        ask(browser, protection=HTML[:60])
        browser.wait("document.querySelector('#ask-wrong').textContent.includes('<img src=x')")
        assert "protection=" in browser.text("#ask-wrong")
        assert browser.evaluate("[document.querySelector('img, .evil'), window.hacked ?? null]") == [None, None]
        # What slips through is not run: neither scripts, nor handlers, nor what is loaded from elsewhere
        browser.evaluate(f"document.body.insertAdjacentHTML('beforeend', {HTML!r})")
        browser.wait("!!document.querySelector('.evil')")
        assert browser.evaluate("window.hacked ?? null") is None
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)
    assert not re.search(r"innerHTML|insertAdjacentHTML|outerHTML|document\.write|eval\(", PAGE)
    browser.complaints.clear()


def test_reasoning_is_shown_apart(start, browser, monkeypatch, tmp_path):
    """The reasoner marks no thoughts: marks are what it writes anyway."""
    template = tmp_path / "template.jinja"
    template.write_text("{# k:565 #}<|user|>{{ messages[0].content }}<|assistant|>")
    monkeypatch.setattr(reasoning, "BEGIN", "k:565")
    monkeypatch.setattr(reasoning, "END", "A i:100")
    server = start(chat_template=str(template))
    open_page(browser, server)
    ask(browser, length=60)
    browser.wait("document.querySelector('#progress').textContent.includes(' s.')")
    browser.wait("!document.querySelector('#thoughts').hidden && !document.querySelector('#said').hidden")
    assert browser.text("#reasoning") == " r:323\n"
    assert browser.text("#content").startswith(" k:565 r:323")


def test_the_key_is_asked_for_and_kept_for_the_session(start, browser):
    server = start(api_key=["secret"])
    browser.open(f"{server.url}/")
    browser.wait("!document.querySelector('#login').hidden")
    browser.wait("document.querySelector('#connection').textContent === 'an API key is needed'")
    browser.type("#key", "wrong")
    browser.press("Enter")
    browser.wait("document.querySelector('#login-wrong').textContent.includes('does not take this key')")
    browser.type("#key", "secret")
    browser.press("Enter")
    browser.wait("document.querySelector('#connection').textContent === 'live'")
    assert browser.evaluate("[document.querySelector('#login').hidden, localStorage.length]") == [True, 0]
    open_page(browser, server)
    ask(browser, length=5)
    browser.wait("document.querySelector('#progress').textContent.includes('5 tokens in')")
    refused = "Failed to load resource: the server responded with a status of 401 (Unauthorized)"
    assert set(browser.complaints) == {f"{refused} {server.url}/live"}
    browser.complaints.clear()


def test_a_server_that_is_gone_and_comes_back(start, browser):
    server = start()
    open_page(browser, server)
    server.server._running_loop.call_soon_threadsafe(server.server.drain)
    browser.wait("document.querySelector('#connection').textContent.includes('trying again')")
    server._thread.join(10)
    browser.wait("document.querySelector('#connection').textContent === 'the server does not answer; trying again'")
    browser.complaints.clear()


def test_without_a_template_or_a_tokenizer(start, browser):
    server = start(lambda: LLM(REASONER, **ENGINE, **POLICY, skip_tokenizer_init=True))
    open_page(browser, server)
    assert "takes token ids only" in browser.text("#ask-wrong")
    assert browser.evaluate("[document.querySelector('#send').disabled, document.querySelector('#kind').value]") == [
        True,
        "completion",
    ]


class Nesting(HTMLParser):
    """Checks that every element ends, and ends inside the one in which it began."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        pass

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag, f"line {self.getpos()[0]}: </{tag}>"


def test_every_element_ends():
    nesting = Nesting()
    nesting.feed(PAGE)
    assert nesting.open == []


def test_the_page_needs_no_key_and_loads_nothing(server):
    response = server.http.get("/")
    policy = response.headers["content-security-policy"]
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "sha256-" in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    addresses = set(re.findall(r"https?://[^\s'\"]+", response.text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of a format, not loaded"
    assert not re.search(r"<[^>]* (style|on\w+)=", response.text), "what the policy would not allow"
