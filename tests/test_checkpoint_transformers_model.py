"""Models that are not of the LLaMA family, behind our interface: the same loop, the same decoding, the same files."""

import json
import sys
from functools import partial

import pytest
import torch
from helpers import tiny_training_run as toy
from helpers.tiny_chat_model import chat_tokenizer

from chat.template import load_template
from checkpoint.directory import load_model, load_weights, save_model
from checkpoint.extend import grow_vocabulary, resize
from checkpoint.transformers_model import TransformersModel
from decoding.generate import generate
from decoding.params import SamplingParams, Stop
from decoding.rows import Rows
from decoding.speculative import DraftModel, Speculative
from distributed.backend import make_backend
from model import Transformer
from optim.args import OptimArgs
from optim.muon import Muon
from optim.optimizers import build_optimizer
from serving.assistant import Assistant
from serving.session import ChatSession
from training.flops import train_flops_per_token
from training.heldout import evaluate
from training.trainer import TrainArgs, Trainer

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TINY |= {"vocab_size": toy.VOCAB, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {
    "gpt_neox": {},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 64},
    "phi": {"partial_rotary_factor": 0.5},
}


def directory_of(kind: str, folder, **changes):
    """A random model of `kind` as transformers saves it, weights large enough for everything to matter."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY | KINDS.get(kind, {}) | changes)
    peer = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    peer.save_pretrained(folder / kind)
    return folder / kind


def trainer_of(model: TransformersModel, run, data, **changes) -> Trainer:
    args = TrainArgs(
        **{"dtype": "fp32", "compile": "off", "device": "cpu", "max_steps": 4, "save_interval": 2} | changes
    )
    optim = OptimArgs(lr=0.01, muon_lr=0.01, warmup_steps=1)
    functions = {"save": partial(save_model, model=model), "load": partial(load_weights, model)}
    backend, identity = make_backend("single", "cpu"), {"seed": 0}
    optimizer = build_optimizer(model, optim)
    return Trainer(model, optimizer, data, backend, args, optim, run, identity=identity, eval_data=data, **functions)


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma", "phi", "gpt2"])
def test_muon_takes_no_embedding_and_no_head_whatever_they_are_called(kind):
    config = transformers.AutoConfig.for_model(kind, **TINY | KINDS.get(kind, {}))
    model = TransformersModel(transformers.AutoModelForCausalLM.from_config(config))
    names = {p: name for name, p in model.named_parameters()}
    muon = next(part for part in build_optimizer(model, OptimArgs()).parts if isinstance(part, Muon))
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    matrices = {name for p, name in names.items() if p.dim() == 2}
    vocabulary_or_positions = {names[p] for p in names if p.dim() == 2 and p.shape[0] in (toy.VOCAB, 64)}
    assert vocabulary_or_positions
    assert taken == matrices - vocabulary_or_positions


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_losses_are_those_of_transformers(tmp_path, kind):
    directory = directory_of(kind, tmp_path)
    model = load_model(directory)
    assert isinstance(model, TransformersModel)
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokens = torch.randint(toy.VOCAB, (3, 12))
    expected = peer(tokens).logits
    torch.testing.assert_close(model(tokens), expected)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = targets[0, :5] = -100
    weights = torch.rand(3, 12)
    losses = torch.nn.functional.cross_entropy(expected.mT, targets, reduction="none")  # 0 where ignored
    for given, wanted in ((None, losses.sum()), (weights, (losses * weights).sum())):
        loss, count = model(tokens, targets, loss_weights=given)
        torch.testing.assert_close(loss, wanted)
        assert count == (targets != -100).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_trains_saves_and_resumes_it(tmp_path, kind):
    data = toy.toy_data(tmp_path)
    directory = directory_of(kind, tmp_path)
    model = load_model(directory)
    before = evaluate(model, data)["loss"]
    result = trainer_of(model, tmp_path / "whole", data).fit()
    assert result["loss"] < before - 0.1
    trainer_of(load_model(directory), tmp_path / "cut", data, save_interval=2, keep=9).fit()
    for link in ("last", "best"):
        (tmp_path / "cut" / link).unlink()
    (tmp_path / "cut" / "last").symlink_to("step_00000002")  # as if it had been stopped there
    again = trainer_of(load_model(directory), tmp_path / "cut", data)
    assert again.state.step == 2 and again.fit()["loss"] == pytest.approx(result["loss"], rel=1e-5)
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(result["model"], output_loading_info=True)
    assert not any(info.values())
    tokens = torch.randint(toy.VOCAB, (2, 9))
    torch.testing.assert_close(load_model(result["model"])(tokens), peer(tokens).logits)
    assert evaluate(load_model(result["model"]), data)["loss"] == pytest.approx(result["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_row_are_apart(tmp_path, kind):
    model = load_model(directory_of(kind, tmp_path))
    tokens = torch.randint(toy.VOCAB, (1, 11))
    doc_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1]], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]])
    together = model(tokens, positions=positions, doc_ids=doc_ids)
    torch.testing.assert_close(together[:, :4], model(tokens[:, :4]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[:, 4:9], model(tokens[:, 4:9]), atol=1e-5, rtol=1e-5)
    assert together.isfinite().all()


@pytest.mark.parametrize("kind, more", [("bloom", {"n_head": 4}), ("mamba", {"state_size": 4})])
def test_a_model_that_takes_no_such_mask_says_so(kind, more):
    config = transformers.AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=1, vocab_size=29, **more)
    with pytest.raises(ValueError, match=r"does not say its .*max_position_embeddings"):
        TransformersModel(transformers.AutoModelForCausalLM.from_config(config))
    config.max_position_embeddings, config.num_attention_heads = 64, 4
    model = TransformersModel(transformers.AutoModelForCausalLM.from_config(config))
    tokens, doc_ids = torch.randint(29, (1, 6)), torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert model(tokens).shape == (1, 6, 29)
    with pytest.raises(ValueError, match=r"cannot keep the documents of a row apart; .*pairs of answers .* it cannot"):
        model(tokens, doc_ids=doc_ids)


def test_a_window_shorter_than_the_row_says_so(tmp_path):
    model = load_model(directory_of("gemma2", tmp_path, sliding_window=4))
    model(torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="sliding window of 4: rows of 9 cannot isolate documents; shorten"):
        model(torch.ones(1, 9, dtype=torch.long), doc_ids=torch.zeros(1, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_is_that_of_transformers(tmp_path, kind):
    directory = directory_of(kind, tmp_path)
    model, peer = load_model(directory), transformers.AutoModelForCausalLM.from_pretrained(directory)
    prompts = [[5, 6, 7, 8], [9]]
    params = SamplingParams(temperature=0, max_new_tokens=8)
    expected = [
        peer.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)[
            0, len(p) :
        ]
        for p in prompts
    ]
    assert generate(model, prompts, params) == [ids.tolist() for ids in expected]
    with pytest.raises(ValueError, match="without key-value caches"):
        model.make_cache(1, kind="sinks")
    rows, answers = Rows(model), {}
    keys = [rows.add(prompts[0], params)]
    for n in range(20):
        if n == 3:  # the second prompt comes while the first is being answered
            keys.append(rows.add(prompts[1], params))
        for key, token in rows.step():
            answers.setdefault(key, []).append(token.id)
    assert [answers[key] for key in keys] == [ids.tolist() for ids in expected]


def test_it_chats_and_drafts(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    template = load_template(tokenizer)
    model = load_model(directory_of("gpt_neox", tmp_path, vocab_size=tokenizer.vocab_size))
    params, asked = SamplingParams(temperature=0, max_new_tokens=6), []
    decoders = (None, Speculative(model, DraftModel(model)))
    sessions = [ChatSession(Assistant(model, tokenizer, template, decoder)) for decoder in decoders]
    for question in ("the moon", "the river"):
        asked = [*sessions[0].messages, {"role": "user", "content": question}]
        prompt, _ = template.encode(asked, add_generation_prompt=True)
        wanted = generate(model, [prompt], params, Stop(template.stop_ids))[0]
        assert [list(session.ask(question, params)) for session in sessions] == [wanted, wanted]


def test_operations_are_counted_by_the_weights_there_are(tmp_path):
    model = load_model(directory_of("gpt_neox", tmp_path))
    blocks = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n)
    assert train_flops_per_token(model.args, 0) == pytest.approx(6 * (blocks + 32 * toy.VOCAB))


def test_reduced_precision_and_recomputation(tmp_path):
    model = load_model(directory_of("phi", tmp_path))
    tokens = torch.randint(toy.VOCAB, (2, 9))
    loss, _ = model(tokens, tokens)
    loss.backward()
    gradient = model.inner.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    model.train()
    model.gradient_checkpointing = True
    model(tokens, tokens)[0].backward()
    torch.testing.assert_close(model.inner.get_input_embeddings().weight.grad, gradient)
    model.gradient_checkpointing = False
    model.compute_dtype = torch.bfloat16
    packed = {"doc_ids": torch.arange(9).expand(2, 9) // 4, "positions": torch.arange(9).expand(2, 9) % 4}
    assert model(tokens, tokens, **packed)[0].dtype == torch.float32
    torch.testing.assert_close(model(tokens, tokens)[0], loss, rtol=0.02, atol=0)  # 8 bits of mantissa


# ---- new tokens


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
@pytest.mark.parametrize("multiple_of", [1, 8])  # 29 rows, of which three had no token, or 32
def test_new_rows_are_the_mean_of_the_spelling(tmp_path, kind, multiple_of):
    """Of the embedding, and of the head with its bias (phi has one), tied (gemma, gpt2) or not."""
    model = load_model(directory_of(kind, tmp_path))
    tokens = torch.randint(26, (2, 9))
    logits = model(tokens)
    ends = (model.inner.get_input_embeddings(), model.inner.get_output_embeddings())
    before = [{name: p.clone() for name, p in end.named_parameters()} for end in ends]
    resize(model, 26, [[1, 2, 2], [3]], multiple_of)
    n = {1: toy.VOCAB, 8: 32}[multiple_of]
    assert model.args.vocab_size == model.inner.config.vocab_size == n
    ends = (model.inner.get_input_embeddings(), model.inner.get_output_embeddings())
    for end, tables in zip(ends, before):
        for name, old in tables.items():
            new = getattr(end, name)
            assert torch.equal(new[:26], old[:26])
            torch.testing.assert_close(new[26], (old[1] + 2 * old[2]) / 3)
            torch.testing.assert_close(new[27], old[3])
            torch.testing.assert_close(new[29:], old[:26].mean(0).expand(n - 29, *old.shape[1:]))
    torch.testing.assert_close(model(tokens)[..., :26], logits[..., :26])
    save_model(tmp_path / "larger", model)
    assert torch.equal(load_model(tmp_path / "larger")(tokens), model(tokens))


@pytest.mark.parametrize("spare", [0, 8])
def test_tokens_that_a_flag_adds(tmp_path, spare):
    """In the rows that the vocabulary was padded with, too, which nothing has trained."""
    tokenizer = chat_tokenizer(tmp_path)
    n = tokenizer.vocab_size
    model = load_model(directory_of("gpt_neox", tmp_path, vocab_size=n + spare))
    rows = model.inner.get_input_embeddings().weight.clone()
    grown, told = grow_vocabulary(model, tokenizer, ["moonriver"], ["<|tool|>"], tmp_path)
    assert grown.vocab_size == n + 2
    assert told == f"2 new tokens start as the mean of their spelling; rows: {n + spare} -> {n + max(2, spare)}"
    for i, text in ((n, "<|tool|>"), (n + 1, "moonriver")):
        assert grown.id_to_bytes(i) == text.encode() or grown.special[text] == i
        torch.testing.assert_close(model.embedding.weight[i], rows[tokenizer.encode(text)].mean(0))


# ---- what cannot be loaded


def test_without_transformers_a_sentence_says_so(tmp_path, monkeypatch):
    directory = directory_of("gpt_neox", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"no model of the LLaMA family, and transformers.* is not installed: bash"):
        load_model(directory)


def test_what_does_not_fit_is_named(tmp_path):
    directory = directory_of("gpt_neox", tmp_path)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"missing keys gpt_neox\.layers\.2\.\S+, .* and \d+ more"):
        load_model(directory)
    path.write_text(json.dumps(config | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 7}}))
    with pytest.raises(ValueError, match=r"the model that its config\.json describes cannot compute: "):
        load_model(directory)
    path.write_text(json.dumps(config | {"model_type": "nobody_knows"}))
    with pytest.raises(ValueError, match=r"transformers cannot load .* as a causal language model: "):
        load_model(directory)


def test_the_family_stays_ours(tmp_path):
    assert isinstance(load_model(directory_of("llama", tmp_path)), Transformer)


@pytest.mark.parametrize(
    "changes", [{"layer_types": 3}, {"layer_types": [["a"]]}, {"hidden_size": 2**31}, {"num_hidden_layers": 10**5}]
)
def test_a_config_that_transformers_cannot_use_is_one_sentence(tmp_path, changes):
    for kind in ("gemma2", "gpt_neox"):
        path = directory_of(kind, tmp_path) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        if kind == "gpt_neox" and "layer_types" in changes:
            continue  # it has none
        with pytest.raises(ValueError, match=r"transformers cannot load .*: |does not fit its config\.json"):
            load_model(path.parent)


@pytest.mark.parametrize("original, length", [(64, 256), (16, 64)])
def test_stretched_positions_count(tmp_path, original, length):
    """Whether max_position_embeddings (64) is the window before stretching or the length after it."""
    scaling = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": original}
    directory = directory_of("gemma", tmp_path, rope_parameters=scaling)
    assert load_model(directory).args.max_seq_len == length
