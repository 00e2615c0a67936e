"""Headers of the Lua files: each states what the Python code that runs the file passes, expects and relies on."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib import resources
from math import prod
from pathlib import Path

import pytest

from pybreaker_redis._engines.lua import NO_VALUE, REPLY_FIELDS, SHARED_ARGUMENTS
from pybreaker_redis._engines.scripts import LANE, LANE_OPERATIONS, PRELUDE, compose_script, strip_comments
from pybreaker_redis._model import circuit as circuit_module
from pybreaker_redis._model import codec
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.codec import HASH_FIELDS, VALUE_NAMES
from pybreaker_redis._model.intents import INTENTS, Intent, Reply
from pybreaker_redis._redis.keys import KEY_SUFFIXES

LUA = Path(str(resources.files("pybreaker_redis._engines"))) / "lua"

every_intent = pytest.mark.parametrize("intent", INTENTS, ids=lambda intent: intent.operation)
#: Files of the fast lanes.
LANES = [f"{operation}_lane" for operation in sorted(LANE_OPERATIONS)]

every_file = pytest.mark.parametrize("name", [PRELUDE, LANE, *LANES, *(intent.operation for intent in INTENTS)])


def source(name: str) -> str:
    """Text of a Lua file."""
    return (LUA / f"{name}.lua").read_text(encoding="utf-8")


def header(name: str) -> dict[str, str]:
    """Entries of a file's header by their label. The first line has the label ``""``."""
    entries: dict[str, str] = {}
    last = ""
    for line in source(name).splitlines():
        if not line.startswith("--") or line == "--":
            break
        if entry := re.match(r"-- ([A-Z]+(?:\[[\d.+]+\])?) +(\S.*)", line):
            last, text = entry.groups()
            assert last not in entries, f"{name}: {last} twice"
        else:
            text = line.removeprefix("--")
        entries[last] = f"{entries.get(last, '')} {text.strip()}".strip()
    assert all(text.endswith(".") for text in entries.values())
    return {label: text.removesuffix(".") for label, text in entries.items()}


def code(name: str) -> str:
    """Lua code of a file without comments and strings."""
    return re.sub(r"'[^']*'", "''", strip_comments(source(name)))


def uses(name: str, word: str) -> bool:
    """Return whether the code of a file uses a name. Fields of tables do not count."""
    return re.search(rf"(?<![.\w]){word}\b", code(name)) is not None


def test_every_operation_has_one_file_and_every_file_one_operation() -> None:
    """No file is unused, and no intent works in memory only."""
    names = {PRELUDE, LANE, *(intent.operation for intent in INTENTS), *LANES}
    assert {path.name for path in LUA.iterdir()} == {f"{name}.lua" for name in names}


@pytest.mark.parametrize("name", LANES)
def test_header_of_a_lane_names_what_the_lane_uses(name: str) -> None:
    """The checks that all lanes share offer exactly what the lanes use."""
    offered = re.findall(r"lane_\w+", header(LANE)["OFFERS"])
    assert header(name)["USES"].split(", ") == [word for word in offered if uses(name, word)]
    assert {word for lane in LANES for word in offered if uses(lane, word)} == set(offered)


@every_intent
def test_header_has_each_label_once_and_in_the_same_order(intent: type[Intent]) -> None:
    """A reader finds keys, arguments, reply, clock, writes and the prelude's names in the same places."""
    labels = list(header(intent.operation))
    arguments = [f"ARGV[{number}]" for number, _ in enumerate(fields(intent), 10)]
    assert labels == ["", "KEYS[1..5]", "ARGV[1..9]", *arguments, "RETURNS", "TIME", "WRITES", "USES"]


@every_intent
def test_header_names_the_fields_of_the_intent_in_order(intent: type[Intent]) -> None:
    """A field that is added to the intent has to be added to the script."""
    entries = header(intent.operation)
    named = [text.split()[0] for label, text in entries.items() if re.fullmatch(r"ARGV\[\d\d\]", label)]
    assert named == [field.name for field in fields(intent)]


@every_intent
def test_script_reads_its_arguments_first_and_under_their_names(intent: type[Intent]) -> None:
    """``local generation, token = tonumber(ARGV[10]), ARGV[11]``."""
    body = strip_comments(source(intent.operation))
    named = [field.name for field in fields(intent)]
    if not named:
        assert "ARGV" not in body
        return
    declared, values = re.findall(r"local ([\w, ]+) =\s+(.*ARGV.*)", body)[0]
    assert declared.split(", ") == named
    assert re.findall(r"ARGV\[(\d+)\]", values) == [str(number) for number, _ in enumerate(named, 10)]
    assert body.count("ARGV") == len(named)


@every_intent
def test_header_states_purpose_keys_reply_and_writes(intent: type[Intent]) -> None:
    """The first line is an imperative, and a reply begins with the acceptance."""
    entries = header(intent.operation)
    assert re.match(rf"{intent.operation}: [A-Z]", entries[""])
    assert entries["KEYS[1..5]"] == ", ".join(KEY_SUFFIXES)
    assert entries["RETURNS"] in {"{accepted 0|1, record…}, see prelude.lua", "{1, record…}, see prelude.lua"}
    assert ("return false" in code(intent.operation)) == entries["RETURNS"].startswith("{accepted")
    assert entries["WRITES"].startswith("only")


@every_intent
def test_header_states_the_use_of_the_clock(intent: type[Intent]) -> None:
    """An operation uses the server's time by `now`, or by the functions for leases."""
    is_used = any(uses(intent.operation, word) for word in ("now", "is_probe_free", "lease_probe"))
    text = header(intent.operation)["TIME"]
    assert text.startswith("server time: ") if is_used else text == "not used by the operation"


@every_intent
def test_header_names_exactly_the_names_of_the_prelude_that_the_file_uses(intent: type[Intent]) -> None:
    """A name that changes in the prelude is found in every header."""
    offered = header(PRELUDE)["OFFERS"].split(", ")
    assert header(intent.operation)["USES"].split(", ") == [word for word in offered if uses(intent.operation, word)]


def test_prelude_offers_exactly_what_operations_use() -> None:
    """Other names of the prelude are its own."""
    declared = {
        name
        for names in re.findall(r"^local (?:function )?([\w, ]+)", code(PRELUDE), re.MULTILINE)
        for name in names.strip().split(", ")
    }
    offered = header(PRELUDE)["OFFERS"].split(", ")
    assert offered == sorted(
        (name for name in declared if any(uses(intent.operation, name) for intent in INTENTS)), key=str.lower
    )


def test_prelude_names_keys_fields_arguments_and_reply_as_python_does() -> None:
    """The prelude is part of every script, so its header holds for all of them."""
    entries = header(PRELUDE)
    assert [entries[f"KEYS[{number}]"].split()[0] for number in range(1, 6)] == list(VALUE_NAMES) == list(KEY_SUFFIXES)
    assert re.findall(r"\w+", entries["KEYS[5]"].partition("as of")[0])[2:] == list(HASH_FIELDS)
    assert tuple(entries[f"ARGV[{number}]"].split()[0] for number in range(1, 10)) == SHARED_ARGUMENTS
    returned = [text.strip() for text in entries["RETURNS"].strip("{}").split(",")]
    assert tuple(text.split()[0] for text in returned) == REPLY_FIELDS
    assert {"TIME", "WRITES"} <= entries.keys()
    # A reply holds the values of the circuit, and the error of PUBLISH is for the engine itself.
    circuit_fields, reply_fields = ({field.name for field in fields(kind)} for kind in (Circuit, Reply))
    assert set(REPLY_FIELDS) == circuit_fields | reply_fields - {"circuit"} | {"publish_error"}


@pytest.mark.parametrize("name", ["LEASE_MAX_MS", "COUNT_LIMIT", "NOISE_MAX_MS", "TTL_RENEWAL_MARGIN_MS"])
def test_limits_are_the_same_in_python_and_lua(name: str) -> None:
    """A value that one of them reads as damage, the other does not continue from."""
    found = re.search(rf"^local {name} = ([\d *^]+)$", source(PRELUDE), re.MULTILINE)
    assert found
    factors = [[int(number) for number in factor.split("^")] for factor in found[1].split("*")]
    value = prod(pow(*factor) if len(factor) == 2 else factor[0] for factor in factors)
    assert value == getattr(codec if name.startswith("TTL") else circuit_module, name)


def test_missing_values_are_the_same_in_python_and_lua() -> None:
    """-1 means no generation and no time."""
    assert f"local BY_HAND = {NO_VALUE}\n" in source(PRELUDE)
    assert f"circuit.opened_at_ms or {NO_VALUE}," in source(PRELUDE)


@every_file
def test_comments_begin_their_line_so_that_they_can_be_stripped(name: str) -> None:
    """A ``--`` inside a string or behind code, or a block comment, would survive or break the composition."""
    assert not [line for line in source(name).splitlines() if "--" in line.lstrip()[2:] and not line.startswith("--")]
    assert "--" not in strip_comments(source(name))
    assert "[[" not in source(name)


@every_intent
def test_script_has_no_comments_and_is_ascii(intent: type[Intent]) -> None:
    """Comments would cost bytes for each EVAL, and characters that not every client can encode."""
    script = compose_script(intent.operation)
    assert script.source.isascii()
    assert b"--" not in script.source
    lane_kib = 1.75 if intent.operation in LANE_OPERATIONS else 0
    assert len(script.source) < (10.25 + lane_kib) * 1024
