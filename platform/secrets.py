"""Finds credentials in texts that others will see: job metadata, dashboards, logs.

What is found is named by its kind and place, never repeated. A value that is read from the environment where it is used,
``${oc.env:NAME}``, is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

INTERPOLATION = re.compile(r"\$\{[^{}]*\}")
PASSWORDS = (
    # scheme://user:password@host; a port and a path, as in http://host:5000/a@b, are no password.
    ("a password in a URI", re.compile(r"(?P<keep>[a-zA-Z][\w+.-]*://[^:/@\s]*:)(?!\d+/)(?P<secret>[^\s'\"]+)(?=@)")),
    (
        "a password or key in a URI",
        re.compile(
            r"(?P<keep>[?&](?:password|passwd|token|secret|sig|access_key|secret_key|x-amz-signature)=)(?P<secret>[^&\s'\"]+)",
            re.IGNORECASE,
        ),
    ),
    (
        "a password or key",
        re.compile(
            r"(?P<keep>\b(?:\w+_)?(?:password|passwd|secret_access_key|secret_key|api_key|auth_token|access_token)"
            r"[\"']?\s*[:=]\s*[\"']?)(?P<secret>[^\s'\",}#]{4,})(?=[\"']?\s*(?:[,}#]|$))",
            re.IGNORECASE | re.MULTILINE,
        ),
    ),
)
TOKENS = (
    ("an access token of Hugging Face", re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")),
    ("an access key of AWS", re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    ("an API key of Google", re.compile(r"\bAIza[A-Za-z0-9_-]{35}")),
    ("an access token of Google", re.compile(r"\bya29\.[A-Za-z0-9_-]{20,}")),
    ("an access token of GitHub", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})")),
    ("an access token of GitLab", re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}")),
    ("an access token of Databricks", re.compile(r"\bdapi[0-9a-f]{32}\b")),
    ("a web token (JWT)", re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*")),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----)?")),
)
Finding = tuple[str, str]
"""Where (a line, or a key's path) and what."""


def find_secrets(source: str | Mapping[str, Any], passwords: bool = True) -> list[Finding]:
    """What looks like credentials in a text (found by line) or in nested mappings (by key path).

    ``passwords=False`` looks for access tokens and keys only, which no value of an experiment ever holds.
    """
    patterns = (*(PASSWORDS if passwords else ()), *TOKENS)
    found: list[Finding] = []
    if isinstance(source, str):
        for what, at in _matches(source, patterns):
            found.append((f"line {source.count(chr(10), 0, at) + 1}", what))
    else:
        for path, text in _texts(source, ""):
            found += [(path, what) for what, _ in _matches(text, patterns)]
    return list(dict.fromkeys(found))


def scrub(text: str) -> str:
    """The text with ``***`` in place of whatever `find_secrets` finds in it."""
    for _, pattern in PASSWORDS:
        text = pattern.sub(lambda m: m["keep"] + (m["secret"] if _harmless(m["secret"]) else "***"), text)
    for _, pattern in TOKENS:
        text = pattern.sub("***", text)
    return text


def _matches(text: str, patterns: Sequence[tuple[str, re.Pattern[str]]]) -> Iterator[tuple[str, int]]:
    for what, pattern in patterns:
        for match in pattern.finditer(text):
            if not _harmless(match.groupdict().get("secret", match[0])):
                yield what, match.start()


def _harmless(secret: str) -> bool:
    """Read from the environment, or masked already."""
    return INTERPOLATION.sub("", secret) in ("", "***")


def _texts(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        for i, value in enumerate(tree):
            yield from _texts(value, f"{path}[{i}]")
    elif isinstance(tree, str):
        yield path, tree
