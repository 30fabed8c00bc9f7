"""The models that are trained have what the loop asks of them."""

import inspect

import pytest
import torch
from helpers.tiny_training_run import SHAPE

from checkpoint.transformers_model import TransformersModel
from model import Transformer
from model_args import ModelArgs
from training.protocols import TrainableModel, take_metrics
from tuning.objectives import ORPO
from tuning.preference_model import PreferenceModel


def from_transformers() -> TransformersModel:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return TransformersModel(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=29, **shape)))


MODELS = {
    "ours": lambda: Transformer(ModelArgs(**SHAPE)),
    "transformers": from_transformers,
    "preferences": lambda: PreferenceModel(Transformer(ModelArgs(**SHAPE)), ORPO(0.1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_models_keep_the_protocol(name):
    model = MODELS[name]()
    members = set(TrainableModel.__annotations__) | {n for n in vars(TrainableModel) if not n.startswith("_")}
    assert {"args", "compute_dtype", "forward", "compile"} < members
    assert not [member for member in members if not hasattr(model, member)]
    wanted, found = (inspect.signature(each.forward).parameters for each in (TrainableModel, type(model)))
    assert list(wanted) == [parameter for parameter in found if parameter in wanted]
    shape = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len")
    assert all(getattr(model.args, field) > 0 for field in shape)
    before = model.compute_dtype, model.gradient_checkpointing
    model.compute_dtype, model.gradient_checkpointing = torch.bfloat16, True
    assert (model.compute_dtype, model.gradient_checkpointing) == (torch.bfloat16, True) != before


def test_metrics_of_a_model_that_has_none():
    assert take_metrics(MODELS["ours"]()) == {}
    assert take_metrics(MODELS["preferences"]()).keys() == set(ORPO.metrics)
