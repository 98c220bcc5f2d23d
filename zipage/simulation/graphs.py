"""Which steps are one CUDA graph, and which of the graphs a step is the first to ask for."""

from __future__ import annotations

from bisect import bisect_left

from zipage.worker.cuda_graph import DECODED_READS, DECODED_TOKENS, PROMPT_TOKENS, PROMPTS, batch_sizes


class SimulatedGraphs:
    """`StepGraphs` as far as it takes time: a graph is captured when a batch of its size first comes, and the largest
    before any other.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.most = min(max_num_batched_tokens, max_num_seqs + PROMPT_TOKENS)
        self._sizes = batch_sizes(self.most)
        self._captured: set[tuple[int, bool]] = set()

    @staticmethod
    def all_decode(prompt_tokens: int, prompt_reads: int) -> bool:
        """Whether the tokens of a step's prompts attend as decodes."""
        return prompt_tokens <= DECODED_TOKENS and prompt_reads <= DECODED_READS

    def take(self, num_tokens: int, num_prompts: int, all_decode: bool) -> bool:
        """Whether a step is one graph."""
        return all_decode or (num_prompts <= PROMPTS and num_tokens <= self.most)

    def capture(self, num_tokens: int, all_decode: bool) -> int:
        """How many graphs a step that is one captures before it runs."""
        asked = self._sizes[bisect_left(self._sizes, num_tokens)], not all_decode
        if asked in self._captured:
            return 0
        new = {asked} if self._captured else {asked, (self.most, True)}
        self._captured |= new
        return len(new)
