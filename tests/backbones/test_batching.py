"""Batches cost least, and chunks cover a split in order, growing as a run goes on."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from chipviz.backbones.batching import (
    CHUNK_BATCHES,
    FIRST_BATCHES,
    MOST_BATCHES,
    PASS_SHARE,
    SHORTEST,
    batches,
    plan,
)

BUDGET = 64


def cost(grouped, lengths):
    """Tokens of all passes, padding included, and what the passes cost beside them."""
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in grouped)
    return padded + len(grouped) * BUDGET * PASS_SHARE


def partitions(rows):
    """Every way to put rows into batches."""
    if not rows:
        yield []
        return
    first, rest = rows[0], rows[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            for more in partitions([row for row in rest if row not in others]):
                yield [[first, *others], *more]


@given(st.lists(st.integers(1, BUDGET), min_size=1, max_size=7))
def test_no_other_batches_within_the_budget_cost_less(lengths):
    fitting = (
        grouped
        for grouped in partitions(list(range(len(lengths))))
        if all(len(b) * max(lengths[row] for row in b) <= BUDGET for b in grouped)
    )
    least = min(cost(grouped, lengths) for grouped in fitting)
    assert cost(batches(lengths, BUDGET), lengths) == least


@given(st.lists(st.integers(0, 200), max_size=60))
def test_every_row_is_in_exactly_one_batch_within_the_budget(lengths):
    grouped = batches(lengths, BUDGET)
    assert sorted(row for batch in grouped for row in batch) == list(range(len(lengths)))
    sizes = [len(b) * max(SHORTEST, *(lengths[i] for i in b)) for b in grouped]
    assert all(size <= BUDGET or len(b) == 1 for size, b in zip(sizes, grouped, strict=True))


@given(st.lists(st.integers(1, 40), max_size=60))
def test_without_padding_a_batch_holds_rows_of_one_length(lengths):
    grouped = batches(lengths, BUDGET, padded=False)
    assert sorted(row for rows in grouped for row in rows) == list(range(len(lengths)))
    for rows in grouped:
        assert len({lengths[row] for row in rows}) == 1
        assert len(rows) == 1 or len(rows) * lengths[rows[0]] <= BUDGET


@given(st.lists(st.integers(1, 3 * BUDGET), max_size=400))
def test_chunks_cover_a_split_in_order_and_redo_little(lengths):
    chunks = plan("train", [range(n) for n in lengths], BUDGET)
    edges = [0, *(chunk.stop for chunk in chunks)]
    assert [(c.start, c.stop) for c in chunks] == list(itertools.pairwise(edges))
    assert edges[-1] == len(lengths)
    longest = max(lengths, default=0)
    half = 0  # of the chunk before
    for i, chunk in enumerate(chunks):
        before = sum(lengths[: chunk.start])
        goal = max(CHUNK_BATCHES * BUDGET, before // 2) if i else FIRST_BATCHES * BUDGET
        goal = min(goal, MOST_BATCHES * BUDGET)
        n_tokens = sum(lengths[chunk.start : chunk.stop])
        assert half <= n_tokens < 1.5 * goal + longest
        half = goal // 2


def test_the_first_chunk_of_a_long_split_is_short_and_the_others_grow():
    sizes = [len(chunk) for chunk in plan("train", [range(BUDGET)] * 300, BUDGET)]
    assert sizes[:4] == [FIRST_BATCHES, CHUNK_BATCHES, CHUNK_BATCHES, 10]
    assert max(sizes[:-1]) == MOST_BATCHES
