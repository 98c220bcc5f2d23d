"""Where things lie in a clone."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
RESULTS = ROOT / "results" / "runs"
REASONER = ROOT / "models" / "zipage-reasoner"


def in_clone(path: str) -> Path:
    """A path as it is given or, where nothing is there, in the clone, wherever the command is typed."""
    given = Path(path).expanduser()
    return ROOT / given if not given.exists() and (ROOT / given).exists() else given
