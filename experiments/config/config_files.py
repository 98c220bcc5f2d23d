"""Config files that mean what was written: `subset: 1.10` gives a field of text "1.10", not the text of a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from experiments.config.known import is_text
from experiments.config.yaml_files import read_yaml


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's source of files, with the values of text fields as texts."""

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        group = result.header.get("package") or config_path.rpartition("/")[0].replace("/", ".")
        prefix = "" if group in ("_global_", "") else f"{group}."
        values = OmegaConf.to_container(result.config)
        if isinstance(result.config, DictConfig) and _numbers(values, prefix):
            written = read_yaml(Path(self.path, self._normalize_file_name(config_path)), texts=True)
            result.config = OmegaConf.create(_as_written(values, written, prefix))
        return result


def use() -> None:
    """Make Hydra read its files by this source."""
    Plugins.instance()  # registers the sources that Hydra brings
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource


def _numbers(values: dict[Any, Any], prefix: str) -> bool:
    """Whether a field of text was read as anything but text."""
    for key, value in values.items():
        option = f"{prefix}{key}"
        if isinstance(value, dict):
            found = _numbers(value, f"{option}.")
        else:
            each = value if isinstance(value, list) else [value]
            found = is_text(option) and any(isinstance(item, int | float) for item in each)
        if found:
            return True
    return False


def _as_written(values: dict[Any, Any], written: dict[str, Any], prefix: str) -> dict[Any, Any]:
    """The values, those of text fields as they are `written`, all of which are texts; null stays null."""

    def text(value: Any, as_text: Any) -> Any:
        return as_text if isinstance(value, int | float) else value

    kept = dict(values)
    for key, value in values.items():
        option, own = f"{prefix}{key}", written.get(str(key))
        if own is None:  # YAML's merges are not in it
            continue
        if isinstance(value, dict):
            kept[key] = _as_written(value, own, f"{option}.")
        elif is_text(option):
            kept[key] = [*map(text, value, own)] if isinstance(value, list) else text(value, own)
    return kept
