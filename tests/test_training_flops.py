"""The formula against torch's counter of what transformers' model really multiplies."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import config_json
from model_args import ModelArgs
from training.flops import train_flops_per_token

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2, "tie_embeddings": False},
        {"n_kv_heads": 1, "head_dim": 24},  # heads wider than the stream
        {"n_layers": 1, "hidden_dim": 100, "vocab_size": 999},
    ],
)
@pytest.mark.parametrize("T", [16, 33])
def test_equals_what_torch_counts(changes, T):
    args = ModelArgs(**{"dim": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 256} | changes)
    config = transformers.AutoConfig.for_model(**config_json.write(args), attn_implementation="eager", use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as forward:
        logits = model(torch.zeros(2, T, dtype=torch.int64)).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert 2 * T * train_flops_per_token(args, T) == forward.get_total_flops() + backward.get_total_flops()
