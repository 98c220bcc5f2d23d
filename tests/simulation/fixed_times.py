"""A device whose steps all take as long as a test says."""

from __future__ import annotations

from dataclasses import dataclass, field

from zipage import CompressionTime, CompressionWork, StepWork

COMPRESSION = CompressionTime(0.001, 0.0, 0.003, 0.006)


@dataclass
class FixedTimes:
    step_seconds: float = 0.010
    host_seconds: float = 0.002
    launch_seconds: float = 0.0
    compression_time: CompressionTime = COMPRESSION
    memory_bytes: int = 10**9
    steps: list[StepWork] = field(default_factory=list)
    compressions: list[CompressionWork] = field(default_factory=list)

    def activation_bytes(self, spec, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        return 0

    def step(self, work: StepWork) -> float:
        self.steps.append(work)
        return self.step_seconds

    def host(self, work: StepWork) -> float:
        return self.host_seconds

    def launch(self, work: StepWork) -> float:
        return 0.0 if work.is_graph else self.launch_seconds

    def compression(self, work: CompressionWork) -> CompressionTime:
        self.compressions.append(work)
        return self.compression_time
