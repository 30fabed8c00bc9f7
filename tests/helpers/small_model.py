"""A model small enough to ask anything of, and what tests of decoding compare its answers with."""

import torch

from model import Transformer
from model_args import ModelArgs


def small_model(**changes) -> Transformer:
    """A float64 model whose logits are far enough apart to have a clear argmax."""
    torch.manual_seed(5)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 61, "max_seq_len": 40}
    model = Transformer(ModelArgs(**(shape | changes))).double()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def sensitive_model(**changes) -> Transformer:
    """A smaller one yet, without gradients, in which every earlier token matters to every logit."""
    torch.manual_seed(0)
    shape = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 17, "max_seq_len": 12}
    model = Transformer(ModelArgs(**shape | changes)).double().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05 if name.startswith("rope.") else 0.4)
    return model.requires_grad_(False)


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Ids of a `sensitive_model`."""
    return torch.randint(17, shape, generator=torch.Generator().manual_seed(seed))


def random_prompts(lengths: list[int], vocab_size: int = 61, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def uncached(model, prompt: list[int], n: int, stop: tuple[int, ...] = ()) -> list[int]:
    """Greedy decoding the dumbest way: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


class ByteTokenizer:
    """Ids are bytes; 256 and up are special."""

    def id_to_bytes(self, i: int) -> bytes:
        return bytes([i]) if i < 256 else b""

    def decode(self, ids) -> str:
        return b"".join(map(self.id_to_bytes, ids)).decode("utf8", errors="replace")
