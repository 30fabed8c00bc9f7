"""Published models, built small with the keys of their files, as we read them and as transformers does.

python -m tests.layouts            prints the table
python -m tests.layouts --write    and keeps it in docs/models.md
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # as pytest has it

from cli.extras import need  # noqa: E402

need("tests.layouts", "dev", "transformers")

import torch  # noqa: E402
import transformers  # noqa: E402
from helpers.published_layouts import LAYOUTS, Layout, with_blocks, write_layout  # noqa: E402

from bins.tokenize import encode  # noqa: E402
from chat.samples import encode_conversation  # noqa: E402
from checkpoint.directory import save_model  # noqa: E402
from fine_tuning import all_stops  # noqa: E402
from serving.assistant import load_assistant  # noqa: E402

DOCUMENT = TESTS.parent / "docs" / "models.md"
MARKS = ("<!-- layouts -->\n", "<!-- /layouts -->\n")  # the table stands between them
COLUMNS = ("plain", "chat", "sample", "mask", "stops", "window", "logits", "saved")
TEXTS = (
    "The rain stopped, and the steps were still wet.",
    "雨停了，石阶上还有水。2024年12月31日",
    "",
    " ",
    "  a  b   c ",
    "\n\n\tx = 10:\t\ty\n",
    "emoji 😀 👩\u200d👧 𠀀",
    "“弯引号” ㈱ Ａ e\u0301 ﬁ",
    "it's 12345 --   6 ......\r\n",
    "<s>a</s> [INST] b [/INST] <|im_end|>\n<|eot_id|> <｜User｜> <|user|>\n<think>",
)
SYSTEM = {"role": "system", "content": "答得短。"}
ASKED = [SYSTEM, {"role": "user", "content": "What is 2 + 2?  "}, {"role": "assistant", "content": "4。"}]
ASKED += [{"role": "user", "content": "再来一次：\n\n雨停了吗？"}]
ANSWER = {"role": "assistant", "content": "停了 😀, it stopped."}
THOUGHT = {"role": "assistant", "content": "<think>\n先看石阶。\n</think>\n\n停了 😀"}
REAL = transformers.PreTrainedTokenizerFast  # the class that takes tokenizer.json as it is


class Case(NamedTuple):
    """A layout in its directory, as we read it and as transformers does."""

    layout: Layout
    directory: Path
    ours: Any  # serving.assistant.Assistant
    theirs: Any  # PreTrainedTokenizerFast
    texts: Any  # the same, markers in a text being text


def open_case(name: str, directory: Path) -> Case:
    """Write the layout `name` into a directory and read it in both ways."""
    layout = LAYOUTS[name]
    write_layout(layout, directory)
    theirs, texts = REAL.from_pretrained(directory), REAL.from_pretrained(directory, split_special_tokens=True)
    return Case(layout, directory, load_assistant(directory, torch.device("cpu"), torch.float64), theirs, texts)


def difference(ours: Any, theirs: Any, what: str = "") -> str:
    """Return `equal`, or what differs, in few words."""
    return "equal" if ours == theirs else f"{what} {ours} / {theirs}".strip()


def plain(case: Case) -> str:
    """Documents of data: what transformers makes of a text, then eos."""
    tokenizer, end = case.ours.tokenizer, [case.theirs.eos_token_id]
    ours = [encode(tokenizer, [text])[0].tolist() for text in TEXTS]
    theirs = [case.texts(text).input_ids + end for text in TEXTS]
    wrong = [text for text, a, b in zip(TEXTS, ours, theirs) if a != b]
    return difference(wrong, [], f"{len(wrong)} texts:")


def chat(case: Case) -> str:
    """Prompts of conversations with and without a system message."""
    wrong = [n for n in (0, 1) if case.ours.encode(ASKED[n:]) != their_ids(case.theirs, ASKED[n:], True)]
    return difference(wrong, [], "conversation")


def their_ids(theirs: Any, messages: list[dict], prompt: bool = False) -> list[int]:
    return theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True).input_ids


def samples(case: Case) -> list[list[dict]]:
    """Conversations to train: with and without a system message, and with a thought where the template knows them."""
    return [[*ASKED, ANSWER], [*ASKED[1:], ANSWER]] + [[*ASKED, THOUGHT]] * case.layout.thoughts


def sample(case: Case) -> str:
    ours = [encode_conversation(each, case.ours.template, "all").texts[0][0] for each in samples(case)]
    return difference(ours, [their_ids(case.theirs, each) for each in samples(case)])


def mask(case: Case) -> str:
    """The answers and their end marks, against transformers' mask of the template with blocks around them."""
    jinja, wrong = with_blocks(case.layout), []
    for n, messages in enumerate(samples(case)):
        theirs = case.theirs.apply_chat_template(
            messages, chat_template=jinja, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, trained = encode_conversation(messages, case.ours.template, "all").texts[0]
        assert ids == theirs["input_ids"]  # blocks change no text
        if trained != [bool(each) for each in theirs["assistant_masks"]]:
            marked = [
                case.theirs.decode([i for i, on in zip(ids, m) if on]) for m in (trained, theirs["assistant_masks"])
            ]
            wrong.append(f"{n}: {marked[0]!r} / {marked[1]!r}")
    return difference(wrong, [])


def stops(case: Case) -> str:
    """Ids that end an answer."""
    theirs = transformers.GenerationConfig.from_pretrained(case.directory).eos_token_id
    return difference(sorted(case.ours.stop.ids), sorted(theirs if isinstance(theirs, list) else [theirs]))


def window(case: Case) -> str:
    return difference(case.ours.model.args.max_seq_len, case.layout.window)


def logits(case: Case) -> str:
    """In float64, over a text of 40 tokens."""
    return compare_logits(case.ours.model, case.directory)


def compare_logits(ours: Any, directory: Path) -> str:
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, output_loading_info=True
    )
    tokens = torch.randint(ours.args.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (ours(tokens).double() - theirs(tokens).logits).abs().max().item()
    keys = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]]
    return difference(keys or error < 1e-5, True, f"{error:.1g}")


def saved(case: Case) -> str:
    """transformers on the directory that we save: ids of texts with markers as they lie there, template, stop ids."""
    directory = case.directory / "saved"
    save_model(directory, case.ours.model, case.ours.tokenizer, all_stops(case.ours.template, case.directory))
    auto = transformers.AutoTokenizer.from_pretrained(directory)
    wrong = [f"{text!r}" for text in TEXTS if auto(text).input_ids != case.theirs(text).input_ids]
    wrong += ["template"] * (their_ids(auto, ASKED, True) != their_ids(case.theirs, ASKED, True))
    names = ("bos_token", "eos_token", "pad_token")
    wrong += [name for name in names if getattr(auto, name) != getattr(case.theirs, name)]
    wrong += [
        each for each in (stops_of(directory, case), compare_logits(case.ours.model, directory)) if each != "equal"
    ]
    return difference(wrong, [])


def stops_of(directory: Path, case: Case) -> str:
    before, after = (transformers.GenerationConfig.from_pretrained(d).eos_token_id for d in (case.directory, directory))
    before, after = (set(each if isinstance(each, list) else [each]) for each in (before, after))
    return difference(sorted(after), sorted(before), "stops")


CHECKS: dict[str, Callable[[Case], str]] = {name: globals()[name] for name in COLUMNS}


def row(name: str) -> list[str]:
    """Return the cells of a layout: its name, then what each of COLUMNS found."""
    with tempfile.TemporaryDirectory() as folder:
        case = open_case(name, Path(folder))
        return [name, *(check(case) for check in CHECKS.values())]


def main(arguments: list[str]) -> int:
    """Print the table as it is found; 1 where something differs."""
    if unknown := [each for each in arguments if each != "--write"]:
        print(
            f"error: {unknown[0]} is not known; there is --write, which keeps the table in {DOCUMENT}", file=sys.stderr
        )
        return 1
    torch.set_num_threads(1)
    lines = [f"| layout | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    print(*lines, sep="\n")
    for name in LAYOUTS:
        lines.append(f"| {' | '.join(row(name))} |")
        print(lines[-1], flush=True)
    wrong = sum(cell.strip() != "equal" for line in lines[2:] for cell in line.split("|")[2:-1])
    print(f"\n{len(LAYOUTS)} layouts, {len(COLUMNS)} comparisons each; {wrong or 'none'} differ")
    if "--write" in arguments:
        head, _, rest = DOCUMENT.read_text(encoding="utf8").partition(MARKS[0])
        tail = rest.partition(MARKS[1])[2]
        DOCUMENT.write_text(head + MARKS[0] + "\n".join(lines) + "\n" + MARKS[1] + tail, encoding="utf8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
