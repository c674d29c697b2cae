import math

import pandas as pd
import pytest
from needle_table import TRAIN_TOK, WINDOW, needle_table

from d2l.figures import draw_fig2, save_figure


def draw(table, **changes):
    options = {"scale": "tiny", "window": WINDOW, "train_tok": TRAIN_TOK, "title": "a model"}
    return draw_fig2(table, **options | changes)


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def texts(axes):
    return " ".join(t.get_text() for t in axes.texts)


def test_fig2_shows_series_controls_lengths_and_scale():
    top, bottom = draw(needle_table()).axes
    assert labels(top) == [
        "D2L",
        "base, document in context",
        "D2L, wrong document",
        "base, no document",
        "chance",
    ]
    assert labels(bottom) == ["base, KV cache", "D2L, adapter counted", "D2L, adapter not counted"]
    assert f"window\n{WINDOW} tok" in texts(top)
    assert f"training length\n{TRAIN_TOK} tok" in texts(top)
    assert "scale tiny" in top.figure.get_suptitle()
    low, high = top.get_xlim()
    assert low < 32
    assert high > 8192


def test_memory_with_adapter_lies_above_memory_without():
    _, bottom = draw(needle_table()).axes
    lines = {line.get_label(): line.get_ydata() for line in bottom.get_lines()}
    counted, bare = lines["D2L, adapter counted"], lines["D2L, adapter not counted"]
    assert all(a > b for a, b in zip(counted, bare, strict=True))


def test_several_seeds_stay_visible_behind_their_mean():
    one, three = (len(draw(needle_table(seeds)).axes[0].get_lines()) for seeds in [(0,), (0, 1, 2)])
    assert three - one == 3 * 4


def test_missing_series_and_memory_are_left_out():
    table = needle_table()
    table = table[table["series"] == "d2l"].assign(gen_memory_mib=math.nan)
    top, bottom = draw(table).axes
    assert labels(top) == ["D2L", "chance"]
    assert "not measured" in texts(bottom)


def test_a_series_without_length_holds_for_every_length():
    table = needle_table()
    other = table["series"] != "base_without_context"
    alone = table[~other].head(1).assign(haystack_tok=0)
    top, _ = draw(pd.concat([table[other], alone])).axes
    assert "base, no document" in labels(top)
    assert top.get_xlim()[0] > 1


def test_wrong_columns_are_refused():
    with pytest.raises(ValueError, match=r"must have the columns .* missing \['seed'\]"):
        draw(needle_table().drop(columns="seed"))


def test_saved_files_are_the_same_bytes_each_time(tmp_path):
    for name in ("one", "two"):
        svg, png = save_figure(draw(needle_table()), tmp_path / name)
        assert svg.read_text().startswith("<?xml")
        assert png.read_bytes().startswith(b"\x89PNG")
    for kind in ("svg", "png"):
        one, two = ((tmp_path / n / f"figure.{kind}").read_bytes() for n in ("one", "two"))
        assert one == two


def test_notebooks_can_display_it():
    assert draw(needle_table())._repr_png_().startswith(b"\x89PNG")
