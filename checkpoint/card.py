"""The model card of the Hugging Face Hub, README.md, from what the run has recorded; nothing is made up.

What the record lacks is left out and named: licence and languages of a model are its author's to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from checkpoint.history import Stage, parameters, read_object
from checkpoint.locate import has_tokenizer, is_adapter

# identifiers that the Hub knows (huggingface.co/docs/hub/repositories-licenses)
_NAMES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc "
    "cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
    "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 "
    "eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c "
    "ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr llama2 "
    "llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other"
)
LICENCES = frozenset(_NAMES.split())
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
ROPE_TYPES = (None, "default", "linear", "dynamic", "yarn", "longrope", "llama3")  # those that transformers has
WHAT = {"pretrain": "pretraining", "fine_tuning": "fine-tuning", "quantize": "quantization"}
SAMPLES = 4


@dataclass(frozen=True)
class Own:
    """What only the author can say."""

    name: str
    licence: str | None = None
    languages: tuple[str, ...] = ()
    base_model: str | None = None
    """name on the Hub"""

    def __post_init__(self) -> None:
        """Raise ValueError for words that the Hub does not accept."""
        for each in self.languages:
            if not LANGUAGE.fullmatch(each):
                raise ValueError(f"--language {each} is no code of ISO 639 such as zh or en (nor code, multilingual)")
        if self.base_model and not HUB_NAME.fullmatch(self.base_model):
            raise ValueError(f"--base_model {self.base_model} is no name on the Hub such as owner/model")


def card(model: Path, stages: list[Stage], base: str | None, own: Own) -> tuple[str, list[str]]:
    """Return the text of README.md, and what the record lacks."""
    base = own.base_model or base
    missing = list(lacks(model, stages, own))
    blocks = [front_matter(model, stages, base, own), f"# {own.name}", summary(model, stages, base)]
    for number, stage in enumerate(reversed(stages), 1):
        title = WHAT.get(stage.script, stage.script)
        blocks += [f"## {number}. {title[:1].upper()}{title[1:]}", *of_stage(stage)]
    if stages and stages[0].samples:
        blocks += ["## What it writes", *samples(stages[0])]
    blocks += ["## How to use it", *usage(model, own)]
    if missing:
        blocks += ["## Not recorded", "\n".join(f"- {each}" for each in missing)]
    return "\n\n".join(blocks) + "\n", missing


def front_matter(model: Path, stages: list[Stage], base: str | None, own: Own) -> str:
    """Return the YAML at the top that the Hub reads."""
    head: dict[str, Any] = {}
    if own.languages:
        head["language"] = list(own.languages)
    if own.licence:
        known = own.licence.lower() in LICENCES
        head |= {"license": own.licence.lower()} if known else {"license": "other", "license_name": own.licence}
    head["library_name"] = "peft" if is_adapter(model) else "transformers"
    head["pipeline_tag"] = "text-generation"
    if base and HUB_NAME.fullmatch(base) and not Path(base).exists():
        kinds = {"quantize": "quantized"}
        head["base_model"] = base
        made_by = stages[0].script if stages else ""
        head["base_model_relation"] = "adapter" if is_adapter(model) else kinds.get(made_by, "finetune")
    if tags := list(dict.fromkeys(WHAT[stage.script] for stage in reversed(stages) if stage.script in WHAT)):
        head["tags"] = tags
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def summary(model: Path, stages: list[Stage], base: str | None) -> str:
    """Return the first paragraph: what kind of model it is, and its size."""
    config = read_object(model / "config.json")
    if is_adapter(model):
        adapter = read_object(model / "adapter_config.json")
        return (
            f"An adapter ({adapter.get('peft_type', 'PEFT')}, rank {adapter.get('r', '?')}) of "
            f"{base or adapter.get('base_model_name_or_path') or 'a model that is not named'}, "
            f"{parameters(model) or 0:,} parameters."
        )
    shape = {
        "layers": config.get("num_hidden_layers"),
        "hidden size": config.get("hidden_size"),
        "heads": config.get("num_attention_heads"),
        "key and value heads": config.get("num_key_value_heads"),
        "feed-forward size": config.get("intermediate_size"),
        "vocabulary": config.get("vocab_size"),
        "context": config.get("max_position_embeddings"),
    }
    lines = [f"| {name} | {value:,} |" for name, value in shape.items() if isinstance(value, int)]
    values = parameters(model)
    quantized = isinstance(config.get("quantization_config"), dict)
    size = f", {values:,} {'stored values' if quantized else 'parameters'}" if values else ""
    begun = f" It began with {base}." if base else ""
    return f"A {config.get('model_type', '?')} language model{size}.{begun}\n\n| | |\n|---|---|\n" + "\n".join(lines)


def of_stage(stage: Stage) -> Iterator[str]:
    """Yield the paragraphs on one run: data, settings, losses."""
    if stage.data:
        lines = ["| data | licence | documents | tokens | SHA-256 |", "|---|---|---|---|---|"]
        for each in stage.data:
            numbers = [f"{n:,}" if n is not None else "" for n in (each.documents, each.tokens)]
            cells = [each.name, each.licence or "not recorded", *numbers, (each.sha256 or "")[:12]]
            lines.append(f"| {' | '.join(cells)} |")
        yield "\n".join(lines)
    yield "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in settings(stage))])
    for where, numbers in held_out(stage):
        in_nats = stage.settings.get("objective") in (None, "sft")  # the others are losses of pairs
        rows = [f"| {name} | {value} |" for name, value in losses(numbers, in_nats)]
        yield "\n".join([f"| on {where} | |", "|---|---|", *rows])


def held_out(stage: Stage) -> list[tuple[str, dict[str, float]]]:
    """Return where the losses to show were measured, and the losses; nothing for a run that measured none."""
    places = {"all held-out data": stage.result, "a part of the held-out data, on the way": stage.on_the_way}
    return [(where, numbers) for where, numbers in places.items() if "loss" in numbers][:1]


def settings(stage: Stage) -> Iterator[tuple[str, Any]]:
    """Yield names and values of the settings that matter to a reader."""
    own, train = stage.settings, stage.settings.get("train") or {}
    data, optim = own.get("data") or {}, own.get("optim") or {}
    lora = own.get("lora") or {}
    steps, tokens = stage.progress.get("step"), stage.progress.get("tokens")
    values = {
        "objective": own.get("objective"),
        "method": own.get("method"),
        "bits": own.get("bits"),
        "steps": f"{steps:,}" if isinstance(steps, int) else None,
        "tokens seen": f"{tokens:,}" if isinstance(tokens, int) else None,
        "rows of a step": data.get("batch_size"),
        "tokens of a row": data.get("seq_len"),
        "optimizer": optim.get("optimizer"),
        "learning rate": optim.get("lr"),
        "LoRA": f"{lora['method']}, rank {lora.get('r')}" if lora.get("method") not in (None, "none") else None,
        "dtype": train.get("dtype"),
        "seed": train.get("seed"),
        "code": stage.record.get("git"),
        "PyTorch": (stage.record.get("versions") or {}).get("torch"),
    }
    yield from ((name, value) for name, value in values.items() if value is not None)


def losses(numbers: dict[str, float], in_nats: bool) -> Iterator[tuple[str, str]]:
    """Yield names and values of measures; the loss with its 95 % interval where its standard error is recorded."""
    error = numbers.get("loss_error")
    for name, value in numbers.items():
        if name in ("steps", "tokens", "model", "loss_error") or not isinstance(value, (int, float)):
            continue
        text = f"{value:.4g}"
        if name == "loss":
            text = f"{value:.3f}" + " nats per token" * in_nats
            text += f", 95 % interval {value - 1.96 * error:.3f} to {value + 1.96 * error:.3f}" if error else ""
        yield name.replace("_", " "), text


def samples(stage: Stage) -> Iterator[str]:
    """Yield what the model wrote to the first prompts of the run, in the order of the record."""
    yield f"To the first prompts of the run, at step {stage.samples[0]['step']:,}; none is chosen."
    for row in stage.samples[:SAMPLES]:
        fence = "~~~~"
        yield f"{fence}\n{row.get('prompt', '')}\n-->\n{row.get('text', '')}\n{fence}".replace("\r", " ")


def usage(model: Path, own: Own) -> Iterator[str]:
    """Yield how to load the model."""
    config = read_object(model / "config.json")
    rope = (config.get("rope_scaling") or config.get("rope_parameters") or {}).get("rope_type")
    chat = "chat_template" in read_object(model / "tokenizer_config.json") or (model / "chat_template.jinja").is_file()
    if is_adapter(model):
        base = read_object(model / "adapter_config.json").get("base_model_name_or_path")
        load = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{own.name}")'
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
    else:
        load = f'AutoModelForCausalLM.from_pretrained("{own.name}")'
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if rope in ROPE_TYPES and has_tokenizer(model):
        ask = (
            'ids = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], add_generation_prompt=True, '
            'return_tensors="pt", return_dict=True)'
            if chat
            else 'ids = tokenizer("...", return_tensors="pt")'
        )
        lines = [imports, "", f'tokenizer = AutoTokenizer.from_pretrained("{own.name}")', f"model = {load}", ask]
        lines.append("print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))")
        yield "```python\n" + "\n".join(lines) + "\n```"
    else:
        why = f"its position encoding ({rope}) is not one of transformers'" if rope else "it has no tokenizer beside it"
        yield f"Only the code that trained it reads it: {why}."
    yield f"With the code that trained it: `python eval.py --model DIR{'' if chat else ' --raw True'}`."


def lacks(model: Path, stages: list[Stage], own: Own) -> Iterator[str]:
    """Yield what a reader would look for and the record does not have."""
    if not own.licence:
        yield "the licence of this model"
    if not own.languages:
        yield "its languages"
    if not stages:
        yield "how it was trained: there is no record of a run with this model"
    for stage in stages:
        what = WHAT.get(stage.script, stage.script)
        if unknown := [each.name for each in stage.data if not each.licence]:
            yield f"the licence of the data of {what}: {', '.join(unknown[:10])}" + ", ..." * (len(unknown) > 10)
        if not stage.data and stage.script in ("pretrain", "fine_tuning"):
            yield f"the data of {what}"
        if stage.script in ("pretrain", "fine_tuning"):
            measured = held_out(stage)
            if not measured:
                yield f"a held-out loss of {what}"
            elif "loss_error" not in measured[0][1]:
                yield f"the interval of the held-out loss of {what}"
