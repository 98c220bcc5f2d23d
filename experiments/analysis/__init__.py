"""What records say: each run beside its baselines, with intervals."""

__all__ = ["compare"]


def __getattr__(name: str):
    # A run imports this package for its metrics, and should not wait for scipy.
    if name == "compare":
        from experiments.analysis.comparison import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
