"""Rows of the table of oracles: decoding, text, training, adapters. Each function returns its largest error."""

from __future__ import annotations

import copy
import functools
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from helpers.oracle_row import apart, differing, room, row

# ---- decoding


@row("greedy decoding: ids that differ", "the whole text again for every token, fp64", "GQA, MQA, window; 3 prompts", 0)
def greedy() -> float:
    small, generate = room("helpers.small_model"), room("decoding.generate")
    params = room("decoding.sampling").SamplingParams(temperature=0, max_new_tokens=12)
    pairs = []
    for shape in ({}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"sliding_window": 5}):
        model = small.small_model(**shape)
        for prompt in small.random_prompts([1, 9, 25]):
            pairs += zip(generate.stream(model, prompt, params), small.uncached(model, prompt, 12))
    return differing(pairs)


@row("compiled decoding step", "forward pass, fp64", "5 shapes; 1, 3 and 11 rows", 1e-12)
def engine() -> float:
    engines = room("test_decoding_cpu_step")
    rows = ([3], [3, 1, 2], [2, 9, 4, 4, 1, 7, 5, 5, 6, 3, 1])
    return max(engines.walk(engines.make(**shape), lengths, 6) for shape in engines.SHAPES.values() for lengths in rows)


# ---- choosing


@row("temperature, top-k, top-p, min-p, penalty", "transformers' warpers, fp32", "60 random settings, ties", 0)
def warpers() -> float:
    rooms, worst = room("test_decoding_sampling"), 0.0
    generator = torch.Generator().manual_seed(0)
    for n in range(60):
        logits = torch.randn(3, 50, generator=generator) * 4
        logits, history = logits.round() if n % 2 else logits, torch.randint(50, (3, 7), generator=generator)
        temperature, top_p = (0.05, 0.7, 3.0)[n % 3], (1.0, 0.95, 0.5, 0.01)[n % 4]
        settings = {
            "top_k": n,
            "min_p": (0.0, 0.05, 0.5)[n // 3 % 3],
            "repetition_penalty": (1.0, 1.3, 0.7)[n // 9 % 3],
        }
        params = rooms.SamplingParams(temperature=temperature, top_p=top_p, **settings)
        ours = rooms.process_logits(logits, history.tolist(), params)
        theirs = rooms.warpers(params)(history, logits)
        worst = max(worst, torch.where(ours == theirs, 0, (ours - theirs).abs().nan_to_num(math.inf)).max().item())
    return worst


@row("beam search: scores (infinite if ids differ)", "transformers' generate, fp32", "3 prompts, 2 and 5 beams", 1e-4)
def beams() -> float:
    import transformers

    rooms, found, worst = room("test_decoding_beam"), [], 0.0
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 29,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        **{"max_position_embeddings": 64, "initializer_range": 0.25, "eos_token_id": 5, "pad_token_id": 0},
    )
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = rooms.load_model(Path(folder))
    for prompt in rooms.PROMPTS:
        for n in (2, 5):
            found = theirs.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=12, num_beams=n, num_return_sequences=n,
                output_scores=True, return_dict_in_generate=True, eos_token_id=5,
            )  # fmt: skip
            mine = rooms.beam_search(ours, prompt, rooms.BeamParams(n, max_new_tokens=12), rooms.Stop((5,)))
            texts = [
                line[: line.index(5)] if 5 in line else line for line in found.sequences[:, len(prompt) :].tolist()
            ]
            errors = [abs(h.score - score) for h, score in zip(mine, found.sequences_scores.tolist())]
            worst = max(worst, *errors) if [h.ids for h in mine] == texts else math.inf
    return worst


@row("speculative decoding: greedy ids that differ", "plain decoding, fp64", "4 drafters, 4 prompts, 1 to 5 drafted", 0)
def speculative_greedy() -> float:
    rooms, small = room("test_decoding_speculative"), room("helpers.small_model")
    model, pairs = small.small_model(), []
    for prompt in small.random_prompts([1, 5, 12, 25]):
        expected = small.uncached(model, prompt, 12)
        for drafter in rooms.drafters(model):
            for n in (1, 2, 5):
                pairs.append((list(rooms.Speculative(model, drafter, n).stream(prompt, rooms.GREEDY)), expected))
    return differing(pairs)


@row(
    "speculative decoding: chi-square of draws",
    "exact probabilities",
    "20,000 draws, 3 ids; passed by 1 in 10,000",
    18.4,
)
def speculative_draws() -> float:
    rooms, n = room("test_decoding_speculative"), 20_000
    generator = torch.Generator().manual_seed(2)
    p = torch.tensor([[0.5, 0.2, 0.0, 0.3], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.3, 0.4, 0.2]], dtype=torch.float64)
    counts = torch.zeros(4)
    for token in torch.multinomial(q[0], n, replacement=True, generator=generator).tolist():
        kept, last = rooms.verify([token], p, q, generator)
        counts[token if kept else last] += 1
    keep = torch.tensor([0, 1, 3])
    return math.inf if counts[2] else rooms.chi_square(counts[keep], p[0, keep])


# ---- text


@row("tokenizer: texts whose ids differ", "transformers, from the saved directory", "200 texts, two vocabularies", 0)
def tokenizers() -> float:
    return differing(
        (ours.encode(text), theirs(text, split_special_tokens=True).input_ids)
        for ours, theirs in vocabularies()
        for text in texts(200)
    )


@row(
    "chat templates: conversations whose ids or mask differ",
    "transformers' Jinja",
    "40 of up to 5 turns, all that fit",
    0,
)
def chat_templates() -> float:
    chats, pairs = room("test_chat_template"), []
    for (ours, theirs), names in zip(vocabularies(), (("ours", "llama2", "mftcoder"), ("plain", "chatml", "mftcoder"))):
        for name in names:
            template = chats.load_template(ours, name)
            theirs.chat_template = template.jinja
            for n in range(40):
                turns = texts(1 + n % 5, seed=n)
                messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
                pairs.append((template.encode(messages), chats.rendered(theirs, messages)))
    return differing(pairs)


@functools.cache
def vocabularies() -> list[tuple]:
    """Ours and a byte-level BPE as Llama 3 has it, each with what transformers makes of its saved directory."""
    import transformers

    made, pairs = room("helpers.vocabularies"), []
    with tempfile.TemporaryDirectory() as folder:
        trained = made.train_tokenizer.train_model(made.LINES, 1.0, made.train_tokenizer.Args(vocab_size=420))
        byte_level = made.load_tokenizer(made.write_byte_level(Path(folder) / "trained"))
        for i, tokenizer in enumerate((made.SentencePieceTokenizer(trained), byte_level)):
            directory = Path(folder) / str(i)
            directory.mkdir()
            tokenizer.save(directory)
            (directory / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
            pairs.append((tokenizer, transformers.AutoTokenizer.from_pretrained(directory)))
    return pairs


def texts(n: int, seed: int = 0) -> list[str]:
    """Of what breaks tokenizers: two scripts, emoji, joiners, runs of spaces, bytes."""
    made, random_ = room("helpers.vocabularies"), random.Random(seed)
    parts = [
        *made.WORDS.split(),
        *made.BLANKS,
        *made.LINES,
        "\U0001f600",
        "\U0001f469\u200d\U0001f467",
        "<0x0A>",
        "\x01",
    ]
    return ["".join(random_.choices(parts, k=random_.randint(1, 12))) for _ in range(n)]


# ---- training


@row(
    "Muon, exact orthogonalisation: a step", "torch.optim.Muon, share of the step", "6 shapes, 8 steps, decay 0.1", 1e-5
)
def muon() -> float:
    rooms, worst = room("test_optim_optimizers"), 0.0
    exact = rooms.exactly_orthogonal
    ours = [torch.nn.Parameter(torch.randn(s)) for s in [(16, 16), (24, 16), (16, 24), (16, 16), (1, 8), (40, 3)]]
    theirs = copy.deepcopy(ours)
    shared = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    peer = torch.optim.Muon(theirs, **shared, adjust_lr_fn="match_rms_adamw", eps=1e-7)
    pairs = ((ours, rooms.Muon(ours, **shared)), (theirs, peer))
    with (
        mock.patch("optim.muon.orthogonalize", exact),
        mock.patch("torch.optim._muon._zeropower_via_newtonschulz", exact),
    ):
        for step in range(8):
            before = [p.detach().clone() for p in ours]
            for params, optimizer in pairs:
                rooms.set_random_grads(params, step)
                optimizer.step()
            with torch.no_grad():
                for p, q, old in zip(ours, theirs, before):
                    worst = max(worst, ((p - q).norm() / (p - old).norm()).item())
                    q.copy_(p)
    return worst


def steps_apart(make: Callable[[ModuleType, list, bool], torch.optim.Optimizer], n_shapes: int = 6) -> float:
    """Largest difference of two optimizers over 8 steps; `make(test module, parameters, whether ours)` makes them."""
    tests, worst = room("test_optim_small_states"), 0.0
    ours = tests.parameters(tests.SHAPES[:n_shapes])
    theirs = copy.deepcopy(ours)
    pairs = [(params, make(tests, params, params is ours)) for params in (ours, theirs)]
    for step in range(8):
        for params, optimizer in pairs:
            tests.set_random_grads(params, step)
            optimizer.step()
        worst = max(worst, *(apart(p, q) for p, q in zip(ours, theirs)))
    return worst


@row("Lion", "bitsandbytes, fp32", "6 shapes, 8 steps, decay 0.2", 1e-5)
def lion() -> float:
    how = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.2}
    return steps_apart(lambda t, ps, ours: (t.Lion if ours else t.bitsandbytes.optim.Lion32bit)(ps, **how))


@row("Adafactor", "torch.optim.Adafactor, fp32", "6 shapes, 8 steps, decay 0.1", 1e-5)
def adafactor() -> float:
    how = {"lr": 0.02, "weight_decay": 0.1}
    return steps_apart(lambda t, ps, ours: (t.Adafactor if ours else torch.optim.Adafactor)(ps, **how))


@row("GaLore with AdamW and with Adafactor", "galore_torch, fp32", "3 shapes, rank 4, 8 steps, 3 subspaces", 2e-5)
def galore() -> float:
    how = {"rank": 4, "every": 3, "scale": 0.25}
    return max(
        steps_apart(
            lambda t, ps, ours, k=kind: t.GaLore(ps, t.inner_of(k), 0.02, 0.0, **how) if ours else t.galore_peer(k, ps),
            n_shapes=3,
        )
        for kind in ("adamw", "adafactor")
    )


@row(
    "learning rate: cosine, WSD, linear", "transformers' schedules", "20 lengths, floors 0 and 0.1, after warmup", 1e-9
)
def schedules() -> float:
    import transformers as t

    rooms, worst = room("test_optim_optimizers"), 0.0
    for n in range(20):
        warmup, rest, floor = n % 7, 1 + 2 * n, (0.0, 0.1)[n % 2]
        total, decay = warmup + rest, rest - rest // 2
        peers = {
            "cosine": lambda o, w=warmup, T=total, f=floor: t.get_cosine_with_min_lr_schedule_with_warmup(
                o, w, T, min_lr_rate=f
            ),
            "wsd": lambda o, w=warmup, T=total, f=floor, d=decay: t.get_wsd_schedule(
                o, w, d, num_training_steps=T, decay_type="linear", min_lr_ratio=f
            ),
        }
        if floor == 0:
            peers["linear"] = lambda o, w=warmup, T=total: t.get_linear_schedule_with_warmup(o, w, T)
        for name, peer in peers.items():
            args = rooms.OptimArgs(schedule=name, warmup_steps=warmup, min_lr_ratio=floor, decay_share=decay / total)
            theirs = rooms.factors_of(peer, total)
            worst = max(worst, *(abs(rooms.lr_factor(s, total, args) - theirs[s]) for s in range(warmup, total)))
    return worst


@row(
    "LoRA and its family: logits", "peft on transformers, fp64", "10 ways: rsLoRA, DoRA, PiSSA, head, embedding", 1e-10
)
def adapters() -> float:
    rooms, models, worst = room("test_checkpoint_peft_oracle"), room("helpers.lora_models"), 0.0
    tokens = models.some_tokens()
    for args in rooms.VARIANTS.values():
        model = models.our_model()
        with tempfile.TemporaryDirectory() as folder:
            models.save_as_hf(model, Path(folder) / "base")
            rooms.adapters.apply(model, args)
            models.shake(model)
            rooms.our_peft.save(Path(folder) / "adapter", model)
            base = models.hf_model(Path(folder) / "base")
            theirs = rooms.peft.PeftModel.from_pretrained(base, Path(folder) / "adapter").double()
        with torch.no_grad():
            worst = max(worst, (model(tokens) - theirs(tokens).logits).abs().max().item())
    return worst
