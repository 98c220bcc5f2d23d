"""An unfinished sample as others see it."""

from __future__ import annotations

from zipage.scheduling.request import Request, Status
from zipage.stats import RequestState
from zipage.tile_table import num_blocks

ON_DEVICE = (Status.RUNNING, Status.COMPRESSING)


def request_state(request: Request) -> RequestState:
    rule = request.rule
    return RequestState(
        request_id=request.request_id,
        sample_index=request.index,
        status=request.status.value,
        num_prompt_tokens=request.num_prompt_tokens,
        num_tokens=request.num_tokens,
        max_total_tokens=request.max_total_tokens,
        entries=request.cache_len,
        blocks=num_blocks(request.block_ids) if request.status in ON_DEVICE else 0,
        policy="full" if rule is None else rule.policy.name,
        budget_tokens=None if rule is None else rule.keep,
        protected=0 if rule is None else rule.protected,
        compressions=request.num_compressions,
        pauses=request.num_pauses,
        preemptions=request.num_preemptions,
    )
