"""Masking of secrets in texts that are logged, raised or shown.

Masked are registered secrets, and what looks like a secret: passwords in URLs, keyword arguments and AUTH commands.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any
from urllib.parse import quote

SECRET_MASK = "***"

#: Number of registered secrets, at most.  A token that is replaced every 15 minutes is dropped after a day.
SECRETS_MAX = 100

#: Length from which a secret is masked everywhere.  A shorter one is masked where no letter or digit touches it.
LONG_SECRET_MIN_CHARS = 8

#: Arguments of a command at the end of an error's text.  Those of AUTH are a password.
_COMMAND_ARGUMENTS = re.compile(r"(, with args beginning with: ?).*()", re.DOTALL)

#: Forms of secrets in texts, as groups: the text before the secret, and the text behind it.
_SECRET_FORMS = (
    _COMMAND_ARGUMENTS,
    re.compile(r"(://)[^\s'\"<>]*(@)"),
    re.compile(r"(?i)((?:password|passwd|secret)['\"]?\s*[=:]\s*)(?:'[^']*'|\"[^\"]*\"|[^\s,&)>\]}]+)()"),
    re.compile(r"\b(AUTH )(?![<(]|called\b|failed\b|is\b|must\b)[^\s)\]]+(?: [^\s)\]]+)?(?=[)\]]|$)()"),
)

#: Packages of client libraries.  Their errors may be changed.
_LIBRARIES = frozenset(("redis", "rediscluster", "valkey"))

#: Pattern of each registered secret.  `mask_text` compiles nothing, because Python may shut down meanwhile.
_patterns_of_secrets: dict[str, re.Pattern[str]] = {}


def register_secret(secret: Any) -> None:
    """Register a secret, which `mask_text` masks from now on.

    Args:
        secret: Text or bytes.  Any other value is ignored.
    """
    if isinstance(secret, bytes):
        secret = secret.decode("utf-8", "replace")
    if not isinstance(secret, str) or not secret or secret in _patterns_of_secrets:
        return
    spellings = "|".join(sorted(map(re.escape, {secret, quote(secret, safe=""), repr(secret)[1:-1]}), key=len)[::-1])
    pattern = (
        f"()(?:{spellings})()" if len(secret) >= LONG_SECRET_MIN_CHARS else rf"(?<![^\W_])()(?:{spellings})()(?![^\W_])"
    )
    # One step each, because threads register secrets at the same time.
    _patterns_of_secrets.setdefault(secret, re.compile(pattern))
    while len(_patterns_of_secrets) > SECRETS_MAX:
        _patterns_of_secrets.pop(next(iter(tuple(_patterns_of_secrets))), None)


def mask_text(text: object) -> str:
    """Return a text with the registered secrets masked, and with everything masked that looks like a secret."""
    masked = str(text)
    patterns = [
        form for _, form in sorted(_patterns_of_secrets.copy().items(), key=lambda item: len(item[0]), reverse=True)
    ]
    for form in (*_SECRET_FORMS[:1], *patterns, *_SECRET_FORMS[1:]):
        masked = form.sub(_masked_match, masked)
    return masked


def _masked_match(match: re.Match[str]) -> str:
    return f"{match[1]}{SECRET_MASK}{match[2]}"


def mask_error(error: BaseException) -> None:
    """Mask the text of a client library's error in place, before the error is raised or logged with its traceback.

    Errors of other classes may be the application's, and stay unchanged.
    """
    if not any(cls.__module__.partition(".")[0] in _LIBRARIES for cls in type(error).__mro__):
        return
    with contextlib.suppress(Exception):
        given = tuple(mask_text(part) if isinstance(part, str) else part for part in error.args)
        if given != error.args:
            error.args = given


def refusal_text(reason: object) -> str:
    """Return the text of a refusal, masked, without the arguments of the refused command."""
    return mask_text(reason).partition(", with args")[0]


def describe_error(error: BaseException) -> str:
    """Return the class of an error and its masked text, or only the class if there is no text."""
    try:
        masked = mask_text(error)
    except Exception:  # noqa: BLE001
        # Errors of applications may not be able to show themselves.
        masked = ""
    return f"{type(error).__name__}: {masked}" if masked else type(error).__name__
