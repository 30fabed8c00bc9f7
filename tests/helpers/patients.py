"""A healthy model, its data and conversations on disk, for tests that plant one fault and look whether it is named."""

import json
import random
from pathlib import Path

from bins.token_bin import BinWriter
from chat.template import load_template
from checkpoint.directory import save_model
from helpers.tiny_chat_model import chat_tokenizer
from model import Transformer
from model_args import ModelArgs
from tokenizer import Tokenizer
from training.checksums import write_sums

QUESTIONS = [f"{n} 加 {n + 3} 是多少？" for n in range(40)]


def texts(n: int, seed: int = 0) -> list[str]:
    """Texts of the characters that the tokenizer knows as pieces."""
    rng = random.Random(seed)
    words = ["床前明月光，", "疑是地上霜。", "举头望明月，", "低头思故乡。", "the moon ", "above the river ", "1984 "]
    return ["".join(rng.choice(words) for _ in range(rng.randint(4, 9))) for _ in range(n)]


def save_patient(folder: Path, **shape) -> tuple[Path, Tokenizer]:
    """A new model with its tokenizer, template and sums; its directory and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = chat_tokenizer(folder)
    template = load_template(tokenizer)
    tokenizer.chat_template = template.saved
    shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_seq_len": 128} | shape
    model = Transformer(ModelArgs(**{"vocab_size": tokenizer.vocab_size} | shape))
    save_model(folder / "model", model, tokenizer, stop_ids=template.stop_ids)
    (folder / "model" / "training_state").mkdir()
    write_sums(folder / "model")
    return folder / "model", tokenizer


def save_data(folder: Path, tokenizer: Tokenizer) -> Path:
    """Token bins of texts, 5 % of them held out."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer")
    whole = list(dict.fromkeys(texts(900)))
    for name, part in (("train_00000", whole[40:]), ("heldout", whole[:40])):
        with BinWriter(folder / name, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256()) as writer:
            for text in part:
                writer.add([*tokenizer.encode(text), tokenizer.eos_id], "made up", len(text.encode()))
    return folder


def save_chats(path: Path, questions: list[str], **more) -> Path:
    """Conversations of one turn; more: entries of every answer."""
    records = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": q[::-1], **more}]}
        for q in questions
    ]
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf8")
    return path
