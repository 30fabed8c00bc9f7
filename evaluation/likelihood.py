"""Log-probabilities of given continuations, many at a time: the base of multiple-choice benchmarks and perplexity."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from attention.cache import KVCache
from decoding.feeder import evaluating
from decoding.params import Ids, shared_length
from evaluation.branches import BranchCache, Branches, join
from evaluation.last_block import hidden_at, pick
from model import Transformer
from serving.assistant import first_id
from tokenizer import Tokenizer

HEAD_ELEMENTS = 1 << 22  # logits that exist at a time: 16 MiB in float32; more of them no longer fit a CPU's cache
PASS_TOKENS = 1024  # tokens of a pass on a CPU, whose cache no longer holds the activations of more
MOST_PADDING = 128  # of them; a pass less saves about as much time
SHORTEST_PREFIX = 8  # a shared beginning of fewer ids is fed with every row


class Pair(NamedTuple):
    """A context and what follows it."""

    context: Ids
    continuation: Ids


class Likelihood(NamedTuple):
    """How likely a model finds a continuation."""

    logprob: float
    """natural logarithm of the probability of all its ids"""
    greedy: bool
    """whether each of its ids is the likeliest in its place"""
    cut: bool
    """whether the beginning of the context did not fit the model's window"""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Return the ids of a context and of the continuation, encoded as one text and then divided.

    Spaces at the end of the context belong to the continuation, because vocabularies have them at the beginning of
    words. An empty context is the id that stands before a text (`first_id`). These are the rules of
    lm-evaluation-harness, which takes bos for `first_id` where a vocabulary of ours has eos.
    """
    bare = context.rstrip()
    whole = [*tokenizer.begins, *tokenizer.encode(context + continuation)]
    if not bare:
        return Pair([first_id(tokenizer)], whole[len(tokenizer.begins) :])
    size = len(tokenizer.begins) + len(tokenizer.encode(bare))
    return Pair(whole[:size], whole[size:])


@torch.inference_mode()
def log_likelihoods(model: Transformer, pairs: Sequence[Pair], batch_size: int) -> list[Likelihood]:
    """Return how likely the model finds the continuation of each pair.

    The beginning that all pairs share (the solved examples of a benchmark) is computed once, and continuations of one
    id after the same context share a row. Of a text that is longer than the model's window the beginning is left out.
    Raises ValueError for an empty context or continuation, and for a continuation that is longer than the window.
    """
    longest = model.args.max_seq_len
    for context, continuation in pairs:
        if not context:
            raise ValueError(
                "a context should have at least 1 id, such as bos: the first id of a text is not predicted"
            )
        if not 0 < len(continuation) <= longest:
            raise ValueError(
                f"a continuation should have from 1 to {longest} ids (the window), found {len(continuation)}"
            )
    texts = [[*context, *continuation][-(longest + 1) :] for context, continuation in pairs]
    inputs = [tuple(text[:-1]) for text in texts]
    rows = sorted(set(inputs), key=len)
    wanted = dict.fromkeys(rows, longest)  # first position of each row whose logits are read
    for row, pair in zip(inputs, pairs):
        wanted[row] = min(wanted[row], len(row) - len(pair.continuation))
    shared = ()
    if len(rows) > 1:
        first, last = min(rows), max(rows)  # in the order of a dictionary, all others lie between these two
        shared = first[: min(shared_length(first, last), *wanted.values())]
    if len(shared) < SHORTEST_PREFIX:
        shared = ()
    members: dict[Ids, list[int]] = {row: [] for row in rows}
    for i, row in enumerate(inputs):
        members[row].append(i)
    results: list[Likelihood] = [Likelihood(0.0, False, False)] * len(pairs)
    with evaluating(model):
        prefix = model.make_cache(1, longest)
        if shared:
            model.hidden(torch.tensor([shared], device=model.device), cache=prefix, lengths=[len(shared)])
        # branches need keys that are rotated once: not where frequencies depend on the length of a text
        branched = isinstance(prefix, KVCache) and prefix.rotated
        joined = join(rows, len(shared), model.args.dim if branched else 0, batch_size)
        for batch in _batches(joined, batch_size, model.device.type == "cpu"):
            todo = [
                (at, path[-len(pairs[i].continuation) :], i)
                for at, row in enumerate(batch)
                for text, path in row.paths.items()
                for i in members[text]
            ]
            needed: list[dict[int, int]] = [{} for _ in batch]  # place whose logits are read -> its number in the row
            for at, path, _ in todo:
                for place in path:
                    needed[at].setdefault(place, len(needed[at]))
            hidden = _hidden(model, batch, prefix, len(shared), [[*places] for places in needed])  # (B, n, dim)
            n = hidden.shape[1]
            asked = [([at * n + needed[at][place] for place in path], pairs[i].continuation) for at, path, i in todo]
            for (_, _, i), (logprob, greedy) in zip(todo, _scores(model, hidden.flatten(0, 1), asked)):
                cut = len(pairs[i].context) + len(pairs[i].continuation) > longest + 1
                results[i] = Likelihood(logprob, greedy, cut)
    return results


def _batches(rows: Iterable[Branches], size: int, small: bool) -> Iterator[list[Branches]]:
    """Yield rows, the shortest first, with at most `size` texts at a time; no row has more. small: as many as a CPU
    computes fastest."""
    batch: list[Branches] = []
    for row in rows:
        width, texts = len(row.ids), sum(len(each.paths) for each in (*batch, row))
        padding = sum(width - len(each.ids) for each in batch)
        large = small and ((len(batch) + 1) * width > PASS_TOKENS or padding > MOST_PADDING)
        if batch and (texts > size or large):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _hidden(
    model: Transformer, rows: Sequence[Branches], prefix: KVCache, past: int, needed: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return the hidden states (B, n, dim) of rows in their `needed` places, those of row i first; `prefix` holds the
    `past` ids before all rows."""
    width, alone = max(len(row.ids) for row in rows), all(len(row.paths) == 1 for row in rows)
    tokens = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows], device=model.device)  # (B, T)
    n = max(map(len, needed))
    places = torch.tensor([[*each, *[0] * (n - len(each))] for each in needed], device=model.device)  # (B, n)
    ours = isinstance(prefix, KVCache)  # a model that runs through transformers has other caches, and no blocks of ours
    # no id sees the padding behind it; only an encoding that depends on the length of a text has to know of it
    if ours and not past and alone and (prefix.rotated or len(rows[0].ids) == width):
        return hidden_at(model, tokens, places)
    if ours and prefix.rotated:
        return hidden_at(model, tokens, places, BranchCache(prefix, past, rows, width))
    cache = copy.copy(prefix)  # `reorder` gives the copy tensors of its own
    cache.reorder(torch.zeros(len(rows), dtype=torch.int64, device=model.device))
    positions = torch.arange(past, past + width, device=model.device).expand(len(rows), -1)  # (B, T)
    hidden = model.hidden(tokens, positions=positions, cache=cache, lengths=[past + len(row.ids) for row in rows])
    return pick(hidden, places)


def _scores(
    model: Transformer, hidden: torch.Tensor, asked: Sequence[tuple[Sequence[int], Ids]]
) -> Iterator[tuple[float, bool]]:
    """Yield the summed log-probability of the ids of each (places, ids), and whether each is the likeliest, under the
    hidden states (N, dim) at the places."""
    device = hidden.device
    places = torch.tensor([place for each, _ in asked for place in each], device=device)
    targets = torch.tensor([each for _, ids in asked for each in ids], device=device)  # as places
    owners = torch.repeat_interleave(torch.tensor([len(ids) for _, ids in asked])).to(device)
    places, numbers = places.unique(return_inverse=True)  # the choices of a question have one place
    hidden = hidden[places]  # (U, dim)
    block = max(32, HEAD_ELEMENTS // model.args.vocab_size)
    logprobs, missed = hidden.new_zeros(2, len(asked), dtype=torch.float64)
    for start in range(0, len(places), block):
        logits = model.logits(hidden[None, start : start + block])[0]  # (block, V)
        here = ((numbers >= start) & (numbers < start + block)).nonzero()[:, 0]
        at, target = numbers[here] - start, targets[here]
        missed.index_add_(0, owners[here], (logits[at, target] < logits.amax(-1)[at]).double())
        logprobs.index_add_(0, owners[here], logits.log_softmax(-1)[at, target].double())
    return zip(logprobs.tolist(), (missed == 0).tolist())


def windows(ids: Sequence[int], length: int, stride: int) -> Iterable[Pair]:
    """Yield pairs that cover all of `ids` but the first, each id once, in windows of at most `length` ids.

    A window begins `stride` ids behind the one before it: every id but those of the first window is judged after at
    least `length - stride` others.
    """
    done = 1
    while done < len(ids):
        end = min(len(ids), length + 1 if done == 1 else done + stride)
        yield Pair(ids[max(0, end - length - 1) : done], ids[done:end])
        done = end
