"""Any causal language model that transformers knows, behind the interface of our `Transformer`: GPT-NeoX, Gemma, Phi.

The loop trains it, evaluation measures it, decoding draws from it, as they do with ours. It is the plain way: logits
of all positions are in memory at once, decoding computes the whole sequence anew for every token, and transformers
(an optional dependency) has to be installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint.safetensors_files import listed, weight_files
from loss import IGNORE


@dataclass(frozen=True)
class ForeignArgs:
    """What others want to know of a model's shape, under the names of `ModelArgs`."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    hidden_dim: float
    """width that a SwiGLU of as many weights as this model's feed-forward would have (for counting operations)"""


def shape_of(inner: nn.Module) -> ForeignArgs:
    """The shape that the config of a transformers model tells, the width of its feed-forward by counting weights."""
    config = inner.config.get_text_config()
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    if missing := [name for name in wanted if getattr(config, name, None) is None]:
        raise ValueError(f"the config of {type(inner).__name__} does not say its {', '.join(missing)}")
    dim, n_layers, n_heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dim = getattr(config, "head_dim", None) or dim // n_heads
    ends = {id(each.weight) for each in (inner.get_input_embeddings(), inner.get_output_embeddings())}
    in_blocks = sum(p.numel() for p in inner.parameters() if p.dim() > 1 and id(p) not in ends)
    attention = 2 * dim * head_dim * (n_heads + n_kv_heads)
    return ForeignArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=inner.get_input_embeddings().num_embeddings,
        max_seq_len=config.max_position_embeddings,
        hidden_dim=max(0.0, (in_blocks / n_layers - attention) / (3 * dim)),
    )


class TransformersModel(nn.Module):
    """A causal LM of transformers with the `forward` of `model.Transformer`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.args = shape_of(inner)
        self.compute_dtype: torch.dtype | None = None  # dtype of matrix products; None: that of the parameters
        self._checkpointing = False
        self._isolates: bool | None = None  # whether a mask keeps the documents of a row apart; None: not tried yet

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        token_losses: bool = False,
        cache: TokenCache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, T, V) in float32; or, with `targets`, the sum of the token losses and the number of targets.

        Shapes and meaning as in `Transformer.forward`. Raises ValueError for `doc_ids` where the model's attention
        takes no mask that would keep documents apart.
        """
        logits = self.logits(self.hidden(tokens, positions=positions, doc_ids=doc_ids, cache=cache))  # (B, T, V)
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        weighted = losses if loss_weights is None else losses * loss_weights.flatten()
        told = losses.detach().view_as(targets) if token_losses else (targets != IGNORE).sum()
        return weighted.sum(), told

    def hidden(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        cache: TokenCache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """What `logits` takes, (B, T, V): here the logits themselves, since heads differ from model to model.

        `lengths`, of rows that are padded on the right, change nothing: nothing sees what lies to its right."""
        if cache is not None:
            B, T = tokens.shape
            if positions is None:
                positions = torch.arange(cache.length, cache.length + T, device=tokens.device)
            positions = positions.expand(B, T)
            everything = self._run(cache.store(tokens, positions), None, None)  # (B, S, V)
            return everything.gather(1, positions[..., None].expand(B, T, everything.shape[-1]))
        if doc_ids is not None:
            self._check_isolation(tokens.shape[1])
        return self._run(tokens, positions, doc_ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V), float32 or wider, of what `hidden` returned."""
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32))

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor | None, doc_ids: torch.Tensor | None) -> torch.Tensor:
        own = self.dtype
        dtype = self.compute_dtype or own
        more = {} if positions is None or not self._takes_positions else {"position_ids": positions}
        if doc_ids is not None:
            T = tokens.shape[1]
            causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
            seen = (doc_ids[:, None, :, None] == doc_ids[:, None, None, :]) & causal  # (B, 1, T, T)
            hide = torch.finfo(dtype).min  # added to the scores; -inf would make NaN of a row that sees nothing
            more["attention_mask"] = torch.zeros(seen.shape, dtype=dtype, device=tokens.device).masked_fill(~seen, hide)
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != own):
            return self.inner(input_ids=tokens, use_cache=False, **more).logits

    @property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.inner.forward).parameters

    def _check_isolation(self, length: int) -> None:
        """Raise ValueError unless a document behind another in a row gives the logits that it gives alone."""
        kind = type(self.inner).__name__
        advice = "train on one document a row (--data.packing none), or without --data.isolate_documents"
        window = getattr(self.inner.config.get_text_config(), "sliding_window", None)
        if window is not None and length > window:
            raise ValueError(
                f"{kind} has a sliding window of {window}: rows of {length} cannot isolate documents; shorten them "
                f"(--data.seq_len, which is half a row where pairs of answers are learnt), or {advice}"
            )
        if self._isolates is None:
            self._isolates = self._takes_positions and self._isolates_in_fact()
        if not self._isolates:
            raise ValueError(
                f"{kind} cannot keep the documents of a row apart; {advice}: pairs of answers (--objective dpo, orpo), "
                "which always share one, it cannot learn from"
            )

    @torch.no_grad()
    def _isolates_in_fact(self) -> bool:
        was_training = self.training
        self.eval()
        device = self.inner.get_input_embeddings().weight.device
        tokens = torch.arange(8, device=device)[None] % self.args.vocab_size  # (1, 8): two documents of four
        places = torch.arange(4, device=device)[None]
        together = self._run(tokens, places.repeat(1, 2), torch.arange(8, device=device)[None] // 4)[:, 4:]
        alone = self._run(tokens[:, 4:], places, None)
        self.train(was_training)
        return bool((together - alone).abs().max() <= 0.02 * alone.abs().max())  # bfloat16 rounds to 0.004

    # ---- what trainer and decoding ask for

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.inner.get_input_embeddings().weight.dtype

    @property
    def model(self) -> SimpleNamespace:
        """What stands where `Transformer` has its decoder: the embedding."""
        return SimpleNamespace(embed_tokens=self.inner.get_input_embeddings())

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute each block in the backward pass instead of keeping it."""
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on and not self._checkpointing:
            self.inner.gradient_checkpointing_enable({"use_reentrant": False})
        elif self._checkpointing and not on:
            self.inner.gradient_checkpointing_disable()
        self._checkpointing = on

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Leaves the model as it is: transformers' code breaks into too many graphs for compiling to pay."""

    def make_cache(self, batch: int, max_len: int | None = None, kind: str = "static") -> TokenCache:
        """An empty cache for `batch` rows of up to `max_len` tokens (default: the model's own limit)."""
        if kind != "static":
            raise ValueError(
                f"{type(self.inner).__name__} is decoded without key-value caches, so without a {kind} one"
            )
        return TokenCache(batch, max_len or self.args.max_seq_len, self.inner.get_input_embeddings().weight.device)

    def n_parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    # ---- the vocabulary

    @torch.no_grad()
    def resize(self, size: int, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Make the vocabulary `size` ids long; `rows` makes of the old embedding (V, dim), and of the head's matrix and
        bias (V,), if it has one, the new ones."""
        before = [table.clone() for table in self._tables()]
        self.inner.resize_token_embeddings(size, mean_resizing=False)
        for old, new in zip(before, self._tables(), strict=True):
            new.copy_(rows(old))
        self.args = shape_of(self.inner)

    def _tables(self) -> list[torch.Tensor]:
        """All that has a row for each id; a matrix twice where it is embedding and head."""
        return [self.inner.get_input_embeddings().weight, *self.inner.get_output_embeddings().parameters()]

    # ---- Hugging Face directories

    @classmethod
    def from_pretrained(
        cls, directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> TransformersModel:
        """The model of a Hugging Face directory, its parameters in `dtype`; ValueError when transformers is missing,
        does not know it, or finds tensors missing, unknown or of another shape."""
        return cls(load_inner(directory, dtype).to(device))

    def save_pretrained(self, directory: Path, config: dict[str, Any] | None = None) -> None:
        """Write the model as transformers does; `config`: ids of special tokens for its config."""
        self.inner.config.update({k: v for k, v in (config or {}).items() if v is not None})
        with quiet():
            self.inner.save_pretrained(directory)

    @torch.no_grad()
    def load_weights(self, directory: Path) -> None:
        """Copy the weights of a directory into the parameters there are."""
        self.inner.load_state_dict(load_inner(directory, self.dtype).state_dict())


class TokenCache:
    """In the place of a key-value cache, the ids themselves: every step computes the whole sequence anew.

    Slot = position, as in `cache.KVCache`: rows of unequal length are padded on the right, where nothing sees it.
    """

    def __init__(self, batch: int, max_len: int, device: torch.device | str = "cpu") -> None:
        self.ids = torch.zeros(batch, max_len, dtype=torch.long, device=device)
        self.max_len = max_len
        self.length = 0  # highest position written so far, plus one

    def store(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keep tokens (B, T) at positions (B, T); all ids so far, (B, length)."""
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= self.max_len:
            raise ValueError(f"the cache holds positions 0..{self.max_len - 1}, asked to store {low}..{high}")
        self.ids.scatter_(1, positions, tokens)
        self.length = max(self.length, high + 1)
        return self.ids[:, : self.length]

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        self.length = min(self.length, length)

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i continue from what row `rows[i]` has seen."""
        self.ids = self.ids[rows]

    def append(self, other: TokenCache) -> None:
        """Add the rows of another cache with the same room after those of this one."""
        self.ids, self.length = torch.cat([self.ids, other.ids]), max(self.length, other.length)


def load_inner(directory: Path, dtype: torch.dtype) -> nn.Module:
    """The causal LM that transformers makes of a directory, all of whose tensors fit."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError(
            f"{directory} is no model of the LLaMA family, and transformers, which may know it, is not installed: "
            "pip install 'transformers>=5,<6'"
        ) from None
    weight_files(directory)  # says in a sentence what is missing, and that pickles are not read
    try:
        with quiet():
            inner, info = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, output_loading_info=True, local_files_only=True, use_safetensors=True
            )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"transformers cannot load {directory} as a causal language model: {reason}") from None
    faults = [f"{what.replace('_', ' ')} {listed(sorted(map(str, names)))}" for what, names in info.items() if names]
    if faults:
        raise ValueError(f"{directory} does not fit its config.json: {'; '.join(faults)}")
    return inner


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars over the parts of a file."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
