"""Files of llama2.c, both ways: the published one bit for bit, tensors where its programs look for them, tokenizers."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_checkpoints import TOKENS, saved
from helpers.tiny_chat_model import chat_tokenizer

import convert
from checkpoint.directory import load_model
from convert import Export, Import
from decoding.generate import generate
from decoding.params import SamplingParams
from formats import llama2c, llama2c_tokenizer
from formats.vocabulary import new_model
from tokenizer import SentencePieceTokenizer, load_tokenizer

VERSIONS = ("llama2c", "llama2c_v1", "llama2c_q8")


def there_and_back(folder: Path, name: str = "llama2c") -> Path:
    convert.export(Export(model=folder / "in", format=name, out=folder / "x.bin"))
    convert.import_(Import(source=folder / "x.bin", out=folder / "back"))
    return folder / "back"


def test_the_published_file_bit_for_bit_both_ways(shared, tmp_path):
    models = shared / "models"
    convert.export(Export(model=models / "stories260K_hf", format="llama2c", out=tmp_path / "x.bin"))
    assert (tmp_path / "x.bin").read_bytes() == (models / "stories260K.bin").read_bytes()
    assert (tmp_path / "x.tokenizer.bin").read_bytes() == (models / "tok512.bin").read_bytes()
    convert.import_(Import(source=models / "stories260K.bin", out=tmp_path / "hf", tokenizer=models / "tok512.model"))
    ours, theirs = load_model(tmp_path / "hf").state_dict(), load_model(models / "stories260K_hf").state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_its_known_text_comes_out_at_temperature_0(shared, tmp_path):
    expected = json.loads((shared / "models/stories260K_expected.json").read_text())["greedy"]
    (tmp_path / "x.bin").write_bytes((shared / "models/stories260K.bin").read_bytes())
    (tmp_path / "tokenizer.bin").write_bytes((shared / "models/tok512.bin").read_bytes())
    convert.import_(Import(source=tmp_path / "x.bin", out=tmp_path / "hf"))
    tokenizer, model = load_tokenizer(tmp_path / "hf"), load_model(tmp_path / "hf")
    for each in expected:
        prompt = each["prompt_ids"]
        assert [1, *tokenizer.encode(each["prompt"])] == prompt if each["prompt"] else prompt == [1]
        answer = generate(model, [prompt], SamplingParams(temperature=0.0, max_new_tokens=60))[0]
        wanted = each["ids"][len(prompt) :] if each["ids"][: len(prompt)] == prompt else each["ids"]
        assert list(answer)[:60] == wanted[:60]


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "n_kv_heads": 1}], ids=["tied", "untied"])
def test_there_and_back(name, changes, tmp_path):
    model = saved(tmp_path / "in", **changes)
    back = load_model(there_and_back(tmp_path, name))
    assert back.args == model.args
    wanted = model(TOKENS)
    error = float((back(TOKENS) - wanted).norm() / wanted.norm())
    assert error == 0 if name != "llama2c_q8" else 0 < error < 0.03, error  # each weight is off by up to 1 in 254


@pytest.mark.parametrize("name", ["llama2c_v1", "llama2c_q8"])
def test_the_header_and_the_first_tensors_lie_where_the_programs_look(name, tmp_path):
    model = saved(tmp_path / "in", tie_embeddings=False, n_kv_heads=2)
    there_and_back(tmp_path, name)
    raw = (tmp_path / "x.bin").read_bytes()
    magic, version, *numbers = struct.unpack_from("<I8i", raw)
    assert (magic, version, numbers) == (0x616B3432, int(name[-1] == "8") + 1, [32, 40, 3, 4, 2, 40, 64])
    assert raw[36] == 0  # the head is not tied
    norms = np.frombuffer(raw, "<f4", 7 * 32, 256).reshape(7, 32)  # attention, feed-forward, the last
    layers = model.model.layers
    halves = [[each.input_layernorm for each in layers], [each.post_attention_layernorm for each in layers]]
    wanted = [each.weight for each in (*halves[0], *halves[1], model.model.norm)]
    assert (norms == torch.stack(wanted).numpy()).all()
    embedding = model.model.embed_tokens.weight.numpy()
    at = 256 + 7 * 32 * 4
    if name == "llama2c_v1":
        assert (np.frombuffer(raw, "<f4", 40 * 32, at).reshape(40, 32) == embedding).all()
        return
    (group,) = struct.unpack_from("<i", raw, 37)
    assert group == 8  # the largest of 64, 32, ... that divides 32 and 40
    codes = np.frombuffer(raw, np.int8, 40 * 32, at).reshape(-1, group)
    scales = np.frombuffer(raw, "<f4", 40 * 32 // group, at + 40 * 32)
    assert (scales == np.abs(embedding.reshape(-1, group)).max(1) / np.float32(127)).all()
    assert np.abs(codes * scales[:, None] - embedding.reshape(-1, group)).max() <= scales.max() / 2 * 1.0001


def test_a_matrix_of_zeros_is_no_nan(tmp_path):
    entry = llama2c.Entry((2, 8), "F32", ("w",), lambda: torch.zeros(2, 8))
    raw = llama2c.to_bytes(entry, None, 8)
    assert raw == bytes(16 + 8)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"attention_bias": True}, "biases on q, k, v"),
        ({"qk_norm": True}, "qk_norm"),
        ({"sliding_window": 8}, "a sliding window of 8"),
        ({"rope_theta": 5e5}, "rope_theta 500000"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "stretched positions"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
        ({"head_dim": 16}, "head_dim 16"),
    ],
)
def test_what_its_programs_do_not_compute_is_refused_by_name(changes, what, tmp_path):
    saved(tmp_path / "in", **changes)
    with pytest.raises(ValueError, match=f"has {what}.*, which the programs of llama2.c do not compute"):
        convert.export(Export(model=tmp_path / "in", format="llama2c", out=tmp_path / "x.bin"))
    assert not list(tmp_path.glob("*x.bin*"))


def test_damaged_files_are_one_sentence(tmp_path):
    saved(tmp_path / "in")
    for name in VERSIONS:
        convert.export(Export(model=tmp_path / "in", format=name, out=tmp_path / f"{name}.bin"))
    for name in VERSIONS[1:]:
        raw = (tmp_path / f"{name}.bin").read_bytes()
        (tmp_path / "short.bin").write_bytes(raw[:-8])
        with pytest.raises(ValueError, match=r"should have .* bytes, as its header says, found .* truncated"):
            convert.import_(Import(source=tmp_path / "short.bin", out=tmp_path / "out"))
    raw = (tmp_path / "llama2c_v1.bin").read_bytes()
    (tmp_path / "new.bin").write_bytes(raw[:4] + struct.pack("<i", 7) + raw[8:])
    with pytest.raises(ValueError, match=r"is of version 7 of llama2\.c's format"):
        convert.import_(Import(source=tmp_path / "new.bin", out=tmp_path / "out"))
    (tmp_path / "cut.bin").write_bytes(raw[:20])
    with pytest.raises(ValueError, match=r"the header of llama2.c has 7 numbers|shorter than a header"):
        convert.import_(Import(source=tmp_path / "cut.bin", out=tmp_path / "out"))
    raw = bytearray((tmp_path / "llama2c.bin").read_bytes())
    (tmp_path / "half.bin").write_bytes(raw[: len(raw) // 2])
    sizes = f"should have {len(raw):,} bytes, as its header says, found {len(raw) // 2:,}: it is truncated"
    with pytest.raises(ValueError, match=sizes):
        convert.import_(Import(source=tmp_path / "half.bin", out=tmp_path / "out"))
    at = len(raw) - 64 * 4 * 4  # the last table, (64, 4)
    raw[at : at + 512] = bytes(512)
    raw[at - 256 : at] = bytes(256)
    (tmp_path / "turned.bin").write_bytes(raw)
    with pytest.raises(ValueError, match="is no table of rotary angles of base 10000"):
        convert.import_(Import(source=tmp_path / "turned.bin", out=tmp_path / "out"))
    (tmp_path / "tokenizer.bin").write_bytes(b"\x01\x00\x00\x00junk")
    with pytest.raises(ValueError, match=r"is no tokenizer\.bin"):
        llama2c_tokenizer.read(tmp_path / "tokenizer.bin")
    assert not (tmp_path / "out").exists()


def test_a_notice_says_that_a_tokenizer_removes_spaces(tmp_path, capsys):
    kinds = [2, 3, 3, *[6] * 256, 1]
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], "\u2581"]
    proto = new_model(pieces, [0.0] * len(pieces), kinds, {"unk": 0, "bos": 1, "eos": 2})
    for removes in (False, True):
        proto.normalizer_spec.remove_extra_whitespaces = removes
        path = tmp_path / "tokenizer.model"
        own = SentencePieceTokenizer(proto.SerializeToString(), path, {"add_bos_token": True})
        assert (own.encode(" a  b ") == own.encode("a b")) is removes
        llama2c_tokenizer.to_bytes(own)
        assert ("run.c will read other ids" in capsys.readouterr().err) is removes


def test_tokenizers_go_there_and_back(tmp_path, capsys):
    own = chat_tokenizer(tmp_path)
    raw = llama2c_tokenizer.to_bytes(own)
    assert "run.c will read other ids" in capsys.readouterr().err  # it has no space before a text
    (tmp_path / "tokenizer.bin").write_bytes(raw)
    back = llama2c_tokenizer.read(tmp_path / "tokenizer.bin", own.vocab_size)
    text = "床前明月光 the moon\n\tabove <s> é😀"
    assert back.encode(text)[1:] == own.encode(text) or back.encode(text) == own.encode(" " + text)
    assert back.special == {"<unk>": 0, "<s>": 1, "</s>": 2} and back.begins == [1]
    with pytest.raises(ValueError, match="and the model beside it 7: name another --tokenizer"):
        llama2c_tokenizer.read(tmp_path / "tokenizer.bin", 7)
