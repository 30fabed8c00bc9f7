"""Single answers: to one prompt, with or without the probabilities of its tokens, and a short demonstration."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from decoding.generate import generate_scored
from decoding.params import SamplingParams
from decoding.rows import Token
from serving.assistant import Assistant
from serving.terminal import print_pieces
from tokenizer import Tokenizer


def answer_scored(assistant: Assistant, question: str, params: SamplingParams, top: int) -> tuple[str, list[Token]]:
    """Print the answer to a question, and below it the log-probability of each token and the `top` likeliest tokens in
    its place. Return both."""
    prompt = assistant.encode([{"role": "user", "content": question}])
    (tokens,) = generate_scored(assistant.model, [prompt], params, assistant.stop, cache=assistant.cache, top=top)
    answer = print_pieces([assistant.text([token.id for token in tokens])])
    print(token_table(tokens, assistant.tokenizer))
    return answer, tokens


def token_table(tokens: Sequence[Token], tokenizer: Tokenizer) -> str:
    """Return a line for each token: its log-probability under the model itself, before temperature, and the likeliest
    tokens in its place."""

    def entry(i: int, logprob: float) -> str:
        piece = tokenizer.id_to_bytes(i)
        text = piece.decode("utf8", errors="ignore") or tokenizer.decode([i], skip_special=False)
        whole = text.encode() == piece or not piece  # else the token is a part of a character
        return f"{(text if whole else piece)!r} {math.exp(logprob):.1%}"

    lines = [f"{t.logprob:9.4f}  {entry(t.id, t.logprob):24}" + ", ".join(entry(*top) for top in t.top) for t in tokens]
    total = sum(token.logprob for token in tokens)
    return "\n".join([f"{'log p':>9}  token", *(line.rstrip() for line in lines), f"{total:9.4f}  together"])


def demonstrate(assistant: Assistant, questions: Sequence[str], params: SamplingParams) -> list[str]:
    """Print the answers to some questions and where the files of the run lie; return the answers."""
    answers = []
    for question in questions:
        print(f"> {question}")
        answers.append(print_pieces(assistant.reply(question, params)))
        print()
    run = assistant.directory.parent
    places = {"model": assistant.directory.resolve(), "measures": run / "metrics.jsonl"}
    places |= {"loss picture": run / "loss.png", "settings": run / "config.yaml", "poems it wrote": run / "poems.txt"}
    places |= {"report": run.parent / "report.html"}  # of run.sh, about all stages
    for name, path in places.items():
        if path.exists():
            print(f"{name:15} {path}")
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    print(f"{'to chat':15} {python} eval.py --model {assistant.directory}")
    return answers
