"""Compare position encodings: a model trained on short rows reads texts eight times as long.

    python bench/long_context.py                       # most of an hour on two cores
    python bench/long_context.py --encodings yarn linear --seeds 1

One model is pretrained on a novel (三国演义, from a pip package) in rows of `window` tokens, with small passkey texts
mixed in. Then, for every encoding, loss by position and passkey retrieval are measured in rows of `factor` times the
window: without tuning, and after continued training on long rows, with full and with shifted sparse attention (S2-Attn,
in training only), over several seeds. All steps are our own scripts, called in-process: `train_tokenizer`,
`data_process`, `pretrain`, `pretrain --init_from DIR --rope.type TYPE`.

Writes a table and a picture into `out`.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import data_process
import pretrain
import rope
import train_tokenizer
from bins.token_bin import TokenBin
from checkpoint.directory import load_model, save_model
from model import Transformer
from model_args import NewModelArgs
from optim.args import OptimArgs
from tokenizer import Tokenizer, load_tokenizer
from training.trainer import TrainArgs

ENCODINGS = ("default", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope", "clex")
KEYS = string.ascii_uppercase + string.digits  # a passkey is one of these; none of them occurs in the novel
TUNE_TOKENS = 1024  # tokens of an optimizer step on long rows
PROMPTS = 40  # number of prompts with passkeys for each length


@dataclass(frozen=True)
class Args:
    """Measure loss by position and passkey retrieval beyond the trained window, for every position encoding."""

    encodings: tuple[str, ...] = ENCODINGS
    """position encodings to compare"""
    window: int = 128
    """tokens in a row of the first model's training"""
    factor: int = 8
    """length of the long rows, as a multiple of the window"""
    base_steps: int = 600
    """optimizer steps of the first model, 4,096 tokens each"""
    tune_steps: int = 200
    """optimizer steps on long rows, 1,024 tokens each"""
    seeds: int = 2
    """runs of continued training for each encoding"""
    s2: bool = True
    """also train with shifted sparse attention"""
    out: Path = Path("out/long_context")
    """directory of data, models, table and picture"""
    raw_dir: Path = Path("data/raw")
    """directory of the package with the novel"""


# ---- data


def passkey_text(rng: random.Random, filler: str, times: int = 1) -> tuple[str, str]:
    """Return `filler` with a key inserted at `times` places and a question for it at the end; and the key."""
    key = rng.choice(KEYS)
    cuts = sorted(rng.randrange(len(filler) + 1) for _ in range(times))
    parts = [filler[i:j] for i, j in zip([0, *cuts], [*cuts, len(filler)])]
    return f"\n暗号是{key}。\n".join(parts) + "\n暗号是", key


def passkeys(novel: str, lengths: list[int], seed: int, most_times: int = 1) -> Iterator[tuple[str, str]]:
    """Yield passkey texts and keys; fillers of `lengths` characters are cut from the novel at random."""
    rng = random.Random(seed)
    for length in lengths:
        start = rng.randrange(len(novel) - length)
        yield passkey_text(rng, novel[start : start + length].replace("\n", ""), rng.randint(1, most_times))


def make_data(args: Args) -> None:
    """Write the tokenizer, bins of the novel (an eighth of its chapters held out), and bins of passkey texts."""
    source: dict[str, Any] = {"raw_dir": args.raw_dir, "corpus": ("sanguo",)}
    common: dict[str, Any] = {"overwrite": True, "processes": 1}  # small texts
    tokenizer = args.out / "novel" / "tokenizer"
    if not (args.out / "novel" / "all_text.txt").is_file():
        train_tokenizer.main(train_tokenizer.Args(**source, vocab_size=3000, out=tokenizer))
        novel = {"tokenizer": tokenizer, "out": args.out / "novel", "held_out": 0.12, "save_all_text": True}
        data_process.main(data_process.Args(**source, **common, **novel))
    novel_text = (args.out / "novel" / "all_text.txt").read_text(encoding="utf8")
    room = args.window - 40  # 40 for the key, the question and rounding: a character is about a token
    kinds = {  # name -> filler, longest filler, most occurrences of the key, number of texts
        "blank": ("。" * 100, 12, 8, 12_000),
        "short": (novel_text, room, 4, 15_000),
        "long": (novel_text, room * args.factor, 4, 2_000),
    }
    for name, (filler, longest, times, n) in kinds.items():
        folder = args.out / f"passkeys_{name}"
        if folder.is_dir():
            continue
        rng = random.Random(n)
        lengths = [int(math.exp(rng.uniform(math.log(4), math.log(longest)))) for _ in range(n)]
        folder.mkdir(parents=True)
        texts = [{"text": text + key + "。"} for text, key in passkeys(filler, lengths, seed=n, most_times=times)]
        (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf8")
        options = {"input": (folder / "texts.jsonl",), "tokenizer": tokenizer, "out": args.out / f"bins_{name}"}
        data_process.main(data_process.Args(**options, **common))


# ---- training


def train_args(args: Args, steps: int, seed: int, **more: Any) -> TrainArgs:
    """Return the arguments of the loop for a run that neither evaluates nor saves on the way."""
    return TrainArgs(max_steps=steps, log_interval=100, eval_interval=0, save_interval=0, keep=1, seed=seed, **more)


def bin_of(args: Args, name: str) -> Path:
    """Return the path of the training bin `name`."""
    return args.out / name / "train_00000.bin"


def train_base(args: Args) -> Path:
    """Pretrain the short-context model; return its directory.

    The first third of the steps sees only passkeys in blank fillers: among the tokens of a novel, a small model does
    not learn within minutes to look back for a key (after 600 steps without them it still guessed).
    """
    before = None
    optim = OptimArgs(lr=4e-3, muon_lr=6e-3, schedule="constant")
    for name, bins, steps in (
        ("blank", ["bins_blank"], args.base_steps // 3),
        ("base", ["novel", "bins_short"], args.base_steps),
    ):
        data = {"train": tuple(bin_of(args, each) for each in bins), "dir": args.out / "novel"}
        data |= {"seq_len": args.window, "batch_size": 4096 // args.window, "isolate_documents": True}
        pretrain.main(
            pretrain.Args(
                model=NewModelArgs(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=args.window),
                data=pretrain.DataArgs(**data),
                optim=optim,
                train=train_args(args, steps, seed=0),
                init_from=before,
                out=args.out / name,
            )
        )
        before = args.out / name / "last"
    return before


def start(args: Args, base: Path, encoding: str) -> Path:
    """Save the base model with another position encoding, for the long rows; return its directory."""
    directory, length = args.out / "start" / encoding, args.window * args.factor
    model = load_model(base)
    stretched = Transformer(model.args.replace(max_seq_len=length, rope_scaling=scaling(args, encoding)))
    stretched.load_state_dict(model.state_dict(), strict=False)  # CLEX has weights that the base has not
    save_model(directory, stretched, load_tokenizer(base))
    return directory


def scaling(args: Args, encoding: str) -> dict[str, Any] | None:
    """Return the `rope_scaling` for rows `factor` times as long, with the usual values of all other keys."""
    window, length = args.window, args.window * args.factor
    pairs = 16  # pairs of dimensions in a head
    if encoding == "default":
        return None
    if encoding == "dynamic":  # the base grows with the present length; factor 1 as in Hugging Face
        return {"rope_type": "dynamic", "factor": 1.0, "original_max_position_embeddings": window}
    if encoding == "longrope":  # instead of a search: factors that grow smoothly from 1 to the whole factor
        smooth = [args.factor ** (i / (pairs - 1)) for i in range(pairs)]
        lists = {"short_factor": [1.0] * pairs, "long_factor": smooth}
        return {"rope_type": "longrope", "original_max_position_embeddings": window} | lists
    return rope.extend(None, window, length, encoding)


def tune(args: Args, start: Path, s2: bool, seed: int) -> Path:
    """Continue training on long rows; return the directory of the model. Finished runs are not repeated."""
    length = args.window * args.factor
    run = args.out / "tuned" / f"{start.name}{'_s2' if s2 else ''}_{seed}"
    more: dict[str, Any] = {"compile": "off"}  # a few dozen short runs, each of which would compile its own graph
    if s2:
        more |= {"s2_group": length // 4, "s2_min_len": length}
    pretrain.main(
        pretrain.Args(
            init_from=start,
            data=pretrain.DataArgs(
                train=(bin_of(args, "novel"), bin_of(args, "bins_long")),
                dir=args.out / "bins_long",
                seq_len=length,
                batch_size=TUNE_TOKENS // length,
                isolate_documents=True,
            ),
            optim=OptimArgs(lr=1e-3, muon_lr=1.5e-3, schedule="linear", warmup_steps=10),
            train=train_args(args, args.tune_steps, seed, **more),
            out=run,
        )
    )
    return run / "last"


# ---- measures


@torch.inference_mode()
def loss_by_position(model: Transformer, rows: torch.Tensor) -> torch.Tensor:
    """Return the loss of each next token in nats, (rows, T), for rows (rows, T + 1)."""
    return torch.stack([F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none") for row in rows])


@torch.inference_mode()
def finds_passkey(model: Transformer, prompt: list[int], key: list[int]) -> bool:
    """Return whether greedy decoding gives the whole key after the prompt."""
    tokens = torch.tensor([prompt + key])
    return model(tokens[:, :-1])[0, -len(key) :].argmax(-1).tolist() == key


def long_rows(args: Args, length: int) -> torch.Tensor:
    """Return rows (n, length + 1) of held-out chapters; no row spans two chapters."""
    held_out = TokenBin(args.out / "novel" / "heldout.bin")
    spans = zip(held_out.offsets[:-1], held_out.offsets[1:])
    starts = [at for begin, end in spans for at in range(int(begin), int(end) - length, length)]
    return torch.stack([torch.from_numpy(held_out.tokens[at : at + length + 1].astype("int64")) for at in starts])


def passkey_prompts(args: Args, tokenizer: Tokenizer, length: int) -> list[tuple[list[int], list[int]]]:
    """Return prompts of almost `length` tokens, each with the ids of its key."""
    text = tokenizer.decode(TokenBin(args.out / "novel" / "heldout.bin").tokens.tolist())
    prompts, seed = [], 0
    while len(prompts) < PROMPTS:
        seed += 1
        for prompt, key in passkeys(text, [int(length * 0.95)], seed=seed):
            ids, answer = tokenizer.encode(prompt), tokenizer.encode(key)
            if 0.8 * length < len(ids) + len(answer) <= length:
                prompts.append((ids, answer))
    return prompts


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of the share hits / n (Wilson 1927)."""
    share, spread = hits / n, z * math.sqrt(hits * (n - hits) / n + z * z / 4) / (n + z * z)
    middle = (share * n + z * z / 2) / (n + z * z)
    return middle - spread, middle + spread


# ---- the comparison


def measure(args: Args, model: Transformer, rows: torch.Tensor, prompts: dict[int, list]) -> dict[str, Any]:
    """Return the mean loss of each row in every bucket of positions, and the number of correct passkeys by length."""
    model.eval()
    losses = loss_by_position(model, rows)  # (rows, T)
    correct = {length: sum(finds_passkey(model, *each) for each in some) for length, some in prompts.items()}
    return {"loss": {end: losses[:, begin:end].mean(1).tolist() for begin, end in buckets(args)}, "found": correct}


def buckets(args: Args) -> list[tuple[int, int]]:
    """Return the bounds of positions 0 to the window, then of each doubling: 0-128, 128-256, 256-512, 512-1024."""
    ends = [args.window * 2**i for i in range(int(math.log2(args.factor)) + 1)]
    return list(zip([0, *ends[:-1]], ends))


def half_width(values: list[float]) -> float:
    """Return half the 95 % interval of the mean of about thirty values."""
    return 2.03 * statistics.stdev(values) / math.sqrt(len(values))


def main(args: Args) -> list[dict[str, Any]]:
    """Measure all encodings without and with tuning; return the rows of the table."""
    make_data(args)
    base = train_base(args)
    tokenizer = load_tokenizer(base)
    rows = long_rows(args, args.window * args.factor)
    prompts = {end: passkey_prompts(args, tokenizer, end) for _, end in buckets(args)}
    results = []
    for encoding in args.encodings:
        begun = start(args, base, encoding)
        untuned = measure(args, load_model(begun), rows, prompts)
        results.append({"encoding": encoding, "tuning": "none", "runs": [untuned]})
        for s2 in (False, True) if args.s2 else (False,):
            runs = [measure(args, load_model(tune(args, begun, s2, seed)), rows, prompts) for seed in range(args.seeds)]
            results.append({"encoding": encoding, "tuning": "S2-Attn" if s2 else "full", "runs": runs})
        (args.out / "results.json").write_text(json.dumps(results))
        print(table(args, results[-3:]), flush=True)
    (args.out / "table.md").write_text(table(args, results))
    apart = ", ".join(f"{seeds_apart(results, end):.3f}" for _, end in buckets(args))
    print(f"two seeds of one kind of training differ by at most {apart} in the four losses")
    draw(args, results, args.out / "long_context.png")
    return results


def table(args: Args, results: list[dict[str, Any]]) -> str:
    """Return loss by position (mean and 95 % interval) and passkey retrieval as a Markdown table.

    Losses of tuned models are means over the seeds; the interval is over the rows of text, which are the same for all.
    """
    ends = [end for _, end in buckets(args)]
    head = ["encoding", "tuned with", *(f"loss {begin}-{end}" for begin, end in buckets(args))]
    lines = [head + [f"passkey {end}" for end in ends], ["---"] * (2 + 2 * len(ends))]
    for result in results:
        cells = [result["encoding"], result["tuning"]]
        for end in ends:
            mean, spread = loss_of(result, end)
            cells.append(f"{mean:.3f} ± {spread:.3f}")
        for end in ends:
            hits, n = sum(run["found"][end] for run in result["runs"]), PROMPTS * len(result["runs"])
            low, high = wilson(hits, n)
            cells.append(f"{hits / n:.0%} ({low:.0%}-{high:.0%})")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def loss_of(result: dict[str, Any], end: int) -> tuple[float, float]:
    """Return the mean loss in the bucket of positions up to `end`, and half its interval over the rows of text."""
    rows = [statistics.fmean(row) for row in zip(*(run["loss"][end] for run in result["runs"]))]  # over the seeds
    return statistics.fmean(rows), half_width(rows)


def seeds_apart(results: list[dict[str, Any]], end: int) -> float:
    """Return the largest difference between two seeds of one kind of training, in the mean loss of a bucket."""
    means = [[statistics.fmean(run["loss"][end]) for run in result["runs"]] for result in results]
    return max(max(each) - min(each) for each in means)


def draw(args: Args, results: list[dict[str, Any]], picture: Path) -> None:
    """Draw loss by position: a panel for each kind of tuning, a line for each encoding."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(result["tuning"] for result in results))
    figure = Figure(figsize=(4 * len(kinds), 4), layout="constrained")
    ends = [end for _, end in buckets(args)]
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds):
        for result in results:
            if result["tuning"] == kind:
                means, spreads = zip(*(loss_of(result, end) for end in ends))
                axes.errorbar(range(len(ends)), means, spreads, fmt="o-", ms=3, capsize=2, label=result["encoding"])
        labels = [f"{begin}-{end}" for begin, end in buckets(args)]
        axes.set(title=f"tuned on long rows: {kind}", xlabel="position", xticks=range(len(ends)), xticklabels=labels)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss (nats per token)")
    figure.axes[-1].legend(fontsize=8)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args))
