"""From a command line to a checked `Experiment`: Hydra composes, the schema holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import config_files
from experiments.config.check import check
from experiments.config.explain import explain, unknown
from experiments.config.known import groups, is_text, known_keys
from experiments.config.overrides import as_written
from experiments.config.schema import Experiment
from experiments.errors import UsageError
from experiments.paths import CONF


@cache
def register() -> None:
    """Give Hydra the schema under the name that `conf/config.yaml` lists first, and its way to read files."""
    config_files.use()
    schema = OmegaConf.structured(Experiment)
    # OmegaConf makes the config of a frozen dataclass read-only; here only the dataclass it ends in is.
    OmegaConf.set_readonly(schema, None)
    for group in groups():
        OmegaConf.set_readonly(schema[group], None)
    for free in (
        schema.policy.options,
        schema.workload.options,
        schema.workload.parts,
        schema.scenario.options,
        schema.launcher.parameters,
        schema.model.chat_template_options,
    ):
        OmegaConf.set_struct(free, False)
    ConfigStore.instance().store("experiment_schema", schema)


def build(config: DictConfig) -> Experiment:
    """The composed config as a checked `Experiment`.

    Raises:
        UsageError: an option is unknown, missing or out of range.
    """
    for key in _keys(config):
        if key not in known_keys():
            raise UsageError(unknown(key))
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UsageError(f"{missing[0]} is missing: give {missing[0]}=...")
        experiment = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UsageError(explain(error)) from error
    check(experiment)
    return experiment


def load_experiment(overrides: Sequence[str] = ()) -> Experiment:
    """What `python -m experiments.run OVERRIDES` would run.

    Raises:
        UsageError: an option is unknown, missing or out of range.
    """
    register()
    try:
        # Inside an application of Hydra's, as `python -m experiments.run` is, there is an instance to compose with.
        running = GlobalHydra.instance().is_initialized()
        with nullcontext() if running else initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=[as_written(override, is_text) for override in overrides])
    except Exception as error:
        raise UsageError(explain(error)) from error
    return build(config)


def _keys(config: DictConfig) -> Iterator[str]:
    known = groups()
    for name in config:
        yield str(name)
        if name in known:
            yield from (f"{name}.{inner}" for inner in config[name])
