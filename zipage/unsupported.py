"""Options that vLLM has and Zipage does not, by name: what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zipage.checks import shown

_MODEL = "download what you need and give its folder as model"
_FORMAT = "convert the model to a folder of safetensors or a GGUF file"
ONE_DEVICE = "use tensor_parallel_size and data_parallel_size"
_LORA = "merge the adapter into the weights and load those"
_TEXT_ONLY = "prompts are text or token ids"
_GENERATE_ONLY = "the engine generates text, and neither embeds nor scores"
_GRAMMAR = "check the answer, and ask again where it does not fit"
_ONE_BY_ONE = "each step decodes one token of a request"
_PAUSED = "set swap_space, host memory for preempted requests"
_BLOCKS = "set num_blocks, kv_cache_memory_bytes or gpu_memory_utilization"
_AS_IT_IS = "edit config.json in the model's folder"
_PROCESSORS = "use logit_bias, bad_words, or the penalties"
_GRAPHS = "CUDA graphs are on unless enforce_eager=True"
_KERNELS = "the device decides which kernels run"
_RECORDS = "read llm.stats, or add to llm.step_listeners"
_ORDER = "requests are served in the order in which they were added"

LLM_OPTIONS: dict[str, str] = {
    **dict.fromkeys(("tokenizer", "tokenizer_mode", "tokenizer_revision"), "the tokenizer is the model folder's own"),
    **dict.fromkeys(("revision", "code_revision", "download_dir", "hf_token", "allowed_local_media_path"), _MODEL),
    "trust_remote_code": "code in a model's folder is never run; save its tokenizer as tokenizer.json",
    "quantization": "load FP8 in blocks or a GGUF file, which are dequantized, or unquantized weights",
    "kv_cache_dtype": "the KV cache has the model's dtype; bound it with policy and budget_tokens",
    "calculate_kv_scales": "the KV cache has the model's dtype",
    "num_gpu_blocks_override": "use num_blocks",
    **dict.fromkeys(("kv_offloading_size", "kv_offloading_backend", "kv_transfer_config"), _PAUSED),
    **dict.fromkeys(("cpu_offload_gb", "cpu_offload_params"), "weights stay on the device; take a smaller model"),
    **dict.fromkeys(("pipeline_parallel_size", "decode_context_parallel_size"), ONE_DEVICE),
    **dict.fromkeys(("prefill_context_parallel_size", "enable_expert_parallel", "worker_cls"), ONE_DEVICE),
    **dict.fromkeys(("distributed_executor_backend", "disable_custom_all_reduce"), ONE_DEVICE),
    **dict.fromkeys(("max_parallel_loading_workers", "ray_workers_use_nsight"), ONE_DEVICE),
    **dict.fromkeys(("speculative_config", "speculative_model", "num_speculative_tokens"), _ONE_BY_ONE),
    "num_lookahead_slots": _ONE_BY_ONE,
    **dict.fromkeys(("enable_lora", "enable_lora_bias", "max_loras", "max_lora_rank", "max_cpu_loras"), _LORA),
    **dict.fromkeys(("lora_extra_vocab_size", "lora_dtype", "fully_sharded_loras", "default_mm_loras"), _LORA),
    **dict.fromkeys(("enable_prompt_adapter", "max_prompt_adapters", "max_prompt_adapter_token"), _LORA),
    **dict.fromkeys(("structured_outputs_config", "guided_decoding_backend", "reasoning_parser"), _GRAMMAR),
    **dict.fromkeys(("logits_processors", "logits_processor_pattern"), _PROCESSORS),
    "max_logprobs": "the limit is fixed; SamplingParams.logprobs may be up to 20",
    "logprobs_mode": "log-probabilities are of the raw logits",
    **dict.fromkeys(("hf_overrides", "hf_config_path", "rope_scaling", "rope_theta", "config_format"), _AS_IT_IS),
    **dict.fromkeys(("generation_config", "override_generation_config"), "set SamplingParams; end tokens are read"),
    **dict.fromkeys(("model_loader_extra_config", "model_impl", "ignore_patterns", "pt_load_map_location"), _FORMAT),
    **dict.fromkeys(("task", "runner", "convert", "override_pooler_config", "pooler_config"), _GENERATE_ONLY),
    **dict.fromkeys(("limit_mm_per_prompt", "mm_processor_kwargs", "mm_processor_cache_gb"), _TEXT_ONLY),
    **dict.fromkeys(("disable_mm_preprocessor_cache", "interleave_mm_strings", "enable_prompt_embeds"), _TEXT_ONLY),
    **dict.fromkeys(("compilation_config", "cudagraph_capture_sizes", "max_seq_len_to_capture"), _GRAPHS),
    **dict.fromkeys(("attention_config", "attention_backend", "use_v2_block_manager"), _KERNELS),
    **dict.fromkeys(("disable_sliding_window", "disable_cascade_attn"), _KERNELS),
    "preemption_mode": "a request is computed again, or copied to host memory: see swap_space",
    **dict.fromkeys(("scheduling_policy", "scheduler_cls", "priority"), _ORDER),
    **dict.fromkeys(("max_num_partial_prefills", "max_long_partial_prefills", "long_prefill_token_threshold"), _ORDER),
    **dict.fromkeys(("scheduler_delay_factor", "num_scheduler_steps", "multi_step_stream_outputs"), _ORDER),
    "prefix_caching_hash_algo": "prefixes are compared whole, whatever their hash",
    **dict.fromkeys(("disable_log_stats", "collect_detailed_traces", "otlp_traces_endpoint"), _RECORDS),
    **dict.fromkeys(("show_hidden_metrics_for_version", "kv_events_config", "profiler_config"), _RECORDS),
    "served_model_name": "it is an option of `zipage serve`",
    "enable_sleep_mode": "call llm.shutdown() and make a new LLM",
    "disable_async_output_proc": "use async_scheduling=False",
    "additional_config": "each option has a name of its own",
}  # fmt: skip
"""Arguments of vLLM's `LLM`. `tensor_parallel_size` is an option here, which says so itself."""

SAMPLING_OPTIONS: dict[str, str] = {
    "best_of": "set n, and choose by cumulative_logprob",
    **dict.fromkeys(("use_beam_search", "length_penalty", "early_stopping"), "set n, and choose by cumulative_logprob"),
    **dict.fromkeys(("structured_outputs", "guided_decoding"), _GRAMMAR),
    "logits_processors": _PROCESSORS,
    "prompt_logprobs": "score a text by a forward pass of transformers' model",
    "allowed_token_ids": "use logit_bias",
    "logprob_token_ids": "use logprobs, up to 20",
    **dict.fromkeys(("prompt_logprob_token_ids", "prompt_logprob_start"), "use logprobs, up to 20"),
    "flat_logprobs": "logprobs is a list with a dictionary for each token",
    "truncate_prompt_tokens": "shorten the prompt",
    "spaces_between_special_tokens": "the text is what the tokens spell",
    **dict.fromkeys(("output_kind", "stream_interval"), "use llm.stream for single tokens"),
    "extra_args": "each option has a name of its own",
    "skip_reading_prefix_cache": "use enable_prefix_caching=False",
    "thinking_token_budget": "use max_tokens, or budget_tokens, which bounds memory",
    "repetition_detection": "use max_tokens, or a penalty",
    "routed_experts_prompt_start": "which experts a token was sent to is not told",
    "trace_decode_token_ids": "tokens are sampled",
    "skip_clone": "parameters are never changed",
}
"""Fields of vLLM's `SamplingParams`."""

CALL_OPTIONS: dict[str, str] = {
    "lora_request": _LORA,
    "prompt_adapter_request": _LORA,
    "guided_options_request": _GRAMMAR,
    "priority": _ORDER,
    "prompt_token_ids": 'give {"prompt_token_ids": [...]} or the ids as prompts',
    "tokenization_kwargs": "tokenize the prompt and give its ids",
    "chat_template_content_format": "templates get texts; parts of a message are joined",
    "tools": "describe them in a message, or give chat_template_kwargs={'tools': [...]}",
    "mm_processor_kwargs": _TEXT_ONLY,
    "trace_headers": _RECORDS,
    "arrival_time": "the clock starts when the request is added",
}
"""Arguments of vLLM's `LLM.generate`, `LLM.chat` and `LLMEngine.add_request`."""

PROMPT_KEYS: dict[str, str] = {
    **dict.fromkeys(("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs", "prompt_embeds"), _TEXT_ONLY),
    **dict.fromkeys(("encoder_prompt", "decoder_prompt", "token_type_ids"), _TEXT_ONLY),
    "cache_salt": "use an engine of your own, or enable_prefix_caching=False",
}
"""Keys of vLLM's prompts."""

NOTHING = {
    **{name: 1 for name in LLM_OPTIONS if name.endswith("parallel_size")},
    **dict.fromkeys(("disable_log_stats", "disable_custom_all_reduce", "spaces_between_special_tokens"), True),
    **{"best_of": 1, "cpu_offload_gb": 0, "kv_cache_dtype": "auto", "tokenizer_mode": "auto", "task": "auto"},
}
"""Values that ask for nothing, beside None and False."""


def drop_unsupported(where: str, given: Mapping[str, Any], unsupported: Mapping[str, str]) -> dict[str, Any]:
    """The options of `given` that are not in `unsupported`.

    Raises:
        ValueError: one of them is, with a value that asks for something.
    """
    for name in given.keys() & unsupported.keys():
        value = given[name]
        nothing = NOTHING.get(name)
        if not (value is None or value is False or (type(value), value) == (type(nothing), nothing)):
            raise ValueError(f"{where}: {name}={shown(value)} is not supported: {unsupported[name]}")
    return {name: value for name, value in given.items() if name not in unsupported}
