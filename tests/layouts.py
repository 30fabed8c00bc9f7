"""Published models, built small with the keys of their files, as we read them and as transformers does.

python -m tests.layouts            prints the table
python -m tests.layouts --write    and keeps it in docs/models.md
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # as pytest has it

import torch  # noqa: E402
import transformers  # noqa: E402
from helpers.published_layouts import LAYOUTS, Layout, with_blocks, write_layout  # noqa: E402

from bins.tokenize import encode  # noqa: E402
from chat.samples import encode_conversation  # noqa: E402
from checkpoint.directory import load_model, save_model  # noqa: E402
from serving.assistant import load_assistant  # noqa: E402

DOCUMENT = TESTS.parent / "docs" / "models.md"
MARKS = ("<!-- layouts -->\n", "<!-- /layouts -->\n")  # the table stands between them
COLUMNS = ("plain", "chat", "sample", "mask", "stops", "window", "logits", "saved")
TEXTS = ("The rain stopped, and the steps were still wet.", "雨停了，石阶上还有水。2024年12月31日", "", " ", "  a  b   c ", "\n\n\tx = 10:\t\ty\n",
         "emoji 😀 👩‍👧 𠀀", "“弯引号” ㈱ Ａ é ﬁ", "it's 12345 -- ......\r\n", "<s>a</s> [INST] b [/INST] <|im_end|>\n<|eot_id|> <｜User｜> <|user|>\n<think>")  # fmt: skip
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
