"""Rows of the table of oracles: the module, positions, attention, caches. Each function returns its largest error."""

from __future__ import annotations

import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers.oracle_row import apart, room, row


def exact_angles():
    """Angles in float64, as the brute force has them."""
    return mock.patch("rope.cos_sin", room("helpers.llama_reference").exact_cos_sin)


# ---- the module

FAMILY = "9 shapes: tied, GQA, MQA, Qwen2, Qwen3, Mistral"


@row("logits", "transformers, fp32", f"{FAMILY}; rows 3 x 8, 1 x 13, 2 x 1", 1e-5)
def logits() -> float:
    models = room("test_model")
    worst = 0.0
    for changes in models.VARIANTS.values():
        model = models.small(**changes)
        peer = models.peer_of(model)
        for shape in ((3, 8), (1, 13), (2, 1)):
            tokens = models.random_tokens(*shape)
            with torch.no_grad():
                worst = max(worst, apart(model(tokens), peer(tokens).logits))
    return worst


@row("gradients", "transformers, fp32", f"{FAMILY}; 3 x 8", 1e-5)
def gradients() -> float:
    models = room("test_model")
    worst, tokens, targets = 0.0, models.random_tokens(3, 8), models.random_tokens(3, 8, seed=1)
    for changes in models.VARIANTS.values():
        model = models.small(**changes)
        peer = models.peer_of(model)
        loss, count = model(tokens, targets)
        (loss / count).backward()
        F.cross_entropy(peer(tokens).logits.flatten(0, 1), targets.flatten()).backward()
        theirs = dict(peer.named_parameters())
        worst = max(worst, *(apart(p.grad, theirs[name].grad) for name, p in model.named_parameters()))
    return worst


@cache
def brute_force_errors() -> tuple[float, float]:
    """Of logits and of gradients."""
    models, reference, logits, gradients = room("test_model"), room("helpers.llama_reference"), 0.0, 0.0
    tokens, targets = models.random_tokens(2, 7), models.random_tokens(2, 7, seed=1)
    for changes in models.VARIANTS.values():
        model = models.small(**changes).double()
        weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        expected = torch.stack([reference.logits(model.args, weights, line.tolist()) for line in tokens])
        with exact_angles():
            logits = max(logits, (model(tokens) - expected).abs().max().item())
            model(tokens, targets)[0].backward()
        F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        pairs = [(p.grad, weights[name].grad) for name, p in model.named_parameters()]
        gradients = max(gradients, *((a - b).abs().max().item() for a, b in pairs))
    return logits, gradients


@row("logits", "loops over heads and tokens, fp64", f"{FAMILY}; 2 x 7", 1e-10)
def logits_in_float64() -> float:
    return brute_force_errors()[0]


@row("gradients", "autograd of these loops, fp64", f"{FAMILY}; 2 x 7", 1e-10)
def gradients_in_float64() -> float:
    return brute_force_errors()[1]


@row("packed documents", "each document alone, fp64", f"{FAMILY}; 3 rows of 11, documents of 1 to 11", 1e-12)
def packed_documents() -> float:
    models, worst = room("test_model"), 0.0
    tokens, (doc_ids, positions) = models.random_tokens(3, 11), models.packed(models.LENGTHS, 11)
    for changes in models.VARIANTS.values():
        model = models.small(**changes).double().requires_grad_(False)
        together = model(tokens, positions=positions, doc_ids=doc_ids)
        for line in range(3):
            for i in range(len(models.LENGTHS[line])):
                mine = doc_ids[line] == i
                alone = model(tokens[line, mine][None])[0]
                worst = max(worst, (together[line, mine] - alone).abs().max().item())
    return worst


@row("config.json and weights in", "transformers, fp32", "LLaMA 1, 2, 3.2, TinyLlama, SmolLM2, Yi, Mistral, Qwen", 2e-5)
def published_configs() -> float:
    configs, worst = room("test_checkpoint_config_json"), 0.0
    for config in configs.PUBLISHED.values():
        with tempfile.TemporaryDirectory() as folder:
            peer = configs.peer_of(configs.TINY | config, Path(folder))
            model, tokens = configs.load_model(Path(folder)), torch.randint(61, (2, 40))
            with torch.no_grad():
                worst = max(worst, apart(model(tokens), peer(tokens).logits))
    return worst


@row("linear cross-entropy by blocks", "torch, fp64", "0 to 23 rows, 1 to 19 classes, ignored, weighted", 1e-11)
def loss() -> float:
    losses, worst = room("test_loss"), 0.0
    for seed, (N, V, d, block) in enumerate(
        [(23, 19, 6, 4), (7, 5, 3, 3), (1, 1, 1, 1), (0, 4, 2, 8), (16, 11, 5, 16)]
    ):
        hidden, weight, targets, weights = losses.random_problem(N, V, d, seed)
        for given in (None, weights):
            ours = losses.linear_cross_entropy(hidden, weight, targets, given, block)[0]
            theirs = losses.plain(hidden, weight, targets, given)
            grads = [torch.autograd.grad(each, (hidden, weight)) for each in (ours, theirs)]
            worst = max(worst, apart(ours, theirs), *(apart(a, b) for a, b in zip(*grads)))
    return worst


@row("bits per byte", "probabilities by hand, fp64", "5 documents, 4 x 7, tokens of 0 to 4 bytes", 1e-5)
def bits_per_byte() -> float:
    toy, bits = room("helpers.tiny_training_run"), 0.0
    evaluate = room("training.heldout").evaluate
    with tempfile.TemporaryDirectory() as folder:
        data = toy.PretrainData([toy.toy_bin(Path(folder), documents=5)], seq_len=7, batch_size=4, seed=0)
        model, lengths, n_bytes = toy.Transformer(toy.ModelArgs(**toy.SHAPE)), torch.arange(toy.VOCAB) % 5, 0
        with torch.no_grad():
            for step in range(data.steps_per_epoch):
                batch = data.batch(step)
                log_p = model(batch.tokens).double().log_softmax(-1)
                for place in (batch.targets != -100).nonzero().tolist():
                    target = int(batch.targets[tuple(place)])
                    bits -= log_p[(*place, target)].item() / math.log(2)
                    n_bytes += int(lengths[target])
        return abs(evaluate(model, data, lengths.numpy())["bits_per_byte"] / (bits / n_bytes) - 1)


# ---- positions


def frequencies(*names: str) -> float:
    scaling = room("test_rope_scaling")
    found = [scaling.error_against_transformers(e) for n, e in scaling.ENTRIES.items() if n.startswith(names)]
    others = [(4, 10000.0), (10, 500.0), (64, 5e5), (128, 1e6)] if names[0] != "longrope" else []
    return max(found + [scaling.error_against_transformers(scaling.ENTRIES[names[0]], *shape) for shape in others])


for _names in (("linear",), ("dynamic", "plain dynamic"), ("yarn",), ("llama3",), ("longrope",)):
    row(f"RoPE {_names[0]}: frequencies, factor", "transformers, fp32", "5 lengths, heads of 4 to 128", 2e-7)(
        partial(frequencies, *_names)
    )


@row("RoPE ntk: frequencies", "transformers, fp32", "heads of 4, 16, 128; factors 1, 2, 8", 2e-7)
def ntk() -> float:
    error = room("test_rope_scaling").ntk_error_against_transformers
    return max(error(D, theta, s) for D in (4, 16, 128) for theta in (10000.0, 5e5) for s in (1.0, 2.0, 8.0))


@row("RoPE clex before training", "NTK-aware frequencies of 2t - 1, fp64", "t = 1 to 4, heads of 4 to 64", 1e-12)
def clex_at_its_start() -> float:
    return max(room("test_rope_clex").error_against_ntk(*s) for s in [(4, 1e4), (16, 1e4), (16, 500.0), (64, 5e5)])


@row("RoPE clex: its equation", "midpoint rule in 2000 steps, fp64", "drawn weights; two activations, two steps", 5e-6)
def clex_equation() -> float:
    clex = room("test_rope_clex")
    changes = ({}, {"act": "silu"}, {"param_factor": 2}, {"time_dt": 0.05})
    return max(clex.error_against_fine_steps(clex.made(std=0.02, **each)) for each in changes)


@row("logits at stretched positions", "transformers, fp32", "18 entries, within the window and at three times it", 3e-4)
def stretched_logits() -> float:
    scaling = room("test_rope_scaling")
    error, window = scaling.logits_error_against_transformers, scaling.L0
    return max(error(entry, length) for entry in scaling.MODELS.values() for length in (window // 2, 3 * window))


# ---- attention


def attention_errors(backend: str, gradients: bool) -> float:
    from helpers.attention_errors import causal_error, lower_right_error, packed_error

    shapes = [(2, 6, 2, 9, 4), (1, 3, 3, 1, 2), (3, 4, 1, 7, 6)]  # B, H, K, T, D
    errors = [causal_error(backend, *shape, gradients=gradients) for shape in shapes]
    errors += [packed_error(backend, *s, window=w, gradients=gradients) for s in shapes for w in (None, 3)]
    errors += [lower_right_error(backend, T=T, window=w, gradients=gradients) for T in (1, 3) for w in (None, 4)]
    return max(errors)


def shifted_sparse_errors(backend: str, gradients: bool) -> float:
    from helpers.attention_errors import shifted_sparse_error

    cases = [(4, 4, 2, 11), (6, 3, 1, 19), (8, 5, 5, 16), (2, 6, 2, 7)]  # group, H, K, T
    cases = cases[:2] if backend == "flex" else cases  # it is slow on a CPU
    return max(
        shifted_sparse_error(backend, G, 2, H, K, T, window=w, packed=p, gradients=gradients)
        for G, H, K, T in cases
        for w, p in ((None, False), (5, True))
    )


def by_backend(errors: Callable[[str, bool], float], backend: str) -> float:
    """With a stand-in for flash-attn, which runs on a GPU only; flex_attention has no backward pass on a CPU."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        if backend == "flash":
            patch.setitem(sys.modules, "flash_attn", room("helpers.flash_stand_in").package())
        return errors(backend, backend != "flex")


for _backend in ("reference", "sdpa", "flash", "flex"):
    _name = "flash (layout, by a stand-in)" if _backend == "flash" else _backend
    _what = "values" if _backend == "flex" else "values, gradients"
    for _kind, _tried, _errors in (
        ("attention", "causal, packed, window, lower right; GQA", attention_errors),
        ("S2 attention", "groups of tokens, odd heads and lengths, packed, window", shifted_sparse_errors),
    ):
        row(f"{_kind} by {_name}", "dense mask over all pairs, fp64", f"{_tried}; {_what}", 1e-12)(
            partial(by_backend, _errors, _backend)
        )


@row("S2 attention: leak of later tokens", "gradient, which should be 0", "16 and 19 tokens in groups of 8", 0)
def leak() -> float:
    from helpers.attention_errors import leak

    from attention.backends import attend

    ways = [partial(attend, backend=name) for name in ("reference", "sdpa")]
    return max(leak(way, group=8, T=T) for T in (16, 19) for way in ways)


# ---- caches and decoding


def caches(name: str) -> float:
    rooms = room("test_attention_cache_rope")
    cuts = [[4, 5], [1, 1, 14], [5, 5, 5], [15, 1], [1] * 20]
    with exact_angles():
        return max(rooms.decoding_error(rooms.MODELS[name], B, each) for each in cuts for B in (1, 3))


for _name in ("default", "linear", "ntk", "yarn", "llama3", "dynamic", "longrope", "clex"):
    row(f"cache, RoPE {_name}", "full forward pass, fp64", "5 ways to cut up to 20 tokens, 1 and 3 rows", 1e-12)(
        partial(caches, _name)
    )


@row("cache, text growing beyond its window", "loops, keys turned anew, fp64", "dynamic, longrope, clex; 3 cuts", 1e-11)
def growing() -> float:
    rooms = room("test_attention_cache_rope")
    cuts = [[9, 1, 1, 1], [1, 4, 1, 8, 1], [5, 13, 1]]
    with exact_angles():
        return max(rooms.growing_error(name, each) for name in rooms.GROWING for each in cuts)


@row(
    "cache of sinks, one layer", "forward pass over what is kept, fp64", "5 sizes, streams of 3 times and 5 more", 1e-12
)
def shallow_sinks() -> float:
    sizes = [(7, 2), (5, 0), (6, 5), (1, 0), (12, 4)]
    with exact_angles():
        return max(room("test_attention_cache_kinds").shallow_sink_error(size, n, 3 * size + 5) for size, n in sizes)


@row("cache of sinks, two layers", "loops over what is kept, fp64", "plain, dynamic, q/k norm; 3 cuts", 1e-11)
def sinks() -> float:
    kinds = room("test_attention_cache_kinds")
    cases = [(7, 2, [1] * 18), (8, 3, [3, 4, 4, 1, 1]), (5, 4, [5, 1, 1, 1])]
    with exact_angles():
        return max(kinds.sink_error(model, *case) for model in kinds.MODELS.values() for case in cases)


@row("cache of 8 bits: rounding", "half a step of 1/127", "3 scales, one number 30 times the others", 1 / 254 + 1e-6)
def int8() -> float:
    x = torch.randn(3, 3, 50, 9, generator=torch.Generator().manual_seed(0)).double()
    x[..., 0] *= 30
    return max(room("test_attention_cache_kinds").int8_error(x * scale) for scale in (1e-6, 1.0, 1e4))
