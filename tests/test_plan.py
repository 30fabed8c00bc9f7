"""plan.py from its flags to its tables: sources of a shape, answers, sentences for bad input."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fine_tuning
import plan
import pretrain
from checkpoint import config_json
from cli.args import parse
from distributed.split import check_rows, check_shape
from model_args import ModelArgs
from planning.measure import Stepper, measure
from planning.memory import Step
from planning.shapes import PUBLISHED
from training.flops import train_flops_per_token

REPOSITORY = Path(__file__).parents[1]
FOUR_BLOCKS = "--shape.dim 64 --shape.n_heads 4 --shape.n_layers 4"


def run(flags: str) -> dict:
    return plan.main(parse(plan.Args, "plan", shlex.split(flags)))


def run_too_large(flags: str) -> None:
    """The answer is no, which the exit status says, too."""
    with pytest.raises(SystemExit) as ended:
        run(flags)
    assert ended.value.code == 3


def test_will_it_fit_my_24_gb_card(capsys):
    result = run("--model llama2-7b --gpu_memory 24")
    said = capsys.readouterr().out
    assert "Adapters can be trained by LoRA, with blocks recomputed" in said and "All weights cannot" in said
    assert result["parameters"]["total"] == 6_738_415_616
    fits = {way["name"]: way["most_rows"] > 0 for way in result["training"]}
    assert not fits["all weights, recomputed"] and fits["QLoRA (nf4), recomputed"] and not fits["QLoRA (nf4)"]


def test_a_preset_says_shape_rows_and_optimizer(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    result = run("--model configs/small.yaml --gpu 4090 --tokens 1e9 --price 0.5")
    assert result["parameters"]["total"] == 55_964_800  # its vocabulary is that of its tokenizer
    step = result["training"][0]["step"]
    assert (step["rows"], step["seq_len"], step["optimizer"]) == (32, 1024, "muon")
    assert result["seconds"] == pytest.approx(result["flops_per_token"] * 1e9 / (165e12 * 0.45))


@pytest.mark.parametrize("end", ["", "/config.json"])
def test_a_model_directory_and_its_config_are_read_without_weights(tmp_path, end):
    (tmp_path / "config.json").write_text(json.dumps(config_json.write(PUBLISHED["qwen3-8b"])))
    assert run(f"--model {tmp_path}{end} --gpu h100")["parameters"]["total"] == 8_190_735_360


def test_a_shape_comes_from_flags_and_the_numbers_go_to_a_file(tmp_path):
    path = tmp_path / "plan.json"
    result = run(f"--shape.dim 64 --shape.n_heads 4 --shape.n_layers 2 --seq_len 64 --json {path}")
    written = json.loads(path.read_text())
    assert written["parameters"] == result["parameters"] and written["training"][0]["n_bytes"] > 0


def test_only_what_runs_here_gets_a_command(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    run("--model configs/base.yaml --gpu h100 --gpus 16 --tokens 1e10")
    said = capsys.readouterr().out
    command = next(line for line in said.splitlines() if "--train.backend ddp" in line).split()
    at = command.index("pretrain.py")
    assert command[:6] == shlex.split("torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint")
    import pretrain

    args = parse(pretrain.Args, "pretrain", command[at + 1 :])
    assert args.train.backend == "ddp" and args.data.batch_size == 256 and 256 % (16 * args.train.micro_batch_size) == 0
    rows = run("--model llama2-7b --gpu h100 --gpus 16 --optimizer muon")["strategies"]
    commands = {row["strategy"]["name"]: row["command"] for row in rows}
    assert "--train.backend fsdp" in commands["FSDP2"] and "optim.optimizer" not in commands["FSDP2"]  # the default
    assert commands["ZeRO-2"] is None and "not run by this repository: ZeRO-2, " in capsys.readouterr().out


def test_what_the_scripts_refuse_gets_no_command_but_their_reason(capsys):
    """A vocabulary that TP does not divide; an optimizer that needs whole matrices."""
    rows = run(f"{FOUR_BLOCKS} --shape.vocab_size 1001 --gpu h100 --gpus 4 --seq_len 64 --batch_size 8")["strategies"]
    for row in rows:
        assert (row["command"] is None) == (row["refused"] is not None) == (row["strategy"]["tensor"] > 1)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "--train.tp 2 does not divide" in line)
    assert "3D TP2 PP1 DP2" in line and "3D TP2 PP2 DP1" in line and "the model's 1001 rows of the embedding" in line
    rows = run(f"{FOUR_BLOCKS} --gpu h100 --gpus 4 --seq_len 64 --batch_size 8 --optimizer adafactor")["strategies"]
    assert {row["strategy"]["name"] for row in rows if row["command"]} == {"DDP"}
    reasons = [row["refused"] or "" for row in rows]
    wanted = "--train.tp 4 needs --optim.optimizer muon, adamw or lion, found adafactor"
    assert any(why.startswith(wanted) for why in reasons)


def test_commands_of_3d_are_those_that_pretrain_divides_so():
    rows = run(f"{FOUR_BLOCKS} --gpu h100 --gpus 8 --seq_len 64 --batch_size 8")["strategies"]
    found = [row for row in rows if row["strategy"]["name"] == "3D"]
    assert len(found) > 5
    for row in found:
        sizes, words = row["strategy"], row["command"].split()
        args = parse(pretrain.Args, "pretrain", words[words.index("pretrain.py") + 1 :])
        train = args.train
        assert (train.tp, train.pp) == (sizes["tensor"], sizes["pipeline"])
        assert train.backend == ("fsdp" if sizes["data"] > 1 else "ddp") and train.tp * train.pp * sizes["data"] == 8
        check_shape(args.model.made(1024, 64), train.tp, train.pp)
        check_rows(train.tp, train.pp, 64, False, 8 // sizes["data"], train.micro_batch_size)


def test_published_runs_agree(capsys):
    rows = run("--published True")["published"]
    assert len(rows) > 10 and "TinyLlama" in capsys.readouterr().out
    for row in rows:
        assert abs(row["formula"] / row["published"] - 1) < 0.12, row
        assert row["what"] != "parameters" or row["formula"] == row["published"]


def test_runs_side_by_side(tmp_path, capsys):
    for name, rate in (("a", 100.0), ("b", 50.0)):
        rows = []
        for step in (10, 20):
            rows += [{"step": step, "loss": 5.0 - step / 10, "tokens": 1000 * step}]
            rows += [{"step": step, "tokens_per_second": rate * step / 10, "mfu": 0.25, "pause_seconds": 2.5}]
        rows += [{"step": 20, "eval_loss": 3.5}, {"step": 1, "first_step": 7.0}]
        directory = tmp_path / name
        directory.mkdir()
        (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3')
        own = "train: {max_steps: 80, gradient_checkpointing: true}, data: {seq_len: 2048}"
        (directory / "config.yaml").write_text(f"pretrain: {{{own}}}")
        (directory / "last").mkdir()
        (directory / "last/config.json").write_text(json.dumps(config_json.write(PUBLISHED["tinyllama"])))
    a, b = run(f"--run {tmp_path}/a {tmp_path}/b --price 36 --gpus 2")["runs"]
    assert a["seconds"] == pytest.approx(10_000 / 100 + 10_000 / 200) and b["seconds"] == pytest.approx(300)
    assert a["seconds_left"] == pytest.approx(150 * 60 / 20) and (a["steps"], a["loss"], a["held_out"]) == (
        80,
        3.0,
        3.5,
    )
    assert (a["first_step"], a["paused"]) == (7.0, 5.0) and a["hfu"] == pytest.approx(0.25 * 4 / 3)
    assert a["flops"] == train_flops_per_token(PUBLISHED["tinyllama"], 2048)
    # 200 tokens a second at 25 % of the peak: 800 at all of it, and a third of the operations is done again
    assert a["predicted"] == pytest.approx(800 * 0.45 * 3 / 4)
    said = capsys.readouterr().out
    assert "20 of 80" in said and "25.0%" in said and "3.00" in said  # 150 s of two GPUs at 36 an hour
    assert "270, 74% reached" in said and "33.3%" in said


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model llama2-7b --gpu h1", "--gpu h1 is not in the table; known are b200, h200, h100"),
        ("--model nothing", "--model nothing is neither a file or directory here nor a name in the table"),
        ("--model llama2-7b --gpus 6 --per_node 4 --gpu h100", "--gpus 6 is not a multiple of --per_node 4"),
        ("--model llama2-7b --gpus 8 --gpu_memory 80", "--gpus 8 needs the speed of a GPU of 80 GiB"),
        ("--model tinyllama --gpus 7 --gpu h100 --batch_size 3", "--batch_size 3 does not divide into --gpus 7"),
        (
            "--model tinyllama --gpus 8 --gpu h100 --tokens 1e9 --launch no/such/a.sh",
            "--launch no/such/a.sh: there is no directory no/such; make it first",
        ),
        ("--run out/nothing", "--run out/nothing has no metrics.jsonl"),
    ],
)
def test_bad_input_is_one_sentence(flags, message, capsys):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run(flags)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model llama2-7b --shape.n_layers 2", "--shape.n_layers 2 does not go with --model llama2-7b"),
        ("--per_node 4", "--per_node 4 needs --gpus"),
        ("--price 2", "--price 2.0 needs --tokens or --run"),
        ("--mfu 2", "--mfu should be from 0.01 to 1"),
        ("--gpu_memory 0", "--gpu_memory should be from 0.001"),
        ("--gpu_tflops 0", "--gpu_tflops should be from 1e-06"),
        ("--gpu_bandwidth 0", "--gpu_bandwidth should be from 1e-06"),
        ("--gpu_link 0 --gpus 2", "--gpu_link should be from 1e-06"),
        ("--seq_len 0", "--seq_len should be from 1 "),
        ("--rows 0", "--rows should be from 1 "),
        ("--batch_size 0 --gpus 2", "--batch_size should be from 1 "),
        ("--tokens 0", "--tokens should be from 1 "),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, message):
    with pytest.raises(SystemExit, match=message):
        run(flags)


def test_a_cluster_that_nothing_fits_names_the_nearest(capsys):
    run_too_large("--model llama3-405b --gpu 4090 --gpus 8")
    said = capsys.readouterr().out
    assert "Nothing fits: the nearest, 3D TP8 PP1 DP1 with 1 row, needs" in said and "more than there are" in said
    count = int(re.search(r"It fits on --gpus (\d+) of them, by 3D TP8 PP(\d+) DP1 in", said)[1])
    run(f"--model llama3-405b --gpu 4090 --gpus {count}")
    assert "Nothing fits" not in capsys.readouterr().out
    run_too_large("--model llama2-7b --gpu 4090 --gpus 2")
    name = re.search(r"It fits on 2 x --gpu (\S+), by", capsys.readouterr().out)[1]
    run(f"--model llama2-7b --gpu {name} --gpus 2")
    assert "Nothing fits" not in capsys.readouterr().out


def test_what_fits_nowhere_ends_with_another_status_and_names_the_nearest(tmp_path, capsys):
    run_too_large(f"--model llama2-70b --gpu 4090 --json {tmp_path / 'a.json'}")
    said = capsys.readouterr().out
    assert re.search(r"It cannot be trained: QLoRA \(nf4\), recomputed takes \S+ GiB, \S+ GiB too much", said)
    assert json.loads((tmp_path / "a.json").read_text())["fits"] is False
    for what in ("trained", "asked"):
        gpu = re.search(rf"The smallest GPU of the table on which it can be {what} is --gpu (\S+), with", said)[1]
        found = run(f"--model llama2-70b --gpu {gpu}")
        ways = found["training"] if what == "trained" else found["decoding"]
        assert any(way.get("most_rows") or way.get("texts") for way in ways)
    run_too_large("--model llama3-405b --gpu 4090")
    assert capsys.readouterr().out.count("No GPU of the table is large enough: plan for several with --gpus") == 1
    assert run("--model llama2-7b --gpu_memory 7.1")["fits"]  # it answers in 4 bits, but is not trained
    command = [sys.executable, str(REPOSITORY / "plan.py"), "--model", "llama2-70b", "--gpu", "4090"]
    assert subprocess.run(command, capture_output=True).returncode == 3


def test_rows_that_do_not_divide_are_named(capsys):
    found = run(f"{FOUR_BLOCKS} --gpu h100 --gpus 8 --seq_len 64 --batch_size 12")
    said = capsys.readouterr().out
    assert "not counted: DDP, FSDP2, ZeRO-1, ZeRO-2, ZeRO-3, ZeRO-2, offload and " in said
    assert "12 rows of a step do not divide over 8 data ranks: take a multiple, such as --batch_size 16" in said
    assert {row["strategy"]["data"] for row in found["strategies"]} == {1, 2, 4}
    run(f"{FOUR_BLOCKS} --gpu h100 --gpus 8 --seq_len 64 --batch_size 4")
    said = capsys.readouterr().out
    assert "3D TP1 PP2 DP4: 1 row for each data rank, fewer than 2 stages: --batch_size 8 is the least" in said
    run(f"{FOUR_BLOCKS} --gpu h100 --gpus 8 --seq_len 64 --batch_size 64")
    assert "not counted: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, rows, wanted",
    [
        (f"{FOUR_BLOCKS} --gpu h100 --seq_len 256", 64, "adamw auto 256 64"),
        (f"{FOUR_BLOCKS} --gpu h100 --seq_len 256 --dtype fp32 --optimizer lion", 64, "lion fp32 256 64"),
        (f"{FOUR_BLOCKS} --gpu h100 --seq_len 256 --batch_size 48 --rows 16", 16, "adamw auto 256 48"),
        ("--model llama2-7b --gpu_memory 24", 4, "adamw auto 4096 64"),
        ("--model llama2-7b --gpu_memory 24 --batch_size 6", 3, "adamw auto 4096 6"),
        ("--model configs/small.yaml --gpu 4090", 32, "muon auto 1024 64"),
        ("--model configs/small.yaml --gpu 4090 --seq_len 512 --optimizer adamw", 32, "adamw auto 512 64"),
    ],
)
def test_the_command_of_one_process_is_the_training_that_was_planned(flags, rows, wanted, capsys, monkeypatch):
    """With its length of rows, rows of a step, dtype and optimizer, whatever the defaults of the scripts are."""
    monkeypatch.chdir(REPOSITORY)
    run(flags)
    words = shlex.split(re.search(r"\n  python (\S+\.py .*)", capsys.readouterr().out)[1])
    script = {"pretrain.py": pretrain, "fine_tuning.py": fine_tuning}[words[0]]
    args = parse(script.Args, words[0].removesuffix(".py"), words[1:])
    found = (args.optim.optimizer, args.train.dtype, args.data.seq_len, args.data.batch_size)
    assert " ".join(map(str, found)) == wanted and args.train.micro_batch_size == rows


def test_a_preset_says_its_dtype(tmp_path):
    for dtype, planned in (("fp32", "fp32"), ("fp16", "bf16"), ("auto", "bf16")):
        path = tmp_path / f"{dtype}.yaml"
        path.write_text(f"pretrain: {{model: {{dim: 64, n_heads: 4, vocab_size: 100}}, train: {{dtype: {dtype}}}}}")
        assert run(f"--model {path} --gpu h100")["training"][0]["step"]["dtype"] == planned


@pytest.mark.parametrize("name", ["json", "picture", "launch"])
def test_a_file_that_exists_is_not_overwritten(name, tmp_path):
    path = tmp_path / "mine.png"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=f"--{name} .*mine.png exists already: choose another, or remove it"):
        run(f"--model tinyllama --gpu h100 --gpus 8 --tokens 1e9 --{name} {path}")
    assert path.read_text() == "mine"


def test_a_config_without_weights_is_planned_by_flags_that_pretrain_understands(tmp_path, capsys):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    shape = ModelArgs(dim=64, n_layers=2, n_heads=4, head_dim=32, max_seq_len=512, rope_scaling=scaling)
    (tmp_path / "of_somebody.json").write_text(json.dumps(config_json.write(shape)))
    run(f"--model {tmp_path / 'of_somebody.json'} --gpu h100")
    words = shlex.split(re.search(r"pretrain\.py (.*)", capsys.readouterr().out)[1])
    assert vars(parse(pretrain.Args, "pretrain", words).model) == vars(shape.replace(vocab_size=ModelArgs().vocab_size))


def test_a_plan_needs_no_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json.write(PUBLISHED["tinyllama"])))
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')")
    for model in ("llama2-7b", str(tmp_path), str(REPOSITORY / "configs/tiny.yaml")):
        command = [sys.executable, str(REPOSITORY / "plan.py"), "--model", model, "--gpu", "h100"]
        env = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0 and "can be trained" in done.stdout, done.stderr


def test_a_step_is_predicted_from_models_of_one_and_of_three_blocks(monkeypatch):
    """With blocks of 0.2 s (and 0.01 for the update) beside 0.5 s (and 0.1), seven of them take 1.9 s (and 0.17)."""

    def step(self: Stepper) -> tuple[float, float]:
        n = len(self.model.model.layers)
        return 0.5 + 0.2 * n, 0.1 + 0.01 * n

    monkeypatch.setattr(Stepper, "step", step)
    shape = ModelArgs(dim=32, n_layers=7, n_heads=2, vocab_size=100)
    found = measure(shape, Step(1, 8, "fp32"), seconds=0.0)
    assert found == pytest.approx((1.9, 0.17)) and found.step(4) == pytest.approx(4 * 1.9 + 0.17)


def test_this_machine_is_measured(capsys):
    flags = "--shape.dim 32 --shape.n_heads 2 --shape.vocab_size 100 --seq_len 16 --rows 2 --tokens 1e6 --measure True"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan.measure, "measure", lambda *shape: measure(*shape, seconds=0.0))
        result = run(flags)
    assert result["tokens_per_second"] == pytest.approx(64 * 16 / result["step_seconds"])  # 64 rows, two at once
    assert "measured here, not compiled" in capsys.readouterr().out


def test_a_picture_of_memory_by_part(tmp_path):
    for number, flags in enumerate(("--gpu_memory 24", "--gpu h100 --gpus 16")):
        path = tmp_path / f"{number}.png"
        result = run(f"--model llama2-7b {flags} --picture {path}")
        assert path.read_bytes()[:4] == b"\x89PNG" and len(result["memory"]) > 5
    with pytest.raises(ValueError, match=r"--picture a\.jpeg should end with \.png, \.svg or \.pdf"):
        run("--model llama2-7b --gpu h100 --picture a.jpeg")
