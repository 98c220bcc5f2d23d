"""The page at `/`, and the headers under which it runs what is in it and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

PAGE = files("zipage.serve").joinpath("page.html").read_text(encoding="utf-8")


def _sources(element: str) -> str:
    """What stands in the page's elements of a name, by its hashes, as sources of a Content-Security-Policy."""
    texts = re.findall(rf"<{element}>(.*?)</{element}>", PAGE, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in hashes)


PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_sources('script')}; style-src {_sources('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
