"""The histogram of prompt lengths shows the counts it was given, and the limit where it is."""

from chipviz.ui.plots.token_lengths import lengths_figure


def drawn(limit):
    return lengths_figure((0, 5, 10, 15), (3, 0, 7), limit=limit, subtitle="10 prompts")


def test_every_bin_is_a_bar_over_its_lengths():
    (bars,) = drawn(12).data
    assert list(bars.y) == [3, 0, 7]
    assert list(bars.x) == [2.5, 7.5, 12.5]
    assert list(bars.width) == [5, 5, 5]
    assert bars.customdata[2] == "10 to 14 tokens"


def test_the_limit_is_a_line_only_where_it_is_in_sight():
    assert drawn(12).layout.shapes[0].x0 == 12.5
    assert "limit 12" in [note.text for note in drawn(12).layout.annotations]
    assert not drawn(64).layout.shapes
