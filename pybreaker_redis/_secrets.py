"""How is a text printed that may contain a password?

Knows: passwords that were used, the forms in which texts contain them.  Does not know: connections, who prints.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any
from urllib.parse import quote

MASK = "***"

#: Secrets that are remembered at most: a token that is replaced every quarter of an hour is forgotten after a day.
MOST_SECRETS = 100

#: A secret of so many characters is masked wherever it stands, a shorter one only where no letter or digit touches it.
LONG = 8

#: What follows in an error is what a command was given; AUTH is given a password.
_ARGUMENTS = re.compile(r"(, with args beginning with:).*", re.DOTALL)

#: The forms in which texts carry a secret, and what is left of each.
_FORMS = (
    (re.compile(r"(?<=://)[^\s'\"<>]*@"), f"{MASK}@"),
    (re.compile(r"(?i)((?:password|passwd|secret)['\"]?\s*[=:]\s*)('[^']*'|\"[^\"]*\"|[^\s,&)>\]}]+)"), rf"\1{MASK}"),
    (re.compile(r"\b(AUTH )(?![<(]|called\b|failed\b|is\b|must\b)[^\s)\]]+( [^\s)\]]+)?(?=[)\]]|$)"), rf"\1{MASK}"),
)

#: Packages whose errors have texts that may be changed.
_LIBRARIES = frozenset(("redis", "rediscluster", "valkey"))

_known: dict[str, None] = {}


def remember(secret: Any) -> None:
    """Mask this value from now on wherever it stands; anything but text and bytes is ignored."""
    if isinstance(secret, bytes):
        secret = secret.decode("utf-8", "replace")
    if not isinstance(secret, str) or not secret or secret in _known:
        return
    # One step each: threads remember at the same time.
    _known.setdefault(secret)
    while len(_known) > MOST_SECRETS:
        _known.pop(next(iter(tuple(_known))), None)


def masked(text: object) -> str:
    """Return a text without the secrets that were remembered, and without what looks like one."""
    said = _ARGUMENTS.sub(rf"\1 {MASK}", str(text))
    for secret in sorted(_known, key=len, reverse=True):
        for spelled in {secret, quote(secret, safe=""), repr(secret)[1:-1]}:
            if spelled in said:
                said = _without(spelled, said)
    for form, rest in _FORMS:
        said = form.sub(rest, said)
    return said


def _without(secret: str, said: str) -> str:
    if len(secret) >= LONG:
        return said.replace(secret, MASK)
    return re.sub(rf"(?<![^\W_]){re.escape(secret)}(?![^\W_])", MASK, said)


def mask(error: BaseException) -> None:
    """Mask the text of a client library's error: it may be raised, or logged with its traceback.

    Errors of other classes are left as they are: they may be the application's own.
    """
    if not any(cls.__module__.partition(".")[0] in _LIBRARIES for cls in type(error).__mro__):
        return
    with contextlib.suppress(Exception):
        given = tuple(masked(part) if isinstance(part, str) else part for part in error.args)
        if given != error.args:
            error.args = given
