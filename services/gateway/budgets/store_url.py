"""Whether a URL can name the store of shared budgets: checked once, at start, by rules that can be told in a sentence.

The client library takes more than it can use: a path that is no number becomes database 0, and a parameter it does not
know fails at the first request. No message here repeats the URL: it may hold a password.
"""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

SCHEMES = ("redis", "rediss", "unix")
PARAMETERS = ("db", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
CERTIFICATES = ("none", "optional", "required")
_SHAPE = "it must be like redis://user:password@host:6379/1, rediss://… or unix:///path?db=1"


class WrongStore(Exception):
    """The URL names no store; the text says why."""


def checked(url: str) -> str:
    """The URL itself. Raises `WrongStore`."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # its text would quote what may be a password
        raise WrongStore(f"the host or the port cannot be read; {_SHAPE}") from None
    if parts.scheme not in SCHEMES:
        raise WrongStore(f"the scheme must be {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}; {_SHAPE}")
    if parts.scheme == "unix":
        if not parts.path.startswith("/"):
            raise WrongStore(f"no path of a socket; {_SHAPE}")
    elif not host:
        raise WrongStore(f"no host; {_SHAPE}")
    elif parts.path.strip("/") and not parts.path.strip("/").isdecimal():
        raise WrongStore(f"what follows the host must be the number of a database; {_SHAPE}")
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in PARAMETERS:
            raise WrongStore(f"a parameter in it is none of {', '.join(PARAMETERS)}")
        if name == "db" and not value.isdecimal():
            raise WrongStore("db must be the number of a database")
        if name == "ssl_cert_reqs" and value not in CERTIFICATES:
            raise WrongStore(f"ssl_cert_reqs must be one of {', '.join(CERTIFICATES)}")
    return url
