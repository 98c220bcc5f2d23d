"""`python -m tests.page_in_browser PAGE...`: lay report pages out in headless Chromium and check what a reader sees.

At 1,300 pixels: nothing overflows, the conclusion and tokens/s are in sight without scrolling. At 390: nothing
overflows, the conclusion is in sight, rows are cards with a name beside each value.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS, HEIGHT = (1300, 390), 1000
NAMES = ("chromium", "chromium-browser", "google-chrome")

# A frame of each width, since a browser's window has a least width of its own.
HOST = """<!doctype html><body>{frames}<pre id="measured"></pre><script>
const seen = (box, frame) => !!box && box.width > 0 && box.left >= 0 && box.top >= 0
  && box.right <= frame.clientWidth + 0.5 && box.bottom <= frame.clientHeight;
window.onload = () => {{
  const measured = {{}};
  for (const frame of document.querySelectorAll('iframe')) {{
    const page = frame.contentDocument, view = frame.contentWindow, first = page.querySelector('td');
    const box = element => element && element.getBoundingClientRect();
    const heads = [...page.querySelectorAll('th')].filter(th => th.textContent === 'tokens/s');
    const cell = page.querySelector('td[data-label="tokens/s"]');
    const wrapper = heads[0] && box(heads[0].closest('.wide'));
    measured[frame.clientWidth] = {{
      overflow: page.documentElement.scrollWidth - frame.clientWidth,
      conclusion: seen(box(page.querySelector('.conclusion')), frame),
      speed: seen(box(heads[0]), frame) && box(heads[0]).right <= wrapper.right + 0.5,
      cards: view.getComputedStyle(page.querySelector('tr:has(td)')).display === 'block'
        && view.getComputedStyle(page.querySelector('thead')).display === 'none'
        && view.getComputedStyle(first, '::before').content === JSON.stringify(first.dataset.label),
      card_speed: !!cell && box(cell).left >= 0 && box(cell).right <= frame.clientWidth,
    }};
  }}
  document.getElementById('measured').textContent = JSON.stringify(measured);
}};
</script></body>"""


def chromium() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def measure(page: str, browser: str) -> dict[int, dict[str, float | bool]]:
    """What a page looks like at each of `WIDTHS`."""
    frame = '<iframe style="border:0;width:{}px;height:{}px" srcdoc="{}"></iframe>'
    frames = "".join(frame.format(width, HEIGHT, html.escape(page, quote=True)) for width in WIDTHS)
    with tempfile.TemporaryDirectory() as folder:
        host = Path(folder) / "host.html"
        host.write_text(HOST.format(frames=frames), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
        options += ["--virtual-time-budget=20000", "--dump-dom", host.as_uri()]
        dom = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    return {int(width): seen for width, seen in json.loads(html.unescape(found[1])).items()}


def faults(page: str, browser: str) -> list[str]:
    """What is wrong with a page, a line each."""
    found = measure(page, browser)
    wide, phone = (found[width] for width in WIDTHS)
    checks = {
        f"overflows by {wide['overflow']} pixels at {WIDTHS[0]}": wide["overflow"] <= 0,
        f"overflows by {phone['overflow']} pixels at {WIDTHS[1]}": phone["overflow"] <= 0,
        f"the conclusion is out of sight at {WIDTHS[0]}": wide["conclusion"],
        f"the conclusion is out of sight at {WIDTHS[1]}": phone["conclusion"],
        f"tokens/s is out of sight at {WIDTHS[0]}": wide["speed"],
        f"rows are cards at {WIDTHS[0]}": not wide["cards"],
        f"rows are no cards at {WIDTHS[1]}": phone["cards"],
        f"tokens/s is beside the screen at {WIDTHS[1]}": phone["card_speed"],
    }
    return [line for line, fine in checks.items() if not fine]


def main(paths: list[str]) -> int:
    browser = chromium()
    if browser is None:
        print(f"no browser: none of {', '.join(NAMES)} is in PATH", file=sys.stderr)
        return 2
    wrong = [f"{path}: {line}" for path in paths for line in faults(Path(path).read_text(encoding="utf-8"), browser)]
    print("\n".join(wrong) or "all is as it should be")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
