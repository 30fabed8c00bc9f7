"""Small models of every kind that formats hold or refuse, as directories on disk, their weights not all alike."""

from pathlib import Path

import torch

from checkpoint.directory import save_model
from model import Transformer
from model_args import ModelArgs

KINDS = {
    "tied": {},
    "untied": {"tie_embeddings": False, "n_kv_heads": 2},
    "biased": {"attention_bias": True, "n_kv_heads": 2},
    "normed": {"qk_norm": True, "head_dim": 10, "n_kv_heads": 1},
}
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 40


def saved(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Transformer:
    """Write a model into a directory, without a tokenizer; returns it."""
    torch.manual_seed(3)
    shape = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 40, "vocab_size": 40, "max_seq_len": 64}
    model = Transformer(ModelArgs(**shape | changes)).to(dtype)
    for parameter in model.parameters():
        mean = 1.0 if parameter.dim() == 1 else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    save_model(folder, model)
    return model.requires_grad_(False)
