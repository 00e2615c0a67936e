"""Which hosts are there, how are they started, and what can be expected of them?

Knows: the command lines of servers.  Does not know: processes, circuits, pytest.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

_UWSGI = Path(sysconfig.get_path("scripts")) / "uwsgi"


@dataclass(frozen=True)
class Kind:
    """One way to run an application.

    Attributes:
        name: Of this way, for test ids.
        command: Program and arguments; ``{socket}`` is where to listen, ``{node}`` is unique, ``{directory}`` is
            the test's own.
        recycle: Further arguments, with which a worker ends after some requests.
        needs: Modules that must be there, and paths of programs.
        workers: Processes that answer, all nodes together.
        nodes: How often the command is run.
        preloads: Whether the application is loaded in the master, and then forked.
        forks: Whether workers are children of a master; else the node itself answers.
        hears: Whether threads in the background run while no request does.
        reloads: Whether SIGHUP replaces the workers.
        ends_within: Seconds after SIGTERM by which it must have ended.
    """

    name: str
    command: tuple[str, ...]
    recycle: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    workers: int = 3
    nodes: int = 1
    preloads: bool = True
    forks: bool = True
    hears: bool = True
    reloads: bool = False
    ends_within: float = 5.0

    @property
    def by_broker(self) -> bool:
        """Whether requests are tasks; else they are HTTP."""
        return "celery" in self.needs

    def missing(self) -> list[str]:
        """What is not installed of what it needs."""
        return [need for need in self.needs if not (_is_program(need) or importlib.util.find_spec(need))]


def _is_program(name: str) -> bool:
    return Path(name).is_absolute() and Path(name).exists()


def _gunicorn(name: str, worker_class: str, *arguments: str) -> Kind:
    return Kind(
        f"gunicorn-{name}",
        (
            *(sys.executable, "-m", "gunicorn", "tests.contrib.hosts.app:application", "--bind", "unix:{socket}"),
            # A thread of the master serves that socket.
            *("--no-control-socket", "--workers", "3", "--worker-class", worker_class, *arguments),
        ),
        recycle=("--max-requests", "120"),
        needs=("gunicorn", "gevent") if worker_class == "gevent" else ("gunicorn",),
        preloads="--preload" in arguments,
        reloads=True,
    )


def _uwsgi(name: str, *arguments: str) -> Kind:
    return Kind(
        name,
        (
            *(str(_UWSGI), "--master", "--processes", "3", "--http-socket", "{socket}", "--need-app"),
            *("--module", "tests.contrib.hosts.app:application", "--home", sys.prefix),
            # To reload is to execute this anew; pyuwsgi would execute a Python outside of the virtual environment.
            *("--binary-path", str(_UWSGI)),
            *("--die-on-term", "--no-orphans", *arguments),
        ),
        # Else a worker lives for a minute at least.
        recycle=("--max-requests", "120", "--min-worker-lifetime", "1"),
        needs=(str(_UWSGI),),
        preloads="--lazy-apps" not in arguments,
        hears="--enable-threads" in arguments,
        reloads=True,
    )


def _celery(
    pool: str, concurrency: int, *, recycle: tuple[str, ...] = (), ends_within: float = 5.0, **expected: int
) -> Kind:
    return Kind(
        f"celery-{pool}",
        (
            *(
                sys.executable,
                "-m",
                "celery",
                "--app",
                "tests.contrib.hosts.tasks",
                "worker",
                "--hostname",
                "{node}@%h",
            ),
            *("--pool", pool, "--concurrency", str(concurrency)),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        ),
        recycle=recycle,
        needs=("celery",),
        ends_within=ends_within,
        **expected,
    )


#: Every one of them.
KINDS = (
    _gunicorn("sync", "sync"),
    _gunicorn("sync-preload", "sync", "--preload"),
    _gunicorn("gthread", "gthread", "--threads", "4"),
    _gunicorn("gthread-preload", "gthread", "--threads", "4", "--preload"),
    _gunicorn("gevent", "gevent"),
    # The application is loaded before gevent replaces threads and locks ...
    _gunicorn("gevent-preload", "gevent", "--preload"),
    # ... and after.
    _gunicorn("gevent-first-preload", "gevent", "--preload", "--config", "python:tests.contrib.hosts.gevent_first"),
    # uWSGI loads the application in the master unless it is told to be lazy.
    _uwsgi("uwsgi"),
    _uwsgi("uwsgi-threads", "--enable-threads"),
    _uwsgi("uwsgi-lazy", "--lazy-apps"),
    _uwsgi("uwsgi-lazy-threads", "--lazy-apps", "--enable-threads", "--threads", "2"),
    # A child of billiard's pool may wait up to 30 s for its parent to take note of the last task, whatever it runs.
    _celery("prefork", 4, workers=4, recycle=("--max-tasks-per-child", "40"), ends_within=45.0),
    # Threads of one process share a breaker: it takes two to be a fleet.
    _celery("threads", 4, workers=2, nodes=2, preloads=False, forks=False),
)
