"""setup.sh with an interpreter that only notes what it is asked to install."""

import re
import shutil
from pathlib import Path

import pytest
from helpers.stub_scripts import REPOSITORY, StubScripts, program

from cli.extras import need

# Notes what it is asked to install; fails where the file `refuse` holds a part of it; leaves torch's folder behind.
FAKE_PYTHON = """
case "$*" in
  *"import platform, torch"*) echo installed ;;
  *"import platform"*) echo 3.12.3 ;;
  "-m pip install"*)
    shift 3
    echo "$*" >>installs
    if grep -qFf refuse <<<"$*"; then echo "ERROR: refused" >&2; exit 1; fi
    if [[ "$*" == *torch==2.13.0+cpu ]]; then mkdir -p .venv/lib/python3.12/site-packages/torch-2.13.0+cpu.dist-info; fi
    ;;
esac
"""
FROM_FOLDER = "--no-deps --no-index torch==2.13.0+cpu"
FROM_INDEX = "--no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
FROM_PYPI = "-c requirements.txt torch==2.13.0,!=2.13.0+cpu"
PINS = "-r requirements.txt"
EXTRAS = ["bench", "bnb", "deepspeed", "dev", "eval", "gguf", "serve", "swanlab", "transformers", "wandb"]


class SetUp(StubScripts):
    """setup.sh itself, with an interpreter in .venv that only notes what it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        program(self.root / ".venv/bin/python", FAKE_PYTHON)
        for name in EXTRAS:
            (self.root / f"requirements-{name}.txt").write_text(f"{name}==1\n")
        self.refuse()

    def refuse(self, *parts: str) -> None:
        (self.root / "refuse").write_text("".join(f"{part}\n" for part in parts))

    def installs(self, *words: str, status: int = 0, **env: str) -> list[str]:
        """What one call of setup.sh installs."""
        (self.root / "installs").unlink(missing_ok=True)
        self.answer = self.bash("setup.sh", *words, **env)
        assert self.answer.returncode == status, self.answer.stderr
        return (self.root / "installs").read_text().splitlines() if (self.root / "installs").exists() else []


@pytest.fixture
def set_up(tmp_path: Path) -> SetUp:
    return SetUp(tmp_path)


def test_setup_installs_torch_first_and_a_second_time_nothing(set_up: SetUp) -> None:
    assert set_up.installs() == [FROM_FOLDER, PINS]
    assert set_up.installs() == []
    (set_up.root / "requirements.txt").write_text("numpy==2\n")
    assert set_up.installs("--dev") == [PINS, "-r requirements-dev.txt"]
    assert set_up.installs("--dev") == []


def test_setup_looks_for_the_cpu_build_in_order_and_takes_cuda_only_when_allowed(set_up: SetUp) -> None:
    set_up.refuse("--no-index")
    assert set_up.installs() == [FROM_FOLDER, FROM_INDEX, PINS]
    shutil.rmtree(set_up.root / ".venv/lib")
    (set_up.root / ".venv/installed-requirements.txt").unlink()
    set_up.refuse("--no-index", "--index-url")
    assert set_up.installs(status=1) == [FROM_FOLDER, FROM_INDEX]
    assert "TORCH_ALLOW_PYPI=1" in set_up.answer.stderr.splitlines()[-1]
    assert set_up.installs(TORCH_ALLOW_PYPI="1") == [FROM_FOLDER, FROM_INDEX, FROM_PYPI, PINS]


def test_setup_takes_the_ordinary_build_where_a_driver_works(set_up: SetUp) -> None:
    assert set_up.installs() == [FROM_FOLDER, PINS]
    program(set_up.root / "bin/nvidia-smi", "echo 'GPU 0: NVIDIA'")
    assert set_up.installs() == [FROM_PYPI, PINS]  # the CPU build of before is replaced


def test_setup_prefers_uv_and_tells_it_of_pips_folders(set_up: SetUp) -> None:
    program(set_up.root / "bin/uv", '[ "$1" = --version ] || echo "uv $* $UV_FIND_LINKS" >>installs')
    expected = [f"uv pip install --python .venv/bin/python {words} /a,/b" for words in (FROM_FOLDER, PINS)]
    assert set_up.installs(PIP_FIND_LINKS="/a /b") == expected
    shutil.rmtree(set_up.root / ".venv")
    program(set_up.root / ".venv/bin/python", FAKE_PYTHON)
    program(set_up.root / "bin/uv", '[ "$1" = --version ]')
    assert set_up.installs() == [FROM_FOLDER, PINS]  # uv fails, pip does it


def test_setup_says_what_could_not_be_installed_and_tries_it_again(set_up: SetUp) -> None:
    set_up.refuse("-r requirements.txt")
    set_up.installs(status=1)
    assert set_up.answer.stderr.splitlines()[-1].startswith("error: requirements.txt could not be installed")
    set_up.refuse()
    assert set_up.installs() == [PINS]


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        ('[ "$1" != --version ] || { echo Python 3.8.2; exit 0; }; exit 1', "expected Python 3.10 or newer, found"),
        ('case "$2" in *venv*) exit 1 ;; *executable*) echo "$0" ;; esac', "has no venv module"),
    ],
)
def test_setup_refuses_an_interpreter_that_will_not_do(set_up: SetUp, python: str, expected: str) -> None:
    shutil.rmtree(set_up.root / ".venv")
    program(set_up.root / "bin/python3.99", python)
    assert set_up.installs(status=1, PYTHON="python3.99") == []
    assert expected in set_up.answer.stderr and "python3.99" in set_up.answer.stderr
    assert set_up.answer.stderr.startswith("error: ") and set_up.answer.stderr.count("\n") == 1


def test_an_extra_is_installed_once_and_torch_stays(set_up: SetUp) -> None:
    assert set_up.installs("--extra", "serve") == [FROM_FOLDER, PINS, "-r requirements-serve.txt"]
    shutil.rmtree(set_up.root / ".venv/lib")  # as if another torch had been installed by hand
    assert set_up.installs("--extra", "eval", "--extra", "serve") == ["-r requirements-eval.txt"]
    assert set_up.installs("--extra", "dev") == ["-r requirements-dev.txt"]
    assert set_up.installs("--dev") == []


def test_the_pinned_protobuf_comes_back_after_swanlab(set_up: SetUp) -> None:
    set_up.installs()
    assert set_up.installs("--extra", "swanlab") == ["-r requirements-swanlab.txt", PINS]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--extra", "server"],
            "expects bench, bnb, data, deepspeed, dev, eval, gguf, serve, swanlab, transformers or wandb, found server",
        ),
        (["--extra", "autogptq"], "found autogptq"),
        (["--extra"], "found nothing"),
        (["--extra", "bnb", "serve"], "setup.sh expects --extra NAME, --dev or no argument, found serve"),
    ],
)
def test_a_wrong_argument_makes_and_removes_nothing(set_up: SetUp, words: list[str], expected: str) -> None:
    program(set_up.root / ".venv/bin/python", "exit 1")  # an interpreter that setup.sh would replace
    before = sorted(set_up.root.rglob("*"))
    assert set_up.installs(*words, status=1) == [] and sorted(set_up.root.rglob("*")) == before
    assert set_up.answer.stderr.rstrip().endswith(expected) and set_up.answer.stderr.count("\n") == 1
    shutil.rmtree(set_up.root / ".venv")
    assert set_up.installs(*words, status=1) == [] and not (set_up.root / ".venv").exists()


def pins(*names: str) -> dict[str, set[str]]:
    """Return the versions of each package in files of pins."""
    found: dict[str, set[str]] = {}
    for line in "\n".join((REPOSITORY / name).read_text() for name in names).splitlines():
        if "==" in line and not line.startswith("#"):
            package, version = line.split(" ;")[0].split("==")
            found.setdefault(package, set()).add(version)
    return found


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_pins_of_an_extra_are_those_of_the_tests_and_hold_what_pyproject_names(extra: str) -> None:
    assert extra in (REPOSITORY / "setup.sh").read_text().split("# A second call")[0]
    own, tested = pins(f"requirements-{extra}.txt"), pins("requirements.txt", "requirements-dev.txt")
    assert all(own[name] <= tested[name] for name in own.keys() & tested.keys())
    (line,) = re.findall(rf"^{extra} = \[(.*)\]", (REPOSITORY / "pyproject.toml").read_text(), re.M)
    assert {re.split("[>=]", name)[0] for name in re.findall('"(.*?)"', line)} <= own.keys()
    assert not any(re.match(r"torch|nvidia|triton", name) for name in own)


def test_a_script_names_the_command_that_installs_what_it_misses() -> None:
    need("x.py", "serve", "json")
    with pytest.raises(SystemExit) as stop:
        need("x.py", "serve", "json", "no_such_package", "no_other")
    assert stop.value.code == (
        "error: x.py needs no_such_package and no_other, which are not installed: bash setup.sh --extra serve "
        "(outside .venv: pip install -r requirements-serve.txt)"
    )
