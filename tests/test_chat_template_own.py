"""Models' own Jinja, in the forms that are published, against transformers: the same ids, and what is trained."""

import json

import pytest
import tokenizers
import transformers
from helpers.vocabularies import TEXT, write_metaspace
from hypothesis import given, settings
from test_chat_template import TALK, conversations, in_transformers, rendered, text_of
from tokenizers import AddedToken, models, pre_tokenizers

from chat.template import ChatTemplate, load_template
from tokenizer import load_tokenizer

# A default system message, and no {% generation %}: Qwen 2.5.
DEFAULT_SYSTEM = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Contents stripped, roles checked, the system message inside the first question: LLaMA 2's own.
STRIPPED = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Generation blocks with more than the content in them, as SmolLM 3 has: what they hold is what is trained.
BLOCKS = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ message.content }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
# What stands before the last answer is not what stands before the others: Qwen 3 thinks before that one only.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OWN = {
    "default system": ("byte_level", DEFAULT_SYSTEM, ["a1<|im_end|>", "a2<|im_end|>"]),
    "stripped": ("ours", STRIPPED, [" a1 </s>", " a2 </s>"]),
    "stripped, dummy prefix": ("llama", STRIPPED, ["a1 </s>", "a2 </s>"]),  # decoding takes one space away
    "blocks": ("byte_level", BLOCKS, [f"<|im_start|>assistant\na{n}<|im_end|>\n" for n in (1, 2)]),
    "thinking": ("byte_level", THINKING, ["a1<|im_end|>", "<think>\n\n</think>\n\na2<|im_end|>"]),
}


@pytest.fixture(scope="module", params=OWN)
def own(request, tmp_path_factory) -> tuple[ChatTemplate, transformers.PreTrainedTokenizerBase, list[str]]:
    """A template that came with the vocabulary, the same in transformers, and what of TALK is trained."""
    vocabulary, jinja, trained = OWN[request.param]
    directory = tmp_path_factory.mktemp("own")
    request.getfixturevalue(vocabulary).save(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(jinja)
    template = load_template(load_tokenizer(directory))
    assert template.name == "the model's own" and template.jinja == jinja
    return template, transformers.AutoTokenizer.from_pretrained(directory), trained


@given(messages=conversations(TEXT))
@settings(max_examples=60, deadline=None)
def test_transformers_renders_the_same_ids(own, messages):
    template, theirs, _ = own
    assert template.encode(messages)[0] == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    if messages[-1]["role"] == "user":
        prompt, mask = template.encode(messages, add_generation_prompt=True)
        assert prompt == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert not mask[-1]


def test_what_a_models_own_template_trains(own):
    template, theirs, trained = own
    ids, mask = template.encode(TALK)
    assert text_of(template.tokenizer, ids, mask) == trained
    if "generation" in template.jinja.split("add_generation_prompt")[0]:
        assert (ids, mask) == rendered(theirs, TALK)
    silent = [message | {"loss": False} if message["content"] == "a1" else message for message in TALK]
    assert text_of(template.tokenizer, *template.encode(silent)) == trained[1:]


def test_what_cannot_be_told_is_refused(byte_level):
    def template(jinja: str) -> ChatTemplate:
        return ChatTemplate(byte_level, jinja)

    with pytest.raises(ValueError, match="changes an answer and has no"):
        template("{% for m in messages %}{{ m.content | length }}<|im_end|>{% endfor %}")
    strict = template(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role + m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ValueError, match="refuses this conversation: no system"):
        strict.encode(TALK)
    with pytest.raises(ValueError, match="refuses this conversation"):  # the sandbox holds
        template("{{ messages.__class__.__base__.__subclasses__() }}<|im_end|>{{ messages.append(1) }}")


def test_a_space_before_the_first_text_alone(tmp_path):
    """With prepend_scheme "first", as newer conversions of LLaMA have it, text after a special token gets no space."""
    write_metaspace(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["prepend_scheme"] = settings["decoder"]["prepend_scheme"] = "first"
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    template = ChatTemplate(load_tokenizer(tmp_path), "{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    theirs = in_transformers(template, tmp_path / "saved")
    messages = [{"role": role, "content": "ab"} for role in ("user", "assistant")]
    ids, _ = template.encode(messages)
    assert ids == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids[0] != ids[2]  # "▁ab", and after </s> "ab"


def test_special_tokens_that_take_the_space_beside_them(tmp_path):
    """Phi-3's <|end|> takes the white space that follows it."""
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate("abĠĊ")}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True, rstrip=True, normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    jinja = "{% for m in messages %}{{ m.content + '<|end|>\n' }}{% endfor %}"
    template = ChatTemplate(load_tokenizer(tmp_path), jinja)
    theirs = in_transformers(template, tmp_path / "saved")
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": " b"}]
    ids, mask = template.encode(messages)
    assert ids == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert text_of(template.tokenizer, ids, mask) == ["b<|end|>"]
