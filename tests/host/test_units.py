import pytest

from dovetail.core.errors import ConfigError
from dovetail.host.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("2G", 2 << 30),
        (".5k", 512),
        ("7B", 7),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1", "12 parsecs", "1..5G", "1e9", "nan", "1G2M", "٣"])
def test_bad_sizes(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 30), ("30s", 30), ("250ms", 0.25), ("1h30m", 5400), ("1 h 30 min", 5400), ("0.5d", 43200)],
)
def test_durations(text, expected):
    assert parse_duration(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "s", "-3s", "3 fortnights", "3s4", "1h-30m", "inf", "nan", "٣s"])
def test_bad_durations(text):
    with pytest.raises(ConfigError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1536, "1.50KiB"),
        (98362432, "93.8MiB"),
        (512 << 20, "512MiB"),
        (3 << 40, "3.00TiB"),
    ],
)
def test_format_size(count, text):
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0042, "4.2ms"), (1.349, "1.35s"), (125, "2m05s"), (11220, "3h07m")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_sizes_survive_a_round_trip():
    for count in (1, 1 << 10, 3 << 20, 5 << 30):
        assert parse_size(format_size(count)) == count
