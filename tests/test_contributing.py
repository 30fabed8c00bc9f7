"""The skeletons of CONTRIBUTING.md work when they are put where it says."""

import copy
import math
import re
import types
from pathlib import Path

import pytest
import torch
from helpers import attention_errors
from helpers.lora_models import our_model, some_tokens
from test_tuning_objectives import some_pairs
from torch import nn

import rope
from attention.backends import BACKENDS, Backend
from chat import conversations
from chat.conversations import to_messages
from chat.template import load_template
from checkpoint import peft
from corpora import CORPORA, SourceArgs, named, read
from decoding.params import SamplingParams
from evaluation.task import Share
from lora import adapters, inject
from lora.adapters import LoraArgs
from optim.optimizers import Optimizers
from quant.grid import GridOptions
from tokenizer import Tokenizer
from tuning import objectives

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf8")
SKELETONS = dict(re.findall(r"^```python\n# (.+?)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))


def skeleton(path: str, inside: types.ModuleType | None = None) -> types.SimpleNamespace:
    """Run the skeleton for the file `path`, with the names of the module `inside` where it is a part of one."""
    names = {"__name__": path.removesuffix(".py").replace("/", ".")} if inside is None else dict(vars(inside))
    exec(compile(SKELETONS[path], path, "exec"), names)
    return types.SimpleNamespace(**names)


def test_a_path_in_the_text_is_there() -> None:
    paths = re.findall(r"`((?:\w+/)+\w*(?:\.\w+)?)`", TEXT)
    new = {"tests/test_rope_mine.py", "tests/test_evaluation_sums.py", "tests/test_quant_narrow.py", "data/raw/NAME/"}
    missing = {path for path in paths if not (Path(__file__).parents[1] / path).exists()} - new
    assert len(paths) > 20 and missing == set()


def test_a_position_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rope.FAMILIES, "mine", None)
    skeleton("rope/mine.py")
    frequencies, factor = rope.make(8, 1e4, {"rope_type": "mine", "factor": 2.0}, 64).frequencies(64)
    assert frequencies == pytest.approx([1e4 ** (-i / 4) / 2 for i in range(4)]) and factor == 1.0


def test_an_attention_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = skeleton("attention/mine.py")
    monkeypatch.setitem(BACKENDS, "mine", Backend(mine.layout, mine.attend))
    assert attention_errors.causal_error("mine") < 1e-12  # float64
    assert attention_errors.packed_error("mine", window=3) < 1e-12
    assert attention_errors.lower_right_error("mine") < 1e-12


def test_a_lora_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inject, "LowRank", skeleton("lora/orthogonal.py").Orthogonal)
    model, tokens = our_model(), some_tokens()
    before, again = model(tokens), copy.deepcopy(model)
    adapters.apply(model, LoraArgs("lora", r=3))
    torch.testing.assert_close(model(tokens), before, atol=1e-12, rtol=0)  # training starts at the base model
    rows = model.model.layers[0].self_attn.q_proj.lora["default"].lora_A
    torch.testing.assert_close(rows @ rows.T, torch.eye(3).to(rows), atol=1e-5, rtol=0)  # made in float32
    monkeypatch.undo()
    peft.save(tmp_path, model)
    peft.load(again, tmp_path)
    torch.testing.assert_close(again(tokens), model(tokens), atol=0, rtol=0)


def test_a_quantized_layer() -> None:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[0.1, -0.5, 0.9]])
    ours = skeleton("quant/ternary.py").TernaryLinear(layer)
    assert torch.equal(ours.to(torch.bfloat16).dequantize(), torch.tensor([[0.0, -0.5, 0.5]]))
    x = torch.ones(1, 3, requires_grad=True)
    ours(x).backward()
    assert torch.equal(x.grad, ours.dequantize())


def test_a_method_of_quantize() -> None:
    solve = skeleton("quant/narrow.py").solve_narrow
    weight = torch.tensor([[-1.0, 2.0, 0.3, 0.0]], dtype=torch.float64)
    step = 0.95 * 3 / 15
    zero = round(0.95 / step)
    codes = [min(max(round(x / step) + zero, 0), 15) for x in weight[0].tolist()]
    solution = solve(weight, GridOptions(4, -1, search=False))
    assert solution.codes.tolist() == [codes] and codes[1] == 15  # clipped
    torch.testing.assert_close(solution.dequantize()[0], torch.tensor([step * (c - zero) for c in codes]).double())


def test_a_chat_template(ours: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(re.search(r"^```jinja\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)[1])
    template = load_template(ours, str(tmp_path / "mine.jinja"))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    ids, mask = template.encode(messages)
    assert ours.decode(ids, skip_special=False) == "<|user|>q<|end|><|assistant|>a<|end|>"
    assert ours.decode([i for i, t in zip(ids, mask) if t], skip_special=False) == "a<|end|>"
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    with pytest.raises(ValueError, match="refuses this conversation"):
        template.encode(
            [messages[0], messages[1] | {"tool_calls": [call]}, {"role": "tool", "content": "r"}, messages[1]]
        )


def test_an_optimizer() -> None:
    signum = skeleton("optim/signum.py").Signum
    p = nn.Parameter(torch.tensor([1.0, -2.0, 5.0]))
    optimizers = Optimizers([signum([p], lr=0.1, beta=0.9, weight_decay=0.0)])
    optimizers.set_lr(0.5)
    for grads in ([0.3, -0.1, 0.0], [-0.1, -0.1, 0.0]):
        p.grad = torch.tensor(grads)
        optimizers.step()
    # the momentum of the first is 0.03, then 0.017: it moves on against its second gradient
    torch.testing.assert_close(p.data, torch.tensor([0.9, -1.9, 5.0]))
    again = Optimizers([signum([nn.Parameter(p.detach().clone())], lr=0.1, beta=0.9)])
    again.load_state_dict(optimizers.state_dict())
    assert torch.equal(*(next(iter(each.parts[0].state.values()))["momentum"] for each in (optimizers, again)))


def test_a_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(CORPORA, "mine", None)
    skeleton("in corpora/named.py", named)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "articles.jsonl").write_text('{"title": "江上", "body": "水"}\n', encoding="utf8")
    assert [document.text for document in read(SourceArgs(corpus=("mine",), raw_dir=tmp_path))] == ["江上\n水"]


def test_a_form_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    form = skeleton("in chat/conversations.py", conversations).firefly
    monkeypatch.setattr(conversations, "FORMS", (form, *conversations.FORMS))
    asked, answered = to_messages({"kind": "NLI", "input": "q", "target": "a"})
    assert (asked["content"], answered["content"]) == ("q", "a")
    assert to_messages({"input": "q", "output": "a"}) == [asked, answered]


def test_a_preference_loss() -> None:
    loss_class = skeleton("in tuning/objectives.py", objectives).MeanLogProb(beta=2.0)
    pairs = some_pairs()
    loss, metrics = loss_class(pairs)
    assert metrics.keys() == set(loss_class.metrics)
    for i, found in enumerate(loss.tolist()):
        chosen, rejected = (pairs.chosen / pairs.n_chosen)[i].item(), (pairs.rejected / pairs.n_rejected)[i].item()
        assert found == pytest.approx(math.log1p(math.exp(-2.0 * (chosen - rejected))))
        assert metrics["margin"][i].item() == pytest.approx(2.0 * (chosen - rejected))


def test_a_benchmark() -> None:
    task = skeleton("evaluation/sums.py").Sums(SamplingParams(), 8, None)
    examples = list(task.examples())
    assert len(examples) == 100 and task.prompt((3, 4))[0]["content"] == "3 + 4 = ?"
    for answer, right in ((" 7\n", 1), ("8", 0), ("", 0)):
        assert task.score((3, 4), answer) == {"right": Share(right, 1)}
