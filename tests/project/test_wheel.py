"""The distribution, tested without the source tree, as the shell commands of the documentation install it.

The tests need only pytest and build.  The server comes with what is installed from the wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

from tests.support.pages import PAGES, blocks, write_files
from tests.support.paths import ROOT

pytestmark = pytest.mark.wheel

SMOKE = """
import importlib.resources, pathlib, sys
import pybreaker
import pybreaker_redis
from pybreaker_redis.testing.binaries import find_servers
from pybreaker_redis.testing.servers import PrivateServer

assert pathlib.Path(sys.prefix) in pathlib.Path(pybreaker_redis.__file__).parents, pybreaker_redis.__file__
assert (importlib.resources.files("pybreaker_redis") / "py.typed").is_file()

def fail():
    raise ConnectionError

with PrivateServer(find_servers()[0].binary) as server:
    client = server.client()
    breakers = [
        pybreaker.CircuitBreaker(
            fail_max=2,
            throw_new_error_on_trip=False,
            state_storage=pybreaker_redis.CircuitRedisStorage("closed", client, namespace="smoke"),
        )
        for _ in range(2)
    ]
    for breaker in breakers:
        try:
            breaker.call(fail)
        except ConnectionError:
            pass
    assert [breaker.current_state for breaker in breakers] == ["open", "open"]
    calls = client.info("commandstats")
    assert "cmdstat_evalsha" in calls, calls  # the scripts were found
    client.close()
print("smoke passed")
"""


#: Start a server, print its URL, and end with the standard input.
SERVE = """
import sys
from pybreaker_redis.testing.binaries import find_servers
from pybreaker_redis.testing.servers import PrivateServer

with PrivateServer(find_servers()[0].binary) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""

#: Most seconds that the shell commands of a page take, most of them for downloads.
LONGEST_S = 600


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist of this tree, and the wheel that is built from that sdist."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", directory, ROOT)
    (sdist,), (wheel,) = directory.glob("*.tar.gz"), directory.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="module")
def installed(distributions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a virtual environment with the wheel and its ``demo`` extra."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{distributions['wheel']}[demo]")
    return python


@pytest.fixture(scope="module")
def redis_url(installed: Path) -> Iterator[str]:
    """URL of a server of this module."""
    command = [str(installed), "-c", SERVE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        yield server.stdout.readline().strip()
        # The end of the context closes the standard input, and waits for the server.


def run(*command: object, cwd: Path | None = None, **variables: str) -> str:
    """Run a command that must succeed, without access to this tree, and return its output.

    Args:
        command: Program and arguments.
        cwd: Directory in which the command runs.
        variables: Further environment variables.
    """
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYBREAKER_REDIS_URL")
    }
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment, **variables},
        check=False,
        timeout=LONGEST_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_of_the_package_is_in_both_distributions(distributions: dict[str, Path]):
    """Both distributions contain every file of the package."""
    package = ROOT / "pybreaker_redis"
    expected = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.suffix in (".py", ".lua") or path.name == "py.typed"
    }
    assert any(name.endswith(".lua") for name in expected)
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        assert {name for name in wheel.namelist() if name.startswith("pybreaker_redis/")} == expected
    with tarfile.open(distributions["sdist"]) as sdist:
        assert expected <= {name.partition("/")[2] for name in sdist.getnames()}


def test_metadata_states_licence_and_dependencies(distributions: dict[str, Path]):
    """The metadata states the licence, and the dependencies without extras."""
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert not [line for line in metadata.get_all("Classifier", []) if line.startswith("License")]
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(required) == ["pybreaker<2,>=1.4", "redis>=3.5.3"]
    assert metadata.get_payload()


def test_installed_wheel_guards_calls_away_from_the_tree(installed: Path, tmp_path: Path):
    """Two breakers share a circuit through the scripts of the wheel."""
    assert run(installed, "-W", "error", "-c", SMOKE, cwd=tmp_path) == "smoke passed\n"


def test_installed_demo_runs(installed: Path, tmp_path: Path):
    """The demo needs only the wheel and its extra."""
    output = run(installed, "-m", "pybreaker_redis", "demo", "--plain", "--seconds", "2", cwd=tmp_path)
    assert "Everything happened as promised." in output


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks("sh", page))])
def test_shell_commands_of_a_page_work(
    distributions: dict[str, Path], redis_url: str, tmp_path: Path, page: str
) -> None:
    """A reader copies the commands of a page in their order, beside the files that the page shows."""
    environment, directory = tmp_path / "venv", tmp_path / "shop"
    venv.create(environment, with_pip=True)
    (directory / "dist").mkdir(parents=True)
    shutil.copy(distributions["wheel"], directory / "dist")
    write_files(page, directory)
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # The commands of a page are one script, so that a variable that they set stays set.
    script = "\n".join(source for _, source in blocks("sh", page))
    run("bash", "-e", "-c", script, cwd=directory, PATH=path, REDIS_URL=redis_url, VIRTUAL_ENV=str(environment))
