"""Pictures of runs: functions from rows of `load_runs()` to matplotlib figures.

Each raises a ValueError that says what the runs lack.
"""

from experiments.reporting.plots.accuracy import (
    accuracy_by_budget,
    accuracy_by_policy,
    accuracy_by_throughput,
)
from experiments.reporting.plots.answers import facts_by_distance, length_inflation
from experiments.reporting.plots.bench import against_roofline
from experiments.reporting.plots.fidelity import accuracy_by_fidelity
from experiments.reporting.plots.frontier import accuracy_by_speed_up
from experiments.reporting.plots.maps import crossover_map, kept_positions
from experiments.reporting.plots.places import accuracy_by_place, recall_by_distance
from experiments.reporting.plots.served import served_traffic
from experiments.reporting.plots.timeline import (
    blocks_over_time,
    cache_over_tokens,
    concurrency_over_time,
    latency_cdfs,
    throughput_over_time,
)
from experiments.reporting.plots.traffic import goodput_by_rate, tails_by_rate, throughput_by_user

__all__ = [
    "accuracy_by_budget",
    "accuracy_by_fidelity",
    "accuracy_by_place",
    "accuracy_by_policy",
    "accuracy_by_speed_up",
    "accuracy_by_throughput",
    "against_roofline",
    "blocks_over_time",
    "cache_over_tokens",
    "concurrency_over_time",
    "crossover_map",
    "facts_by_distance",
    "goodput_by_rate",
    "kept_positions",
    "latency_cdfs",
    "length_inflation",
    "recall_by_distance",
    "served_traffic",
    "tails_by_rate",
    "throughput_by_user",
    "throughput_over_time",
]
