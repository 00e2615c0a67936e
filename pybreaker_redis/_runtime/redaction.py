"""How is a text printed that may contain a password?

Knows: passwords that were used, the forms in which texts contain them.  Does not know: connections, who prints.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any
from urllib.parse import quote

SECRET_MASK = "***"

#: Secrets that are remembered at most: a token that is replaced every quarter of an hour is forgotten after a day.
SECRETS_MAX = 100

#: A secret of so many characters is masked wherever it stands, a shorter one only where no letter or digit touches it.
LONG_SECRET_MIN_CHARS = 8

#: What follows in an error is what a command was given; AUTH is given a password.
_COMMAND_ARGUMENTS = re.compile(r"(, with args beginning with: ?).*()", re.DOTALL)

#: The forms in which texts carry a secret: what stands before it is left, and what stands behind it.
_SECRET_FORMS = (
    _COMMAND_ARGUMENTS,
    re.compile(r"(://)[^\s'\"<>]*(@)"),
    re.compile(r"(?i)((?:password|passwd|secret)['\"]?\s*[=:]\s*)(?:'[^']*'|\"[^\"]*\"|[^\s,&)>\]}]+)()"),
    re.compile(r"\b(AUTH )(?![<(]|called\b|failed\b|is\b|must\b)[^\s)\]]+(?: [^\s)\]]+)?(?=[)\]]|$)()"),
)

#: Packages whose errors have texts that may be changed.
_LIBRARIES = frozenset(("redis", "rediscluster", "valkey"))

#: Each secret, and what finds it: nothing is compiled while a text is printed, as that may be when Python shuts down.
_patterns_of_secrets: dict[str, re.Pattern[str]] = {}


def register_secret(secret: Any) -> None:
    """Mask this value from now on wherever it stands; anything but text and bytes is ignored."""
    if isinstance(secret, bytes):
        secret = secret.decode("utf-8", "replace")
    if not isinstance(secret, str) or not secret or secret in _patterns_of_secrets:
        return
    spelled = "|".join(sorted(map(re.escape, {secret, quote(secret, safe=""), repr(secret)[1:-1]}), key=len)[::-1])
    pattern = (
        f"()(?:{spelled})()" if len(secret) >= LONG_SECRET_MIN_CHARS else rf"(?<![^\W_])()(?:{spelled})()(?![^\W_])"
    )
    # One step each: threads remember at the same time.
    _patterns_of_secrets.setdefault(secret, re.compile(pattern))
    while len(_patterns_of_secrets) > SECRETS_MAX:
        _patterns_of_secrets.pop(next(iter(tuple(_patterns_of_secrets))), None)


def mask_text(text: object) -> str:
    """Return a text without the secrets that were remembered, and without what looks like one."""
    said = str(text)
    known = [
        form for _, form in sorted(_patterns_of_secrets.copy().items(), key=lambda item: len(item[0]), reverse=True)
    ]
    for form in (*_SECRET_FORMS[:1], *known, *_SECRET_FORMS[1:]):
        said = form.sub(_masked_match, said)
    return said


def _masked_match(match: re.Match[str]) -> str:
    return f"{match[1]}{SECRET_MASK}{match[2]}"


def mask_error(error: BaseException) -> None:
    """Mask the text of a client library's error: it may be raised, or logged with its traceback.

    Errors of other classes are left as they are: they may be the application's own.
    """
    if not any(cls.__module__.partition(".")[0] in _LIBRARIES for cls in type(error).__mro__):
        return
    with contextlib.suppress(Exception):
        given = tuple(mask_text(part) if isinstance(part, str) else part for part in error.args)
        if given != error.args:
            error.args = given


def describe_error(error: BaseException) -> str:
    """Return the class of an error and what it says, masked, or the class alone if it says nothing."""
    said = mask_text(error)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
