"""`python -m experiments.bench_transformers`: our engine in a batch against `transformers.generate` one by one.

Both answer prompts of the same workload with the same weights in float32, on the same threads, greedily, with a fixed
number of new tokens each. `transformers` gets only the first few of the prompts: its rate does not depend on how many.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.backends import BACKENDS, Backend, get_backend
from experiments.command_line import Parser, stoppable
from experiments.config.compose import load_experiment
from experiments.config.schema import Experiment, engine_options, to_dict
from experiments.errors import UsageError
from experiments.paths import ROOT
from experiments.records import provenance, write_json
from experiments.running.models import LocalModel, find_model
from experiments.running.prompts import PromptRenderer
from experiments.running.scenarios import TimedRequest, serve
from experiments.workloads import load_problems
from zipage import SamplingParams


def bench(experiment: Experiment, batch: int, alone: int, tokens: int) -> dict[str, Any]:
    """Measure both, the engine first, after a warm-up of each.

    Args:
        experiment: model, engine, hardware and workload.
        batch: requests that the engine serves together.
        alone: requests that `transformers` answers one after the other.
        tokens: new tokens of each request.

    Returns:
        Output tokens per second of both, their ratio, and the share of tokens that both chose alike.
    """
    import torch

    if experiment.hardware.threads is not None:
        torch.set_num_threads(experiment.hardware.threads)
    started = provenance.now()
    problems = [p for p in load_problems(experiment.workload) if p.error is None][:batch]
    if len(problems) < batch:
        raise UsageError(f"--batch {batch}: the workload holds {len(problems)} problems")
    model = find_model(experiment.model)
    try:
        engine = get_backend(experiment.backend, BACKENDS)(**engine_options(experiment, str(model.path)))
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    renderer = PromptRenderer(experiment.workload, experiment.model, engine.get_tokenizer())
    prompts = [prompt.token_ids for prompt in renderer.render_all(problems)]
    engine_seconds, engine_tokens = _engine(engine, prompts, tokens)
    del engine
    device = "cpu" if provenance.device_name(experiment.hardware.device) == "cpu" else "cuda"
    naive_seconds, naive_tokens = _transformers(model, device, prompts[:alone], tokens)

    engine_rate, naive_rate = batch * tokens / engine_seconds, alone * tokens / naive_seconds
    pairs = [pair for a, b in zip(engine_tokens, naive_tokens, strict=False) for pair in zip(a, b, strict=True)]
    return {
        "engine": {"requests": batch, "seconds": engine_seconds, "output_tokens_per_second": engine_rate},
        "transformers": {"requests": alone, "seconds": naive_seconds, "output_tokens_per_second": naive_rate},
        "ratio": engine_rate / naive_rate,
        "same_tokens": sum(a == b for a, b in pairs) / len(pairs),
        "new_tokens": tokens,
        "prompt_tokens": sum(map(len, prompts)),
        "config": {group: to_dict(experiment)[group] for group in ("model", "engine", "workload", "hardware")},
        "provenance": provenance.collect()
        | {"started": started, "ended": provenance.now(), "model_files": model.files},
    }


def _engine(engine: Backend, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
    def params(count: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)

    # Warm up on other tokens, so that no prefix of a timed prompt is cached.
    serve(engine, [TimedRequest("warm-up", prompts[0][::-1], params(4))], progress=False)
    served = serve(engine, [TimedRequest(str(i), prompt, params(tokens)) for i, prompt in enumerate(prompts)])
    outputs = [served.outputs[str(i)] for i in range(len(prompts))]
    refused = next((output.error for output in outputs if output.error is not None), None)
    if refused is not None:
        raise UsageError(refused)
    return served.seconds, [output.outputs[0].token_ids for output in outputs]


def _transformers(
    local: LocalModel, device: str, prompts: list[list[int]], tokens: int
) -> tuple[float, list[list[int]]]:
    import torch

    model = _load_transformers(local.path).to(device).eval()
    model.generation_config.eos_token_id = None

    def answer(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt], device=device)
        options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()

    answer(prompts[0], 4)
    begin = time.perf_counter()
    answers = [answer(prompt, tokens) for prompt in prompts]
    return time.perf_counter() - begin, answers


def _load_transformers(path: Path) -> Any:
    """The model in float32. A GGUF file is unpacked here: `from_pretrained` would want `accelerate` for that."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if path.suffix != ".gguf":
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    keys = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    missing = set(keys.missing_keys) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    if missing or keys.unexpected_keys:
        raise RuntimeError(f"transformers did not load {path.name}: {sorted(missing) or keys.unexpected_keys}")
    return model


@stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.bench_transformers", description=__doc__)
    parser.add_argument("options", nargs="*", help="as for experiments.run, such as model=smollm2 hardware.threads=2")
    parser.add_argument("--batch", type=int, default=32, help="requests the engine serves together (32)")
    parser.add_argument("--alone", type=int, default=4, help="requests transformers answers one by one (4)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each request (64)")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench_transformers.json", help="the record")
    given = parser.parse_args(arguments)
    try:
        if min(given.batch, given.alone, given.tokens) < 1 or given.alone > given.batch:
            raise UsageError("--batch, --alone and --tokens must be at least 1, and --alone at most --batch")
        experiment = load_experiment(["engine.dtype=float32", *given.options])
        record = bench(experiment, given.batch, given.alone, given.tokens)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.output, record)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ours, theirs = record["engine"], record["transformers"]
    print(f"engine, batch of {given.batch}:          {ours['output_tokens_per_second']:8.1f} output tokens/s")
    print(f"transformers, one at a time: {theirs['output_tokens_per_second']:8.1f} output tokens/s")
    print(f"ratio {record['ratio']:.2f}; same tokens {record['same_tokens']:.1%}; record: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
