"""Chunks that begin alike share a row, and can be read back out of it."""

import random

from d2l.lm.rows import alike, weave


def test_chunks_that_begin_alike_stand_in_one_row_and_can_be_read_back():
    rng = random.Random(0)
    stems = [[rng.randrange(3) for _ in range(20)] for _ in range(4)]
    chunks = [rng.choice(stems)[: rng.randint(1, 20)] for _ in range(60)]
    chunks = [[*c, *(rng.randrange(9) for _ in range(rng.randint(0, 8)))] for c in chunks]
    rows = alike(chunks, 40, 120)
    assert sorted(i for *_, row in rows for i in row) == list(range(60))
    assert max(n for n, *_ in rows) <= 40
    assert 60 < max(n for _, n, _ in rows) <= 120
    for n_tok, n_read, members in rows:
        assert n_read == sum(len(chunks[i]) for i in members)
        ids, places = weave([chunks[i] for i in members])
        assert len(ids) == n_tok
        assert sorted({p for place in places for p in place}) == list(range(n_tok))
        for i, place in zip(members, places, strict=True):
            assert [ids[p] for p in place] == chunks[i]
            assert place == sorted(place)
    assert sum(n for n, *_ in rows) < 0.6 * sum(map(len, chunks))
    assert alike([], 8, 8) == []
    assert alike([[5], [5, 6], [5, 6, 7]], 2, 9) == [(1, 1, [0]), (2, 2, [1]), (3, 3, [2])]
