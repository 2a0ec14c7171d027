"""URLs of the shared budgets' store: what can be used is taken, what cannot is told without repeating it."""

import pytest

from services.gateway.budgets.ledger import Local
from services.gateway.budgets.redis_ledger import Shared
from services.gateway.budgets.store_url import WrongStore, checked


@pytest.mark.parametrize(
    "url",
    [
        "redis://store",
        "redis://store:6379/1",
        "redis://someone:secret@store:6379/0",
        "redis://[::1]:6379",
        "rediss://store:6380/2?ssl_ca_certs=/etc/ca.pem&ssl_cert_reqs=required",
        "unix:///run/valkey.sock?db=3",
    ],
)
def test_a_good_one_is_taken_as_it_is(url: str) -> None:
    """And the client takes it, too: nothing is connected before the first question."""
    assert checked(url) == url
    Shared(url, 0.1, 1, Local(1), 1.0)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("store:6379", "the scheme must be"),
        ("http://store:6379", "the scheme must be"),
        ("redis:store", "no host"),
        ("redis://:6379/1", "no host"),
        ("redis://someone:secret", "the host or the port"),
        ("redis://store:99999", "the host or the port"),
        ("redis://[::1", "the host or the port"),
        ("redis://store/secret", "number of a database"),
        ("redis://store:6379/1?timeout=secret", "none of db"),
        ("redis://store?db=secret", "db must be"),
        ("unix://secret", "no path"),
        ("rediss://store?ssl_cert_reqs=secret", "ssl_cert_reqs must be"),
    ],
)
def test_one_that_cannot_be_used_is_refused(url: str, text: str) -> None:
    """The sentence says what is wrong; it holds nothing that may be a password."""
    with pytest.raises(WrongStore, match=text) as told:
        Shared(url, 0.1, 1, Local(1), 1.0)
    assert "secret" not in str(told.value)
