from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from dovetail.config import Found, Machine, Options, resolve
from dovetail.core.errors import CapacityError, ConfigError
from dovetail.models import geometry
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


def test_the_configuration_prints_whole() -> None:
    c = settle()
    assert all(f"{name}: " in str(c) for name in c.to_dict())
