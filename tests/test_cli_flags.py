"""The tables of flags that do something only beside others: which rows are broken, and what the message says."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

import convert
import corpora
import eval
import fine_tuning
import pretrain
import quantize
import quantizing.args
import quantizing.ladder_args
import train_tokenizer
import tuning.args
from cli.args import parse
from cli.flags import ABOVE_0, SET, Needs, Wanted, check_flags, read_flags, where_set
from optim.args import OptimArgs

SCRIPTS = {  # its settings, without which it does not start; its table
    "pretrain": (pretrain.Args(), pretrain.NEEDS),
    "fine_tuning": (fine_tuning.Args(), tuning.args.NEEDS),
    "eval": (eval.Args(), eval.NEEDS),
    "quantize": (quantize.Args(out=Path("q"), calib=(Path("c"),)), quantizing.args.NEEDS),
    "quantize ladder": (
        quantizing.ladder_args.LadderArgs((Path("c"),), (Path("h"),), Path("o")),
        quantizing.ladder_args.NEEDS,
    ),
    "convert": (convert.Merge(model=Path("m"), adapter=Path("a"), out=Path("o")), convert.NEEDS),
    "train_tokenizer": (train_tokenizer.Args(), corpora.NEEDS),
}


@dataclass(frozen=True)
class Inner:
    kind: str = "a"
    tea_leaves: int = 3
    tea_sugar: tuple[str, ...] = field(default_factory=lambda: ("white",))


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    mode: str = "slow"
    out: str = "here"


NEEDS = (
    Needs("inner.tea_*", "mode", ("fast", "faster"), "see {args.out}; remove it"),
    Needs("mode", "inner.kind", ("a", "b"), "c is fast already", lambda mode: mode == "fast"),
)


@pytest.mark.parametrize(
    "args",
    [
        Outer(),
        Outer(mode="faster", inner=Inner("c", 4)),
        Outer(mode="fast", inner=Inner(tea_sugar=())),
        Outer(inner=Inner(tea_sugar=("white",))),
    ],
)
def test_rows_that_are_kept(args):
    check_flags(args, NEEDS)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            Outer(inner=Inner(tea_leaves=4)),
            "--inner.tea_leaves 4 needs --mode fast or faster, found slow: see here; remove it",
        ),
        (
            Outer(inner=Inner("c", 4, ()), out="there"),
            "--inner.tea_leaves 4 and --inner.tea_sugar need --mode fast or faster, found slow: see there; remove it",
        ),
        (Outer(mode="fast", inner=Inner("c")), "--mode fast needs --inner.kind a or b, found c: c is fast already"),
    ],
)
def test_the_first_broken_row_is_the_message(args, message):
    with pytest.raises(ValueError) as refused:
        check_flags(args, NEEDS)
    assert str(refused.value) == message


def test_flags_by_name_and_by_pattern():
    assert list(read_flags(Outer(), "inner.kind")) == [("inner.kind", "a", "a")]
    assert [name for name, _, _ in read_flags(Outer(), "inner.tea_*")] == ["inner.tea_leaves", "inner.tea_sugar"]
    assert not list(read_flags(Outer(), "inner.coffee"))


# ---- what counts as set


@pytest.mark.parametrize(
    "command_line, preset, refused",
    [
        ((), (), True),
        (("inner.tea_leaves",), (), True),
        ((), ("inner.tea_leaves",), True),  # a preset that has nothing but the useless flag
        ((), ("inner.tea_leaves", "mode"), False),  # the record of a run has all flags
        (("mode",), ("inner.tea_leaves",), False),  # the command line has changed what the preset was made for
        (("mode", "inner.tea_leaves"), (), True),
    ],
)
def test_a_value_of_a_preset_counts_where_nothing_sets_the_other_flag(command_line, preset, refused):
    with where_set(set(command_line), set(preset)):
        if refused:
            with pytest.raises(ValueError, match=r"--inner\.tea_leaves 4 needs --mode"):
                check_flags(Outer(inner=Inner(tea_leaves=4)), NEEDS)
        else:
            check_flags(Outer(inner=Inner(tea_leaves=4)), NEEDS)


def test_rows_with_other_conditions():
    rows = (
        Needs("mode", "out or inner.kind", SET, "why"),
        Needs("out", "inner.tea_leaves", ABOVE_0, "why"),
        Needs("out", "mode", ("slow",), "why", only_named=True),
    )
    check_flags(Outer(mode="x", out="y"), rows)
    check_flags(Outer(mode="x", inner=Inner("b")), rows)
    with pytest.raises(ValueError, match=r"^--mode x needs --out or --inner\.kind: why$"):
        check_flags(Outer(mode="x"), rows)
    with pytest.raises(ValueError, match=r"^--out y needs --inner\.tea_leaves above 0, found 0: why$"):
        check_flags(Outer(out="y", inner=Inner(tea_leaves=0)), rows)
    with where_set({"out"}, set()), pytest.raises(ValueError, match=r"^--out y needs --mode slow, found x: why$"):
        check_flags(Outer(mode="x", out="y"), rows)


def test_the_default_of_a_flag_is_that_of_the_script():
    for optim, default in ((OptimArgs(muon_lr=1.0), 2e-3), (OptimArgs(muon_lr=2e-3), 2e-3), (OptimArgs(), 6e-3)):
        found = list(read_flags(fine_tuning.Args(optim=optim), "optim.muon_lr"))
        assert found == [("optim.muon_lr", optim.muon_lr, default)]


# ---- the tables of the scripts


@pytest.mark.parametrize(
    "args, row", [(args, row) for args, rows in SCRIPTS.values() for row in rows], ids=lambda each: str(each)[:60]
)
def test_rows_name_flags_that_exist_and_values_that_they_take(args, row):
    assert list(read_flags(args, row.flag))
    others = [flag for name in row.other.split(" or ") for flag in read_flags(args, name)]
    assert len(others) == len(row.other.split(" or "))
    if not isinstance(row.values, Wanted):
        kinds = {type(None), *(type(each) for _, *values in others for each in values)}
        kinds |= {int, float} if float in kinds else set()
        assert {type(each) for each in row.values} <= kinds
    assert row.why.format(args=args)


REFUSED = {
    "pretrain": [
        ("--rope.type yarn", "--rope.type yarn needs --init_from: it changes a model that there is"),
        ("--add_tokens x", "--add_tokens needs --init_from"),
        ("--vocab_multiple_of 64", "--vocab_multiple_of 64 needs --init_from"),
        ("--model.vocab_size 5000", "--model.vocab_size 5000 needs --init_from: a new model has the ids of the tok"),
        ("--init_from m --multiple_of 64", "--model.multiple_of 64 does not go with --init_from m: a checkpoint has"),
        ("--train.epochs 3 --max_steps 9", "--train.epochs 3.0 needs --train.max_steps 0, found 9: that many steps"),
        ("--optimizer adamw --muon_lr 1", "--optim.muon_lr 1.0 needs --optim.optimizer muon, found adamw"),
        ("--schedule cosine --decay_share 0.1", "--optim.decay_share 0.1 needs --optim.schedule wsd, found cosine"),
        ("--schedule constant --min_lr_ratio 0.1", "--optim.min_lr_ratio 0.1 needs --optim.schedule wsd, cosine or"),
        ("--s2_min_len 9", "--train.s2_min_len 9 needs --train.s2_group above 0, found 0"),
        ("--eval_interval 0 --patience 2", "--train.patience 2 needs --train.eval_interval above 0, found 0.0"),
    ],
    "fine_tuning": [
        ("--data.heldout_share 0 --patience 2", "--train.patience 2 needs --data.heldout_share above 0, found 0.0"),
        ("--data.heldout h --heldout_share 0.1", "--data.heldout_share 0.1 does not go with --data.heldout: all of"),
        ("--lora.method lora --muon_lr 1", "--optim.muon_lr 1.0 needs --lora.method none, found lora: AdamW trains"),
        ("--optim.lora_lr_ratio 16", "--optim.lora_lr_ratio 16.0 needs --lora.method lora, rslora, dora or pissa"),
        ("--packing concat --too_long drop", "--data.too_long drop needs --data.packing best_fit, bucket or none"),
    ],
    "eval": [
        ("--task loss --prompt x", "--prompt x needs --task chat, found loss"),
        ("--output f --prompt x", "--output f needs --input or --task: other answers are printed"),
        ("--draft_tokens 2", "--draft_tokens 2 needs --draft: it is the number of tokens that a draft guesses"),
        ("--demo true --prompt x", "--demo True does not go with --prompt x"),
        ("--heldout f", "--heldout f needs --task loss or poems, found chat: only these read it"),
        ("--task poems --draft lookup", "--draft lookup needs --task chat, found poems"),
        ("--temperature 0 --top_p 0.5", "--sampling.top_p 0.5 needs --sampling.temperature above 0, found 0.0"),
        ("--batch_size 3", "--batch_size 3 needs --input or --task: other answers come one by one"),
    ],
    "quantize": [
        ("--out o --method rtn --calib c", "--calib needs --method gptq, awq"),
        ("--out o --calib c --method awq --damping 1", "--damping 1.0 needs --method gptq, found awq"),
        ("--out o --calib c --format awq --bits 3", "--format awq needs --bits 4, found 3: its files keep 4 bits"),
    ],
    "train_tokenizer": [
        ("--text_key t", "--text_key t needs --input or --loader: named corpora have forms of their own"),
        ("--loader l.py --format file", "--format file needs --input"),
    ],
}


@pytest.mark.parametrize("script, words, sentence", [(name, *each) for name, all_ in REFUSED.items() for each in all_])
def test_flags_that_do_nothing_are_refused(script, words, sentence):
    with pytest.raises(SystemExit) as refused:
        parse(type(SCRIPTS[script][0]), script, words.split())
    assert refused.value.code.startswith(f"error: {sentence}")


PRESETS = [path.relative_to(Path(__file__).parents[1]) for path in Path(__file__).parents[1].glob("configs/**/*.yaml")]


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_presets_and_what_a_command_line_changes_in_them_are_accepted(preset, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    for script in ("pretrain", "fine_tuning", "eval"):
        cls = type(SCRIPTS[script][0])
        data = ["--data", "a,b"] if script == "fine_tuning" and preset.stem == "tasks" else []
        parse(cls, script, ["--config", str(preset), *data])
        if script != "eval":
            for words in ("--optimizer adamw", "--schedule constant", "--max_steps 9", "--eval_interval 0"):
                parse(cls, script, ["--config", str(preset), *data, *words.split()])
    data = "a,b" if preset.stem == "tasks" else "d"
    for words in ("--lora.method none", "--lora.method lora", "--max_steps 3 --micro_batch_size 2"):
        parse(fine_tuning.Args, "fine_tuning", ["--config", str(preset), "--data", data, *words.split()])
