"""A tokenizer from a GGUF file's metadata.

Built here and not by transformers, whose reader takes seconds and which splits text before digits as GPT-2 does
where the vocabulary was trained on single digits ("smollm").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from zipage.models.loading.gguf_file import GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GGML = "tokenizer.ggml"
_CONTROL, _USER_DEFINED = 3, 4

# What is read under `tokenizer.ggml` -> its kind, as `GgufFile.get` takes it.
_KEYS = {
    "tokens": [str],
    "scores": [float],
    "token_type": [int],
    "merges": [str],
    "add_bos_token": bool,
    "add_space_prefix": bool,
    "bos_token_id": int,
    "eos_token_id": int,
    "unknown_token_id": int,
    "padding_token_id": int,
}

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER, _ENDINGS = (
    r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}",
    r"\p{Ll}\p{Lm}\p{Lo}\p{M}",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
_GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre -> how text is cut before merging
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])
_LLAMA3 = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"), _BYTES])
_QWEN2 = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"), _BYTES])
_GPT4O = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_GPT4O_SPLIT), "isolated"), _BYTES])
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": _GPT4O,
}


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Build the tokenizer: byte-level BPE ("gpt2") or sentencepiece's BPE ("llama").

    Raises:
        ValueError: the file holds no vocabulary, or one whose rules are not known here.
    """
    kind, pre = file.get(f"{_GGML}.model", str), file.get(f"{_GGML}.pre", str)
    if kind is None or not file.get(f"{_GGML}.tokens", [str]):
        raise ValueError(f"{file.path} holds no tokenizer: pass skip_tokenizer_init=True and prompts as token ids")
    metadata = _checked(file)
    if kind == "llama" and "scores" in metadata:
        tokenizer, add_bos = _sentencepiece_bpe(metadata), True
    elif kind == "gpt2" and pre in PRE_TOKENIZERS:
        tokenizer, add_bos = _byte_level_bpe(metadata, pre), PRE_TOKENIZERS[pre] is _LLAMA3
    else:
        raise ValueError(
            f"{file.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported (supported: "
            f"{', '.join(PRE_TOKENIZERS)}): pass skip_tokenizer_init=True, or a folder with tokenizer.json"
        )
    _add_tokens(tokenizer, metadata)
    bos = metadata.get("bos_token_id")
    if bos is not None and metadata.get("add_bos_token", add_bos):
        token = metadata["tokens"][bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, bos)]
        )
    context = file.get(f"{file.metadata.get('general.architecture')}.context_length", int)
    return _wrapped(tokenizer, metadata, file.get("tokenizer.chat_template", str), context)


def _checked(file: GgufFile) -> dict[str, Any]:
    """The keys of `_KEYS` that the file has.

    Raises:
        ValueError: one is of another kind, of another length than the vocabulary, or no token's id; a token is twice
            in the vocabulary.
    """
    metadata = {key: value for key, kind in _KEYS.items() if (value := file.get(f"{_GGML}.{key}", kind)) is not None}
    size = len(metadata["tokens"])
    if len(set(metadata["tokens"])) < size:
        raise ValueError(f"{file.path}: GGUF key {_GGML}.tokens has a token twice")
    for key, value in metadata.items():
        where = f"{file.path}: GGUF key {_GGML}.{key}"
        if key in ("scores", "token_type") and len(value) != size:
            raise ValueError(f"{where} has {len(value)} values for {size} tokens")
        if key.endswith("_token_id") and not 0 <= value < size:
            raise ValueError(f"{where} is {value}: must be the id of one of {size} tokens")
        if key == "merges" and not all(" " in merge[1:-1] for merge in value):
            raise ValueError(f"{where}: each merge must be two tokens with a space between")
    return metadata


def _byte_level_bpe(metadata: dict[str, Any], pre: str) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(metadata["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("merges", [])]
    # Llama 3's vocabulary has tokens that no merges lead to; a word that is one of them is taken whole.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=PRE_TOKENIZERS[pre] is _LLAMA3))
    if PRE_TOKENIZERS[pre] is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: dict[str, Any]) -> Tokenizer:
    """Merges are every pair of pieces that makes a piece, the piece of the best score first."""
    tokens, scores = metadata["tokens"], metadata["scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(score, pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[0], reverse=True)
    unknown = metadata.get("unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(vocab, [pair for _, pair in merges], unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefix = metadata.get("add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Tokens that text is searched for before anything else; the control tokens among them are special."""
    kinds = metadata.get("token_type", [])
    typed = list(zip(metadata["tokens"], kinds))
    control = [AddedToken(token, normalized=False, special=True) for token, kind in typed if kind == _CONTROL]
    user_defined = [AddedToken(token, normalized=False) for token, kind in typed if kind == _USER_DEFINED]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user_defined)


def _wrapped(
    tokenizer: Tokenizer, metadata: dict[str, Any], chat_template: str | None, context: int | None
) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"{key}_token_id") for name, key in keys.items()}
    tokens = metadata["tokens"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        **{name: None if index is None else tokens[index] for name, index in ids.items()},
        **({} if context is None else {"model_max_length": context}),
    )
