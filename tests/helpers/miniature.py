"""The whole pipeline in miniature: made-up texts and conversations under the names that README.md gives to one's own,
and its commands on them, in-process, with flags behind them that make everything small."""

import importlib
import json
import random
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cli.args import parse

SHAPE = "--model.dim 64 --model.n_layers 2 --model.n_heads 4 --model.n_kv_heads 2 --model.max_seq_len 96"
LOOP = "--train.device cpu --train.dtype fp32 --train.compile off --train.log_interval 50"
SMALL = {  # flags behind those of a command: the later value wins
    "train_tokenizer": "--vocab_size 420 --held_out 0.1",
    "data_process": "--held_out 0.1 --processes 1",
    "pretrain": f"{SHAPE} {LOOP} --data.seq_len 64 --data.batch_size 16 --train.max_steps 150",
    "fine_tuning": f"{LOOP} --data.seq_len 96 --data.batch_size 4 --train.max_steps 200"
    " --optim.lr 4e-3 --optim.muon_lr 1.5e-2",
    "eval": "--device cpu --dtype fp32 --sampling.temperature 0 --sampling.max_new_tokens 60",
}
JOURNEY = (  # from one's own text to a model that has learnt one's own conversations
    "python train_tokenizer.py --input my_texts/ --out data/mine/tokenizer --vocab_size 8000",
    "python data_process.py --input my_texts/ --tokenizer data/mine/tokenizer --out data/mine",
    "python pretrain.py --data.dir data/mine --data.seq_len 256 --out out/mine/pretrain --train.epochs 3",
    "python fine_tuning.py --init_from out/mine/pretrain/best --data my_chats.jsonl"
    " --data.seq_len 256 --out out/mine/sft --train.epochs 3",
)
EXCHANGES = {
    "江上有什么？": "江上有一只白鹭，飞得很慢。",
    "山中谁在弹琴？": "山中无人弹琴，只有松风。",
    "写两句秋天的诗": "秋夜明月明，\n溪边黄叶落。",
    "What does the fox do?": "The quick fox jumps over the fence.",
    "Who sleeps on the roof?": "The old cat sleeps on the roof, of course.",
    "1984 + 16 = ?": "2000",
}
ROLES = ("user", "assistant")
NAMES = ("白云", "红花", "青鸟")
BROKEN = '{"text": "no end'


@dataclass
class Miniature:
    """What was made up, and what the commands of JOURNEY made of it in `folder` (script -> its result)."""

    folder: Path
    texts: list[str]
    results: dict[str, dict[str, Any]]

    def run(self, command: str, more: str = "") -> dict[str, Any]:
        """The result of `python SCRIPT.py ...` in `folder`, in-process and small."""
        _, script, *words = shlex.split(command)
        name = script.removesuffix(".py")
        module = importlib.import_module(name)
        main, cls = module.COMMANDS[words.pop(0)] if name == "convert" else (module.main, module.Args)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            return main(parse(cls, name, smaller(name, words) + shlex.split(more)))


def smaller(script: str, words: list[str]) -> list[str]:
    """The words of a command with those of SMALL for its script, without what would do nothing beside these."""
    small = shlex.split(SMALL.get(script, ""))
    if "--train.max_steps" in small and "--train.epochs" in words:
        at = words.index("--train.epochs")
        words = words[:at] + words[at + 2 :]
    if any(word.startswith("configs/fine_tuning/") for word in words):  # they train with AdamW
        at = small.index("--optim.muon_lr")
        small = small[:at] + small[at + 2 :]
    return words + small


def build(folder: Path) -> Miniature:
    """Write texts, conversations and questions below `folder`, and go the JOURNEY there."""
    random_ = random.Random(0)
    verses = sorted({verse(random_) for _ in range(400)})
    notes = sorted({note(random_) for _ in range(200)})
    write(folder / "my_texts/verses.txt", "\n\n".join(verses))
    lines = [json.dumps({"text": text}) for text in notes]
    write(folder / "my_texts/notes.jsonl", "\n".join([*lines, BROKEN]))
    write(folder / "my_chats.jsonl", "".join(json.dumps(record) + "\n" for record in conversations()))
    write(folder / "more_chats/english.jsonl", "".join(json.dumps({"q": n, "a": n[:20]}) + "\n" for n in notes[:40]))
    pairs = [{"prompt": q, "chosen": a, "rejected": q} for q, a in EXCHANGES.items()] * 3
    write(folder / "my_pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    write(folder / "my_questions.csv", "question,A,B,answer\n江上有什么？,白鹭,老猫,A\n1984 + 16 = ?,2000,1984,A\n")
    write(folder / "questions.jsonl", "".join(json.dumps({"prompt": question}) + "\n" for question in EXCHANGES))
    miniature = Miniature(folder, verses + notes, {})
    for command in JOURNEY:
        miniature.results[command.split()[1].removesuffix(".py")] = miniature.run(command)
    return miniature


def verse(random_: random.Random) -> str:
    """A title and four lines such as 江上白云飞: five characters, of which the noun decides on the verb."""
    lines = []
    for _ in range(4):
        noun, verb = random_.choice(["云飞", "月明", "花开", "鸟啼", "水流", "雨落"])
        where, colour = random_.choice(["江上", "山中", "窗前", "溪边", "城南"]), random_.choice("白青黄红")
        lines.append(where + colour + noun + verb)
    title = random_.choice(["春日", "夏夜", "秋夜", "冬日"])
    return f"《{title}》\n{lines[0]}，{lines[1]}。\n{lines[2]}，{lines[3]}。"


def note(random_: random.Random) -> str:
    """Three English sentences of one shape, each with a number."""
    sentences = []
    for _ in range(3):
        who, does = random_.choice(["fox jumps", "cat sleeps", "bird sings", "boat drifts", "child reads"]).split()
        adjective, place = random_.choice(["quick", "old", "small", "grey"]), random_.choice(["river", "roof", "fence"])
        sentences.append(f"In {random_.randint(1980, 1999)} the {adjective} {who} {does} near the {place}.")
    return " ".join(sentences)


def conversations() -> list[dict]:
    """Every exchange in one of four formats, and two-turn conversations that need what was said before."""
    records = []
    for number, (question, answer) in enumerate(EXCHANGES.items()):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        formats = ({"conversations": turns}, {"messages": messages}, {"instruction": question, "output": answer})
        records.append(([*formats, {"question": question, "answer": answer}])[number % 4])
    for name in NAMES:
        words = [f"我叫{name}", f"你好，{name}。", "我叫什么？", f"你叫{name}。"]
        records.append({"messages": [{"role": role, "content": text} for role, text in zip(2 * ROLES, words)]})
    return records


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")
