"""`quantize` from a model to a checkpoint: what is written, by whom it is read, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dovetail
from dovetail.checkpoint import Checkpoint
from dovetail.cli import build
from dovetail.core.errors import ConfigError, ModelError
from dovetail.models import open_checkpoint
from dovetail.ops.grids import codes, from_nibbles, num_outliers
from dovetail.ops.stored import StoredTensor
from dovetail.quantize.calibration import sample
from dovetail.quantize.recipe import Recipe, needs_text, resolved
from dovetail.quantize.run import Report, quantize
from dovetail.text.corpus import Corpus
from tests.helpers.hf_models import save_model

TEXT = Corpus("text", " ".join(f"the {i * 7919 % 997} quick brown foxes jump over {i} dogs" for i in range(400)))
SMALL = {"samples": 6, "length": 64}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("w8a8-fp8", {}),
    "int8": ("w8a8-int8", SMALL),
    "int8 rtn": ("w8a8-int8", {"method": "rtn"}),
    "int8 smooth": ("w8a8-int8", SMALL | {"smoothquant": 0.5}),
    "w4a16": ("w4a16", SMALL | {"group": 32}),
    "w4a16 head": ("w4a16", SMALL | {"group": 32, "head": "int8"}),
    "w4a8": ("w4a8", SMALL | {"group": 32, "dtype": "float32"}),
    "atom": ("atom", SMALL | {"group": 32, "outliers": 32}),
    "atom whole": ("atom", SMALL | {"group": 0, "outliers": 32}),
    "tender": ("tender", SMALL | {"groups": 4, "chunk": 32}),
    "tender4": ("tender", SMALL | {"bits": 4, "groups": 4, "chunk": 32}),
}
STANDARD = [name for name in FORMATS if not name.startswith(("atom", "tender"))]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "model"
    save_model(path, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    return path


def recipe(checkpoint: Checkpoint, name: str, seed: int = 0, **changes: Any) -> Recipe:
    form, given = FORMATS[name]
    options = resolved(form, given | changes, checkpoint.config)
    return Recipe(form, options, TEXT if needs_text(form, options) else None, seed)


def made(plain: Path, out: Path, name: str, **changes: Any) -> Report:
    checkpoint = open_checkpoint(plain)
    return quantize(checkpoint, out, recipe(checkpoint, name, **changes), progress=False)


@pytest.fixture(scope="module")
def all_made(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, done = tmp_path_factory.mktemp("made"), {}

    def get(name: str) -> Path:
        if name not in done:
            done[name] = folder / name.replace(" ", "-")
            made(plain, done[name], name)
        return done[name]

    return get


def digests(path: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.iterdir())}


@pytest.mark.parametrize("name", FORMATS)
def test_it_opens_and_its_weights_are_near(name: str, plain: Path, all_made: Callable[[str], Path]) -> None:
    form, given = FORMATS[name]
    found, original = open_checkpoint(all_made(name)), open_checkpoint(plain)
    kind = {"w8a8-fp8": "F8", "w8a8-int8": "I8", "atom": "ATOM", "tender": f"TENDER{given.get('bits', 8)}"}.get(
        form, "I4"
    )
    bound = {"F8": 0.04, "I8": 0.02, "TENDER8": 0.02, "I4": 0.25, "ATOM": 0.3, "TENDER4": 0.3}[kind]
    order = found.tensor("model.layers.1.mlp.gate_proj.weight")
    for tensor in original.names():
        a, b = original.tensor(tensor).values(), found.tensor(tensor).values()
        if "_proj" not in tensor:
            assert found.format(tensor) == ("F32" if given.get("dtype") == "float32" else "BF16") or "head" in name
            continue
        assert found.format(tensor) == kind
        if form == "atom" and ("gate" in tensor or "up" in tensor or "down" in tensor):
            assert np.sort(np.abs(a)).sum() == pytest.approx(np.sort(np.abs(b)).sum(), rel=0.2)  # permuted
        elif "smooth" not in name:
            assert np.linalg.norm(a - b) < bound * np.linalg.norm(a), tensor
    assert order.activation == {"w8a8-fp8": "fp8-token", "w8a8-int8": "int8-token", "w4a16": "int16",
                                "w4a8": "int8-token"}.get(form, form)  # fmt: skip


TOKENS = torch.arange(40)[None] * 7 % 260


def logits(plain: Path, weights: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """What transformers computes with the values of a checkpoint. plain: of the same architecture."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(plain).eval()
    values = {n: torch.from_numpy(weights.tensor(n).values().copy()) for n in weights.names()}
    model.load_state_dict(values, strict=False)
    with torch.inference_mode():
        return model(tokens).logits


@pytest.mark.parametrize("name", FORMATS)
def test_the_model_computes_nearly_the_same(name: str, plain: Path, all_made: Callable[[str], Path]) -> None:
    """Also where magnitudes moved between norms and weights (SmoothQuant), and rows were permuted (Atom)."""
    expected = logits(plain, open_checkpoint(plain))
    found = logits(plain, open_checkpoint(all_made(name)))
    error = float((found - expected).norm() / expected.norm())
    assert error < {"w4": 0.3, "at": 0.35}.get(name[:2], 0.35 if name == "tender4" else 0.05)


@pytest.mark.parametrize("name", STANDARD)
def test_the_library_reads_the_same_values(name: str, all_made: Callable[[str], Path]) -> None:
    path = all_made(name)
    config = QuantizationConfig.model_validate(
        json.loads((path / "config.json").read_text())["quantization_config"]
    )
    tensors, checkpoint = load_file(path / "model.safetensors"), open_checkpoint(path)
    for scheme in config.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
        for full in [n for n in checkpoint.names() if checkpoint.format(n) in ("I4", "I8", "F8")]:
            module = full.removesuffix(".weight")
            if (module == "lm_head") != (scheme.targets == ["lm_head"]):
                continue
            state = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
            assert set(state) == set(compressor.compression_param_names(scheme))
            state["weight_scale"] = state["weight_scale"].float()
            values = compressor.decompress(state, scheme)["weight"]
            np.testing.assert_array_equal(checkpoint.tensor(full).values(), values.numpy())


@pytest.mark.parametrize("name", ["int8 smooth", "w4a16 head", "atom", "tender"])
def test_the_same_recipe_gives_the_same_bytes(
    name: str, plain: Path, tmp_path: Path, all_made: Callable[[str], Path]
) -> None:
    made(plain, tmp_path / "again", name)
    assert digests(tmp_path / "again") == digests(all_made(name))
    if name != "tender":
        made(plain, tmp_path / "seed", name, seed=1)
        assert digests(tmp_path / "seed")["model.safetensors"] != digests(all_made(name))["model.safetensors"]


@pytest.mark.parametrize("name", ["w4a16", "atom", "tender"])
def test_an_interrupted_run_goes_on(
    name: str, plain: Path, tmp_path: Path, all_made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dovetail.quantize import run

    real = run.Layer.block

    def interrupted(layer: Any, changed: Any = None) -> Any:
        if layer.index == 1:
            raise KeyboardInterrupt
        return real(layer, changed)

    monkeypatch.setattr(run.Layer, "block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(plain, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(run.Layer, "block", real)
    with pytest.raises(ConfigError, match=r"another recipe made \(it differs in: options\)"):
        made(plain, tmp_path / "out", name, dtype="float32")
    report = made(plain, tmp_path / "out", name)
    assert report.resumed == 1 and len(report.layers) == 14
    assert digests(tmp_path / "out") == digests(all_made(name))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_gptq_is_better_than_rounding_on_its_text(
    plain: Path, tmp_path: Path, all_made: Callable[[str], Path]
) -> None:
    gptq = json.loads((all_made("w4a16") / "recipe.json").read_text())["errors"]
    assert gptq["measured_on"] == "outputs"
    rounded = made(plain, tmp_path / "rtn", "w4a16", method="rtn")
    assert not rounded.measured
    names = [layer["name"] for layer in gptq["layers"]]
    assert names == [layer["name"] for layer in rounded.layers] and len(names) == 14
    tokens = torch.from_numpy(sample(open_checkpoint(plain).tokenizer(), TEXT, (6, 64), 0))
    expected = logits(plain, open_checkpoint(plain), tokens)
    paths = all_made("w4a16"), tmp_path / "rtn"
    a, b = (float((logits(plain, open_checkpoint(p), tokens) - expected).norm()) for p in paths)
    assert a < 0.9 * b


def test_atoms_layout(plain: Path, all_made: Callable[[str], Path]) -> None:
    """q, k and v share an order; gate and up have theirs; down needs none, as rows of gate and up are permuted."""
    found, original = open_checkpoint(all_made("atom")), open_checkpoint(plain)
    prefix = "model.layers.0."
    q, k, v, o = (found.tensor(f"{prefix}self_attn.{n}_proj.weight") for n in "qkvo")
    gate, up, down = (found.tensor(f"{prefix}mlp.{n}_proj.weight") for n in ("gate", "up", "down"))
    assert all(np.array_equal(q.shared["order"], other.shared["order"]) for other in (k, v))
    assert np.array_equal(gate.shared["order"], up.shared["order"]) and "order" not in down.shared
    assert "order" in o.shared and q.shared["clip"] == np.float32(0.9)
    for stored in (q, o, gate, down):
        assert num_outliers(stored) == 32
        scale = stored.parts["scale"]
        assert scale.shape == (stored.shape[0], (stored.shape[1] - 32) // 32)
        assert np.array_equal(scale[0::2], scale[1::2])  # two neighbouring rows share a group's scale
        narrow = from_nibbles(stored.data[:, : (stored.shape[1] - 32) // 2])
        assert narrow.min() >= -8 and narrow.max() <= 7
    best = [int(np.argmax(_cosines(row, original.tensor(up.name).values()))) for row in up.values()]
    assert sorted(best) == list(range(96)) and best != list(range(96))  # each row of up is one of the original's
    a, b = original.tensor(down.name).values(), down.values()
    assert np.linalg.norm(b - a[:, best]) < 0.3 * np.linalg.norm(a)


def _cosines(row: Any, rows: Any) -> Any:
    return rows @ row / np.linalg.norm(rows, axis=1)


def test_products_of_atoms_integers_do_not_depend_on_the_order(all_made: Callable[[str], Path]) -> None:
    stored = open_checkpoint(all_made("atom")).tensor("model.layers.0.self_attn.q_proj.weight")
    split, order = stored.shape[1] - 32, stored.shared["order"]
    w = np.concatenate([from_nibbles(stored.data[:, : split // 2]), stored.data[:, split // 2 :].view(np.int8)], 1)
    x = np.random.default_rng(0).integers(-8, 8, (5, stored.shape[1]))
    back = np.empty_like(w)
    back[:, order] = w
    assert np.array_equal(x[:, order] @ w.T.astype(int), x @ back.T.astype(int))


def test_tenders_weights_have_the_calibration(all_made: Callable[[str], Path]) -> None:
    found = open_checkpoint(all_made("tender"))
    q, o = (found.tensor(f"model.layers.0.self_attn.{n}_proj.weight") for n in "qo")
    assert q.shared["scales"].shape == (2,) and q.shared["means"].shape == (2, 64) and "means" not in o.shared
    assert q.shared["sizes"].sum() == 64 and q.parts["bias"].shape == (64, 2)
    assert np.abs(codes(q)).max() == 127


@pytest.mark.parametrize("name", ["fp8", "int8", "w4a16 head", "w4a8"])
def test_it_runs_without_a_flag(name: str, all_made: Callable[[str], Path]) -> None:
    llm = dovetail.LLM(all_made(name), kernels="torch", kv_memory="1MiB", max_model_len=64)
    params = dovetail.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    assert len(llm.generate("the quick", params, progress=False)[0].outputs[0].token_ids) == 8


def test_the_head(all_made: Callable[[str], Path]) -> None:
    found = open_checkpoint(all_made("w4a16 head"))
    assert found.format("lm_head.weight") == "I8" and not found.config.tie_word_embeddings
    config = json.loads((all_made("w4a16 head") / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and config["ignore"] == []


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("name", ["int8 smooth", "atom"])
def test_other_architectures(name: str, kind: str, tmp_path: Path) -> None:
    """Biases, norms of heads, norms that are stored less one, norms behind attention and MLP."""
    save_model(tmp_path / "m", kind, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    made(tmp_path / "m", tmp_path / "q", name)
    expected = logits(tmp_path / "m", _AsWritten(tmp_path / "m"))
    found = logits(tmp_path / "m", _AsWritten(tmp_path / "q"))
    assert float((found - expected).norm() / expected.norm()) < (0.05 if "int8" in name else 0.5)


class _AsWritten:
    """A checkpoint whose norms are as files have them."""

    def __init__(self, path: Path) -> None:
        self.inner = open_checkpoint(path)
        self.names = self.inner.names

    def tensor(self, name: str) -> StoredTensor:
        stored = self.inner.tensor(name)
        offset = self.inner.architecture.norm_offset if name.endswith("norm.weight") else 0
        return StoredTensor.of(name, stored.values() - np.float32(offset))


@pytest.mark.parametrize(
    ("form", "given", "words"),
    [
        ("w3a16", {}, "'w3a16' is unknown; the known ones are w8a8-fp8, w8a8-int8, w4a16"),
        ("w8a8-fp8", {"group": 64}, "w8a8-fp8 takes no --group; it is an option of w4a16, w4a8, atom"),
        ("w4a16", {"smoothquant": 0.5}, "w4a16 takes no --smoothquant; it is an option of w8a8-int8"),
        ("w4a16", {"group": 48}, "--group must be 128 or 64 or 32, got 48"),
        ("w4a16", {"damping": 2.0}, "--damping must be from 0.0 to 1.0, got 2.0"),
        ("w4a16", {}, "q_proj has 64 inputs, which groups of 128 do not divide; give --group 32"),
        ("w4a16", {"group": 64}, "layers.0.mlp.down_proj has 96 inputs, which groups of 64 do not divide"),
        ("atom", {"group": 32, "outliers": 16}, "q_proj has 64 inputs; without 16 outliers"),
        ("tender", {"groups": 30}, "--groups must be from 1 to 20, got 30"),
    ],
)  # fmt: skip
def test_options_that_are_refused(form: str, given: dict[str, Any], words: str, plain: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        resolved(form, given, open_checkpoint(plain).config)


def test_outliers_are_in_proportion_to_the_width() -> None:
    from tests.tiny import tiny_config

    def count(**sizes: int) -> dict[str, int]:
        config = tiny_config(num_heads=32, num_kv_heads=32, **sizes)
        found: dict[str, int] = resolved("atom", {}, config)["outliers"]
        return found

    assert count(hidden_size=4096, head_dim=128, intermediate_size=11008) == {"4096": 128, "11008": 128}
    assert count(hidden_size=576, head_dim=18, intermediate_size=1536) == {"576": 64, "1536": 128}


def test_what_is_there_is_not_overwritten(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        made(plain, tmp_path / "out", "fp8")
    (tmp_path / "out" / "file").unlink()
    made(plain, tmp_path / "out", "fp8")
    assert (tmp_path / "out" / "config.json").exists()


def test_quantized_checkpoints_are_refused(tmp_path: Path, all_made: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="its weights are quantized"):
        made(all_made("fp8"), tmp_path / "out", "w4a16")


def test_a_text_that_is_too_short(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="samples of 64, and 4000 were asked for; give a longer text, fewer"):
        made(plain, tmp_path / "out", "w4a16", samples=4000)
    assert list(tmp_path.iterdir()) == []  # so another recipe may be next


@pytest.mark.parametrize("name", ["w4a16", "atom", "tender"])
def test_activations_that_are_not_finite(name: str, plain: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(plain, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp\.down_proj: calibration met an activation that is not finite"
    ):
        made(broken, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["int8", "w4a16", "atom"])
def test_rows_and_groups_of_zeros(name: str, plain: Path, tmp_path: Path) -> None:
    zeros = Path(shutil.copytree(plain, tmp_path / "zeros"))
    tensors = load_file(zeros / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:6] = 0
    tensors["model.layers.0.self_attn.q_proj.weight"][:, :32] = 0
    save_file(tensors, zeros / "model.safetensors", {"format": "pt"})
    made(zeros, tmp_path / "out", name)
    found = open_checkpoint(tmp_path / "out")
    values = found.tensor("model.layers.0.mlp.up_proj.weight").values()
    assert np.isfinite(values).all() and sum(not row.any() for row in values) >= 4
    assert np.isfinite(found.tensor("model.layers.0.self_attn.q_proj.weight").values()).all()


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("weight_codes", lambda t: t[:, :-2].contiguous(), "do not fit ATOM weights of 64 columns"),
        ("weight_codes", lambda t: t[:-2].contiguous(), "not all of its tensors have 32 rows"),
        ("weight_outlier_scale", None, "weight_outlier_scale is missing"),
        ("weight_common_order", lambda t: t * 0, "its order is no permutation of 64 columns"),
        ("weight_common_order", lambda t: t.flip(0), "rounded in another way than that of the layers"),
        ("weight_common_clip", None, "weight_common_clip is missing"),
    ],
)  # fmt: skip
def test_own_tensors_that_do_not_fit(
    part: str, change: Callable[[Any], Any] | None, words: str, tmp_path: Path, all_made: Callable[[str], Path]
) -> None:
    path = Path(shutil.copytree(all_made("atom"), tmp_path / "broken"))
    name = f"model.layers.0.self_attn.k_proj.{part}"
    tensors = load_file(path / "model.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=words):
        open_checkpoint(path).tensor("model.layers.0.self_attn.k_proj.weight")


def test_the_command(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT.text)
    arguments = ["quantize", str(plain), str(tmp_path / "out"), "--format", "w4a16", "--group", "32",
                 "--calibration", str(tmp_path / "text.txt"), "--samples", "4", "--length", "64",
                 "--json", "-"]  # fmt: skip
    result = CliRunner().invoke(build(["quantize", "run"]), arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["recipe"]["format"] == "w4a16" and len(found["layers"]) == 14
    assert found["recipe"]["calibration"]["sha256"] == hashlib.sha256(TEXT.text.encode()).hexdigest()
    kept = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert {k: kept[k] for k in found["recipe"]} == found["recipe"]
    assert "relative error of outputs" in result.stdout
