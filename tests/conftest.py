"""Fixtures of the whole suite."""

import os
import signal
from pathlib import Path

import pytest
import setuptools  # noqa: F401  (torch.compile wants its distutils; whoever imports the old one first breaks that)
import torch
from helpers.miniature import Miniature, build

pytest_plugins = ["helpers.page", "helpers.tokenizer_corpus", "helpers.vocabularies"]

# What a shell starts in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed_and_threads() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder of real corpora, tokenizers and checkpoints beside the checkout; tests that want it skip without it."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return path


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For processes that a test starts: one thread each, the repository importable."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{Path(__file__).parents[1]}:{Path(__file__).parent}")
    if env.pop("PYTHONDONTWRITEBYTECODE", None):  # else each would spend seconds on compiling torch's modules
        env["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("pycache"))
    return env


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    """The whole pipeline on made-up texts, gone through once, in seconds."""
    return build(tmp_path_factory.mktemp("miniature"))
