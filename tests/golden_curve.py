"""Whether a change of the code has changed a number: losses of four tiny runs, bit for bit, in two revisions.

python -m tests.golden_curve                   print the losses of this working tree
python -m tests.golden_curve --against HEAD    compare them with those of another commit, on this machine

Pretraining, fine-tuning in full, LoRA and DPO run for some steps each, in float32, with fixed seeds, through their
command lines, so that the comparison does not depend on how the code is laid out. Sums are rounded differently by
different processors: compare two revisions on one machine, never with numbers from elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LOOP = "--train.device cpu --train.dtype fp32 --train.compile off --train.log_interval 1 --train.eval_interval 10"
SHAPE = "--model.dim 64 --model.n_layers 2 --model.n_heads 4 --model.n_kv_heads 2 --model.max_seq_len 96"
FINE_TUNING = f"fine_tuning.py --init_from pretrain/best {LOOP} --train.max_steps 30 --data.seq_len 96"
COMMANDS = (
    "train_tokenizer.py --input texts --out data/tokenizer --vocab_size 420",
    "data_process.py --input texts --tokenizer data/tokenizer --out data --held_out 0.1 --processes 1",
    f"pretrain.py --data.dir data --out pretrain {SHAPE} {LOOP} --data.seq_len 64 --data.batch_size 16"
    " --train.micro_batch_size 8 --train.max_steps 40",
    f"{FINE_TUNING} --data chats.jsonl --data.batch_size 4 --out sft",
    f"{FINE_TUNING} --data chats.jsonl --data.batch_size 4 --lora.method lora --out lora",
    f"{FINE_TUNING} --data pairs.jsonl --data.batch_size 4 --objective dpo --data.packing none --out dpo",
)
RUNS = ("pretrain", "sft", "lora", "dpo")


def losses(repository: Path, folder: Path) -> dict[str, list[str]]:
    """Run COMMANDS of `repository` in `folder`, which holds the texts; returns every loss of each run, as exact
    hexadecimal floats, and the SHA-256 of its last weights."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(repository))
    for command in COMMANDS:
        script, *flags = command.split()
        done = subprocess.run(
            [sys.executable, repository / script, *flags], cwd=folder, env=env, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{repository}: {command} failed:\n{done.stderr}")
    curves = {}
    for run in RUNS:
        rows = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        curves[run] = [
            f"{row['step']} {name} {float(row[name]).hex()}" for row in rows for name in sorted(row) if "loss" in name
        ]
        weights = next((folder / run / "last").resolve().glob("*model.safetensors"))
        curves[run].append(hashlib.sha256(weights.read_bytes()).hexdigest())
    return curves


def write_texts(folder: Path) -> None:
    """Write made-up texts, conversations and pairs of answers, the same at every call."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import random

    from cli.extras import need

    need("tests.golden_curve", "dev", "pytest")
    from helpers.miniature import EXCHANGES, conversations, note, verse, write

    generator = random.Random(0)
    write(folder / "texts/verses.txt", "\n\n".join(verse(generator) for _ in range(300)))
    write(folder / "texts/notes.txt", "\n\n".join(note(generator) for _ in range(200)))
    write(folder / "chats.jsonl", "".join(json.dumps(record) + "\n" for record in conversations() * 4))
    pairs = [{"prompt": q, "chosen": a, "rejected": q} for q, a in EXCHANGES.items()] * 4
    write(folder / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))


def main() -> None:
    """Print the curves, or say whether those of two revisions are equal (exit status 1 where they are not)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="a commit to compare with")
    parser.add_argument("--save", type=Path, help="write the losses as JSON to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch, "here")
        write_texts(here)
        ours = losses(REPOSITORY, here)
        if args.save:
            args.save.write_text(json.dumps(ours, indent=1))
        if args.against is None:
            print(json.dumps(ours, indent=1))
            return
        other = Path(scratch, "other")
        worktree = Path(scratch, "revision")
        subprocess.run(["git", "-C", REPOSITORY, "worktree", "add", "-q", worktree, args.against], check=True)
        try:
            write_texts(other)
            theirs = losses(worktree, other)
        finally:
            subprocess.run(["git", "-C", REPOSITORY, "worktree", "remove", "--force", worktree], check=True)
    for run in RUNS:
        equal = sum(a == b for a, b in zip(ours[run], theirs[run]))
        same = ours[run] == theirs[run]
        print(f"{run:10} {len(ours[run]) - 1} losses and the weights: {'identical' if same else f'{equal} equal'}")
    sys.exit(ours != theirs)


if __name__ == "__main__":
    main()
