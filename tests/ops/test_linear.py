"""Native linear kernels against their torch references, for every format, activation and instruction set."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from dovetail.ops.dequant import BLOCKS

native = pytest.importorskip("dovetail._native")

ISAS = native.isas() + native.emulated()
TILES = [isa for isa in ISAS if isa.startswith("amx")]
QUANTIZED = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4",
]  # fmt: skip
SCALES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82),
    "Q3_K": (108,),
}  # fmt: skip
CASES = [(f, a) for f in QUANTIZED for a in ("int8", "int16", "exact")] + [
    ("F32", "exact"), ("F16", "exact"), ("BF16", "exact"), ("BF16", "bf16")
]  # fmt: skip


def stored(name: str, n: int, k: int, seed: int) -> torch.Tensor:
    """Random bytes [n, row bytes] whose float16 scales are ordinary numbers."""
    rng = np.random.default_rng(seed)
    if BLOCKS[name].values == 1:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        values = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32)).to(dtype)
        return values.view(torch.uint8)
    block = BLOCKS[name]
    data = rng.integers(0, 256, (n, k // block.values, block.bytes), dtype=np.uint8)
    if name == "MXFP4":
        data[:, :, 0] = rng.integers(117, 123, data.shape[:2])
        return torch.from_numpy(data.reshape(n, -1))
    for at in SCALES.get(name, (0,)):
        scale = rng.uniform(-0.02, 0.02, data.shape[:2]).astype(np.float16)
        data[:, :, at : at + 2] = scale[..., None].view(np.uint8)
    return torch.from_numpy(data.reshape(n, -1))


def dense(name: str, data: torch.Tensor, k: int) -> torch.Tensor:
    block = BLOCKS[name]
    return torch.from_numpy(block.dequantize(data.numpy().reshape(-1, block.bytes))).view(data.shape[0], k)


def quantized_rows(x: torch.Tensor, most: int = 127) -> torch.Tensor:
    """The values of int8 activations: per row and 32 values, scale = max|x| / 127. Of int16: / 32639."""
    blocks = x.view(x.shape[0], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / most
    inverse = torch.where(scale > 0, most / blocks.abs().amax(-1, keepdim=True), 0)
    return (torch.round(blocks * inverse) * scale).view_as(x)


CODES = {"Q4_1": (4, 20), "Q5_1": (4, 24), "Q4_K": (16, 144), "Q5_K": (16, 176), "Q2_K": (16, 80)}  # with minima


def minima(name: str, data: torch.Tensor, k: int, each: int) -> torch.Tensor:
    """The minima of every `each` values, float64 [n, k / each]: the values of zero codes."""
    block = BLOCKS[name]
    zeros = data.view(data.shape[0], -1, block.bytes).clone()
    zeros[:, :, slice(*CODES[name])] = 0
    return dense(name, zeros.view(data.shape[0], -1), k)[:, ::each].double()


def minima_of_rounded_sums(x: torch.Tensor, name: str, data: torch.Tensor) -> torch.Tensor:
    """What rounding adds to a product: K formats take each row's sums of 32 values, with which the minima are
    multiplied, as 16-bit multiples of a unit: the largest of 8 sums / 32767."""
    sums = quantized_rows(x).double().view(len(x), -1, 8, 32).sum(-1)
    most = sums.abs().amax(-1, keepdim=True)
    rounded = torch.round(sums * torch.where(most > 0, 32767 / most, 0)) * most / 32767
    return ((rounded - sums).view(len(x), -1) @ minima(name, data, x.shape[1], 32).T).float()


def minima_of_true_sums(x: torch.Tensor, name: str, data: torch.Tensor) -> torch.Tensor:
    """What int16 rows add to a product of their values: minima are multiplied with sums of the row itself."""
    error = (x.double() - quantized_rows(x, 32639)).view(len(x), -1, 16).sum(-1)
    return (error @ minima(name, data, x.shape[1], 16).T).float()


class Layer:
    """One linear operation in a program of its own."""

    def __init__(self, parts, k, isa, activation, threads=2, gate="", bias=(), norm=(), add=False):
        self.program = native.Program(isa, threads, True, True)
        self.keep = [native.Packed(f, d.data_ptr(), d.shape[1], d.shape[0], k, threads) for f, d in parts]
        n = parts[0][1].shape[0] if gate else sum(d.shape[0] for _, d in parts)
        self.x, self.y = self.program.slot(k, False), self.program.slot(n, False)
        self.n = n
        args = (self.keep, activation, list(norm), 1e-5, list(bias), add, gate, False)
        self.program.linear(self.x, self.y, *args)

    def __call__(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        rows = len(x)
        self.program.shape(1, "NHD", "float32", (0, 0, 0, 0), (1, 4096, 1, 2, 0))
        self.program.clear()
        self.program.add(0, rows, [0] * rows, [], [0], 0, 0)
        self.program.run(0, 0)
        self.program.view(self.x, rows)[:, : x.shape[1]] = x.numpy()
        if y is not None:
            self.program.view(self.y, rows)[:, : self.n] = y.numpy()
        self.program.run(0, 1)
        return torch.from_numpy(self.program.view(self.y, rows)[:, : self.n].copy())


def reference(x: torch.Tensor, w: torch.Tensor, activation: str) -> torch.Tensor:
    if activation in ("int8", "int16"):
        x = quantized_rows(x, 127 if activation == "int8" else 32639)
    elif activation == "bf16":
        x = x.to(torch.bfloat16).float()
    return (x.double() @ w.double().T).float()


def close(got: torch.Tensor, want: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> bool:
    """Within float32 rounding of sums of this size."""
    size = x.double().abs() @ w.double().abs().T
    return bool(((got - want).abs() <= 2e-6 * size + 1e-7).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "activation"), CASES)
def test_matches_the_reference(name: str, activation: str, isa: str) -> None:
    k = 512
    for n, rows in ((16, 1), (48, 2), (64, 3), (32, 5), (80, 7), (112, 17), (200, 33)):
        data = stored(name, n, k, n)
        w = dense(name, data, k)
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(n)) * 3
        got, want = Layer([(name, data)], k, isa, activation)(x), reference(x, w, activation)
        if activation == "int8" and name in ("Q4_K", "Q5_K"):
            want += minima_of_rounded_sums(x, name, data)
        if activation == "int16" and name in CODES:
            want += minima_of_true_sums(x, name, data)
        assert close(got, want, x, w), (n, rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "activation"), CASES)
def test_a_row_does_not_depend_on_the_others(name: str, activation: str, isa: str) -> None:
    k, n = 256, 80
    data = stored(name, n, k, 1)
    x = torch.randn(40, k, generator=torch.Generator().manual_seed(0))
    layer = Layer([(name, data)], k, isa, activation)
    alone = torch.cat([layer(row[None]) for row in x])
    for rows in (2, 3, 4, 5, 6, 7, 11, 40):
        assert torch.equal(layer(x[:rows]), alone[:rows]), rows
    assert torch.equal(Layer([(name, data)], k, isa, activation, threads=1)(x), alone)


@pytest.mark.parametrize("activation", ["int8", "int16"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_integer_products_are_the_same_on_every_instruction_set(name: str, activation: str) -> None:
    k, n = 512, 72
    data = stored(name, n, k, 3)
    x = torch.randn(15, k, generator=torch.Generator().manual_seed(0))
    results = [Layer([(name, data)], k, isa, activation)(x) for isa in ISAS]
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_tiles_give_the_bits_of_vectors(name: str, isa: str) -> None:
    """For any number of rows, of columns and of blocks, also through a gate and onto a residual."""
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 512, generator=random), torch.randn(100, 400, generator=random)
    for n, k in ((17, 256), (200, 512), (48, 512 if BLOCKS[name].values > 32 else 288)):
        parts = [(name, stored(name, n, k, n)), (name, stored(name, n, k, n + 1))]
        for options in ({}, {"gate": "silu"}, {"add": True}):
            scalar, layer = (Layer(parts, k, i, "int8", **options) for i in ("scalar", isa))
            before = y[:, : layer.n].contiguous() if options.get("add") else None
            want = scalar(x[:, :k].contiguous(), before)
            for rows in (*range(1, 41), 48, 49, 97, 100):
                got = layer(x[:rows, :k].contiguous(), None if before is None else before[:rows])
                assert torch.equal(got, want[:rows]), (n, k, rows, options)


def tile_sums(x: torch.Tensor, w: torch.Tensor) -> np.ndarray:
    """x @ w.T as the manual adds it up: per 32 of K a sum of even and one of odd products, both then added."""
    a, b = (v.to(torch.bfloat16).float().numpy().astype(np.longdouble) for v in (x, w))
    out = np.zeros((len(a), len(b)), np.float32)
    for first in range(0, a.shape[1], 32):
        sums = np.zeros((2, *out.shape), np.float32)
        for k in range(first, first + 32):
            sums[k % 2] = sums[k % 2] + a[:, k, None] * b[:, k]  # exact but for the rounding to float32
        out += sums[0] + sums[1]
    return out


@pytest.mark.parametrize("isa", native.emulated())
def test_emulated_tiles_add_bfloat16_in_the_order_of_the_manual(isa: str) -> None:
    n, k = 33, 96
    data = stored("BF16", n, k, 0)
    layer, adding = (Layer([("BF16", data)], k, isa, "bf16", add=add) for add in (False, True))
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, k, generator=random), torch.randn(40, n, generator=random)
    want = tile_sums(x, dense("BF16", data, k))
    for rows in (1, 2, 8, 9, 16, 17, 32, 33, 40):
        assert np.array_equal(layer(x[:rows]).numpy(), want[:rows]), rows
        assert np.array_equal(adding(x[:rows], y[:rows]).numpy(), want[:rows] + y[:rows].numpy()), rows


@pytest.mark.parametrize("isa", TILES)
def test_tiles_take_denormal_bfloat16_for_zero(isa: str) -> None:
    w = torch.full((16, 32), 2.0**-127).to(torch.bfloat16)
    layer = Layer([("BF16", w.view(torch.uint8))], 32, isa, "bf16")
    assert not layer(torch.full((1, 32), 2.0**120)).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_gate_norm_bias_and_residual(gate: str, isa: str) -> None:
    k, n = 96, 40
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_pytorch_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "relu": torch.relu,
    }
    random = torch.Generator().manual_seed(5)
    norm, bias = torch.rand(k, generator=random) + 0.5, torch.randn(2 * n, generator=random)
    gate_data, up_data = stored("F32", n, k, 1), stored("Q8_0", n, k, 2)
    w = torch.cat([dense("F32", gate_data, k), dense("Q8_0", up_data, k)])
    for rows in (1, 3, 9):
        x = torch.randn(rows, k, generator=random)
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm
        full = normed @ w.T + bias
        want = functions[gate](full[:, :n]) * full[:, n:]
        parts = [("F32", gate_data), ("Q8_0", up_data)]
        got = Layer(parts, k, isa, "exact", gate=gate, norm=norm.tolist(), bias=bias.tolist())(x)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        before = torch.randn(rows, 2 * n, generator=random)
        added = Layer(parts, k, isa, "exact", norm=norm.tolist(), bias=bias.tolist(), add=True)(x, before)
        torch.testing.assert_close(added, before + full, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_widths_that_fill_no_tile_or_block(isa: str) -> None:
    for n, k in ((1, 1), (7, 5), (17, 33), (30, 70)):
        data = stored("F32", n, k, 9)
        x = torch.randn(6, k, generator=torch.Generator().manual_seed(k))
        got = Layer([("F32", data)], k, isa, "exact")(x)
        torch.testing.assert_close(got, x @ dense("F32", data, k).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["int8", "int16", "exact"])
@pytest.mark.parametrize("name", ["Q4_1", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "MXFP4"])
def test_nan_and_infinity_in_a_row_stay_in_that_row(name: str, activation: str, isa: str) -> None:
    data = stored(name, 32, 256, 0)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
        x[1, 40] = bad
        got = Layer([(name, data)], 256, isa, activation)(x)
        assert not torch.isfinite(got[1]).any()
        assert torch.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize("name", native.formats())
def test_single_rows_are_dequantized_bit_for_bit(name: str) -> None:
    data = stored(name, 20, 512, 4)
    want = dense(name, data, 512)
    got = torch.empty_like(want)
    for row, out in zip(data, got, strict=True):
        native.dequantize_row(name, row.data_ptr(), 512, out.data_ptr())
    assert torch.equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_int16_rows_are_exact(sign: int, isa: str) -> None:
    data = torch.from_numpy(np.full((16, 34), 0x80, np.uint8))  # codes of -128
    data[:, :2] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    x = torch.full((1, 32), sign * 32639.0)
    assert Layer([("Q8_0", data)], 32, isa, "int16")(x).unique().tolist() == [-128.0 * 32 * 32639 * sign]


@pytest.mark.parametrize("isa", ISAS)
def test_int16_rows_of_nothing_are_zeros(isa: str) -> None:
    data = stored("Q4_0", 16, 64, 0)
    for tiny in (0.0, -0.0, 1e-45, 1e-38, -1e-31):
        assert not Layer([("Q4_0", data)], 64, isa, "int16")(torch.full((1, 64), tiny)).any()


@pytest.mark.parametrize("isa", ISAS)
def test_every_scale_of_mxfp4_is_the_power_of_two_that_ggml_takes(isa: str) -> None:
    """Also the subnormal ones, and 255: each times one, with the code of one half."""
    data = torch.full((256, 17), 0x11, dtype=torch.uint8)
    data[:, 0] = torch.arange(256)
    want = dense("MXFP4", data, 32)
    row = torch.empty(32)
    for line, values in zip(data, want, strict=True):
        native.dequantize_row("MXFP4", line.data_ptr(), 32, row.data_ptr())
        assert torch.equal(row, values)
    x = torch.zeros(1, 32)
    x[0, 3] = 1
    assert torch.equal(Layer([("MXFP4", data)], 32, isa, "exact")(x)[0], want[:, 3])


LAYOUTS = {
    1: "9e015f16e59ee58f2be4f74dd24224bd",
    2: "63b7bd789b3fe443fc0acab37e22b3a6",
    3: "63b7bd789b3fe443fc0acab37e22b3a6",  # weights on uniform grids have another header
}


def test_a_changed_layout_has_a_new_number() -> None:
    """Packed weights are kept in files. If this fails, raise LAYOUT in csrc/formats.h and add its digest here."""
    found = hashlib.sha256()
    for name in ["F32", "F16", "BF16", *QUANTIZED]:
        n, k = 24, 64 if BLOCKS[name].values == 1 else 512
        rows = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, k * 4), dtype=np.uint8))
        size = k // BLOCKS[name].values * BLOCKS[name].bytes
        found.update(native.Packed(name, rows.data_ptr(), size, n, k, 1).data.tobytes())
    assert LAYOUTS.get(native.layout()) == found.hexdigest()[:32]
