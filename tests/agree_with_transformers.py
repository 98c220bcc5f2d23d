"""A GGUF model in this engine and in transformers, which reads the file by its own code: prompts and greedy tokens.

python -m tests.agree_with_transformers MODEL.gguf QUESTIONS.jsonl[.gz] [--prompts 20] [--tokens 64] [--record FILE]

Both compute in float32. The exit code is 0 where all prompts have the same tokens, and all answers too. Where answers
part, the record has by how much the two tokens' logits differ: a tie to rounding is no disagreement of the models.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from experiments.records import file_hash, provenance
from experiments.workloads.sources import read_file
from zipage import LLM, SamplingParams

NEAR_TIE = 1e-3
"""Between two logits; both engines round in float32."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args(arguments)
    questions = [row["question"] for row in read_file(str(options.questions))[: options.prompts]]
    chats = [[{"role": "user", "content": question}] for question in questions]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pool = len(chats) * (512 + options.tokens)
    llm = LLM(str(options.model), dtype="float32", device=device, block_size=16, num_blocks=pool // 16)
    params = SamplingParams(temperature=0, max_tokens=options.tokens)
    outputs = llm.chat(chats, params, use_tqdm=False)
    llm.shutdown()
    del llm
    rows = list(compared(options.model, device, chats, outputs, options.tokens))
    equal = sum(row["equal"] for row in rows)
    verdict = all(row["prompt_equal"] and (row["equal"] or row["margin"] < NEAR_TIE) for row in rows)
    print(f"{equal} of {len(rows)} answers equal token for token, {sum(row['tokens'] for row in rows)} tokens")
    for number, row in enumerate(rows):
        if not row["equal"]:
            print(f"prompt {number} parts at token {row['first']}: transformers' logits differ by {row['margin']:.2g}")
    if options.record:
        record = {
            "model": options.model.name,
            "model_sha256": file_hash(options.model),
            "questions": options.questions.name,
            "dtype": "float32",
            "max_tokens": options.tokens,
            "verdict": "agree" if verdict else "differ",
            "rows": rows,
        }
        record |= provenance.collect(["-m", "tests.agree_with_transformers"]) | {"code": provenance.code_state()}
        options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if verdict else 1


def compared(path: Path, device: str, chats: list, outputs: list, num_tokens: int):
    """A row for each chat: whether prompt and answer are those of transformers, and where they part."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = as_transformers_reads(path).to(device)
    for chat, output in zip(chats, outputs, strict=True):
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt], device=device)
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens,
                repetition_penalty=1.0, temperature=None, top_p=None, top_k=None, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        answer = found.sequences[0, len(prompt) :].tolist()
        yield row(prompt, answer, [logits[0] for logits in found.logits], output)


def as_transformers_reads(path: Path) -> PreTrainedModel:
    """The model in float32. Loaded by hand, since `from_pretrained` wants the package accelerate for a GGUF file."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)["tensors"]
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    model.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{path}: transformers' tensors do not fit its model: {missing=}, {unexpected=}")
    return model.eval()


def row(prompt: list[int], answer: list[int], logits: list[torch.Tensor], output: Any) -> dict[str, Any]:
    ours = output.outputs[0].token_ids
    first = next((i for i, (a, b) in enumerate(zip(answer, ours)) if a != b), min(len(answer), len(ours)))
    equal = answer == ours
    margin = 0.0
    if not equal:
        both = first < min(len(answer), len(ours))
        margin = float(logits[first][answer[first]] - logits[first][ours[first]]) if both else float("inf")
    return {
        "prompt_equal": prompt == output.prompt_token_ids,
        "equal": equal,
        "tokens": len(answer),
        "first": None if equal else first,
        "margin": margin,
    }


if __name__ == "__main__":
    sys.exit(main())
