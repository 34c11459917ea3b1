"""Native kernels of weights on uniform grids, against plain integers and against fake-quantized references."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dovetail.checkpoint.packed_file import load, store
from dovetail.core.errors import ModelError
from dovetail.core.sampling import SamplingParams
from dovetail.hub.packed import Origin
from dovetail.layers.linear import Dense, Packed
from dovetail.ops import cpu
from dovetail.ops.activations import FAKE, atom, fp8_token, int8_token, rule
from dovetail.ops.grids import codes, e4m3, from_nibbles, num_outliers, to_nibbles
from dovetail.ops.schemes import SCHEMES, bfloat16
from dovetail.ops.stored import StoredTensor
from tests.tiny import TinyCheckpoint, run_all, tiny_config, tiny_engine

native = pytest.importorskip("dovetail._native")

ISAS = [*native.isas(), *native.emulated()]
KINDS = [
    ("I8", "int8-token"), ("I4", "int8-token"), ("F8", "fp8-token"), ("I8", ""), ("I4", ""), ("F8", ""),
    ("I4", "int16"), ("I8", "int16"),
]  # fmt: skip
SHAPES = [(16, 64, 0), (80, 512, 0), (200, 512, 64), (33, 768, 128), (48, 96, 32), (17, 1024, 256)]
Floats = NDArray[np.float32]


def weight(fmt: str, shape: tuple[int, int, int], activation: str = "", zeros: bool = False) -> StoredTensor:
    """Random codes [n, k] in groups of `shape[2]` columns (0: whole rows), with scales in bfloat16."""
    n, k, group = shape
    rng = np.random.default_rng(n + k)
    groups = k // (group or k)
    scale = rng.uniform(0.001, 0.02, (n, groups)).astype(np.float32)
    parts: dict[str, NDArray[Any]] = {"scale": (scale.view(np.uint32) & 0xFFFF0000).view(np.float32)}
    if zeros:
        parts["zero"] = rng.integers(-8, 8, (n, groups)).astype(np.int16)
    if fmt == "F8":
        data = rng.integers(0, 255, (n, k)).astype(np.uint8)
        data[(data & 127) == 127] = 1  # no NaN
    else:
        q = rng.integers(-8, 8, (n, k)) if fmt == "I4" else rng.integers(-128, 128, (n, k))
        data = to_nibbles(q) if fmt == "I4" else q.astype(np.int8).view(np.uint8)
    return StoredTensor("w", fmt, (n, k), data, parts, activation=activation)


def rows_of(count: int, k: int) -> Floats:
    return np.random.default_rng(count).standard_normal((count, k)).astype(np.float32) * 3


def layer(stored: StoredTensor, isa: str, activations: str = "exact", threads: int = 2) -> Any:
    return Packed("float32", activations, isa, threads).linear([stored], [])


def close(got: Floats, x: Floats, stored: StoredTensor, bound: float = 2e-6) -> bool:
    """Within float32 rounding of sums of this size."""
    w = stored.values().astype(np.float64)
    return bool((np.abs(got - x @ w.T) <= bound * (np.abs(x) @ np.abs(w.T)) + 1e-7).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("fmt", "activation"), KINDS)
def test_products_are_those_of_the_reference(fmt: str, activation: str, zeros: bool, isa: str) -> None:
    for shape in SHAPES:
        stored = weight(fmt, shape, activation, zeros and fmt != "F8")
        for count in (1, 3, 8, 9, 37):
            x = rows_of(count, shape[1])
            seen = FAKE[activation](x, rule(stored)) if activation in FAKE else x
            assert close(layer(stored, isa)(x), seen.astype(np.float64), stored), (shape, count)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["I8", "I4"])
def test_integer_sums_are_exact(fmt: str, isa: str) -> None:
    """With scales of one, whole numbers come out: those of plain integer arithmetic."""
    for shape in ((40, 512, 0), (40, 512, 128)):
        stored = weight(fmt, shape, "int8-token", zeros=shape[2] > 0)
        ones = {**stored.parts, "scale": np.ones_like(stored.parts["scale"])}
        stored = replace(stored, parts=ones)
        x = np.random.default_rng(0).integers(-127, 128, (21, 512)).astype(np.float32)
        x[:, 0] = 127  # so that a row's scale is one
        q = codes(stored).astype(np.int64).reshape(40, -1, shape[2] or 512)
        if "zero" in ones:
            q = q - ones["zero"][..., None]
        np.testing.assert_array_equal(layer(stored, isa)(x), x.astype(np.int64) @ q.reshape(40, 512).T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["I8", "I4", "F8"])
def test_the_widest_row_does_not_overflow(fmt: str, isa: str) -> None:
    k = 65536
    stored = weight(fmt, (1, k, 0), "fp8-token" if fmt == "F8" else "int8-token")
    lowest = {"I8": np.full((1, k), 0x80), "I4": np.zeros((1, k // 2)), "F8": np.full((1, k), 0xFE)}[fmt]
    stored = replace(stored, data=lowest.astype(np.uint8))
    x = np.ones((2, k), np.float32)
    x[1] = -1
    want = k * stored.values()[0, 0]
    np.testing.assert_allclose(layer(stored, isa)(x)[:, 0], [want, -want], rtol=1e-3 if fmt == "F8" else 1e-6)
    wider = weight(fmt, (1, k + 32, 0), stored.activation)
    with pytest.raises(ModelError, match="w: a row has more columns than native kernels add"):
        layer(wider, isa)


@pytest.mark.parametrize(("fmt", "activation"), [*KINDS, ("ATOM", "atom")])
def test_a_row_depends_on_nothing_else(fmt: str, activation: str) -> None:
    """Neither on the other rows nor on threads; integer products not on the instruction set either."""
    stored = atom_weight((200, 512, 64, 128)) if fmt == "ATOM" else weight(fmt, (200, 512, 64), activation)
    x = rows_of(40, 512)
    found = []
    for isa in ISAS:
        whole = layer(stored, isa, "int8")
        alone = np.concatenate([whole(row[None]) for row in x])
        for count in (2, 3, 5, 8, 11, 40):
            np.testing.assert_array_equal(whole(x[:count]), alone[:count])
        np.testing.assert_array_equal(layer(stored, isa, "int8", threads=1)(x), alone)
        found.append(alone)
    if fmt != "F8":
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("isa", ISAS)
def test_columns_in_another_order_and_widths_that_fill_no_block(isa: str) -> None:
    for fmt, activation, shape in (
        ("I8", "int8-token", (7, 50, 0)),
        ("I4", "", (30, 70, 0)),
        ("F8", "", (5, 33, 0)),
        ("I8", "int16", (7, 50, 0)),
    ):
        if fmt == "I4":
            shape = (30, 64, 32)
        stored = weight(fmt, shape, activation)
        order = np.random.default_rng(0).permutation(shape[1])
        stored = replace(stored, shared={"order": order})
        x = rows_of(9, shape[1])
        seen = FAKE[activation](x, rule(stored)) if activation in FAKE else x
        assert close(layer(stored, isa)(x), seen.astype(np.float64), stored)
        with pytest.raises(ModelError, match="an order must have a number for each column"):
            layer(replace(stored, shared={"order": order + 1}), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_every_eight_bit_float_is_read_exactly(isa: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    every[(every & 127) == 127] = 0
    stored = StoredTensor("w", "F8", (1, 256), every[None], {"scale": np.ones((1, 1), np.float32)})
    np.testing.assert_array_equal(layer(stored, isa)(np.eye(256, dtype=np.float32))[:, 0], e4m3()[every])


@pytest.mark.parametrize("isa", ISAS)
def test_rows_become_the_codes_of_the_reference(isa: str) -> None:
    """Products with the unit matrix are the values of a row's codes."""
    k = 256
    halves = (e4m3()[:126] + e4m3()[1:127]) / 2  # ties, and numbers beside them
    special = np.concatenate([[448], halves, np.nextafter(halves, 0, dtype=np.float32), [2**-11, 0, -(2**-10)]])
    x = np.concatenate([rows_of(20, k), rows_of(20, k) * 1e-3, np.resize(special, (1, k))]).astype(np.float32)
    x[3] = 0
    x[4, ::2] *= 1e-5
    eye = np.eye(k, dtype=np.float32)
    one = {"scale": np.ones((k, 1), np.float32)}
    q, scale = int8_token(x)
    ints = StoredTensor("w", "I8", (k, k), eye.astype(np.uint8), one, activation="int8-token")
    np.testing.assert_array_equal(layer(ints, isa)(x), q * scale)
    c, scale = fp8_token(x)
    wide = FAKE["int16"](x, {})
    np.testing.assert_array_equal(layer(replace(ints, activation="int16"), isa)(x), wide)
    assert np.abs(wide - x).max() <= np.abs(x).max() / 65278
    floats = StoredTensor(
        "w", "F8", (k, k), (eye * 0x38).astype(np.uint8), one, activation="fp8-token"
    )  # 0x38: one
    np.testing.assert_array_equal(layer(floats, isa)(x), e4m3()[c] * scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("fmt", "activation"), [*KINDS[:3], *KINDS[-2:], ("ATOM", "atom")])
def test_nan_and_infinity_in_a_row_stay_in_that_row(fmt: str, activation: str, isa: str) -> None:
    stored = atom_weight((32, 256, 64, 64)) if fmt == "ATOM" else weight(fmt, (32, 256, 64), activation)
    whole = layer(stored, isa)
    for bad in (np.nan, np.inf):
        x = rows_of(3, 256)
        x[1, 40] = bad
        got = whole(x)
        assert not np.isfinite(got[1]).any()
        assert np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize(("fmt", "bits"), [("I8", 8), ("I4", 4), ("F8", 8)])
def test_resident_bytes(fmt: str, bits: int) -> None:
    """Within 5 % of the format's bits: codes, and 16 bits for each scale."""
    for n, k, group in ((4096, 4096, 0), (1536, 576, 64), (576, 1536, 128), (576, 576, 32)):
        packed = cpu.pack(weight(fmt, (n, k, group)), "float32", 2)
        assert 8 * packed.bytes <= 1.05 * n * (k * bits + 16 * (k // group if group else 1))


def test_weights_of_one_product_agree() -> None:
    first = weight("I8", (16, 64, 0), "int8-token")
    ordered = replace(first, name="v", shared={"order": np.arange(64)})
    for fmt in (Packed("float32", "exact", ISAS[0], 1), Dense("float32")):
        with pytest.raises(ModelError, match="w and v have the same input"):
            fmt.linear([first, ordered], [])


def test_values_that_are_no_numbers_are_refused() -> None:
    stored = weight("F8", (16, 64, 0))
    with pytest.raises(ModelError, match="w: a value is not a number"):
        cpu.pack(replace(stored, data=np.full_like(stored.data, 127)), "float32", 1)
    with pytest.raises(ModelError, match="w: a scale is not finite"):
        cpu.pack(replace(stored, parts={"scale": np.full((16, 1), np.inf, np.float32)}), "float32", 1)


# -- Atom

ATOMS = [(16, 96, 32, 32), (80, 576, 64, 64), (33, 576, 32, 32), (48, 1152, 128, 128), (17, 256, 64, 0)]


def atom_weight(shape: tuple[int, int, int, int], pairs: bool = True, plain: bool = False) -> StoredTensor:
    """[n, k] in groups of `shape[2]`, with `shape[3]` outliers. plain: scales and clip are one, order is kept."""
    n, k, group, outliers = shape
    rng = np.random.default_rng(n + k)
    q = rng.integers(-8, 8, (n, k - outliers)).astype(np.int8)
    wide = rng.integers(-128, 128, (n, outliers)).astype(np.int8)
    scale = (rng.integers(1, 255, (n, (k - outliers) // group)) / 4096).astype(np.float32)
    if pairs and n % 2 == 0:
        scale[1::2] = scale[::2]
    kept = {"scale": scale, "outlier_scale": (rng.integers(1, 255, n) / 65536).astype(np.float32)}
    shared = {"order": rng.permutation(k), "clip": np.array([0.9], np.float32)}
    if plain:
        kept = {name: np.ones_like(part) for name, part in kept.items()}
        shared = {"clip": np.ones(1, np.float32)}
    data = np.concatenate([to_nibbles(q), wide.view(np.uint8)], 1)
    return StoredTensor("w", "ATOM", (n, k), data, kept, shared, "atom")


def atom_codes(stored: StoredTensor) -> NDArray[np.int64]:
    split = stored.shape[1] - num_outliers(stored)
    narrow, wide = stored.data[:, : split // 2], stored.data[:, split // 2 :].view(np.int8)
    return np.concatenate([from_nibbles(narrow), wide], 1).astype(np.int64)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pairs", [True, False])
def test_atom_is_its_reference(pairs: bool, isa: str) -> None:
    for shape in ATOMS:
        stored = atom_weight(shape, pairs)
        for count in (1, 5, 8, 21):
            x = rows_of(count, shape[1])
            x[0, stored.shared["order"][:32]] = 0  # a group of zeros, or a part of one
            seen = FAKE["atom"](x, rule(stored)).astype(np.float64)
            assert close(layer(stored, isa)(x), seen, stored), (shape, count)


@pytest.mark.parametrize("isa", ISAS)
def test_atoms_integer_sums_are_exact_in_any_order(isa: str) -> None:
    """With scales of one, products are those of plain integers. Reordering columns changes none of them."""
    stored = atom_weight((40, 576, 64, 64), plain=True)
    rng = np.random.default_rng(0)
    x = rng.integers(-7, 8, (21, 576)).astype(np.float32)
    x[:, 512:] = rng.integers(-127, 128, (21, 64))
    x[:, :512:64], x[:, 512] = 7, 127  # so that scales of rows are one
    want = x.astype(np.int64) @ atom_codes(stored).T
    np.testing.assert_array_equal(layer(stored, isa)(x), want)
    order = rng.permutation(576)
    moved = np.empty_like(x)
    moved[:, order] = x
    sorted_ = replace(stored, shared={**stored.shared, "order": order})
    np.testing.assert_array_equal(layer(sorted_, isa)(moved), want)


@pytest.mark.parametrize("isa", ISAS)
def test_atoms_rows_become_the_codes_of_the_reference(isa: str) -> None:
    """A product with the unit matrix are the values of a row's codes."""
    k, outliers = 192, 64
    narrow = np.concatenate([np.eye(k - outliers), np.zeros((outliers, k - outliers))]).astype(np.int8)
    wide = np.concatenate([np.zeros((k - outliers, outliers)), np.eye(outliers)]).astype(np.int8)
    unit = replace(
        atom_weight((k, k, 64, outliers), plain=True),
        data=np.concatenate([to_nibbles(narrow), wide.view(np.uint8)], 1),
        shared={"clip": np.array([0.85], np.float32)},
    )
    x = rows_of(30, k)
    x[3] = x[4, :64] = x[5, 128:] = 0
    codes_, scales = atom(x, rule(unit))
    np.testing.assert_array_equal(layer(unit, isa)(x), codes_ * scales)


@pytest.mark.parametrize(("n", "k", "group", "outliers", "most"), [
    (4096, 4096, 128, 128, 4.3), (1536, 576, 64, 64, 4.6), (1536, 576, 32, 32, 4.6)
])  # fmt: skip
def test_atoms_bits_a_weight(n: int, k: int, group: int, outliers: int, most: float) -> None:
    stored = replace(atom_weight((n, k, group, outliers)), shared={})
    assert cpu.pack(stored, "float32", 2).bytes * 8 / (n * k) <= most


def test_atoms_weights_whose_groups_are_no_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match=r"w: no native kernel .* 80 columns have 1 groups, beside 16 outliers"):
        layer(atom_weight((16, 96, 80, 16)), ISAS[0])


WIDE = tiny_config(hidden_size=64, intermediate_size=96, head_dim=16)
PROMPTS = [(1, 2, 3, 4, 5), tuple(i * 7 % 61 for i in range(40)), (9,)]


def nearest_atom(weight_: StoredTensor) -> StoredTensor:
    """A weight [n, k] rounded to the nearest codes in groups of 32, with 32 outliers and an order."""
    (n, k), w = weight_.shape, weight_.values()
    order = np.random.default_rng(k).permutation(k)
    groups, wide = w[:, order[:-32]].reshape(n, -1, 32), w[:, order[-32:]]
    scale = bfloat16(np.abs(groups).max(-1) / 7)
    q = np.clip(np.rint(groups / scale[..., None]), -8, 7).reshape(n, -1)
    outlier_scale = bfloat16(np.abs(wide).max(1) / 127)
    eights = np.clip(np.rint(wide / outlier_scale[:, None]), -128, 127).astype(np.int8)
    return StoredTensor(
        weight_.name, "ATOM", (n, k), np.concatenate([to_nibbles(q), eights.view(np.uint8)], 1),
        {"scale": scale, "outlier_scale": outlier_scale}, {"order": order, "clip": np.array([0.9], np.float32)},
        "atom",
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS[:1])
@pytest.mark.parametrize("scheme", ["w8a8-int8", "w8a8-fp8", "w4a8", "w4a16", "atom"])
def test_a_model_says_the_same_with_native_kernels_as_with_the_reference(scheme: str, isa: str) -> None:
    checkpoint = TinyCheckpoint(WIDE)
    made = SCHEMES.get(scheme)
    for name in checkpoint.names():
        if name.startswith("model.layers.") and len(checkpoint.shape(name)) == 2:
            nearest = replace(made, group=made.group and 32).nearest if made else nearest_atom
            checkpoint.put(nearest(checkpoint.tensor(name)))
    options: dict[str, Any] = {"checkpoint": checkpoint, "dtype": "float32", "kv_cache_dtype": "float32"}
    greedy = SamplingParams(temperature=0, max_tokens=12)
    short = [
        tuple((7 * i + 5 * j) % 61 for i in range(8)) for j in range(12)
    ]  # over which no code is rounded apart
    assert run_all(tiny_engine(kernels=isa, **options), short, greedy) == run_all(
        tiny_engine(**options), short, greedy
    )
    ours = run_all(tiny_engine(kernels=isa, max_num_batched_tokens=7, **options), PROMPTS, greedy)
    assert ours == [run_all(tiny_engine(kernels=isa, **options), [p], greedy)[0] for p in PROMPTS]


@pytest.mark.parametrize(("fmt", "activation"), [*KINDS[:3], ("ATOM", "atom")])
def test_a_file_of_packed_weights_has_all_of_them(fmt: str, activation: str, tmp_path: Path) -> None:
    stored = atom_weight((33, 256, 64, 64)) if fmt == "ATOM" else weight(fmt, (33, 256, 64), activation)
    stored = replace(stored, shared={**stored.shared, "order": np.arange(256)[::-1]})
    one, x, origin = cpu.pack(stored, "float32", 1), rows_of(5, 256), Origin("m", "s", "stored", native.layout())
    store(tmp_path / "x.packed", origin, {"w": one})
    found = load(tmp_path / "x.packed", origin, 1)
    again = found.packed["w"]
    assert not found.damaged
    assert (again.row_rule, again.activation, again.bytes) == (one.row_rule, activation, one.bytes)
    multiply = Packed("float32", "exact", ISAS[0], 1)
    np.testing.assert_array_equal(multiply.layer([again], [])(x), multiply.layer([one], [])(x))


LAYOUTS = {2: "4312dabac52df2a06abd2b7850ea0d79", 3: "321b6147ea7aed45abb0de9004b96e9b"}


def test_a_changed_layout_has_a_new_number() -> None:
    """Packed weights are kept in files. If this fails, raise LAYOUT in csrc/formats.h and add its digest here."""
    found = hashlib.sha256()
    for stored in (
        weight("I8", (24, 96, 0), "int8-token"), weight("I8", (24, 96, 32)),
        weight("I4", (24, 128, 64), zeros=True),
        weight("F8", (24, 96, 0), "fp8-token"), atom_weight((24, 128, 32, 32)),
        atom_weight((24, 128, 32, 32), pairs=False),
    ):  # fmt: skip
        found.update(cpu.pack(stored, "float32", 1).data.tobytes())
    assert LAYOUTS.get(native.layout()) == found.hexdigest()[:32]
