"""One small model in three guises, for tests of adapters: ours, transformers', and as a directory on disk."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from checkpoint.directory import save_model
from model import RMSNorm, Transformer
from model_args import ModelArgs

SHAPE = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "vocab_size": 37, "hidden_dim": 40}


def our_model(tied: bool = False, **shape: Any) -> Transformer:
    """In float64, with weights large enough for adapters to show."""
    model = Transformer(ModelArgs(**SHAPE | {"tie_embeddings": tied} | shape)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.dim() == 1, std=0.2)
    return model


def save_as_hf(model: Transformer, folder: Path) -> Path:
    save_model(folder, model)
    return folder


def hf_model(folder: Path) -> LlamaForCausalLM:
    """transformers' model of a directory, in float64: its norms, too, which by themselves are in float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.eps = module.variance_epsilon
            module.forward = partial(RMSNorm.forward, module)
    return model


def some_tokens() -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (3, 11))


def shake(model: torch.nn.Module) -> None:
    """Move every trainable parameter away from where it started, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
