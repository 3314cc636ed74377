"""Command lines without their secrets, to be kept and shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MASK = "***"

_SECRET_OPTION = re.compile(r"--[\w-]*(key|token|password|secret)", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def masked(arguments: Sequence[str], secrets: Iterable[str]) -> list[str]:
    """`arguments` with stars for the values of options that name a key, token, password or secret (vLLM's too), for
    user and password in addresses, and for each of `secrets` wherever it stands.
    """
    known = [secret for secret in secrets if secret]
    shown: list[str] = []
    follows = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret_option = _SECRET_OPTION.fullmatch(name) is not None
        if follows:
            argument = MASK
        elif secret_option and equals:
            argument = f"{name}={MASK}"
        for secret in known:
            argument = argument.replace(secret, MASK)
        shown.append(_CREDENTIALS.sub(MASK, argument))
        follows = secret_option and not equals and not follows
    return shown
