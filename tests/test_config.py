from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from dovetail.config import Found, KVSizes, Machine, Options, most_written, resolve, resolve_activations
from dovetail.core.errors import CapacityError, ConfigError
from dovetail.core.technique import Beside, Composition, Technique
from dovetail.models import geometry
from dovetail.ops.cpu import native
from dovetail.runtime.kv import bytes_per_token
from tests.tiny import tiny_config

MODEL = tiny_config(max_position_embeddings=1024)  # 2 layers of 2 KV heads of 8: 256 bytes a token in float32
FOUND = Found("tiny", "F32", (), Machine(threads=3, cpus=4, free_memory=64 << 20, cuda=False), bytes_per_token)


def settle(found: Found = FOUND, **options):
    return resolve(Options(**options), MODEL, geometry(MODEL), found)


def test_defaults_come_from_the_model_and_the_machine() -> None:
    c = settle()
    assert (c.dtype, c.device, c.threads, c.kv_cache_dtype) == ("float32", "cpu", 3, "float32")
    assert (c.max_model_len, c.block_size, c.num_kv_pages * 16 * 256) == (1024, 16, c.kv_memory)
    assert c.kv_memory <= 16 << 20


@pytest.mark.parametrize(
    ("stored", "cuda", "dtype", "kv"),
    [("F32", False, "float32", "float32"), ("BF16", False, "bfloat16", "bf16"),
     ("Q4_1", False, "float32", "float32"), ("Q4_1", True, "bfloat16", "bf16"),
     ("F16", False, "float16", "float16")],
)  # fmt: skip
def test_the_compute_type_follows_the_weights(stored: str, cuda: bool, dtype: str, kv: str) -> None:
    c = settle(replace(FOUND, stored_format=stored, machine=replace(FOUND.machine, cuda=cuda)))
    assert (c.dtype, c.kv_cache_dtype, c.device) == (dtype, kv, "cuda" if cuda else "cpu")


def test_only_defaults_are_lowered_to_what_fits() -> None:
    assert settle(kv_memory=100_000).max_model_len == 100_000 // (16 * 256) * 16
    with pytest.raises(CapacityError, match=r"max_model_len 1024 needs 64 pages.* hold 24"):
        settle(kv_memory=100_000, max_model_len=1024)
    assert settle(kv_memory=100_000, max_model_len=200).max_model_len == 200


def test_int8_kv_takes_a_quarter_of_the_bytes_and_a_scale() -> None:
    assert bytes_per_token(geometry(MODEL), "int8") == 2 * 2 * 2 * (8 + 4)
    assert settle(kv_memory=1 << 20, kv_cache_dtype="int8").num_kv_pages == (1 << 20) // (16 * 96)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int3"}, "int3.*float32"),
        ({"device": "tpu"}, "tpu"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"kv_cache_dtype": "fp3"}, "fp3.*int8"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 10**6}, "block_size"),
        ({"block_size": 1.5}, "block_size"),
        ({"threads": 0}, "threads"),
        ({"threads": 5}, "at most 4"),
        ({"max_num_seqs": -1}, "max_num_seqs"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"max_model_len": 2048}, "2 and the model's 1024"),
        ({"kv_memory": 0}, "kv_memory"),
        ({"kv_memory": 100}, "no page"),
        ({"kv_memory": 1 << 40}, "are free"),
    ],
)
def test_impossible_options_are_refused_with_what_to_change(options, words) -> None:
    with pytest.raises((ConfigError, CapacityError), match=words):
        settle(**options)


def test_a_head_dim_beyond_the_native_kernels_falls_back_with_a_reason() -> None:
    model = replace(MODEL, head_dim=514)
    found = replace(FOUND, machine=replace(FOUND.machine, isas=("fast", "scalar")))

    def kernels(model, **options):
        return resolve(Options(**options), model, geometry(model), found).kernels

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels(replace(MODEL, head_dim=512)) == "fast"
        assert kernels(model, kernels="torch") == "torch"
    with pytest.warns(UserWarning, match="head_dim of at most 512, and this model's is 514"):
        assert kernels(model) == "torch"
    with pytest.raises(ConfigError, match=r"'scalar': native .* head_dim of at most 512.*--kernels auto"):
        kernels(model, kernels="scalar")


def test_the_activations_that_a_checkpoint_was_made_for_are_no_option() -> None:
    found = replace(FOUND, stored_format="I8", activation="int8-token")
    c = settle(found)
    assert (c.activations, c.kv_cache_dtype, c.dtype) == ("int8-token", "bf16", "float32")
    with pytest.raises(
        ConfigError, match="'exact' were asked for, but the checkpoint was made for int8-token; drop"
    ):
        settle(found, activations="exact")


def test_the_configuration_prints_whole() -> None:
    c = settle()
    assert all(f"{name}: " in str(c) for name in c.to_dict())


def test_activations_that_are_rounded_need_native_kernels_and_blocks() -> None:
    for asked in ("int8", "int16"):
        options = Options(activations=asked)
        assert resolve_activations(options, "Q4_K", "scalar") == asked
        with pytest.raises(ConfigError, match=f"'{asked}' needs native kernels"):
            resolve_activations(options, "Q4_K", "torch")
        for stored, dtype in (("F32", "auto"), ("Q4_K", "bf16")):
            with pytest.raises(ConfigError, match=f"'{asked}' needs weights that are stored in blocks"):
                resolve_activations(replace(options, dtype=dtype), stored, "scalar")
    with pytest.raises(ConfigError, match="'int4' is unknown; the known ones are auto, int8, int16, exact"):
        resolve_activations(Options(activations="int4"), "Q4_K", "scalar")


# -- what techniques keep beside KV, and the slow tier

TIERED = {"kv_cache_dtype": "bf16", "kv_offloading_backend": "host", "kernels": "torch"}


def beside(page: int, request: int) -> Found:
    """Of two techniques, of which one keeps nothing."""
    keeper = Technique("keeper", (), lambda site: {}, beside=lambda shape, size, value: Beside(page, request))
    idle = Technique("idle", (), lambda site: {})
    return replace(FOUND, beside=Composition((idle, keeper)).beside)


def test_what_techniques_keep_is_within_kv_memory() -> None:
    """A page of 16 tokens takes 4096 bytes of K and V."""
    found = beside(page=1024, request=100)
    c = settle(found, kv_memory=100_000, max_num_seqs=8)
    assert c.num_kv_pages == (100_000 - 8 * 100) // (4096 + 1024)
    assert c.kv_memory == c.num_kv_pages * 4096
    least = 4096 + 1024 + 8 * 100
    assert settle(found, kv_memory=least, max_num_seqs=8).num_kv_pages == 1
    with pytest.raises(
        CapacityError, match=r"hold no page: .* 4096 bytes, and what keeper keeps beside KV 1824 bytes; raise"
    ):
        settle(found, kv_memory=least - 1, max_num_seqs=8)
    with pytest.raises(CapacityError, match=r"takes 4096 bytes, and what keeper keeps beside KV 50124 bytes;"):
        settle(beside(page=1024, request=49_100), kv_memory=54_219, max_num_seqs=1)
    with pytest.raises(CapacityError, match=r"takes 4096 bytes; raise"):
        settle(kv_memory=4095)


def test_a_context_that_what_techniques_keep_does_not_leave_room_for_is_refused() -> None:
    with pytest.raises(
        CapacityError, match=r"needs 10 pages \(40960 bytes\) of KV, and what keeper .* 10540 bytes, but"
    ):
        settle(beside(page=1024, request=100), kv_memory=51_499, max_model_len=160, max_num_seqs=3)
    c = settle(beside(page=1024, request=100), kv_memory=51_500, max_model_len=160, max_num_seqs=3)
    assert c.num_kv_pages == 10


def test_what_techniques_keep_is_within_kv_memory_beside_a_slow_tier() -> None:
    """One layer of all pages, and both of those that a step writes, is a page of half the bytes for each."""
    if native() is None:
        pytest.skip("a slow tier needs the native library")
    page, options = 4096, {"max_num_batched_tokens": 16, "max_num_seqs": 1, **TIERED}
    cells = (20 + 2 * 2) * page // 2
    found = beside(page=10, request=1000)
    size = {"kv_offloading_size": 20 * page, "max_model_len": 320}
    assert settle(found, kv_memory=cells + 1200, **size, **options).num_kv_cells == 24
    with pytest.raises(CapacityError, match=r"49152 bytes, and what keeper keeps beside KV 1200 bytes; raise"):
        settle(found, kv_memory=cells + 1199, **size, **options)
    all_of_it = {"kv_offloading_size": 2 * page, "max_model_len": 32}  # fewer pages than a step may write
    assert settle(kv_memory=2 * page, **all_of_it, **options).num_kv_cells == 4
    with pytest.raises(CapacityError, match=r"take 8192 bytes; raise"):
        settle(kv_memory=2 * page - 1, **all_of_it, **options)


def test_a_disk_keeps_what_moves_together_in_whole_sectors() -> None:
    """96 dimensions in bf16: 6144 bytes of K and V of 16 tokens take two sectors."""
    sizes = KVSizes(16, 160, 2 * 3 * 6144, 2, 3, Beside())
    assert (sizes.stored("host"), sizes.stored("disk")) == (2 * 3 * 6144, 2 * 3 * 8192)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("seqs", [1, 2, 3])
@pytest.mark.parametrize("tokens", range(1, 10))
def test_the_most_pages_that_a_step_can_write(tokens: int, seqs: int, size: int) -> None:
    def most(left: int, spans: int) -> int:
        """Of `left` tokens in at most so many spans, each from anywhere in a page."""
        if not left or not spans:
            return 0
        return max(
            (start + n - 1) // size + 1 + most(left - n, spans - 1)
            for n in range(1, left + 1)
            for start in range(size)
        )

    assert most_written(tokens, seqs, size) == most(tokens, seqs)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "auto"])
def test_a_slow_tier_is_behind_the_memory_of_the_cpu(device: str) -> None:
    machine = replace(FOUND.machine, cuda=True)
    with pytest.raises(ConfigError, match=r"KV is on cuda.*; use --device cpu"):
        settle(replace(FOUND, machine=machine), device=device, kv_offloading_size=1 << 20, **TIERED)
    if native() is not None:
        on_cpu = settle(replace(FOUND, machine=machine), device="cpu", kv_offloading_size=1 << 18, **TIERED)
        assert on_cpu.num_kv_cells > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_offloading_path": "/tmp"}, "kv_offloading_path means nothing without a slow tier"),
        ({"emulate_link": 1.0}, "emulate_link means nothing without a slow tier"),
        ({"kv_offloading_size": 1 << 18, "kv_offloading_backend": "tape"}, "'tape' is unknown.* disk and host"),
        ({"kv_offloading_size": 1 << 18, **TIERED, "emulate_link": -1.0}, "GB/s above 0"),
        ({"kv_offloading_size": 1 << 18, **TIERED, "kv_offloading_path": "/tmp"}, "is the disk's"),
        (
            {"kv_offloading_size": 1 << 18, **TIERED, "kv_cache_dtype": "int8", "block_size": 8},
            "float32, bf16.* not int8",
        ),
        ({"kv_offloading_size": 1 << 18, **TIERED, "block_size": 8}, "multiple of 16 tokens.* of 8"),
        ({"kv_offloading_size": 0, **TIERED}, "kv_offloading_size must be a whole number of at least 1"),
    ],
)
def test_a_slow_tier_that_cannot_be_had_is_refused(options, words) -> None:
    if native() is None:
        pytest.skip("a slow tier needs the native library")
    with pytest.raises(ConfigError, match=words):
        settle(**options)
