"""What a model's program costs, and which executor its layers allow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dovetail.core.cost import Load, total
from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import WALL_CLOCK
from dovetail.core.technique import Technique
from dovetail.core.types import SpanResult, StepResult
from dovetail.layers.linear import Dense, Packed
from dovetail.ops.cpu import isas
from dovetail.ops.stored import StoredTensor
from dovetail.runtime.executor import ModelExecutor
from dovetail.runtime.ledger import Ledger, recorded
from dovetail.runtime.native import NativeExecutor
from dovetail.runtime.target import Weights
from tests.tiny import TinyCheckpoint, run_all, tiny_config, tiny_engine

native = pytest.mark.skipif(not isas(), reason="the native kernels were not built")
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = [tuple(i * 7 % 61 for i in range(30)), (1, 2, 3)]
CONFIG = tiny_config(num_layers=3, hidden_size=64, intermediate_size=96, head_dim=16)
CHECKPOINT = TinyCheckpoint(CONFIG)
FLOAT: dict[str, Any] = dict(checkpoint=CHECKPOINT, dtype="float32", kv_cache_dtype="float32", page_size=16)
VALUES = 3 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96) + 61 * 64  # of all products


def fill(**parts: Any) -> Technique:
    return Technique("-".join(parts), tuple(parts), lambda site: parts)


def operations_of(engine: Any) -> list[Any]:
    return recorded(engine.executor.model, engine.executor.kv).operations


def test_a_step_of_the_reference_costs_its_weights_and_kv() -> None:
    program = operations_of(tiny_engine(**FLOAT))
    linear = [o for o in program if o.name == "linear"]
    assert [o.layer for o in linear] == [0] * 4 + [1] * 4 + [2] * 4 + [-1]
    cost = total(linear, Load(((5, 5),), 1))
    assert cost.bytes == {"device": VALUES * 4.0}
    assert cost.flops == {"float32": 2.0 * (5 * (VALUES - 61 * 64) + 61 * 64)}
    attend = total([o for o in program if o.name == "attend"], Load(((1, 20), (1, 30))))
    assert attend.bytes == {"device": 3 * 50 * 2 * 2 * 16 * 4.0}  # layers, keys, K and V, heads, head_dim, bytes
    assert attend.flops == {"attention": 3 * 50 * 4.0 * 4 * 16}
    assert total(linear, Load(((5, 5),), 0)).bytes["device"] == (VALUES - 61 * 64) * 4.0  # no logits, no head


def test_a_sliding_layer_reads_its_window() -> None:
    config = tiny_config(num_layers=2, sliding_windows=(8, None))
    program = operations_of(tiny_engine(checkpoint=TinyCheckpoint(config)))
    first, second = (o.cost(Load(((1, 100),))) for o in program if o.name == "attend")
    assert first.all_bytes * 100 == second.all_bytes * 8


@native
def test_a_native_program_states_what_techniques_add() -> None:
    plain = tiny_engine(kernels=isas()[0], **FLOAT)
    assert [o.name for o in plain.executor.operations] == [o.name for o in operations_of(plain)]
    quest = tiny_engine("quest:budget=64,skip_layers=1", kernels=isas()[0], **FLOAT)
    picks = [o for o in quest.executor.operations if o.name == "pick"]
    assert [o.layer for o in picks] == [1, 2]
    assert all(o.cost(Load(((1, 160),))).all_bytes > 0 for o in picks)
    load = Load(((1, 100),), 1)
    packed = total(plain.executor.operations, load).all_bytes
    assert packed >= total(operations_of(tiny_engine(**FLOAT)), load).all_bytes


class Halved:
    """A Format of codes and scales: int8 by channel where `chosen` says so, and as stored elsewhere."""

    def __init__(self, inner: Any, chosen: str) -> None:
        self.inner, self.chosen, self.seen = inner, chosen, 0

    def linear(self, weights: Any, bias: Any) -> Any:
        return self.inner.linear([self.coded(w) if self.chosen in w.name else w for w in weights], bias)

    def coded(self, weight: StoredTensor) -> StoredTensor:
        self.seen += 1
        values = weight.values()
        scale = np.abs(values).max(1) / np.float32(127)
        codes = (values / scale[:, None]).round().astype(np.int8).view(np.uint8)
        return StoredTensor(weight.name, "I8", weight.shape, codes, {"scale": scale[:, None]})


def test_int16_rows_cost_twice_the_operations_of_int8() -> None:
    ledger = Ledger(tiny_engine(**FLOAT).executor.model.geometry, 64, 1.0)
    for activation in ("int8", "int16"):
        ledger.linear(0, 1, Weights(64, 8, 100, activation))
    once, twice = (operation.cost(Load(((3, 3),))) for operation in ledger.operations[-2:])
    assert (once.flops, twice.flops) == ({"int8": 2.0 * 64 * 8 * 3}, {"int8": 4.0 * 64 * 8 * 3})
    assert once.bytes == twice.bytes


@native
@pytest.mark.parametrize("chosen", ["", "mlp", "q_proj"])
def test_weights_of_several_parts_in_some_layers_stay_native(chosen: str) -> None:
    fmt = Halved(Packed("float32", "exact", isas()[0], 1), chosen)
    engine = tiny_engine(fill(format=fmt), kernels=isas()[0], **FLOAT)
    assert isinstance(engine.executor, NativeExecutor)
    reference = Halved(Dense("float32"), chosen)
    slow = tiny_engine(fill(format=reference), **FLOAT)
    assert isinstance(slow.executor, ModelExecutor)
    assert fmt.seen == reference.seen > 0
    assert run_all(engine, PROMPTS, GREEDY) == run_all(slow, PROMPTS, GREEDY)


def test_rows_of_several_parts_are_permuted_together() -> None:
    stored = Halved(None, "").coded(CHECKPOINT.tensor("model.layers.0.mlp.down_proj.weight"))
    index = np.arange(64)[::-1]
    assert np.array_equal(stored.permute_rows(index).values(), stored.values()[index])
    some = np.array([3, 3, 60])
    assert np.array_equal(stored.rows(some).values(), stored.values()[some])
    order = np.random.default_rng(0).permutation(96)
    codes = np.ascontiguousarray(stored.data.reshape(64, 96)[:, order])
    shuffled = replace(stored, data=codes, shared={"order": order})
    assert np.array_equal(shuffled.values(), stored.values())
    assert np.array_equal(shuffled.permute_rows(index).values(), stored.values()[index])
    assert shuffled.nbytes == 64 * 96 + 64 * 4 + 96 * 8


@native
def test_a_format_that_knows_of_no_programs_runs_operation_by_operation() -> None:
    class Plain:
        def linear(self, weights: Any, bias: Any) -> Any:
            matrix = torch.cat([w.dequantize(torch.float32) for w in weights])
            return lambda x: x @ matrix.T

    engine = tiny_engine(fill(format=Plain()), kernels=isas()[0], **FLOAT)
    linear = [o for o in operations_of(engine) if o.name == "linear"]
    assert not any(o.native for o in linear)
    assert total(linear, Load(((1, 1),), 1)).bytes == {"device": VALUES * 4.0}
    assert isinstance(engine.executor, ModelExecutor)
    assert run_all(engine, PROMPTS, GREEDY) == run_all(tiny_engine(**FLOAT), PROMPTS, GREEDY)


def test_an_executor_of_a_technique_is_chosen_before_any_weight_is_read() -> None:
    class Untouchable(TinyCheckpoint):
        def tensor(self, name: str) -> StoredTensor:
            raise AssertionError(f"{name} was read")

    class Sevens:
        num_stages = 1
        clock = WALL_CLOCK

        def run(self, plan: Any) -> StepResult:
            return StepResult([SpanResult(tokens=[7] * s.sample) for s in plan.spans])

    def unready() -> None:
        raise AssertionError("there is no model to be measured")

    def build(site: Any) -> dict[str, Any]:
        site.ready.append(unready)
        return {"executor": Sevens()}

    sevens = Technique("sevens", ("executor",), build)
    engine = tiny_engine(sevens, checkpoint=Untouchable(CONFIG))
    assert run_all(engine, PROMPTS, GREEDY) == [[7] * 12] * 2
    with pytest.raises(ConfigError, match="sink-window fills selector, which sevens never asks"):
        tiny_engine(sevens, "sink-window", checkpoint=Untouchable(CONFIG))
