"""Kinds of hosts, with their commands and properties."""

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
        name: Name for test ids.
        command: Program and arguments.  ``{socket}`` is the address, ``{node}`` is unique, ``{directory}`` belongs to
            the test.
        recycle: Further arguments that end a worker after some requests.
        needs: Required modules, and paths of programs.
        workers: Number of answering processes of all nodes.
        nodes: Number of times that the command runs.
        preloads: Whether the application is loaded in the master, which then forks.
        forks: Whether workers are children of a master.  Otherwise the node itself answers.
        has_background_threads: Whether threads run between requests.
        reloads: Whether SIGHUP replaces the workers.
        ends_within: Seconds after SIGTERM by which the node must have ended.
    """

    name: str
    command: tuple[str, ...]
    recycle: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    workers: int = 3
    nodes: int = 1
    preloads: bool = True
    forks: bool = True
    has_background_threads: bool = True
    reloads: bool = False
    ends_within: float = 5.0

    @property
    def by_broker(self) -> bool:
        """Whether requests are tasks instead of HTTP."""
        return "celery" in self.needs

    def missing(self) -> list[str]:
        """Return the missing ones of the required modules and programs."""
        return [need for need in self.needs if not (_is_program(need) or importlib.util.find_spec(need))]


def _is_program(name: str) -> bool:
    return Path(name).is_absolute() and Path(name).exists()


def _gunicorn(name: str, worker_class: str, *arguments: str) -> Kind:
    return Kind(
        f"gunicorn-{name}",
        (
            *(sys.executable, "-m", "gunicorn", "tests.contrib.hosts.app:application", "--bind", "unix:{socket}"),
            # A thread of the master would serve the control socket.
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
            # A reload executes this path.  pyuwsgi would execute a Python outside of the virtual environment.
            *("--binary-path", str(_UWSGI)),
            *("--die-on-term", "--no-orphans", *arguments),
        ),
        # By default a worker lives for at least a minute.
        recycle=("--max-requests", "120", "--min-worker-lifetime", "1"),
        needs=(str(_UWSGI),),
        preloads="--lazy-apps" not in arguments,
        has_background_threads="--enable-threads" in arguments,
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


#: Every kind of host.
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
    # uWSGI loads the application in the master, except with ``--lazy-apps``.
    _uwsgi("uwsgi"),
    _uwsgi("uwsgi-threads", "--enable-threads"),
    _uwsgi("uwsgi-lazy", "--lazy-apps"),
    _uwsgi("uwsgi-lazy-threads", "--lazy-apps", "--enable-threads", "--threads", "2"),
    # A child of billiard's pool may wait up to 30 s until its parent has noted the last task.
    _celery("prefork", 4, workers=4, recycle=("--max-tasks-per-child", "40"), ends_within=45.0),
    # Threads of one process share a breaker, so a fleet needs two nodes.
    _celery("threads", 4, workers=2, nodes=2, preloads=False, forks=False),
)
