"""Tables: what fits a width, and alike rows as one."""

from __future__ import annotations

import re

import pytest

from fx_approx.utils.tables import FEW, checked, folded, human, table, wrapped


def cells(layer: str, why: str = "same", k: str = "1 of 2") -> dict[str, list[str]]:
    return {"layer": [layer], "op": ["linear"], "k": [k], "saved": ["50.0"], "why": [why]}


def names(rows: list[dict[str, list[str]]]) -> list[str]:
    return [fold.cells["layer"][0] for fold in folded(rows, FEW)]


def test_alike_rows_are_one_where_the_first_stands() -> None:
    rows = [cells("stem"), *(cells(f"blocks.{i}.{part}") for i in range(12) for part in ("qkv", "proj")), cells("head")]
    assert names(rows) == ["stem", "blocks.0-11.qkv", "blocks.0-11.proj", "head"]
    found = folded(rows, FEW)
    assert sorted(place for fold in found for place in fold.rows) == list(range(len(rows)))


def test_rows_that_differ_stay_apart() -> None:
    rows = [cells(f"blocks.{i}.fc", k="1 of 2" if i != 3 else "2 of 2") for i in range(6)]
    assert names(rows) == ["blocks.0-2,4-5.fc", "blocks.3.fc"]
    rows = [cells("a.0.fc"), cells("a.1.fc", why="another")]
    assert names(rows) == ["a.0.fc", "a.1.fc"]
    assert [fold.cells["layer"][0] for fold in folded(rows, ("layer", "k"))] == ["a.0-1.fc"], "why is not shown"


def test_the_own_name_in_a_reason_counts_as_alike() -> None:
    rows = [cells(f"layer.{i}.up", why=f"shares with layer.{i}.gate, not layer.{i}0.gate") for i in range(2, 5)]
    assert len(folded(rows, FEW)) == 3, "another layer's name is another reason"
    rows = [cells(f"layer.{i}.up", why=f"shares with layer.{i}.gate") for i in range(2, 5)]
    (fold,) = folded(rows, FEW)
    assert (fold.cells["layer"], fold.cells["why"]) == (["layer.2-4.up"], ["shares with layer.2-4.gate"])


def test_the_largest_fold_wins_and_no_row_is_in_two() -> None:
    rows = [cells("s.0.conv1"), cells("s.0.conv2"), cells("s.1.conv2"), cells("s.2.conv2")]
    assert names(rows) == ["s.0.conv1", "s.0-2.conv2"]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_table_fits(width: int) -> None:
    rows = [
        cells("encoder.layers.encoder_layer_3.self_attention.scaled_dot_product_attention", "short"),
        cells("fc", "a reason that goes on and on, about " + "a_name_without_any_end" * 6),
    ]
    text = table(rows, FEW, "simple", width)
    assert max(map(len, text.splitlines())) <= width
    letters = re.sub(r"[\s-]", "", text)
    assert all(letter in letters for letter in "scaled_dot")
    assert "a_name_without_any_end" * 6 in re.sub(r"\s|1of2|50\.0|linear|fc|-", "", text) or width < 100


def test_text_is_wrapped_at_spaces_then_at_dots() -> None:
    assert wrapped("one two three", 8) == "one two\n  three"
    assert wrapped("encoder.layers.attention", 12) == "encoder.\n  layers.\n  attention"
    assert wrapped("x" * 25, 10) == "\n  ".join(["x" * 8] * 3 + ["x"])
    assert wrapped("short", 10) == "short"


def test_unknown_columns_are_told() -> None:
    assert checked(None) == list(FEW)
    with pytest.raises(ValueError, match=r"columns: expected a list of names from layer, .*got \['reason'\]"):
        checked(["reason"])


def test_numbers_for_people() -> None:
    assert [human(n) for n in (None, 999, 1000, 1_250_000, 3 * 10**15)] == ["?", "999", "1k", "1.25M", "3e+03T"]
