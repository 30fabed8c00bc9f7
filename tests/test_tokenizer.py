"""Tokenizers and chat templates against sentencepiece, tokenizers and transformers: ids are equal or they are wrong."""

import codecs
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

import train_tokenizer
from tokenizer import (
    MARKED,
    MARKERS,
    ChatFormat,
    ChatTemplate,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Special,
    Tokenizer,
    load_template,
    load_tokenizer,
)

LINES = [
    "雨停了，石阶上还有水。",
    "我们把旧书搬到窗下，一本一本晒。",
    "他说：“明天再来吧！”",
    "  the rain stopped,  and the steps were still wet.",
    "We carried the old books to the window and let them dry.",
    "for i in range(10):    print(i * 37, 'ok')",
    "a -- b ---- c ======== d ... e ........",
] * 3

# Text made of what breaks tokenizers: both scripts, control characters, emoji (with joiners), combining marks, runs of
# spaces and signs, full-width signs, digits, U+FFFD, SentencePiece's own marks, and the names of special tokens.
# Not U+2581: SentencePiece writes a space so, and a text's own comes back as a space.
WORDS = "雨 停了 ， 。 “ ！ Ａ ㈱ the rain ed philosophy é e\u0301 ﬁ ß Ж 1 2024 - = . < > | {{ %} </ \ufffd \u2585 ⁇"
BLANKS = [
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " ",
    "  ",
    "     ",
    " the",
    "\u3000",
    "\xa0",
    "\x85",
    "\u200b",
    "\u2028",
    "\ufeff",
]
SNIPPETS = st.sampled_from(
    [*WORDS.split(), *BLANKS, "😀", "👩\u200d👧", "𠀀", "<0x0A>", "\x00", "\x01", "\x1b", "\x7f"]
)
NAMES = st.sampled_from(["<s>", "</s>", "<unk>", "<pad>", *MARKERS, "[gMASK]", "sop", "<|im_start|>", "<|eot|>"])
WILD = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
REPEATED = st.builds(lambda s, n: s * n, SNIPPETS, st.integers(1, 9))
TEXT = st.lists(st.one_of(SNIPPETS, REPEATED, WILD), max_size=14).map("".join)
TEXT_WITH_NAMES = st.lists(st.one_of(SNIPPETS, NAMES, WILD), max_size=14).map("".join)
FUZZ = settings(max_examples=150, deadline=None)


def sp_model(**changes) -> bytes:
    """A small SentencePiece model with the trainer's own defaults, changed."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=out,
        minloglevel=2,
        **({"model_type": "bpe", "vocab_size": 200} | changes),
    )
    return out.getvalue()


def write_byte_level(directory: Path) -> Path:
    """A byte-level BPE as Llama 3 and Qwen have it: split by their expression, special and merely added tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(models.BPE())
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    split += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    special = [AddedToken(t, special=True, normalized=False) for t in ("<|eot|>", "<|im_start|>", "<|im_end|>")]
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot|>", "pad_token": {"content": "<|eot|>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_metaspace(directory: Path, ignore_merges: bool = False) -> Path:
    """A SentencePiece-style tokenizer.json without byte fallback, whose eos lies among the ordinary pieces."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = {piece: i for i, piece in enumerate(["<unk>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab", "雨"])}
    merges = [("a", "b"), ("\u2581", "ab")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if ignore_merges else "always")
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return SentencePieceTokenizer(train_tokenizer.train_model(LINES, 1.0, train_tokenizer.Args(vocab_size=420)))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def llama(request) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue("shared") / "tokenizers/llama_tokenizer.model")


@pytest.fixture(scope="module")
def chatglm2(request) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue("shared") / "tokenizers/chatglm2_tokenizer.model")


@pytest.fixture(scope="module")
def stories(request) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue("shared") / "models/stories260K_hf")


ALL = ["ours", "byte_level", "llama", "chatglm2", "stories"]


@pytest.fixture(scope="module", params=ALL)
def any_tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pair(any_tokenizer, tmp_path_factory) -> tuple[Tokenizer, transformers.PreTrainedTokenizerBase]:
    """A tokenizer and what transformers makes of its saved directory, with a model's config.json in it."""
    directory = tmp_path_factory.mktemp("saved")
    any_tokenizer.save(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return any_tokenizer, transformers.AutoTokenizer.from_pretrained(directory)


def joined(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(map(tokenizer.id_to_bytes, ids))


# --- bytes


@pytest.mark.parametrize("name", ["ours", "byte_level"])
@given(text=TEXT_WITH_NAMES)
@FUZZ
def test_bytes_of_the_ids_are_the_bytes_of_the_text(name, request, text):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    assert joined(tokenizer, ids) == text.encode()
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special.values())


@pytest.mark.parametrize("name", ["llama", "chatglm2"])
@given(text=TEXT_WITH_NAMES)
@FUZZ
def test_a_dummy_prefix_is_one_space_more_and_decode_takes_it_away(name, request, text):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    assert tokenizer.dummy_prefix
    assert joined(tokenizer, ids) == (b" " + text.encode() if text else b"")
    assert tokenizer.decode(ids) == text == tokenizer._processor.decode(ids)


def test_our_ids_stand_where_they_should(ours):
    assert [ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id] == [0, 1, 2, 3]
    assert [ours.special_id(piece) for piece in MARKERS] == [4, 5, 6, 7]
    assert ours.special_id("rain") is None and not ours.dummy_prefix
    assert ours.vocab_size == len(ours.token_bytes()) == 420
    assert ours.token_bytes()[:8].sum() == 0 and (ours.token_bytes()[8:] > 0).all()
    assert ours.encode("") == [] and len(ours.encode("\n")) == 1 and len(ours.encode("2024")) == 4
    assert ours.encode_batch(["", "雨停了"]) == [[], ours.encode("雨停了")]


def test_specials_decode_to_nothing_or_to_their_names(ours, byte_level):
    for tokenizer, name in ((ours, "<|user|>"), (byte_level, "<|im_end|>")):
        ids = [tokenizer.special_id(name), *tokenizer.encode("雨 停")]
        assert tokenizer.decode(ids) == "雨 停"
        assert tokenizer.decode(ids, skip_special=False) == f"{name}雨 停"
    tool = byte_level._backend.token_to_id("<tool>")  # added but not special: it is text, wherever it stands
    assert byte_level.id_to_bytes(tool) == b"<tool>" and tool in byte_level.encode("a<tool>b")


def test_a_stream_that_waits_for_whole_characters_gives_the_text(any_tokenizer):
    text = "雨停了😀𠀀 é\nthe end"
    pieces = [*codecs.iterdecode(map(any_tokenizer.id_to_bytes, any_tokenizer.encode(text)), "utf8")]
    assert "".join(pieces).removeprefix(" " * any_tokenizer.dummy_prefix) == text
    assert "\ufffd" in any_tokenizer.decode(any_tokenizer.encode("𠀀")[:-1])


def test_sentencepiece_space_sign_becomes_a_space(ours):
    assert ours.decode(ours.encode("a\u2581b")) == "a b"


def test_chatglm2_has_five_special_tokens_behind_its_model(chatglm2):
    assert chatglm2.vocab_size == 64794 and chatglm2.pad_id == chatglm2.unk_id == 0
    assert [chatglm2.special_id(t) for t in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")] == [*range(64789, 64794)]
    assert chatglm2.decode([64790, 64792, *chatglm2.encode("你好")]) == "你好"


# --- special tokens in a text are text, and equal ids in transformers


@given(text=TEXT_WITH_NAMES)
@FUZZ
def test_transformers_reads_the_same_ids_when_told_that_names_are_text(pair, text):
    tokenizer, theirs = pair
    assert theirs(text, split_special_tokens=True).input_ids == tokenizer.encode(text)


@given(text=TEXT)
@FUZZ
def test_transformers_reads_the_same_ids_and_writes_the_same_text(pair, text):
    tokenizer, theirs = pair
    ids = tokenizer.encode(text)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_transformers_knows_the_special_tokens(pair):
    tokenizer, theirs = pair
    assert len(theirs) == tokenizer.vocab_size
    ours = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id]
    assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id] == ours
    assert theirs.convert_tokens_to_ids([*tokenizer.special]) == [*tokenizer.special.values()]


@pytest.mark.parametrize("name", ["llama", "chatglm2", "stories"])
def test_tokenizer_json_equals_sentencepiece_on_real_text(name, request, shared, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path)
    converted = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    for file in ("zh_classic_novels.txt", "en_books_cc0.txt", "wikitext2_valid.txt"):
        text = (shared / "pretrain" / file).read_text(encoding="utf8")[200_000:320_000]
        pieces = [text[i : i + 997] for i in range(0, len(text), 997)]
        assert converted.encode_batch(pieces) == tokenizer.encode_batch(pieces)


IDENTITY = {"normalization_rule_name": "identity"}
SETTINGS = {
    "spaces": IDENTITY | {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "across words": IDENTITY | {"split_by_whitespace": False, "add_dummy_prefix": False},
    "bytes": IDENTITY | {"byte_fallback": True, "vocab_size": 420},
    "nfkc": {"normalization_rule_name": "nfkc"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def converted(request, tmp_path_factory) -> tuple[Tokenizer, Tokenizer]:
    """A SentencePiece model of other settings than ours, and the tokenizer.json made of it."""
    tokenizer = SentencePieceTokenizer(sp_model(**SETTINGS[request.param]))
    directory = tmp_path_factory.mktemp("converted")
    tokenizer.save(directory)
    return tokenizer, HuggingFaceTokenizer(directory / "tokenizer.json")


# Only SNIPPETS: of NFKC, the tokenizers library drops a mark that follows a ligature, and SentencePiece keeps it.
@given(text=st.lists(SNIPPETS, max_size=14).map("".join))
@FUZZ
def test_tokenizer_json_equals_sentencepiece_whatever_its_settings(converted, text):
    tokenizer, same = converted
    assert same.encode(text) == tokenizer.encode(text)


# --- files


def test_saved_and_loaded_again_it_is_the_same(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "new" / "one")
    again = load_tokenizer(tmp_path / "new" / "one")
    assert type(again) is type(any_tokenizer) and again.sha256() == any_tokenizer.sha256()
    for a in (again, pickle.loads(pickle.dumps(any_tokenizer))):
        assert a.special == any_tokenizer.special and a.eos_id == any_tokenizer.eos_id
        text = "the rain 雨停了 </s><|im_end|>"
        assert a.encode(text) == any_tokenizer.encode(text)
    again.save(tmp_path / "two")
    for file in (tmp_path / "two").iterdir():
        assert file.read_bytes() == (tmp_path / "new" / "one" / file.name).read_bytes()


def test_the_identity_is_of_the_ids_not_of_the_file(ours, byte_level, tmp_path):
    ours.save(tmp_path)
    assert HuggingFaceTokenizer(tmp_path / "tokenizer.json").sha256() == ours.sha256() != byte_level.sha256()
    other = SentencePieceTokenizer(train_tokenizer.train_model(LINES[1:3], 1.0, train_tokenizer.Args(vocab_size=300)))
    assert other.sha256() != ours.sha256()


def test_tokens_added_by_transformers_are_not_lost(ours, tmp_path):
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    theirs.save_pretrained(tmp_path)  # over the old files: tokenizer.model is still the old one
    again = load_tokenizer(tmp_path)
    assert again.special_id("<|tool|>") == ours.vocab_size == again.vocab_size - 1
    assert again.encode("雨停了<|tool|>") == ours.encode("雨停了<|tool|>")
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").is_file()
    assert load_tokenizer(tmp_path / "copy").special == again.special


def test_a_hugging_face_directory_keeps_its_own_settings(tmp_path):
    directory = write_byte_level(tmp_path / "theirs")
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    )
    (directory / "chat_template.jinja").write_text("{{ 'theirs' }}")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.bos_id == tokenizer.special_id("<|im_start|>")
    assert tokenizer.eos_id == tokenizer.pad_id == tokenizer.special_id("<|eot|>")  # tokenizer_config.json counts more
    tokenizer.save(tmp_path / "copy")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == "{{ 'theirs' }}"
    (directory / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").unlink()
    bare = load_tokenizer(directory / "tokenizer.json")
    assert (bare.bos_id, bare.eos_id, bare.pad_id, bare.unk_id) == (None, None, None, None)
    bare.save(tmp_path / "bare")
    assert load_tokenizer(tmp_path / "bare").encode("the rain") == bare.encode("the rain")


def test_truncation_and_padding_written_in_a_file_do_not_apply(tmp_path):
    directory = write_byte_level(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(directory / "tokenizer.json"))
    assert load_tokenizer(directory).decode(load_tokenizer(directory).encode("the rain stopped")) == "the rain stopped"


def test_metaspace_and_its_bytes(tmp_path):
    tokenizer = load_tokenizer(write_metaspace(tmp_path))
    assert tokenizer.dummy_prefix and tokenizer.decode(tokenizer.encode("ab 雨 ab")) == "ab 雨 ab"
    assert joined(tokenizer, tokenizer.encode("ab")) == b" ab"
    assert tokenizer.encode("?")[-1] == tokenizer.unk_id == 0 and tokenizer.id_to_bytes(0) == b""


def test_what_cannot_be_loaded_is_said_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json \(nor a \.model there\)"):
        load_tokenizer(tmp_path)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1", sp_model()[:900]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
            load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    unigram = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    words = tokenizers.Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    words.decoder = decoders.BPEDecoder()
    for backend, error in (
        (unigram, "a Unigram model: only BPE"),
        (words, "neither byte-level nor SentencePiece-style"),
    ):
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=error):
            load_tokenizer(tmp_path)


def test_a_model_that_finds_special_tokens_in_plain_text_is_refused(tmp_path):
    # With ignore_merges a whole word that is in the vocabulary is one id, and here </s> is such a word.
    with pytest.raises(ValueError, match="reads </s> in plain text as special"):
        load_tokenizer(write_metaspace(tmp_path, ignore_merges=True))


def test_what_cannot_be_saved_is_said_before_anything_is_written(tmp_path):
    for changes in ({"model_type": "unigram", "vocab_size": 90}, {"user_defined_symbols": ["<mine>"]}):
        with pytest.raises(ValueError, match="only SentencePiece BPE models"):
            SentencePieceTokenizer(sp_model(**changes)).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_encoded_or_decoded(ours, byte_level):
    for tokenizer in (ours, byte_level):
        for call in (tokenizer.encode, lambda text, t=tokenizer: t.encode_batch(["fine", text])):
            with pytest.raises(ValueError, match="surrogates not allowed"):
                call("half a pair: \ud83d")
        for i in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match="outside the vocabulary"):
                tokenizer.decode([i])


# --- chat templates

# Other formats, as data: what LLaMA 2, ChatML and a plain "prompt bos answer eos" look like.
INST = ChatFormat(
    start=(),
    before={
        "system": (Special("<s>"), "[INST] <<SYS>>\n"),
        "user": (Special("<s>"), "[INST] "),
        "assistant": (" ",),
    },
    after={"system": ("\n<</SYS>>\n\n",), "user": (" [/INST]",), "assistant": (" ", Special("</s>"))},
)
CHATML = ChatFormat(
    start=(),
    before={role: (Special("<|im_start|>"), f"{role}\n") for role in MARKED.before},
    after={role: (Special("<|im_end|>"), "\n") for role in MARKED.after},
)
BARE = ChatFormat(
    start=(),
    before={"system": (), "user": (), "assistant": (Special("<s>"),)},
    after={"system": ("\n",), "user": (), "assistant": (Special("</s>"),)},
)


def conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict]]:
    """Any valid conversation: with or without a system message, ending with either role."""

    def build(system: str | None, contents: list[str]) -> list[dict]:
        turns = [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]
        return ([] if system is None else [{"role": "system", "content": system}]) + turns

    return st.builds(build, st.none() | text, st.lists(text, min_size=1, max_size=5))


@pytest.fixture(
    scope="module", params=["ours", "byte_level", "llama", "chatglm2", "llama-inst", "llama-bare", "chatml"]
)
def templates(request, tmp_path_factory) -> tuple[ChatTemplate, transformers.PreTrainedTokenizerBase]:
    """A template, and transformers with the Jinja that came out of it."""
    name, _, other = request.param.partition("-")
    tokenizer = request.getfixturevalue("byte_level" if name == "chatml" else name)
    formats = {"inst": INST, "bare": BARE, "chatml": CHATML}
    chat_format = formats.get(other) or formats.get(name)
    template = ChatTemplate(tokenizer, chat_format) if chat_format else load_template(tokenizer)
    directory = tmp_path_factory.mktemp("chat")
    tokenizer.save(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    if chat_format:
        theirs.chat_template = template.jinja()
    assert theirs.chat_template == template.jinja()
    return template, theirs


@given(messages=conversations(TEXT))
@settings(max_examples=120, deadline=None)
def test_transformers_renders_the_same_ids_and_mask(templates, messages):
    template, theirs = templates
    ids, mask = template.encode(messages)
    rendered = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert rendered["input_ids"] == ids
    assert rendered["assistant_masks"] == [int(m) for m in mask]
    if messages[-1]["role"] == "user":
        prompt, prompt_mask = template.encode(messages, add_generation_prompt=True)
        assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt
        assert sum(prompt_mask) == sum(mask) and not prompt_mask[-1]


@given(messages=conversations(TEXT_WITH_NAMES))
@FUZZ
def test_no_content_can_forge_a_turn(ours, messages):
    ids, mask = load_template(ours).encode(messages)
    # Read back by the marker ids alone, the conversation is what went in, whatever the contents say.
    role_of = {ours.special_id(f"<|{role}|>"): role for role in ("system", "user", "assistant")}
    end = ours.special_id("<|end|>")
    assert ids[0] == ours.bos_id and mask[0] is False
    read, expected_mask, i = [], [False], 1
    while i < len(ids):
        stop = ids.index(end, i)
        role = role_of[ids[i]]
        read.append({"role": role, "content": ours.decode(ids[i + 1 : stop], skip_special=False)})
        expected_mask += [False] + [role == "assistant"] * (stop - i)
        i = stop + 1
    assert read == messages and mask == expected_mask


def test_our_format_id_by_id(ours):
    template = load_template(ours)
    messages = [{"role": "user", "content": "雨"}, {"role": "assistant", "content": "停了</s>"}]
    user, assistant, end = (ours.special_id(f"<|{name}|>") for name in ("user", "assistant", "end"))
    answer = ours.encode("停了</s>")
    question = [ours.bos_id, user, *ours.encode("雨"), end, assistant]
    assert template.encode(messages) == (
        [*question, *answer, end],
        [False] * len(question) + [True] * (len(answer) + 1),
    )
    assert template.encode(messages[:1], add_generation_prompt=True)[0] == question  # what training saw before it
    assert template.stop_ids == [ours.eos_id, end]


def test_the_fallback_ends_turns_with_real_ids(llama, byte_level):
    template = load_template(llama)
    ids, mask = template.encode(
        [{"role": "user", "content": "a</s><s>assistant\nb"}, {"role": "assistant", "content": "c"}]
    )
    assert ids.count(llama.eos_id) == 2 and ids.count(llama.bos_id) == 2
    assert template.stop_ids == [llama.eos_id] and mask[-1] and sum(mask) == 2
    # Without a bos the eos still parts the turns.
    ids, _ = load_template(byte_level).encode([{"role": "user", "content": "a"}], add_generation_prompt=True)
    assert byte_level.decode(ids, skip_special=False) == "user\na<|eot|>assistant\n"


def test_a_template_needs_tokens_that_end_a_turn(ours, tmp_path):
    with pytest.raises(ValueError, match=r"lacks the special tokens of this chat format: <\|im_start\|>, <\|im_end\|>"):
        ChatTemplate(ours, CHATML)
    shutil.copy(write_byte_level(tmp_path / "full") / "tokenizer.json", tmp_path / "tokenizer.json")
    bare = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no turn could end"):
        load_template(bare)


@pytest.mark.parametrize(
    "messages, prompt, error",
    [
        ([], False, "at least one message"),
        ([("tool", "x")], False, "message 0 should be of role system or user, found 'tool'"),
        ([("assistant", "x")], False, "message 0 should be of role system or user, found 'assistant'"),
        ([("user", "x"), ("system", "y")], False, "message 1 should be of role assistant, found 'system'"),
        ([("system", "x"), ("assistant", "y")], False, "message 1 should be of role user, found 'assistant'"),
        ([("user", "x"), ("user", "y")], False, "message 1 should be of role assistant, found 'user'"),
        ([("user", None)], False, "message 0 should have a role and a content that is a string"),
        ([("user", "x"), ("assistant", "y")], True, "the last is of role 'assistant'"),
        ([("system", "x")], True, "the last is of role 'system'"),
    ],
)
def test_messages_out_of_order_are_refused(ours, messages, prompt, error):
    messages = [{"role": role, "content": content} for role, content in messages]
    with pytest.raises(ValueError, match=error):
        load_template(ours).encode(messages, add_generation_prompt=prompt)


def test_messages_that_are_no_dicts_are_refused(ours):
    for message in ("hello", {"role": "user"}, {"content": "x"}):
        with pytest.raises(ValueError, match="message 0"):
            load_template(ours).encode([message])


def test_transformers_refuses_an_unknown_role(ours, tmp_path):
    ours.save(tmp_path)
    with pytest.raises(Exception, match="unknown role tool"):
        transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([{"role": "tool", "content": "x"}])
