"""What a simulated device is asked: how long would this take?"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from zipage.eviction.policy import Policy
    from zipage.models.spec import ModelSpec


class StepWork(NamedTuple):
    """What one step computes.

    Attributes:
        num_decodes: requests that compute one token.
        decode_entries: entries that they read, per layer and KV head.
        prefill_tokens: of prompts, in chunks.
        prefill_entries: entries before each of these tokens, its own included, summed over them.
        all_decode: tokens of prompts attend as decodes, so that each reads all before it anew.
        moved_blocks: to host memory and back, of requests that are paused and resumed.
        decode_squares: the square of what each of these requests reads, summed: the less, the more alike they are.
        is_graph: the step would be one CUDA graph.
        num_captures: graphs that are captured before it, since no step has asked for them yet.
    """

    num_decodes: int
    decode_entries: int
    prefill_tokens: int = 0
    prefill_entries: int = 0
    all_decode: bool = True
    moved_blocks: int = 0
    decode_squares: int = 0
    is_graph: bool = True
    num_captures: int = 0


class CompressionWork(NamedTuple):
    """Requests that are compressed together.

    Attributes:
        policy: of all of them.
        num_requests: how many.
        entries, kept: of all together, per layer and KV head, before and after.
    """

    policy: Policy
    num_requests: int
    entries: int
    kept: int


class CompressionTime(NamedTuple):
    """Seconds of a compression.

    Attributes:
        launch: that the host takes to launch it.
        interrupts: of these, that it keeps the interpreter from the next step, where a thread of its own launches it.
        device: that the device is busy with it.
        beside: from its begin to its end, where it shares the device with a step.
    """

    launch: float
    interrupts: float
    device: float
    beside: float


class DeviceTimes(Protocol):
    """A model of a device's time, and what it has."""

    memory_bytes: int
    """Of each GPU."""

    def activation_bytes(self, spec: ModelSpec, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        """Peak of the largest step, beside weights and cache."""

    def step(self, work: StepWork) -> float:
        """Seconds of the device."""

    def host(self, work: StepWork) -> float:
        """Seconds of the host before the first kernel of a step: scheduling it, and booking the tokens of another."""

    def launch(self, work: StepWork) -> float:
        """Seconds in which the host launches a step's kernels, while the device is at work on those before; 0 for a
        graph that was captured earlier."""

    def compression(self, work: CompressionWork) -> CompressionTime: ...
