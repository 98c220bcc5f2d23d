"""Kernels over tensors, strides, slots and masks.

Hugging Face's package `kernels`, which transformers imports where it is installed, has the same name, so the two share
it. Modules are looked for here first and then there. A name that is no module is the other package's, whose
`__init__.py` is run when the first of them is asked for.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import extend_path
from typing import Any

__path__ = extend_path(__path__, __name__)
_other: Any = None


def __getattr__(name: str) -> Any:
    is_own_module = Path(__file__).with_name(f"{name}.py").is_file()
    is_protocol = name.startswith("__") and name != "__version__"
    if is_own_module or is_protocol or not _find_other():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_other, name)


def _find_other() -> bool:
    global _other
    found = [init for folder in __path__[1:] if (init := Path(folder, "__init__.py")).is_file()]
    if _other is None and found:
        spec = spec_from_file_location(__name__, found[0], submodule_search_locations=__path__)
        _other = module_from_spec(spec)  # before it is run, since its own modules may ask for its names
        spec.loader.exec_module(_other)
    return _other is not None
