"""DPO and ORPO against formulas written out pair by pair; the model that learns by them against texts one by one."""

import inspect
import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_dataset_sft_pairs import made_up

from chat.samples import Samples
from checkpoint.transformers_model import TransformersModel
from dataset import IGNORE
from dataset_sft import PairData
from distributed.single import SingleProcess
from model import Transformer
from model_args import ModelArgs
from tuning import args as flags
from tuning import reference as reference_room
from tuning.args import PreferenceArgs
from tuning.objectives import DPO, OBJECTIVES, ORPO, SFT, log_odds, make_objective
from tuning.preference_model import Pairs, PreferenceModel
from tuning.reference import reference

CPU = SingleProcess(torch.device("cpu"))
SHAPE = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "vocab_size": 37, "hidden_dim": 40}
PAIRWISE = (DPO(0.3), DPO(0.1, 0.2, 0.7), ORPO(0.4))


# ---- the objectives


def some_pairs(n: int = 7) -> Pairs:
    """As a model would give them: sums over 1 to 9 tokens of about -2 each."""
    lengths = torch.randint(1, 10, (2, n)).double()
    chosen, rejected = (-2 * length * torch.rand(n, dtype=torch.float64) - 0.01 for length in lengths)
    refs = [-2 * length * torch.rand(n, dtype=torch.float64) for length in lengths]
    return Pairs(chosen.requires_grad_(), rejected.requires_grad_(), *lengths, *refs)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dpo_by_hand(objective: DPO, chosen, rejected, n_chosen, n_rejected, ref_chosen, ref_rejected) -> dict[str, float]:
    beta, e = objective.beta, objective.label_smoothing
    reward_chosen, reward_rejected = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    p = sigmoid(reward_chosen - reward_rejected)  # that the chosen answer is the better one (Bradley-Terry)
    return {
        "loss": -(1 - e) * math.log(p) - e * math.log(1 - p) + objective.sft_weight * -chosen / n_chosen,
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "margin": reward_chosen - reward_rejected,
        "accuracy": float(reward_chosen > reward_rejected),
        "log_ratio_chosen": (chosen - ref_chosen) / n_chosen,
        "log_ratio_rejected": (rejected - ref_rejected) / n_rejected,
    }


def orpo_by_hand(objective: ORPO, chosen, rejected, n_chosen, n_rejected, *_) -> dict[str, float]:
    p, q = math.exp(chosen / n_chosen), math.exp(rejected / n_rejected)  # geometric means over the tokens
    ratio = (p / (1 - p)) / (q / (1 - q))
    return {
        "loss": -math.log(p) + objective.beta * -math.log(sigmoid(math.log(ratio))),
        "reward_chosen": objective.beta * math.log(p),
        "reward_rejected": objective.beta * math.log(q),
        "margin": objective.beta * math.log(p / q),
        "accuracy": float(p > q),
        "sft_loss": -math.log(p),
        "log_odds_ratio": math.log(ratio),
    }


BY_HAND = {DPO: dpo_by_hand, ORPO: orpo_by_hand}


def test_every_loss_on_pairs_is_tested_here():
    assert {type(each) for each in PAIRWISE} == BY_HAND.keys() == set(OBJECTIVES.values()) - {SFT}


@pytest.mark.parametrize("objective", PAIRWISE)
def test_each_pair_by_hand(objective):
    pairs, by_hand = some_pairs(), BY_HAND[type(objective)]
    losses, metrics = objective(pairs)
    assert tuple(metrics) == objective.metrics and not any(value.requires_grad for value in metrics.values())
    for n in range(7):
        expected = by_hand(objective, *(values[n].item() for values in vars(pairs).values()))
        found = {"loss": losses[n].item()} | {name: values[n].item() for name, values in metrics.items()}
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_the_formulas_of_trl():
    """As its DPOTrainer.dpo_loss (sigmoid) and ORPOTrainer.odds_ratio_loss compute them."""
    pairs = some_pairs()
    logits = (pairs.chosen - pairs.rejected) - (pairs.ref_chosen - pairs.ref_rejected)
    for e in (0.0, 0.2):
        expected = -F.logsigmoid(0.3 * logits) * (1 - e) - F.logsigmoid(-0.3 * logits) * e
        torch.testing.assert_close(DPO(0.3, e)(pairs)[0], expected)
    chosen, rejected = pairs.chosen / pairs.n_chosen, pairs.rejected / pairs.n_rejected
    odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    torch.testing.assert_close(ORPO(0.4)(pairs)[0], -chosen - 0.4 * F.logsigmoid(odds))


@pytest.mark.parametrize("objective", PAIRWISE)
def test_gradients_by_differences(objective):
    pairs = some_pairs()
    rest = list(vars(pairs).values())[2:]
    torch.autograd.gradcheck(lambda a, b: objective(Pairs(a, b, *rest))[0], (pairs.chosen, pairs.rejected))


def test_equal_models_have_a_loss_of_log_2_and_no_margin():
    pairs = some_pairs()
    same = Pairs(pairs.chosen, pairs.rejected, pairs.n_chosen, pairs.n_rejected, pairs.chosen, pairs.rejected)
    for e in (0.0, 0.3):
        losses, metrics = DPO(0.7, e)(same)
        torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=1e-15, atol=0)
        assert not metrics["margin"].any() and (metrics["accuracy"] == 0.5).all()


@pytest.mark.parametrize("log_p", [-1e-300, -1e-15, -1e-6, -0.1, -math.log(2), -0.8, -3.0, -40.0, -800.0])
def test_odds_at_both_ends(log_p):
    getcontext().prec = 400
    p = Decimal(log_p).exp()
    x = torch.tensor(log_p, dtype=torch.float64, requires_grad=True)
    found = log_odds(x)
    assert found.item() == pytest.approx(float(Decimal(log_p) - (1 - p).ln()), rel=1e-14, abs=1e-14)
    found.backward()
    assert x.grad.item() == pytest.approx(float(1 / (1 - p)), rel=1e-12)


def test_certain_and_hopeless_answers_give_finite_numbers():
    for chosen, rejected in ((0.0, -5.0), (-5.0, 0.0), (0.0, 0.0), (-1e5, -1e-9), (-1e-9, -1e5)):
        numbers = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
        one, none = torch.ones(1), torch.zeros(1)
        for objective in PAIRWISE:
            loss = objective(Pairs(*numbers, one, one, none, none))[0].sum()
            gradients = torch.autograd.grad(loss, numbers)
            assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beta": 0.0}, "beta should be above 0, and finite, found 0.0"),
        ({"beta": -1.0}, "beta should be above 0"),
        ({"beta": math.nan}, "beta should be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing should be from 0 to below 0.5"),
        ({"sft_weight": -0.1}, "sft_weight should be 0 or more"),
    ],
)
def test_refused_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        PreferenceArgs(**changes)


def test_objectives_by_name():
    args = PreferenceArgs(0.2, 0.1, 0.5)
    assert make_objective("dpo", args) == DPO(0.2, 0.1, 0.5)
    assert make_objective("orpo", PreferenceArgs(0.2)) == ORPO(0.2)
    assert make_objective("orpo", args) == ORPO(0.2)  # fine_tuning.py refuses the flags of the others
    assert isinstance(make_objective("sft", PreferenceArgs()), SFT)


def test_the_names_for_the_argument_parser_are_those_of_the_classes():
    assert list(OBJECTIVES) == list(flags.OBJECTIVES)
    for name, settings in flags.OBJECTIVES.items():
        cls = OBJECTIVES[name]
        assert tuple(inspect.signature(cls).parameters) == settings
        assert {setting: getattr(cls(), setting) for setting in settings}.items() <= vars(PreferenceArgs()).items()


# ---- the model


def our_model(**shape) -> Transformer:
    model = Transformer(ModelArgs(**SHAPE | shape)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.dim() == 1, std=0.2)
    return model


def small_data(**changes) -> PairData:
    """Nine pairs, several a row."""
    samples = made_up([(5, 3), (8, 8), (1, 2), (4, 6), (2, 2), (7, 1), (3, 3), (8, 1), (2, 6)])
    samples = Samples(samples.ids % 37, samples.mask, samples.offsets, {})
    return PairData(samples, **{"seq_len": 8, "batch_size": 2, "seed": 0} | changes)


def one_by_one(model, data: PairData) -> tuple[list[torch.Tensor], list[int]]:
    """log p of each text's targets, token after token, the text alone in a batch; and how many they are."""
    sums, counts = [], []
    for n in range(2 * data.n_pairs):
        here = np.s_[int(data.samples.offsets[n]) : int(data.samples.offsets[n + 1])]
        ids, mask = data.samples.ids[here].astype(int), data.samples.mask[here]
        logits = model(torch.from_numpy(ids)[None])[0].double()
        total = torch.zeros((), dtype=torch.float64)
        for t in range(1, len(ids)):
            if mask[t]:
                total = total + torch.log(torch.exp(logits[t - 1, ids[t]]) / torch.exp(logits[t - 1]).sum())
        sums.append(total)
        counts.append(int(mask[1:].sum()))
    return sums, counts


def losses_one_by_one(model, ref, data: PairData, objective) -> torch.Tensor:
    sums, counts = one_by_one(model, data)
    refs, _ = one_by_one(ref, data)
    columns = (sums[0::2], sums[1::2], counts[0::2], counts[1::2], refs[0::2], refs[1::2])
    return objective(Pairs(*(torch.stack([torch.as_tensor(x).double() for x in column]) for column in columns)))[0]


def inputs(batch) -> dict:
    return {"tokens": batch.tokens, "targets": batch.targets, "positions": batch.positions, "doc_ids": batch.doc_ids}


def epoch(tuned: PreferenceModel, data: PairData, micro: int = 0) -> tuple[torch.Tensor, int]:
    """The losses of an epoch together, and of how many pairs."""
    parts = [part for step in range(data.steps_per_epoch) for part in data.batch(step).split(micro)]
    results = [tuned(**inputs(part)) for part in parts]
    return sum(loss for loss, _ in results), sum(int(count) for _, count in results)


@pytest.mark.parametrize("objective", PAIRWISE)
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_loss_and_gradients_as_of_texts_one_by_one(objective, packing):
    model, ref, data = our_model(), our_model(), small_data(packing=packing)
    tuned = PreferenceModel(model, objective)
    if objective.has_reference:
        tuned.reference = torch.stack(one_by_one(ref, data)[0]).detach()
    expected = losses_one_by_one(model, ref, data, objective)
    theirs = torch.autograd.grad(expected.sum(), list(model.parameters()))
    for micro, checkpointing in ((0, False), (1, True)):
        tuned.gradient_checkpointing = checkpointing
        loss, count = epoch(tuned, data, micro)
        assert count == data.n_pairs == sum(data.batch(step).n_targets for step in range(data.steps_per_epoch))
        torch.testing.assert_close(loss, expected.sum(), atol=1e-9, rtol=1e-10)
        for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), theirs):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_metrics_are_sums_over_the_pairs_since_they_were_taken():
    model, data, objective = our_model(), small_data(), ORPO(0.4)
    tuned = PreferenceModel(model, objective)
    assert tuned.take_metrics() == dict.fromkeys(objective.metrics, 0.0)
    epoch(tuned, data, 1)
    sums, counts = one_by_one(model, data)
    expected = sum(-total.item() / count for total, count in zip(sums[0::2], counts[0::2]))
    assert tuned.take_metrics()["sft_loss"] == pytest.approx(expected, rel=1e-9)
    assert not any(tuned.take_metrics().values())


def test_a_batch_without_pairs_has_a_loss_of_zero_and_gradients_of_zero():
    tuned, data = PreferenceModel(our_model(), ORPO(0.4)), small_data(batch_size=12, packing="none")
    filling = data.batch(0).split(1)[-1]
    assert (filling.targets == IGNORE).all() and filling.n_targets == 0
    loss, count = tuned(**inputs(filling))
    loss.backward()
    assert loss.item() == count.item() == 0
    assert not any(parameter.grad.any() for parameter in tuned.parameters())


def test_a_model_of_transformers_gives_the_same():
    data, objective = small_data(), ORPO(0.4)
    inner = pytest.importorskip("transformers").GPTNeoXForCausalLM
    config = inner.config_class(
        vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    foreign = TransformersModel(inner(config).double().eval())
    loss, _ = epoch(PreferenceModel(foreign, objective), data)
    expected = losses_one_by_one(foreign, foreign, data, objective).sum()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)  # logits are made in float32 at least


# ---- the reference


def test_at_the_start_the_loss_is_log_2(tmp_path):
    model = our_model().float()
    tuned, data, heldout = PreferenceModel(model, DPO(0.5)), small_data(), small_data(first=9)
    tuned.reference = reference(tuned, [data, heldout], CPU, tmp_path / "reference.npz")
    for source in (data, heldout):
        loss, count = epoch(tuned, source)
        assert loss.item() / count == pytest.approx(math.log(2), abs=1e-12)  # the same float32 numbers, step by step
    assert tuned.take_metrics()["margin"] == pytest.approx(0, abs=1e-12)
    expected = torch.stack(one_by_one(model, data)[0])
    torch.testing.assert_close(tuned.reference, expected.repeat(2), atol=1e-4, rtol=1e-5)


def test_it_is_computed_once_and_never_of_something_else(tmp_path, monkeypatch):
    cache, asked = tmp_path / "run" / "reference.npz", []
    compute = reference_room._log_probs
    monkeypatch.setattr(reference_room, "_log_probs", lambda *args: asked.append(1) or compute(*args))
    tuned = PreferenceModel(our_model().train(), DPO())
    first = reference(tuned, [small_data()], CPU, cache)
    assert tuned.training
    assert torch.equal(reference(tuned, [small_data(seed=5)], CPU, cache), first) and len(asked) == 1
    changed = small_data()
    changed.samples.ids[3] += 1
    assert not torch.equal(reference(tuned, [changed], CPU, cache), first) and len(asked) == 2
    assert torch.equal(reference(tuned, [small_data()], CPU, cache), first) and len(asked) == 3
    with torch.no_grad():
        tuned.model.model.norm.weight[5] += 1e-9
    assert not torch.equal(reference(tuned, [small_data()], CPU, cache), first) and len(asked) == 4
    tuned.compute_dtype = torch.float32
    reference(tuned, [small_data()], CPU, cache)
    assert len(asked) == 5
    assert [path.name for path in cache.parent.iterdir()] == ["reference.npz"]


def test_ranks_share_the_work(tmp_path, monkeypatch):
    tuned, data = PreferenceModel(our_model(), DPO()), small_data()
    expected = reference(tuned, [data], CPU, tmp_path / "one.npz")
    ranks = [SingleProcess(torch.device("cpu")) for _ in range(2)]
    for rank, backend in enumerate(ranks):
        monkeypatch.setattr(backend, "rank", rank)
        monkeypatch.setattr(backend, "world", 2)
    parts = [reference_room._log_probs(tuned, [data], backend, 1) for backend in ranks]
    assert all(np.isnan(part).any() for part in parts)
    monkeypatch.setattr(ranks[0], "gather", lambda value: parts if isinstance(value, np.ndarray) else [value] * 2)
    both = reference(tuned, [data], ranks[0], tmp_path / "two.npz", 1)
    torch.testing.assert_close(both, expected, atol=1e-12, rtol=1e-12)
