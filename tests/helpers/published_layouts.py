"""Published models in small: the keys of their config files, the kind of their tokenizer, the shape of their template.

The sizes are tiny and the vocabulary is trained on a few lines; keys and windows are those of the published files. Ids
are written as the names of their tokens.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from helpers import published_templates as templates
from helpers.vocabularies import LINES, sp_model

SPACE = "\u2581"
LINES = [*LINES, "Thought, then an answer: 4. 你好！再见。<<SYS>> [INST] <|user|> " * 3]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")


class Layout(NamedTuple):
    """A published directory."""

    config: dict[str, Any]
    tokenizer: Callable[[Path], tokenizers.Tokenizer]  # writes a .model into the directory, if there is one
    tokenizer_config: dict[str, Any]
    generation: dict[str, Any]
    jinja: str
    answers: list[tuple[str, str]]  # replacements in `jinja` that put {% generation %} blocks around what is trained
    window: int  # tokens, positions stretched
    thoughts: bool = False  # the template knows them


# --- tokenizers


def byte_level(
    *splits: pre_tokenizers.PreTokenizer,
    special: tuple[str, ...],
    plain: tuple[str, ...] = (),
    first: bool = False,
    nfc: bool = False,
    bos: str | None = None,
    ignore_merges: bool = False,
) -> Callable[[Path], tokenizers.Tokenizer]:
    """Byte-level BPE; `special` tokens before (`first`) or after the pieces, then the merely added ones, `plain`."""

    def write(directory: Path) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
        backend.normalizer = normalizers.NFC() if nfc else None
        own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not nfc and not ignore_merges)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, own]) if splits else own
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        names = [*special, *plain] if first else []
        trainer = trainers.BpeTrainer(
            vocab_size=450, initial_alphabet=alphabet, special_tokens=names, show_progress=False
        )
        backend.train_from_iterator(LINES, trainer)
        if first:  # the trainer makes all of them special
            settings = json.loads(backend.to_str())
            for token in settings["added_tokens"]:
                token["special"] = token["content"] in special
            backend = tokenizers.Tokenizer.from_str(json.dumps(settings))
        for name in () if first else (*special, *plain):
            backend.add_tokens([AddedToken(name, special=name in special, normalized=False)])
        level = processors.ByteLevel(trim_offsets=False)
        steps = [level, begin(backend, bos)] if bos and ignore_merges else [begin(backend, bos)] if bos else [level]
        backend.post_processor = processors.Sequence(steps) if len(steps) > 1 else None if first else steps[0]
        return backend

    return write


def begin(backend: tokenizers.Tokenizer, bos: str) -> processors.TemplateProcessing:
    """The post-processor that writes `bos` before every text."""
    names = [(bos, backend.token_to_id(bos))]
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=names)


def sentencepiece(
    legacy: bool = True, prefix: bool = True, bos: str | None = "<s>", special: tuple[str, ...] = (), **changes: Any
) -> Callable[[Path], tokenizers.Tokenizer]:
    """SentencePiece BPE with bytes, as .model and as the tokenizer.json that transformers made of it.

    legacy: the space before a text comes from the normalizer, otherwise from Metaspace, before the first text only.
    """

    def write(directory: Path) -> tokenizers.Tokenizer:
        options = {"vocab_size": 460, "byte_fallback": True, "normalization_rule_name": "identity"}
        options |= {"remove_extra_whitespaces": False, "add_dummy_prefix": prefix, "split_digits": True}
        path = directory / "tokenizer.model"
        path.write_bytes(sp_model(**options | {"control_symbols": list(special)} | changes))
        made = SentencePieceExtractor(str(path)).extract(models.BPE)
        bpe = models.BPE(made["vocab"], made["merges"], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        backend = tokenizers.Tokenizer(bpe)
        if legacy:
            before = [normalizers.Prepend(SPACE)] if prefix else []
            backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(back + [decoders.Strip(" ", 1, 0)] * prefix)
        control = sorted((i, name) for name, i in made["vocab"].items() if i < 3 + len(special))
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for _, name in control])
        if bos:
            backend.post_processor = begin(backend, bos)
        return backend

    return write


def split(expression: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")


# --- what the files share

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
USUAL = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
DRAWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}  # keys of generation_config.json


def config(kind: str, name: str, kv: int, *, bos: Any, eos: Any, eps: float, **more: Any) -> dict[str, Any]:
    ids = {"bos_token_id": bos, "eos_token_id": eos, "rms_norm_eps": eps, "num_key_value_heads": kv}
    return {"architectures": [f"{name}ForCausalLM"], "model_type": kind} | TINY | USUAL | ids | more


def added(name: str, normalized: bool = False) -> dict[str, Any]:
    """A special token as tokenizer_config.json of LLaMA 2 and DeepSeek has it."""
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": name} | flags


LLAMA2_TOKENS = {"add_bos_token": True, "add_eos_token": False, "bos_token": added("<s>"), "eos_token": added("</s>")}
LLAMA2_TOKENS |= {"unk_token": added("<unk>"), "pad_token": None, "padding_side": "right", "sp_model_kwargs": {}}
LLAMA2_TOKENS |= {"legacy": False, "model_max_length": 10**30, "clean_up_tokenization_spaces": False}
LLAMA2_TOKENS |= {"tokenizer_class": "LlamaTokenizer"}
SENTENCES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
SENTENCES |= {"legacy": False, "sp_model_kwargs": {}, "clean_up_tokenization_spaces": False}
QWEN = {"add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
QWEN |= {"unk_token": None, "errors": "replace", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer"}
QWEN |= {"add_bos_token": False, "model_max_length": 131072, "clean_up_tokenization_spaces": False}
QWEN |= {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
QWEN_STOPS = {"bos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>"}
QWEN_STOPS |= {"eos_token_id": ["<|im_end|>", "<|endoftext|>"], "top_k": 20, "repetition_penalty": 1.1} | DRAWN
R1_BOS, R1_EOS, R1_USER, R1_ASSISTANT = templates.DEEPSEEK
R1_TOKENS = {"add_bos_token": True, "add_eos_token": False, "bos_token": added(R1_BOS, True)}
R1_TOKENS |= {"eos_token": added(R1_EOS, True), "pad_token": added(R1_EOS, True), "unk_token": None, "legacy": True}
R1_TOKENS |= {"sp_model_kwargs": {}, "model_max_length": 16384, "tokenizer_class": "LlamaTokenizerFast"}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_ROPE |= {"rope_type": "llama3"}
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", *templates.HEADERS[1:], "<|python_tag|>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
NONE: dict[str, Any] = {"attention_bias": False, "attention_dropout": 0.0}

# --- where the answers stand, in the words of transformers

ON, OFF = "{%- generation %}", "{%- endgeneration %}"


def whole(line: str) -> tuple[str, str]:
    """The replacement for a line of a template that writes an answer and its end."""
    return line, ON + line + OFF


def after(role: str, content: str, end: str) -> tuple[str, str]:
    """The replacement for the line that writes `content` and the `end` of every role."""
    line = f"{{{{- {content} + '{end}' }}}}"
    return line, f"{{%- if {role} == 'assistant' %}}{ON}{line}{OFF}{{%- else %}}{line}{{%- endif %}}"


# fmt: off
TOOL = "\n    {%- elif message.role == 'tool'"  # the branch after that of the assistant
QWEN3_ANSWERS = [
    ("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n' }}" + ON),
    ("{{- '<|im_end|>\\n' }}" + TOOL, "{{- '<|im_end|>' }}" + OFF + "{{- '\\n' }}" + TOOL),
]
QWEN25_LINE = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
QWEN25_ANSWERS = [(QWEN25_LINE, "{{- '<|im_start|>' + message.role + '\\n' }}" + after(
    "message.role", "message.content", "<|im_end|>")[1] + "{{- '\\n' }}")]
R1_ANSWERS = [(f"{{{{- '{R1_ASSISTANT}' + content + '{R1_EOS}' }}}}",
               f"{{{{- '{R1_ASSISTANT}' }}}}{ON}{{{{- content + '{R1_EOS}' }}}}{OFF}")]
LLAMA32_ANSWERS = [after("message['role']", "message['content'] | trim", "<|eot_id|>")]
CHATML_ANSWERS = [whole("{{- message['content'] + '<|im_end|>' }}")]  # the first, which is that of the assistant
MINIMIND_LINES = ("{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}\n"
                  "            {{- content.lstrip('\\n') }}")
MINIMIND_ANSWERS = [
    (MINIMIND_LINES, "{{- '<think>\\n' }}{%- if thought %}" + ON + "{{- thought.strip('\\n') + '\\n</think>\\n\\n' }}"
     + "{{- content + '<|im_end|>' }}" + OFF + "{%- else %}{{- '\\n</think>\\n\\n' }}" + ON
     + "{{- content + '<|im_end|>' }}" + OFF + "{%- endif %}"),
    ("{{- '<|im_end|>\\n' }}" + TOOL, "{{- '\\n' }}" + TOOL),
]

# --- the layouts

LAYOUTS = {
    "LLaMA-2 chat": Layout(
        config("llama", "Llama", 4, bos="<s>", eos="</s>", eps=1e-5, max_position_embeddings=4096, pretraining_tp=1,
               rope_scaling=None, tie_word_embeddings=False),
        sentencepiece(), LLAMA2_TOKENS,
        {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<unk>", "max_length": 4096} | DRAWN,
        templates.LLAMA2, [whole("{{- ' ' + content.strip() + ' ' + eos_token }}")], 4096,
    ),
    "Llama-3.2 Instruct": Layout(
        config("llama", "Llama", 2, bos=HEADERS[0], eos=["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], eps=1e-5,
               head_dim=8, max_position_embeddings=131072, mlp_bias=False, pretraining_tp=1, rope_theta=500000.0,
               rope_scaling={"factor": 32.0} | LLAMA3_ROPE, tie_word_embeddings=True, **NONE),
        byte_level(split(LLAMA3_SPLIT), special=HEADERS, bos=HEADERS[0], ignore_merges=True),
        {"bos_token": HEADERS[0], "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True,
         "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 131072,
         "tokenizer_class": "PreTrainedTokenizerFast"},
        {"bos_token_id": HEADERS[0], "eos_token_id": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]} | DRAWN,
        templates.LLAMA32, LLAMA32_ANSWERS, 131072,
    ),
    "Mistral-v0.3 Instruct": Layout(
        config("mistral", "Mistral", 2, bos="<s>", eos="</s>", eps=1e-5, attention_dropout=0.0, rope_theta=1000000.0,
               max_position_embeddings=32768, sliding_window=None, tie_word_embeddings=False),
        sentencepiece(legacy=False, special=(*templates.BRACKETS[2:], "[TOOL_RESULTS]", "[/TOOL_RESULTS]")),
        SENTENCES | {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True, "pad_token": None},
        {"bos_token_id": "<s>", "eos_token_id": "</s>"},
        templates.MISTRAL3, [whole("{{- ' ' + message['content'] | trim + eos_token }}")], 32768,
    ),
    "TinyLlama Chat": Layout(
        config("llama", "Llama", 2, bos="<s>", eos="</s>", eps=1e-5, attention_bias=False, pretraining_tp=1,
               max_position_embeddings=2048, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False),
        sentencepiece(), SENTENCES | {"pad_token": "</s>", "padding_side": "right", "model_max_length": 2048},
        {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<unk>", "max_length": 2048},
        templates.TINYLLAMA, [whole("{{- message['content'] + eos_token }}")], 2048,
    ),
    "SmolLM2 Instruct": Layout(
        config("llama", "Llama", 2, bos="<|im_start|>", eos="<|im_end|>", eps=1e-5, is_llama_config=True,
               max_position_embeddings=8192, mlp_bias=False, pad_token_id="<|im_end|>", pretraining_tp=1,
               rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
               **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}, **NONE),
        byte_level(pre_tokenizers.Digits(individual_digits=True), special=(*CHATML, "<repo_name>"), first=True),
        {"add_prefix_space": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
         "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
         "unk_token": "<|endoftext|>", "clean_up_tokenization_spaces": False, "model_max_length": 8192,
         "tokenizer_class": "GPT2Tokenizer", "vocab_size": 49152},
        {"bos_token_id": "<|im_start|>", "eos_token_id": "<|im_end|>", "pad_token_id": "<|im_end|>"},
        templates.SMOLLM2, CHATML_ANSWERS, 8192,
    ),
    "Yi-1.5 Chat": Layout(
        config("llama", "Llama", 1, bos="<|startoftext|>", eos="<|endoftext|>", eps=1e-6, pad_token_id="<unk>",
               max_position_embeddings=4096, pretraining_tp=1, rope_scaling=None, rope_theta=5000000.0,
               tie_word_embeddings=False, **NONE),
        sentencepiece(prefix=False, bos=None, special=("<|Human|>", "<|Assistant|>", *CHATML[1:]),
                      bos_piece="<|startoftext|>", eos_piece="<|endoftext|>"),
        SENTENCES | {"add_bos_token": False, "add_eos_token": False, "bos_token": "<|startoftext|>", "legacy": True,
                     "eos_token": "<|im_end|>", "pad_token": "<unk>", "model_max_length": 4096},
        {"bos_token_id": "<|startoftext|>", "eos_token_id": "<|im_end|>", "pad_token_id": "<unk>"} | DRAWN,
        templates.YI, CHATML_ANSWERS, 4096,
    ),
    "Qwen2.5 Instruct": Layout(
        config("qwen2", "Qwen2", 2, bos="<|endoftext|>", eos="<|im_end|>", eps=1e-6, attention_dropout=0.0,
               max_position_embeddings=32768, max_window_layers=21, rope_theta=1000000.0, sliding_window=32768,
               tie_word_embeddings=True, use_sliding_window=False),
        byte_level(split(QWEN_SPLIT), special=CHATML, plain=templates.TOOLS, nfc=True), QWEN, QWEN_STOPS,
        templates.QWEN25, QWEN25_ANSWERS, 32768,
    ),
    "Qwen3": Layout(
        config("qwen3", "Qwen3", 2, bos="<|endoftext|>", eos="<|im_end|>", eps=1e-6, head_dim=16, rope_scaling=None,
               max_position_embeddings=40960, max_window_layers=28, rope_theta=1000000, sliding_window=None,
               tie_word_embeddings=True, use_sliding_window=False, **NONE),
        byte_level(split(QWEN_SPLIT), special=CHATML, plain=(*templates.TOOLS, *THINK), nfc=True), QWEN, QWEN_STOPS,
        templates.QWEN3, QWEN3_ANSWERS, 40960, thoughts=True,
    ),
    "DeepSeek-R1-Distill-Qwen": Layout(
        config("qwen2", "Qwen2", 2, bos=R1_EOS, eos=R1_EOS, eps=1e-6, attention_dropout=0.0, use_mrope=False,
               max_position_embeddings=131072, max_window_layers=21, rope_theta=10000, sliding_window=4096,
               tie_word_embeddings=False, use_sliding_window=False),
        byte_level(split(QWEN_SPLIT), special=(R1_EOS, R1_BOS), plain=(R1_USER, R1_ASSISTANT, "<|EOT|>", *THINK),
                   nfc=True, bos=R1_BOS),
        R1_TOKENS, {"bos_token_id": R1_BOS, "eos_token_id": R1_EOS} | DRAWN, templates.R1, R1_ANSWERS, 131072,
    ),
    "DeepSeek-R1-Distill-Llama": Layout(
        config("llama", "Llama", 2, bos=R1_BOS, eos=R1_EOS, eps=1e-5, head_dim=8, max_position_embeddings=131072,
               mlp_bias=False, pretraining_tp=1, rope_scaling={"factor": 8.0} | LLAMA3_ROPE, rope_theta=500000.0,
               tie_word_embeddings=False, **NONE),
        byte_level(split(LLAMA3_SPLIT), special=templates.DEEPSEEK, plain=THINK, bos=R1_BOS, ignore_merges=True),
        R1_TOKENS, {"bos_token_id": R1_BOS, "eos_token_id": R1_EOS} | DRAWN, templates.R1, R1_ANSWERS, 131072,
    ),
    "MiniMind2": Layout(
        config("llama", "Llama", 2, bos="<|im_start|>", eos="<|im_end|>", eps=1e-5, head_dim=8, mlp_bias=False,
               max_position_embeddings=32768, pretraining_tp=1, rope_scaling=None, rope_theta=1000000.0,
               tie_word_embeddings=True, **NONE),
        byte_level(special=CHATML, plain=(*templates.TOOLS, *THINK, "<|buffer1|>"), first=True),
        {"add_bos_token": False, "add_eos_token": False, "add_prefix_space": False, "bos_token": "<|im_start|>",
         "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>", "legacy": True,
         "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "sp_model_kwargs": {},
         "spaces_between_special_tokens": False, "image_token": "<|image_pad|>", "model_max_length": 131072,
         "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"},
        {"bos_token_id": "<|im_start|>", "eos_token_id": "<|im_end|>"},
        templates.MINIMIND, MINIMIND_ANSWERS, 32768, thoughts=True,
    ),
}
# fmt: on
STRETCHED = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}
LAYOUTS["Qwen2.5 Instruct, YaRN of its card"] = LAYOUTS["Qwen2.5 Instruct"]._replace(
    config=LAYOUTS["Qwen2.5 Instruct"].config | STRETCHED, window=131072
)


def write_layout(layout: Layout, directory: Path) -> None:
    """Write the directory of a layout, with random weights that all matter."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = layout.tokenizer(directory)
    ids = backend.get_vocab(with_added_tokens=True)

    def with_ids(values: dict[str, Any]) -> dict[str, Any]:
        """The settings with ids in place of the names of tokens."""
        named = {key: value for key, value in values.items() if key.endswith("token_id")}
        numbers = {k: [ids[each] for each in v] if isinstance(v, list) else ids[v] for k, v in named.items()}
        return values | numbers

    settings = with_ids(layout.config) | {"vocab_size": len(ids) + 6}  # rows of padding, as Qwen has them
    config = transformers.AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.dim() == 1), 0.2)
    model.save_pretrained(directory)  # then the files as they were published
    backend.save(str(directory / "tokenizer.json"))
    added = json.loads(backend.to_str())["added_tokens"]
    decoder = {str(token.pop("id")): token for token in added}
    files = {"config": settings, "generation_config": with_ids(layout.generation)}
    files["tokenizer_config"] = layout.tokenizer_config | {
        "added_tokens_decoder": decoder,
        "chat_template": layout.jinja,
    }
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf8")


def with_blocks(layout: Layout) -> str:
    """The template of a layout with {% generation %} blocks around what is trained."""
    jinja = layout.jinja
    for old, new in layout.answers:
        assert old in jinja, old
        jinja = jinja.replace(old, new, 1)
    return jinja
