"""The picture of a benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def picture(rows: pd.DataFrame) -> Figure:
    """Of `load_rows`: servers by rate, engines and kernels against their roofline.

    Raises:
        ValueError: the rows lack what it would show.
    """
    from experiments.reporting.plots import against_roofline, served_traffic

    return served_traffic(rows) if "slo" in rows else against_roofline(rows)
