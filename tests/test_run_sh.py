"""run.sh on a copy of the scripts with stubs of the Python scripts: nothing is installed or trained."""

import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.stub_scripts import REPOSITORY, STAGES, StubScripts, program


@pytest.fixture
def stubs(tmp_path: Path) -> StubScripts:
    """For run.sh: set-up has nothing to do, and .venv's Python is this one."""
    stubs = StubScripts(tmp_path)
    program(stubs.root / "setup.sh", "exit 0")
    program(stubs.root / ".venv/bin/python", f'exec {shlex.quote(sys.executable)} -S "$@"')
    return stubs


@pytest.mark.parametrize("script", ["run.sh", "setup.sh", "test.sh", ".ci/run"])
def test_bash_can_parse_the_scripts(script: str) -> None:
    subprocess.run(["bash", "-n", REPOSITORY / script], check=True)


# --- the command line -------------------------------------------------------------------------------------------------


def test_help_names_every_switch_stage_and_preset(stubs: StubScripts) -> None:
    answer = stubs.bash("run.sh", "--help")
    assert answer.returncode == 0
    presets = [path.stem for path in (REPOSITORY / "configs").glob("*.yaml")]
    switches = ["--preset", "--stage", "--use", "--nproc", "--background", "--dry_run", "-- "]
    for word in [*switches, *presets, "ddp", "setup", *STAGES]:
        assert word in answer.stdout
    assert not (stubs.root / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--presett", "tiny"], "--presett"),
        (["tiny"], "--preset, --stage, --minutes, --use"),
        (["--preset", "huge"], "presets are base, tiny"),
        (["--preset", "tin"], "presets are base, tiny"),
        (["--stage", "train"], "stages are all, setup, tokenizer, data, pretrain, sft, eval, chat, quant"),
        (["--use", "zero"], "single, ddp, fsdp or deepspeed, found zero"),
        (["--nnodes", "2"], "--nnodes 2 needs --use ddp, fsdp or deepspeed"),
        (["--use", "fsdp", "--nnodes", "2"], "needs --stage pretrain or sft: the other stages run on one machine"),
        (
            ["--use", "fsdp", "--nnodes", "2", "--stage", "sft"],
            "needs --node_rank 0 to 1, another one on every machine",
        ),
        (["--use=fsdp", "--nnodes=2", "--stage=sft", "--node_rank=2"], "found 2"),
        (["--use=fsdp", "--nnodes=2", "--stage=sft", "--node_rank=1"], "needs --master with the name or address"),
        (["--use=fsdp", "--master=a"], "--node_rank and --master need --nnodes above 1"),
        (["--use=fsdp", "--nnodes=two"], "--nnodes expects a positive number, found two"),
        (["--use=fsdp", "--hostfile=a"], "--hostfile needs --use deepspeed, found fsdp"),
        (["--use=deepspeed", "--hostfile=a"], "--hostfile needs --stage pretrain or sft"),
        (["--use=deepspeed", "--stage=sft", "--hostfile=a", "--nproc=2"], "remove --nproc and --nnodes"),
        (["--use", "ddp", "--nproc", "two"], "positive number, found two"),
        (["--use", "ddp", "--nproc", "0"], "positive number, found 0"),
        (["--use", "ddp", "--nproc", "9999"], "--nproc 9999 is more than the "),
        (["--minutes", "0"], "--minutes expects a whole number of minutes, found 0"),
        (["--minutes", "9", "--stage", "sft"], "for stage sft there is -- --train.max_minutes"),
        (["--nproc", "2"], "--use ddp, fsdp or deepspeed"),
        (["--stage"], "--stage expects a value"),
        (["--", "--train.max_steps", "1"], "--stage"),
    ],
)
def test_misuse_is_one_sentence_and_status_2(stubs: StubScripts, words: list[str], expected: str) -> None:
    answer = stubs.bash("run.sh", *words)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1 and expected in answer.stderr
    assert stubs.calls() == [] and not (stubs.root / "out").exists()


def commands(output: str) -> list[list[str]]:
    """What a dry run prints, as the words that bash would make of it."""
    return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


def test_dry_run_prints_the_commands_and_does_nothing(stubs: StubScripts) -> None:
    answer = stubs.bash("run.sh", "--dry_run", "--preset=base")
    assert answer.returncode == 0, answer.stderr
    config = ["--config", "configs/base.yaml"]
    py = ".venv/bin/python"
    assert commands(answer.stdout) == [
        ["bash", "setup.sh"],
        [py, "train_tokenizer.py", *config],
        [py, "data_process.py", *config],
        [py, "pretrain.py", *config, "--train.backend", "single"],
        [py, "fine_tuning.py", *config, "--train.backend", "single"],
        [py, "eval.py", *config, "--task", "loss"],
        [py, "eval.py", *config, "--task", "poems"],
        [py, "report.py", "out/base", "--out", "out/base/report.html"],
        [py, "eval.py", *config, "--demo", "true"],
    ]
    assert stubs.calls() == [] and not (stubs.root / "out").exists()


def test_processes_are_started_by_torchrun(stubs: StubScripts) -> None:
    answer = stubs.bash(
        "run.sh", "--dry_run", "--stage", "pretrain", "--use", "ddp", "--nproc", "2", "--", "--note", "a b"
    )
    _, words, report = commands(answer.stdout)
    assert report[1] == "report.py"
    assert words[0] == "env" and words[1].startswith("OMP_NUM_THREADS=") and int(words[1].partition("=")[2]) >= 1
    launcher = [".venv/bin/python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = ["pretrain.py", "--config", "configs/tiny.yaml", "--train.backend", "ddp", "--note", "a b"]
    assert words[2:] == launcher + script


def test_deepspeed_is_installed_by_the_switch_and_trains_with_adamw(stubs: StubScripts) -> None:
    answer = stubs.bash("run.sh", "--dry_run", "--use", "deepspeed", "--nproc", "2")
    found = commands(answer.stdout)
    (tuning,) = [words for words in found if "fine_tuning.py" in words]
    assert found[0] == ["bash", "setup.sh", "--extra", "deepspeed"]
    assert tuning[-4:] == ["--train.backend", "deepspeed", "--optim.optimizer", "adamw"]


def test_a_machine_among_several_is_told_its_number_and_the_first_one(stubs: StubScripts) -> None:
    words = ["--stage", "sft", "--use", "fsdp", "--nproc", "4", "--nnodes", "2", "--node_rank", "1", "--master", "a.b"]
    command = commands(stubs.bash("run.sh", "--dry_run", *words).stdout)[1]
    nodes = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "a.b", "--master_port", "29500"]
    assert command[5:] == [*nodes, "--nproc_per_node", "4", *FINE_TUNING, "fsdp"]
    again = stubs.bash("run.sh", "--dry_run", "--background", *words).stdout
    assert "--nnodes 2 --node_rank 1 --master a.b" in again


def test_a_hostfile_goes_to_the_launcher_of_deepspeed(stubs: StubScripts) -> None:
    (stubs.root / "hosts").write_text("# two machines\r\n\nnode0 slots=8\r\nnode1   slots=8")
    words = ["--stage", "sft", "--use", "deepspeed", "--hostfile", "hosts"]
    command = commands(stubs.bash("run.sh", "--dry_run", *words).stdout)[1]
    assert command[:3] == [".venv/bin/deepspeed", "--hostfile", "hosts"]
    assert command[3:] == [*FINE_TUNING, "deepspeed", "--optim.optimizer", "adamw"]
    assert "--hostfile hosts" in stubs.bash("run.sh", "--dry_run", "--background", *words).stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "--hostfile hosts: no such file"),
        ("# nothing\n", "--hostfile hosts names no machine: expected lines HOST slots=N"),
        ("node0 slots=8\nnode1", "--hostfile hosts, line 2: expected HOST slots=N, found node1"),
        ("node0 slots=0", "line 1: expected HOST slots=N, found node0 slots=0"),
        ("node0 slots=8 extra", "line 1: expected HOST slots=N, found node0 slots=8 extra"),
        ("node0 slots=8\n\nnode0 slots=4", "line 3: node0 is named twice"),
    ],
)
def test_a_wrong_hostfile_is_one_sentence(stubs: StubScripts, text: str | None, expected: str) -> None:
    if text is not None:
        (stubs.root / "hosts").write_text(text)
    answer = stubs.bash("run.sh", "--use", "deepspeed", "--stage", "pretrain", "--hostfile", "hosts")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1 and expected in answer.stderr


FINE_TUNING = ["fine_tuning.py", "--config", "configs/tiny.yaml", "--train.backend"]


@pytest.mark.parametrize(
    ("gpus", "env", "nproc"),
    [
        (0, {}, "2"),
        (4, {}, "4"),
        (4, {"CUDA_VISIBLE_DEVICES": "0,2,3"}, "3"),
        (4, {"CUDA_VISIBLE_DEVICES": ""}, "2"),
        (4, {"CUDA_VISIBLE_DEVICES": "-1"}, "2"),
    ],
)
def test_processes_default_to_the_gpus(stubs: StubScripts, gpus: int, env: dict[str, str], nproc: str) -> None:
    lines = "".join(f"echo 'GPU {i}: NVIDIA (UUID: GPU-{i})'\n" for i in range(gpus))
    program(stubs.root / "bin/nvidia-smi", lines or "exit 9")
    answer = stubs.bash("run.sh", "--dry_run", "--stage", "sft", "--use", "ddp", OMP_NUM_THREADS="5", **env)
    words = commands(answer.stdout)[-2]
    assert words[words.index("--nproc_per_node") + 1] == nproc
    assert words[1] == "OMP_NUM_THREADS=5"


def test_arguments_reach_the_script_unchanged(stubs: StubScripts) -> None:
    words = ["--a", "b c", "*", "it's", "", "$HOME", "--stage", "\\n", "写诗"]
    answer = stubs.bash("run.sh", "--stage", "pretrain", "--", *words)
    assert answer.returncode == 0, answer.stderr
    call, _ = stubs.calls()
    assert call == ["pretrain.py", "--config", "configs/tiny.yaml", "--train.backend", "single", *words]


def test_scripts_speak_utf8_whatever_the_locale(stubs: StubScripts) -> None:
    (stubs.root / "eval.py").write_text("import sys; print(sys.flags.utf8_mode, '写诗')")
    answer = stubs.bash("run.sh", "--stage", "chat", LC_ALL="C", LANG="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert answer.stdout.splitlines()[-1] == "1 写诗", answer.stderr


def test_chat_takes_arguments_instead_of_the_demo(stubs: StubScripts) -> None:
    stubs.bash("run.sh", "--stage", "chat", "--", "--prompt", "a b")
    assert stubs.calls() == [["eval.py", "--config", "configs/tiny.yaml", "--prompt", "a b"]]


# --- stages, and what is skipped --------------------------------------------------------------------------------------


def test_a_whole_run_ends_in_the_chat_and_a_second_one_only_chats(stubs: StubScripts) -> None:
    first = stubs.bash("run.sh")
    assert first.returncode == 0, first.stderr
    assert stubs.calls()[-1] == ["eval.py", "--config", "configs/tiny.yaml", "--demo", "true"]
    assert stubs.stages_called() == STAGES
    assert "total" in first.stdout and "out/tiny/times.tsv" in first.stdout
    second = stubs.bash("run.sh")
    assert second.returncode == 0 and stubs.stages_called() == ["report", "chat"]
    assert second.stdout.count("done earlier") == 5
    assert "# == pretrain: done earlier" in stubs.bash("run.sh", "--dry_run").stdout


def test_the_time_that_is_left_is_told_at_every_stage(stubs: StubScripts) -> None:
    answer = stubs.bash("run.sh")
    heads = [line.partition(": ")[::2] for line in answer.stdout.splitlines() if line.startswith("== ")]
    left = {name.split()[1]: told for name, told in heads}
    # pretraining took no time, unlike the 300 seconds that were foreseen, so neither will fine-tuning
    assert left.pop("sft").removeprefix("about ").partition(" left")[0] in ("48 s", "49 s", "50 s", "4 min")
    # 30 + 12 + 300 + 200 + 48 seconds in all
    seconds = {"tokenizer": "10 min", "data": "9 min", "pretrain": "9 min", "eval": "48 s"}
    assert left == {"setup": ""} | {name: f"about {told} left of all stages" for name, told in seconds.items()}
    again = stubs.bash("run.sh").stdout  # nothing is left
    assert "whole_run" not in again and "about" not in again
    (stubs.root / "planning/whole_run.py").write_text("raise SystemExit(1)")  # a run does not fail by it
    shutil.rmtree(stubs.root / "out/tiny/pretrain")
    answer = stubs.bash("run.sh")
    assert answer.returncode == 0 and "about" not in answer.stdout


def test_minutes_are_divided_between_both_trainings(stubs: StubScripts) -> None:
    answer = stubs.bash("run.sh", "--minutes", "6")
    assert "about 6 min left of all stages" in answer.stdout
    flag = "--train.max_minutes"
    limits = {call[0]: call[call.index(flag) + 1] for call in stubs.calls() if flag in call}
    rows = [line.split("\t") for line in (stubs.root / "out/tiny/times.tsv").read_text().splitlines()]
    took = dict.fromkeys(STAGES, 0) | {name: int(seconds) for name, seconds, *_ in rows}
    # 360 seconds less 48 of the evaluation and 10 around each training, and what the other stages took
    left = 360 - 48 - 20 - took["tokenizer"] - took["data"]
    assert float(limits["pretrain.py"]) == pytest.approx(left * 300 / 500 / 60, abs=0.03)
    assert float(limits["fine_tuning.py"]) == pytest.approx((left - took["pretrain"] + 10) / 60, abs=0.03)
    answer = stubs.bash("run.sh", "--preset", "base", "--minutes", "2")
    assert answer.returncode == 1 and "--minutes 2 is too short: what is no training takes 90 s" in answer.stderr
    assert "--minutes 6" in stubs.bash("run.sh", "--dry_run", "--background", "--minutes", "6").stdout


def test_the_model_is_made_in_4_bits_and_chats(stubs: StubScripts) -> None:
    config = ["--config", "configs/tiny.yaml"]
    for _ in range(2):  # a named stage runs again
        answer = stubs.bash("run.sh", "--stage", "quant", "--", "--bits", "3")
        assert answer.returncode == 0, answer.stderr
        made, _, chat = stubs.calls()[-3:]
        assert made == ["quantize.py", *config, "--bits", "3"]
        assert chat == ["eval.py", *config, "--model", "out/tiny/quant", "--demo", "true"]
    stubs.behave(quant="fail")
    answer = stubs.bash("run.sh", "--stage", "quant")
    assert answer.returncode == 3 and "stage quant ended with status 3" in answer.stderr
    assert stubs.calls()[-1][0] == "quantize.py"


def test_on_a_terminal_the_chat_is_interactive(stubs: StubScripts) -> None:
    stubs.bash("run.sh")
    stubs.stages_called()
    ours, theirs = pty.openpty()
    subprocess.run(["bash", stubs.root / "run.sh"], env=stubs.env, stdin=theirs, stdout=theirs, check=True, timeout=60)
    os.close(theirs)
    os.close(ours)
    assert stubs.calls()[1:] == [["eval.py", "--config", "configs/tiny.yaml"]]


def test_a_changed_config_calls_every_stage_again(stubs: StubScripts) -> None:
    stubs.bash("run.sh")
    stubs.stages_called()
    (stubs.root / "configs/tiny.yaml").write_text("pretrain: {seed: 1}\n")
    stubs.bash("run.sh")
    assert stubs.stages_called() == STAGES


def test_a_report_is_written_and_named_and_no_run_fails_by_it(stubs: StubScripts) -> None:
    answer = stubs.bash("run.sh", "--stage", "sft")
    assert answer.stdout.splitlines()[-1] == "report of all stages, a page for your browser: out/tiny/report.html"
    assert stubs.calls()[-1] == ["report.py", "out/tiny", "--out", "out/tiny/report.html"]
    stubs.behave(report="fail")
    answer = stubs.bash("run.sh", "--stage", "sft")
    assert answer.returncode == 0 and "no report was written" in answer.stderr
    stubs.stages_called()
    stubs.bash("run.sh", "--stage", "data")  # which trains nothing
    assert stubs.stages_called() == ["data"]


def test_a_removed_output_calls_its_stage_and_what_follows(stubs: StubScripts) -> None:
    stubs.bash("run.sh")
    stubs.stages_called()
    shutil.rmtree(stubs.root / "out/tiny/pretrain")
    stubs.bash("run.sh")
    assert stubs.stages_called() == STAGES[2:]


def test_a_stage_asked_for_by_name_runs_alone_though_it_is_done(stubs: StubScripts) -> None:
    stubs.bash("run.sh")
    stubs.stages_called()
    stubs.bash("run.sh", "--stage", "eval")
    assert stubs.stages_called() == ["eval", "eval", "report"]
    # with arguments of its own the result is not the preset's, so a whole run looks at it and at what follows again
    stubs.bash("run.sh", "--stage", "sft", "--", "--train.max_steps", "1")
    stubs.stages_called()
    stubs.bash("run.sh")
    assert stubs.stages_called()[:1] == ["sft"]


def test_a_failed_stage_stops_the_run_and_the_next_goes_on_there(stubs: StubScripts) -> None:
    stubs.behave(pretrain="fail")
    answer = stubs.bash("run.sh")
    assert answer.returncode == 3
    assert answer.stderr.splitlines()[-1].startswith("error: stage pretrain ended with status 3")
    assert stubs.stages_called() == STAGES[:3]
    stubs.behave()
    assert stubs.bash("run.sh").returncode == 0
    assert stubs.stages_called() == STAGES[2:]


# --- signals, locks, background ---------------------------------------------------------------------------------------


def test_sigterm_reaches_the_script_and_the_next_call_goes_on(stubs: StubScripts) -> None:
    stubs.behave(pretrain="wait")
    process = stubs.start()
    time.sleep(1.1)  # so that it leaves a row in times.tsv
    process.send_signal(signal.SIGTERM)  # to bash alone
    assert process.wait(30) == 143
    assert (stubs.root / "saved").exists()
    assert not (stubs.root / "out/tiny/.lock").exists()
    stubs.stages_called()
    stubs.behave()
    assert "pretrain" in stubs.bash("run.sh").stdout
    assert stubs.stages_called() == STAGES[2:]
    rows = [line.split("\t") for line in (stubs.root / "out/tiny/times.tsv").read_text().splitlines()]
    rows = [row for row in rows if row[0] == "pretrain"]
    assert rows[0][2] == "143" and int(rows[0][1]) >= 1
    table = stubs.bash("run.sh").stdout.partition("seconds\n")[2].splitlines()
    assert table[3].split() == ["pretrain", str(sum(int(row[1]) for row in rows))]  # both calls count


def test_ctrl_c_stops_the_run_even_if_the_script_ends_well(stubs: StubScripts) -> None:
    stubs.behave(pretrain="wait")
    process = stubs.start()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(30) == 130
    stubs.stages_called()
    stubs.behave()
    stubs.bash("run.sh")
    assert stubs.stages_called() == STAGES[2:]


def test_two_runs_do_not_write_to_the_same_folders(stubs: StubScripts) -> None:
    stubs.behave(pretrain="wait")
    process = stubs.start()
    for words in (["--background"], ["--stage", "data"], []):
        answer = stubs.bash("run.sh", *words)
        assert answer.returncode == 1 and f"process {process.pid} is running preset tiny" in answer.stderr
    process.send_signal(signal.SIGKILL)  # its lock stays behind
    process.wait(30)
    os.killpg(process.pid, signal.SIGKILL)
    assert (stubs.root / "out/tiny/.lock").exists()
    stubs.behave()
    assert stubs.bash("run.sh").returncode == 0


def test_a_second_background_run_is_refused_at_once(stubs: StubScripts) -> None:
    stubs.behave(pretrain="wait")
    first = stubs.bash("run.sh", "--background", "--stage", "pretrain")
    pid = first.stdout.split()[3]
    second = stubs.bash("run.sh", "--background", "--stage", "pretrain")
    assert second.returncode == 1 and f"process {pid} is running" in second.stderr
    stubs.wait_for(lambda: stubs.calls())
    os.kill(int(pid), signal.SIGTERM)
    stubs.wait_for(lambda: not (stubs.root / "out/tiny/.lock").exists())


def test_background_run_logs_and_says_how_to_follow_it(stubs: StubScripts) -> None:
    answer = stubs.bash("run.sh", "--background", "--stage", "sft", "--", "--note", "a b")
    assert answer.returncode == 0 and "tail -f out/tiny/run.log" in answer.stdout and "kill " in answer.stdout
    stubs.wait_for(lambda: (stubs.root / "out/tiny/sft/last").exists())
    assert stubs.calls()[0][-2:] == ["--note", "a b"]
    stubs.wait_for(lambda: not (stubs.root / "out/tiny/.lock").exists())
    assert "== sft (preset tiny)" in (stubs.root / "out/tiny/run.log").read_text()
