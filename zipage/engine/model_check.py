"""Whether what bounds the caches of an engine goes with its model's attention: known before a weight is read."""

from __future__ import annotations

from zipage.config import EngineConfig
from zipage.models.attention import refuse_forms
from zipage.models.spec import ModelSpec


def check_model(config: EngineConfig, spec: ModelSpec) -> None:
    """Raise a ValueError where the engine's policy, budget or allocation needs what the model's attention is not; the
    message names the option and what to change.
    """
    policy = config.make_policy()
    if policy is None:
        return
    if config.is_tiled:
        refuse_forms(spec.attention, f"allocation={config.allocation!r}", "leave allocation at 'uniform'")
    name = f"policy={policy.name}"
    if policy.calibration_arrays or policy.needs_rotary_pairs:
        refuse_forms(spec.attention, name, "take another policy, such as zipage or snapkv")
    if policy.output_norm and spec.output_norms:
        raise ValueError(
            f"{name}: weighs what the output projection adds, and {spec.architecture} has a norm behind it: "
            "take another policy"
        )
    if policy.output_norm and spec.attention[0].output_gate:
        raise ValueError(
            f"{name}: weighs what the output projection adds, and {spec.architecture} has a gate of each query before "
            "it: take another policy"
        )
    if all(layer.window for layer in spec.attention):
        raise ValueError(
            f"{name}: each layer of the model has a window, so that there is nothing to choose: set policy=full"
        )
