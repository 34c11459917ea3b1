from dovetail.show.table import table


def test_columns_line_up_and_numbers_stand_right():
    text = table(("name", "n", "rate"), [("a", 1, 0.5), ("longer", 1000, None), ("b", 22, 12345.6)])
    assert text.splitlines() == [
        "name       n   rate",
        "a          1    0.5",
        "longer  1000      -",
        "b         22  12346",
    ]


def test_a_table_without_rows_is_its_headers():
    assert table(("a", "b"), []) == "a  b"
