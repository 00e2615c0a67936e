"""The import table of the packages, and the libraries that each may import."""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import graphlib
import importlib
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from pybreaker import CircuitBreaker

import pybreaker_redis
from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage
from pybreaker_redis.registry import BreakerRegistry
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.public_names import PUBLIC_NAMES
from tests.support.wait import wait_for

PACKAGE = Path(pybreaker_redis.__file__).parent

#: Packages that every package may import.
BASE = {"_runtime", "errors", "health", "policies", "_log"}
PUBLIC = {"breaker", "storage", "memory", "__init__"} | BASE
LOWER = {
    "_runtime": set(),
    "errors": {"_runtime"},
    "health": {"_runtime", "errors"},
    "policies": {"_runtime", "errors"},
    "_log": set(),
    "_model": BASE,
    "_redis": BASE,
    "_engines": BASE | {"_model", "_redis"},
    "_servers": BASE | {"_redis"},
    "_replica": BASE | {"_servers", "_engines.base", "_model", "_redis"},
    "_circuits": BASE | {"_replica", "_servers", "_engines", "_redis", "_model"},
    "_adapter": BASE | {"_circuits", "_model"},
    "breaker": BASE | {"_circuits", "_engines", "_model", "storage", "memory"},
    "operators": BASE | {"_circuits", "_redis", "_model"},
    "registry": (PUBLIC - {"__init__"}) | {"operators"},
    "cli": PUBLIC | {"registry", "operators", "testing"},
}
LOWER["storage"] = LOWER["memory"] = BASE | {"_circuits", "_engines", "_model", "_adapter"}
LOWER["instrument"] = LOWER["contrib"] = LOWER["panel"] = LOWER["testing"] = PUBLIC | {"registry", "operators"}
LOWER["__init__"] = PUBLIC | {"registry", "operators", "instrument"}
LOWER["listeners"] = LOWER["prometheus"] = {"instrument"}
LOWER["fixtures"] = {"testing"}
LOWER["__main__"] = {"cli"}
#: Packages that may import a library.
LIBRARIES = {
    "pybreaker": (
        "breaker",
        "errors",
        "storage",
        "memory",
        "operators",
        "registry",
        "instrument",
        "contrib",
        "testing",
        "_adapter",
        "cli.demo",
    ),
    "redis": ("_redis", "_engines.transaction", "testing.servers"),
}


def module_name(path: Path) -> str:
    """Return the name of a module within the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Yield the full names of everything that a module imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(module: str) -> set[tuple[str, str]]:
    """Return the imports of a module that the table forbids."""
    package, found = module.partition(".")[0], set()
    for name in imports(MODULES[module]):
        root, *parts = name.split(".")
        if root != "pybreaker_redis":
            continue
        target = parts[0] if (PACKAGE / parts[0]).is_dir() or (PACKAGE / f"{parts[0]}.py").exists() else "__init__"
        if target != package and not {target, ".".join(parts[:2])} & LOWER[package]:
            found.add((module, ".".join(parts[:2])))
    return found


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_public_names_grow_on_purpose(module: str) -> None:
    """The public surface grows only on purpose."""
    assert importlib.import_module(f"pybreaker_redis.{module}".rstrip(".")).__all__ == PUBLIC_NAMES[module]


def test_every_package_has_its_row() -> None:
    """A new package needs a row that lists its imports."""
    assert {module.partition(".")[0] for module in MODULES} <= set(LOWER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_table(module: str) -> None:
    """Imports go in one direction."""
    assert forbidden(module) == set()


def imported_module(name: str) -> str:
    """Return the module of the package that an import loads, empty for other packages."""
    parts = name.split(".")[1:] if name.startswith("pybreaker_redis.") else []
    while parts and not {".".join(parts), ".".join([*parts, "__init__"])} & set(MODULES):
        parts.pop()
    path = ".".join(parts)
    return path if not path or path in MODULES else f"{path}.__init__"


def test_imports_form_no_cycle() -> None:
    """No module imports itself by way of others, also within a package."""
    graph = {
        module: {imported_module(name) for name in imports(path)} - {"", module} for module, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > len(MODULES)
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_is_imported_by_its_packages_only(library: str) -> None:
    """Only a few packages may import Redis or pybreaker."""
    users = {module for module, path in MODULES.items() if library in {name.split(".")[0] for name in imports(path)}}
    assert [
        module for module in users if not any(f"{module}.".startswith(f"{each}.") for each in LIBRARIES[library])
    ] == []


def test_packages_are_small() -> None:
    """At most twelve modules at the top, and ten in a package, without its docstring."""
    sizes: dict[str, int] = {}
    for module in MODULES:
        package = module.rpartition(".")[0]
        sizes[package] = sizes.get(package, 0) + (not module.endswith(".__init__"))
    assert sizes.pop("") <= 12
    assert {package: size for package, size in sizes.items() if size > 10} == {}


def test_modules_fit_on_a_few_screens() -> None:
    """A module that outgrows this limit may answer two questions."""
    assert {
        module: lines
        for module, path in MODULES.items()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 370
    } == {}


#: Classes of the containers that are searched for objects.
CONTAINERS = (
    *(dict, list, tuple, set, frozenset, deque, types.MethodType, functools.partial, threading.Thread),
    *(weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet),
)


def package_of(item: object) -> str:
    """Return the package of an object's class, empty for classes of others."""
    root, _, rest = type(item).__module__.partition(".")
    return rest.partition(".")[0] if root == "pybreaker_redis" else ""


def referents(item: object) -> Iterator[object]:
    """Yield the objects of this package that an object refers to, by way of containers, functions and threads too."""
    seen, pending = {id(item)}, [*gc.get_referents(item)]
    while pending:
        found = pending.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if package_of(found):
            yield found
        elif isinstance(found, weakref.ref):
            pending.append(found())
        elif isinstance(found, types.FunctionType):
            pending += [cell.cell_contents for cell in found.__closure__ or () if cell != types.CellType()]
            pending += found.__defaults__ or ()
        elif isinstance(found, CONTAINERS):
            pending += gc.get_referents(found)


@pytest.mark.parametrize("is_unreachable", [False, True])
def test_objects_refer_to_their_own_and_lower_packages_only(
    killable_server: PrivateServer, is_unreachable: bool
) -> None:
    """The object graph follows the table of imports.  A server refers to its members: the one exception."""
    storage = CircuitRedisStorage("closed", killable_server.client(), "graph", timeout=5.0)
    breaker = CircuitBreaker(state_storage=storage, fail_max=2)
    breaker.call(int)
    wait_for(lambda: storage.health().push != "none", "the subscription")
    breaker.call(int)
    if is_unreachable:
        killable_server.kill()
        with contextlib.suppress(ValueError):
            breaker.call(int, "x")
        wait_for(lambda: storage.health().is_own, "the local circuit")
    seen: dict[int, object] = {id(storage): storage}
    pending: list[object] = [storage]
    edges: set[tuple[str, str]] = set()
    packages = set()
    while pending:
        item = pending.pop()
        package = package_of(item)
        packages.add(package)
        for found in referents(item):
            target = package_of(found)
            if target != package and target not in {row.partition(".")[0] for row in LOWER[package]}:
                edges.add((type(item).__name__, type(found).__name__))
            if id(found) not in seen:
                seen[id(found)] = found
                pending.append(found)
    assert {"storage", "_adapter", "_circuits", "_servers", "_replica", "_engines", "_redis", "_model"} <= packages
    assert edges == {("Server", "Failover")}


#: Names that pybreaker's interface of storages has.
STORAGE_INTERFACE = {
    *("counter", "increment_counter", "increment_success_counter", "name", "opened_at", "reset_counter"),
    *("reset_success_counter", "state", "success_counter"),
}


@pytest.mark.parametrize(
    ("item", "names"),
    [
        (
            CircuitRedisStorage("closed", lambda: None),
            STORAGE_INTERFACE | {"BASE_NAMESPACE", "from_url", "health", "logger"},
        ),
        (CircuitMemoryStorage("closed"), STORAGE_INTERFACE),
        (BreakerRegistry(), {"close", "configure", "get", "guard", "health", "reset", "set_state", "status"}),
    ],
    ids=lambda item: type(item).__name__,
)
def test_public_objects_show_what_users_need(item: object, names: set[str]) -> None:
    """Internals start with an underscore, so `dir` and completion show what users call."""
    assert {name for name in dir(item) if not name.startswith("_")} == names


def test_public_objects_have_a_useful_repr() -> None:
    """A log or a debugger shows which circuit an object is, and no secret."""
    with_password = CircuitRedisStorage.from_url("redis://:s3cret@localhost:1", namespace="payments")
    assert repr(with_password) == "<CircuitRedisStorage 'payments', mode='unused'>"
    assert repr(CircuitMemoryStorage("open")) == "<CircuitMemoryStorage open>"
    registry = BreakerRegistry("redis://:s3cret@localhost:1", prefix="shop")
    registry.configure("payments")
    assert repr(registry) == "<BreakerRegistry redis, prefix='shop', 1 breakers>"
