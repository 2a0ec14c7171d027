"""Names of prefixes."""

from __future__ import annotations

import pytest

from engine.prefix import block_hashes, next_hash, scope_key


def test_a_name_depends_on_everything_before_it() -> None:
    """Equal prefixes have equal names; a change in an early block changes all later names."""
    scope = scope_key("sha256:a", "tenant", 4)
    one, two = block_hashes(scope, [1, 2, 3, 4, 5, 6, 7, 8, 9], 4), block_hashes(scope, [1, 2, 3, 4, 5, 6, 7, 0], 4)
    assert len(one) == 2 and one[0] == two[0] and one[1] != two[1]
    assert block_hashes(scope, [0, 2, 3, 4, 5, 6, 7, 8], 4)[1] != one[1]


@pytest.mark.parametrize("other", [("sha256:b", "tenant", 4), ("sha256:a", "tenant2", 4), ("sha256:a", "tenant", 8)])
def test_scopes_never_share_a_name(other: tuple[str, str, int]) -> None:
    """Another variant, tenant or block size never meets this one's blocks."""
    mine = set(block_hashes(scope_key("sha256:a", "tenant", 4), [7] * 64, 4))
    assert not mine & set(block_hashes(scope_key(*other), [7] * 64, other[2]))


@pytest.mark.parametrize("parts", [("", "t", 4), ("v", "", 4), ("v", "t", 0)])
def test_an_unknown_scope_fails_closed(parts: tuple[str, str, int]) -> None:
    """Without a full scope there is no name at all."""
    with pytest.raises(ValueError, match="known"):
        scope_key(*parts)


def test_a_chain_can_be_continued_block_by_block() -> None:
    """A growing text is named without hashing its beginning again."""
    scope = scope_key("sha256:a", "tenant", 4)
    tokens = [*range(11), 70_000]
    parent = scope
    for index, name in enumerate(block_hashes(scope, tokens, 4)):
        parent = next_hash(parent, tokens[index * 4 : index * 4 + 4])
        assert parent == name
