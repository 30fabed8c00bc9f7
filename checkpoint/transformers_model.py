"""Any causal language model of transformers (GPT-NeoX, Gemma, Phi, ...), with the interface of our `Transformer`.

The same loop trains it, the same evaluation measures it, the same decoding samples from it. It is slower than ours:
the logits of all positions are in memory at once, and decoding computes the whole sequence again for every token.
transformers is an optional dependency.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint.config_json import longest_text
from checkpoint.locate import read_config
from checkpoint.safetensors_files import check_depth, listed, opened, weight_files
from cli.extras import install_command
from cli.memory import memory_is_full
from loss import IGNORE


@dataclass(frozen=True)
class Shape:
    """The part of a model's shape that the loop and decoding use, under the names of `ModelArgs`."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    hidden_dim: float
    """width of a SwiGLU with as many weights as this model's feed-forward, to count operations by"""


def shape_of(inner: nn.Module) -> Shape:
    """Return the shape of a transformers model: from its config, and the feed-forward's width by counting weights.

    Raises ValueError where the config lacks a number.
    """
    config = inner.config.get_text_config()
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    if missing := [name for name in needed if getattr(config, name, None) is None]:
        raise ValueError(f"the config of {type(inner).__name__} does not say its {', '.join(missing)}")
    stated = config.to_dict() | {"max_position_embeddings": config.max_position_embeddings}  # n_positions in GPT-2
    rope = getattr(config, "rope_parameters", None) or {}  # by layer type in some models, which stretch nothing
    dim, n_layers, n_heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dim = getattr(config, "head_dim", None) or dim // n_heads
    # Matrices in the blocks: all but embedding and head. Without q, k, v and o the rest is the feed-forward, which for
    # a SwiGLU has three matrices of dim x hidden_dim.
    ends = {id(each.weight) for each in (inner.get_input_embeddings(), inner.get_output_embeddings())}
    in_blocks = sum(p.numel() for p in inner.parameters() if p.dim() > 1 and id(p) not in ends)
    attention = 2 * dim * head_dim * (n_heads + n_kv_heads)  # q and o, k and v
    return Shape(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=inner.get_input_embeddings().num_embeddings,
        max_seq_len=longest_text(stated, rope if "rope_type" in rope else None),
        hidden_dim=max(0.0, (in_blocks / n_layers - attention) / (3 * dim)),
    )


class TransformersModel(nn.Module):
    """A causal LM of transformers, `inner`, that is trained and decoded as `model.Transformer` is."""

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
        """Return logits (B, T, V) in float32; with `targets`, the sum of the token losses and the number of targets.

        Arguments and results as in `Transformer.forward`. Raises ValueError for `doc_ids` where no mask keeps documents
        apart in this model.
        """
        logits = self.logits(self.hidden(tokens, positions=positions, doc_ids=doc_ids, cache=cache))  # (B, T, V)
        if targets is None:
            return logits
        flat = logits.flatten(0, 1), targets.flatten()  # (B T, V), (B T,)
        losses = F.cross_entropy(*flat, ignore_index=IGNORE, reduction="none")  # (B T,), 0 where ignored
        weighted = losses if loss_weights is None else losses * loss_weights.flatten()
        return weighted.sum(), losses.detach().view_as(targets) if token_losses else (targets != IGNORE).sum()

    def hidden(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        cache: TokenCache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return what `logits` takes: here the logits themselves, (B, T, V), because heads differ from model to model.

        lengths: accepted for the interface, and not needed: no token sees the padding on its right.
        """
        if cache is not None:
            B, T = tokens.shape
            if positions is None:
                positions = torch.arange(cache.length, cache.length + T, device=tokens.device)
            positions = positions.expand(B, T)
            # Compute all S tokens so far, and pick the T rows of logits that stand at `positions`.
            logits = self._run(cache.store(tokens, positions), None, None)  # (B, S, V)
            return logits.gather(1, positions[..., None].expand(B, T, logits.shape[-1]))  # (B, T, V)
        if doc_ids is not None:
            self._check_isolation(tokens.shape[1])
        return self._run(tokens, positions, doc_ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (..., V), float32 or wider, for what `hidden` returned."""
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32))

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor | None, doc_ids: torch.Tensor | None) -> torch.Tensor:
        """Call the model: logits (B, T, V) for tokens (B, T), in `compute_dtype` or that of the parameters."""
        dtype = self.compute_dtype or self.dtype
        more = {} if positions is None or not self._takes_positions else {"position_ids": positions}
        if doc_ids is not None:
            T = tokens.shape[1]
            # A query sees the keys at or before its place that belong to the same document.
            causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
            seen = (doc_ids[:, None, :, None] == doc_ids[:, None, None, :]) & causal  # (B, 1, T, T)
            hide = torch.finfo(dtype).min  # added to the scores; -inf would make NaN of a row that sees nothing
            more["attention_mask"] = torch.zeros(seen.shape, dtype=dtype, device=tokens.device).masked_fill(~seen, hide)
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != self.dtype):
            return self.inner(input_ids=tokens, use_cache=False, **more).logits

    @property
    def _takes_positions(self) -> bool:
        """Whether the model takes positions, so that they can restart inside a row."""
        return "position_ids" in inspect.signature(self.inner.forward).parameters

    def _check_isolation(self, length: int) -> None:
        """Raise ValueError unless the second document of a row has the same logits as alone in its row."""
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
                f"{kind} cannot keep the documents of a row apart; {advice}: pairs of answers (preference objectives), "
                "which always share one, it cannot learn from"
            )

    @torch.no_grad()
    def _isolates_in_fact(self) -> bool:
        """Try it: not every model that takes a mask of four dimensions obeys it."""
        was_training = self.training
        self.eval()
        device = self.device
        tokens = torch.arange(8, device=device)[None] % self.args.vocab_size  # (1, 8): two documents of four
        positions = torch.arange(4, device=device)[None]  # (1, 4)
        together = self._run(tokens, positions.repeat(1, 2), torch.arange(8, device=device)[None] // 4)[:, 4:]
        alone = self._run(tokens[:, 4:], positions, None)  # (1, 4, V), as `together`
        self.train(was_training)
        return bool((together - alone).abs().max() <= 0.02 * alone.abs().max())  # bfloat16 rounds by 0.004

    # ---- what the training loop, decoding and adapters use besides

    @property
    def embedding(self) -> nn.Module:
        """The input embedding, (V, dim)."""
        return self.inner.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.embedding.weight.dtype

    @property
    def module_tree(self) -> nn.Module:
        """The module whose names an adapter's file uses: transformers' own."""
        return self.inner

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each block is recomputed in the backward pass instead of kept."""
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on and not self._checkpointing:
            self.inner.gradient_checkpointing_enable({"use_reentrant": False})
        elif self._checkpointing and not on:
            self.inner.gradient_checkpointing_disable()
        self._checkpointing = on

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: transformers' code breaks into too many graphs for compiling to pay."""

    def make_cache(self, batch: int, max_len: int | None = None, kind: str = "static") -> TokenCache:
        """Make an empty cache for `batch` rows of up to `max_len` tokens (default: the model's max_seq_len)."""
        if kind != "static":
            name = type(self.inner).__name__
            raise ValueError(f"{name} is decoded without key-value caches, so without a {kind} one")
        return TokenCache(batch, max_len or self.args.max_seq_len, self.device)

    def n_parameters(self) -> int:
        """Return the number of parameters; tied ones count once."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def resize(self, size: int, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the vocabulary to `size` ids.

        rows: function from an old table to the new one, for the embedding (V, dim), and the head's matrix (V, dim) and
        bias (V,), if it has one.
        """
        before = [table.clone() for table in self._tables()]
        self.inner.resize_token_embeddings(size, mean_resizing=False)
        for old, new in zip(before, self._tables(), strict=True):
            new.copy_(rows(old))
        self.args = shape_of(self.inner)

    def _tables(self) -> list[torch.Tensor]:
        """Return all tensors with a row for each id; a matrix that is embedding and head stands there twice."""
        return [self.embedding.weight, *self.inner.get_output_embeddings().parameters()]


class TokenCache:
    """A stand-in for a key-value cache that keeps ids: every step computes the whole sequence again.

    Slot = position, as in `attention.cache.KVCache`: rows of unequal length are padded on the right, where no token
    sees the padding.
    """

    can_rewind, endless = True, False  # as of `cache.KVCache`

    def __init__(self, batch: int, max_len: int, device: torch.device | str = "cpu") -> None:
        self.ids = torch.zeros(batch, 0, dtype=torch.long, device=device)  # (B, length of the longest text so far)
        self.max_len = max_len
        self.length = 0  # highest position written so far, plus one

    def store(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Store tokens (B, T) at positions (B, T), and return all ids so far, (B, length)."""
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= self.max_len:
            raise ValueError(f"the cache holds positions 0..{self.max_len - 1}, asked to store {low}..{high}")
        self.widen(high + 1)
        self.ids.scatter_(1, positions, tokens)
        self.length = max(self.length, high + 1)
        return self.ids[:, : self.length]

    def widen(self, length: int) -> None:
        """Make room for texts of `length` tokens."""
        self.ids = F.pad(self.ids, (0, max(0, length - self.ids.shape[1])))

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        self.length = min(self.length, length)

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i continue from what row `rows[i]` has seen."""
        self.ids = self.ids[rows]

    def append(self, other: TokenCache) -> None:
        """Add the rows of another cache with the same limit after those of this one."""
        self.widen(other.ids.shape[1])
        other.widen(self.ids.shape[1])
        self.ids, self.length = torch.cat([self.ids, other.ids]), max(self.length, other.length)


# ---- directories


def load(directory: Path, device: torch.device | str, dtype: torch.dtype) -> TransformersModel:
    """Load the model in a Hugging Face directory; raises ValueError as `load_inner` does."""
    return TransformersModel(load_inner(directory, dtype).to(device))


@torch.no_grad()
def copy_into(model: TransformersModel, directory: Path) -> None:
    """Copy the weights of a directory into the parameters that `model` has."""
    model.inner.load_state_dict(load_inner(directory, model.dtype).state_dict())


def save(directory: Path, model: TransformersModel, ids: dict[str, int | None]) -> None:
    """Write the model as transformers does; ids: those of special tokens, by their keys in config.json."""
    model.inner.config.update({key: i for key, i in ids.items() if i is not None})
    with quiet():
        model.inner.save_pretrained(directory)


def load_inner(directory: Path, dtype: torch.dtype) -> nn.Module:
    """Load a causal LM with transformers.

    Raises ValueError where transformers is not installed, does not know the model, or finds tensors that are missing,
    unknown or of another shape.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError(
            f"{directory} is no model of the LLaMA family, and transformers, which may know it, is not installed: "
            + install_command("transformers")
        ) from None
    config, files = read_config(directory), weight_files(directory)
    check_depth(config, directory)
    safe = files[0].suffix == ".safetensors"
    for path in files:
        with opened(path):  # raises, in a sentence, for a damaged file and a pickle that would run code
            pass
    try:
        with quiet():
            inner, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,  # without a word, transformers asks on the terminal
                use_safetensors=safe,
            )
    except Exception as error:  # whatever the code of so many models meets in a config.json
        if memory_is_full(error) and "overflow" not in str(error):  # a size that overflows is the config's fault
            raise
        if "auto_map" in config and "trust_remote_code" in str(error):
            raise ValueError(
                f"{directory} needs code of its own (auto_map in config.json), which is never run here; "
                f"use a model whose type transformers knows, found model_type {config.get('model_type')!r}"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"transformers cannot load {directory} as a causal language model: {reason}") from None
    faults = [f"{what.replace('_', ' ')} {listed(sorted(map(str, names)))}" for what, names in info.items() if names]
    if faults:
        raise ValueError(f"{directory} does not fit its config.json: {'; '.join(faults)}")
    try_it(inner, directory)
    return inner


@torch.no_grad()
def try_it(inner: nn.Module, directory: Path) -> None:
    """Compute the logits of one token; ValueError where a config.json makes a model that can be built, and not run."""
    try:
        inner(input_ids=torch.zeros(1, 1, dtype=torch.long, device=inner.device), use_cache=False)
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        if memory_is_full(error):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"{directory}: the model that its config.json describes cannot compute: {reason}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from showing progress bars within the block."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
