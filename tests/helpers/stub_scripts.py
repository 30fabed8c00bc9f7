"""A copy of run.sh and setup.sh beside stubs of the Python scripts: nothing is installed or trained."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
STAGES = ["tokenizer", "data", "pretrain", "sft", "eval", "eval", "report", "chat"]  # as calls: eval runs two tasks
SCRIPTS = {
    "train_tokenizer.py": ("tokenizer", "data/tiny/tokenizer"),
    "data_process.py": ("data", "data/tiny/heldout.bin"),
    "pretrain.py": ("pretrain", "out/tiny/pretrain/last"),
    "fine_tuning.py": ("sft", "out/tiny/sft/last"),
    "eval.py": ("eval", None),
    "quantize.py": ("quant", "out/tiny/quant"),
    "report.py": ("report", None),
}
# variables that the shell scripts read; they are removed, so that those of the caller do not matter
SWITCHING = {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHON", "PIP_FIND_LINKS", "UV_FIND_LINKS", "TORCH_ALLOW_PYPI"}
# Writes down its arguments, then does what the file `behave` says for the stage: fail, or wait for a signal and exit.
STUB = """
import json, pathlib, signal, sys, time
behave = json.loads(pathlib.Path("behave").read_text()).get({stage!r})
def end_well(*_):
    pathlib.Path("saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end_well)
signal.signal(signal.SIGINT, end_well)
with open("calls.jsonl", "a") as file:
    print(json.dumps(sys.argv), file=file)
if behave == "fail":
    sys.exit(3)
if behave == "wait":
    time.sleep(20)
if {output!r}:
    pathlib.Path({output!r}).mkdir(parents=True, exist_ok=True)
"""


# the seconds that each stage will take
FORESEEN = """
import pathlib, sys
seconds = {"tokenizer": 30, "data": 12, "eval": 48, "pretrain": 300, "sft": 200}
pathlib.Path(sys.argv[2]).write_text("".join(f"{name} {n}\\n" for name, n in seconds.items()))
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


class StubScripts:
    """A folder with a copy of the shell scripts and stubs of the Python scripts; its name needs quotes in a shell."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a stub's copy"
        (self.root / "configs").mkdir(parents=True)
        for name in ("run.sh", "setup.sh"):
            shutil.copy(REPOSITORY / name, self.root / name)
        for preset in ("tiny", "base"):
            (self.root / f"configs/{preset}.yaml").write_text("pretrain: {}\n")
        (self.root / "planning").mkdir()
        (self.root / "planning/whole_run.py").write_text(FORESEEN)
        (self.root / "requirements.txt").write_text("numpy==1\n")
        self.behave()
        for name, (stage, output) in SCRIPTS.items():
            (self.root / name).write_text(STUB.format(stage=stage, output=output))
        # programs that come first on PATH: no uv, no GPU, and Linux
        for name, text in {"uv": "exit 1", "nvidia-smi": "exit 9", "uname": "echo Linux"}.items():
            program(self.root / "bin" / name, text)
        self.env = {key: value for key, value in os.environ.items() if key not in SWITCHING}
        self.env["PATH"] = f"{self.root / 'bin'}:{os.environ['PATH']}"

    def behave(self, **stages: str) -> None:
        (self.root / "behave").write_text(json.dumps(stages))

    def bash(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        """Run `bash WORDS...` from another folder and without a terminal."""
        command = ["bash", self.root / words[0], *words[1:]]
        return subprocess.run(
            command, cwd="/", env=self.env | env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )

    def start(self, *words: str) -> subprocess.Popen:
        """Start run.sh in a process group of its own; returns when the stage that should wait is waiting."""
        command = ["bash", self.root / "run.sh", *words]
        process = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, text=True, start_new_session=True)
        self.wait_for(lambda: self.calls() and self.calls()[-1][0] == "pretrain.py")
        return process

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)

    def calls(self) -> list[list[str]]:
        path = self.root / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def stages_called(self) -> list[str]:
        """Return the stages whose scripts were called since the last call of this method."""
        names = []
        for script, *arguments in self.calls():
            chat = script == "eval.py" and "--task" not in arguments
            names.append("chat" if chat else SCRIPTS[script][0])
        (self.root / "calls.jsonl").unlink(missing_ok=True)
        return names
