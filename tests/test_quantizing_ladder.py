"""`quantize.py ladder`: its figures against the plain forward pass, rows that are kept, and what it refuses."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_quantize import SHAPE, folder, run  # noqa: F401  (folder: a fixture)
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import quantize
from checkpoint.directory import load_model, save_model
from decoding.feeder import Feeder
from model import Transformer
from model_args import ModelArgs
from quantizing import ladder, measure, table
from quantizing.ladder_args import STEPS, LadderArgs

FEW = {"methods": ("rtn-", "int8", "gptq"), "bits": (8, 3), "draws": 2, "group_size": 32, "seq_len": 50}


def args_of(folder, out, **changes) -> LadderArgs:  # noqa: F811
    settings = {"calib": (folder / "text.txt",), "heldout": (folder / "chats.jsonl",), "model": folder / "model"}
    settings |= FEW | {"calib_tokens": 500, "heldout_tokens": 400, "out": out}
    return LadderArgs(**settings | changes)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):  # noqa: F811
    """A ladder of a tiny model."""
    out = tmp_path_factory.mktemp("ladder") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "resident_bytes", lambda directory, dtype: 7)  # a process for each row
        return out, quantize.ladder(args_of(folder, out))


def test_every_method_and_width_is_a_row_in_the_table_the_json_and_the_picture(done):
    out, rows = done
    names = [(row["method"], row["bits"]) for row in rows]
    assert names == [
        *[("float32", 32), ("bfloat16", 16), ("int8_cache", 32)],
        *[("rtn-", 8), ("int8", 8), ("gptq", 8), ("rtn-", 3), ("gptq", 3)],
    ]
    assert json.loads((out / "ladder.json").read_text())["rows"] == json.loads(json.dumps(rows))
    lines = (out / "ladder.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + len(rows)
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG")
    by_name = dict(zip(names, rows))
    assert by_name["gptq", 3]["calib_tokens"] == 500 and len(by_name["gptq", 3]["more_nats_of_draws"]) == 2
    assert "calib_tokens" not in by_name["rtn-", 3]
    assert by_name["rtn-", 3]["kl"] > 10 * by_name["rtn-", 8]["kl"] > 0
    assert by_name["float32", 32]["more_nats"] == by_name["float32", 32]["kl"] == 0
    # codes of 3 bits; of 32 weights a scale of 16 bits or 32 and a zero point
    assert 3.5 < by_name["rtn-", 3]["bits_per_weight"] < 4.5
    assert by_name["float32", 32]["bits_per_weight"] == 32 and by_name["bfloat16", 16]["bits_per_weight"] == 16
    assert all(row["resident"] == 7 for row in rows if row["method"] != "int8_cache")


def test_the_figures_are_those_of_the_plain_forward_pass(folder, done):  # noqa: F811
    out, rows = done
    work = ladder.Ladder(args_of(folder, out))
    run(folder, out.parent / "rounded", method="rtn", search=False, bits=3, format="compressed-tensors")
    full, ours = load_model(folder / "model").double(), load_model(out.parent / "rounded").double()
    losses, kl, same = [], [], []
    with torch.no_grad():
        for ids in work.rows_of_text:
            p, q = (log_softmax(model(ids[None])[0], -1) for model in (full, ours))
            losses.append([float(cross_entropy(each[:-1], ids[1:])) for each in (p, q)])
            kl.append(float(kl_div(q, p, log_target=True, reduction="batchmean")))
            same.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    base, found = torch.tensor(losses).T
    row = next(row for row in rows if (row["method"], row["bits"]) == ("rtn-", 3))
    # the compiled step rounds the head to 8 bits and inputs to 16
    assert row["loss"] == pytest.approx(float(found.mean()), abs=2e-3)
    assert row["more_nats"] == pytest.approx(float((found - base).mean()), abs=2e-3)
    assert row["more_nats_half"] == pytest.approx(1.96 * float((found - base).std()) / math.sqrt(len(base)), abs=2e-3)
    assert row["kl"] == pytest.approx(sum(kl) / len(kl), rel=0.1)
    assert row["top1"] == pytest.approx(sum(same) / len(same), abs=0.05)
    # a row may begin inside of a character
    text = sum(len(work.tokenizer.decode(ids.tolist()).encode()) for ids in work.rows_of_text[:, 1:])
    nats = row["loss"] * work.rows_of_text[:, 1:].numel()
    assert row["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / text, rel=0.05
    )  # rows may begin inside a character


def test_rows_that_are_there_are_not_measured_again(folder, done, monkeypatch, capsys):  # noqa: F811
    out, rows = done
    (out / "rows/rtn-_3.json").unlink()
    measured = []
    whole = ladder.Ladder.measured
    monkeypatch.setattr(
        ladder.Ladder, "measured", lambda self, name, how: measured.append(name) or whole(self, name, how)
    )
    again = quantize.ladder(args_of(folder, out))
    assert measured == ["rtn-_3"] and "has 7 of 8 rows already" in capsys.readouterr().err
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert again[:-2] == json.loads(json.dumps(rows[:-2]))


def test_rows_of_other_texts_or_settings_are_not_mixed(folder, done):  # noqa: F811
    out, _ = done
    with pytest.raises(ValueError, match="has rows of a ladder that differs in group_size: choose another"):
        ladder.Ladder(args_of(folder, out, group_size=64))
    with pytest.raises(ValueError, match="differs in texts"):
        ladder.Ladder(args_of(folder, out, calib=(folder / "chats.jsonl",)))
    (out / "config.json").touch()
    with pytest.raises(ValueError, match="is a model; choose a directory for the table"):
        ladder.Ladder(args_of(folder, out))
    (out / "config.json").unlink()


def test_a_model_beside_and_one_that_cannot_be_compared(folder, tmp_path):  # noqa: F811
    run(folder, tmp_path / "four", method="rtn", bits=4)
    work = ladder.Ladder(args_of(folder, tmp_path / "out", beside=(tmp_path / "four",)))
    beside, same = work.other("four", tmp_path / "four"), work.quantized("rtn_4")
    assert beside["resident"] > 10**6  # some MB for the libraries that decoding loads
    assert (beside["method"], beside["bits"]) == ("four", 4)
    assert beside["loss"] == pytest.approx(same["loss"], abs=1e-3)  # its scales are in float16
    with pytest.raises(ValueError, match="the ladder compares with the full weights"):
        ladder.Ladder(args_of(folder, tmp_path / "other", model=tmp_path / "four"))
    larger = Transformer(ModelArgs(vocab_size=4000, n_layers=1, **SHAPE))
    save_model(tmp_path / "larger", larger, None, None)
    with pytest.raises(ValueError, match="does not have the vocabulary of"):
        work.other("larger", tmp_path / "larger")
    for name, message in (("larger", "does not have the vocabulary of"), ("nowhere", "nowhere is no model directory")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):  # before any row is measured
            ladder.Ladder(args_of(folder, tmp_path / "third", beside=(tmp_path / name,)))
    assert not (tmp_path / "third").exists()
    with pytest.raises(NotADirectoryError, match=r"--out .* is a file, where a folder is expected"):
        ladder.Ladder(args_of(folder, folder / "text.txt/table"))


def test_a_method_whose_package_is_missing_is_left_out(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    work = ladder.Ladder(args_of(folder, tmp_path / "out"))
    monkeypatch.setattr(ladder.importlib.util, "find_spec", lambda name: None)
    assert work.quantized("nf4_4") is None
    assert "nf4 is left out: it needs bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quick": True}, "--methods does not go with --quick True"),
        ({"calib": ()}, "--calib needs at least one file"),
        ({"heldout": ()}, "--heldout needs at least one file"),
        ({"group_size": 0}, "--group_size should be -1"),
        ({"beside": (Path("a/x"), Path("b/x"))}, "two directories of the same name"),
    ],
)
def test_flags_that_do_not_go_together(folder, changes, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        args_of(folder, Path("out"), **changes)


def test_quick_is_a_few_rows(folder):  # noqa: F811
    args = LadderArgs((Path("a"),), (Path("b"),), Path("out"), quick=True).chosen()
    assert args.methods == ("rtn-", "gptq") and args.bits == (8, 4) and args.draws == 1 and not args.quick


@pytest.mark.parametrize("name", STEPS)
def test_every_method_has_settings_that_quantize_takes(folder, tmp_path, name):  # noqa: F811
    work = ladder.Ladder(args_of(folder, tmp_path / "out"))
    for size in (32, 48):  # 48 divides not every row: another format
        object.__setattr__(work.args, "group_size", size)
        for bits in STEPS[name].bits:
            one = work.settings(STEPS[name], bits, tmp_path / "model", 1)
            assert (one.bits, one.seed) == (bits, int(STEPS[name].text))


def test_the_share_of_rounding():
    plain = {"method": "rtn-", "bits": 4, "more_nats": 0.5, "more_nats_half": 0.2, "more_nats_of_draws": [0.5]}
    ours = {"method": "gptq", "bits": 4, "more_nats": 0.15, "more_nats_of_draws": [0.1, 0.2]}
    assert table.of_rounding(ours, [plain, ours]) == "0.20 to 0.40"
    assert table.of_rounding(plain, [plain]) == "1.00"
    assert table.of_rounding(ours | {"bits": 3}, [plain]) == ""
    for loss in (-0.1, 0.0, 0.19):  # none, or within the interval
        assert table.of_rounding(ours, [plain | {"more_nats": loss}]) == ""


def test_a_cache_in_8_bits_is_read(folder):  # noqa: F811
    model, row = load_model(folder / "model").eval(), torch.arange(3, 67)
    exact = Feeder(model, model.make_cache(1, 64))([row.tolist()], [0], 64)[0]
    found = measure.logits_of(model, row, "int8")
    assert 0 < float((found - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_the_command_line_of_the_ladder_and_of_a_model():
    def error(*words: str) -> str:
        command = [sys.executable, "quantize.py", *words]
        return subprocess.run(command, cwd=Path(quantize.__file__).parent, capture_output=True, text=True).stderr

    assert "ladder" in error("stairs") and "expects a command" in error("stairs")
    assert "--draws" in error("ladder", "--calib", "a", "--heldout", "b", "--out", "c", "--draws", "0")
    assert "--damping is no flag" in error("ladder", "--damping", "0.1")
