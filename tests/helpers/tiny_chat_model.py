"""A small model to chat with, random weights and all, as a directory on disk: for tests of what talks to models."""

from pathlib import Path

import sentencepiece
import torch

from chat.template import load_template
from checkpoint.directory import save_model
from model import Transformer
from model_args import ModelArgs
from tokenizer import MARKERS, Tokenizer, load_tokenizer

TEXT = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n以《江上》为题写一首五言绝句 the moon above the river 1984"


def chat_tokenizer(folder: Path) -> Tokenizer:
    """One of our vocabularies, almost all bytes: with the chat markers, in a second."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 10),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=3,
        control_symbols=list(MARKERS),
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return load_tokenizer(folder / "tokenizer.model")


def save_chat_model(folder: Path, **shape) -> Path:
    """A model directory; its answers are gibberish, though of many tokens, and do not change."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = chat_tokenizer(folder)
    torch.manual_seed(2)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_seq_len": 200} | shape
    model = Transformer(ModelArgs(vocab_size=tokenizer.vocab_size, **shape))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    save_model(folder, model, tokenizer, stop_ids=load_template(tokenizer).stop_ids)
    return folder
