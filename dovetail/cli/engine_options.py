"""Options that several commands share: those of the engine, those of sampling, and groups of others.

A command asks for them by annotation, and `spliced` turns them into command-line options:

    @spliced
    def run(model: str, engine: EngineOptions, sampling: SamplingOptions) -> None:
        llm = engine.load(model)
        llm.generate("Hi", sampling.params(llm))
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Self, TypeVar, get_type_hints

import typer

from dovetail.core.errors import ConfigError
from dovetail.host.units import parse_size
from dovetail.options import SIZES, Options
from dovetail.techniques import MODULES

if TYPE_CHECKING:
    from dovetail.core.sampling import SamplingParams
    from dovetail.llm import LLM

C = TypeVar("C", bound=Callable[..., Any])

# For models that ship no sampling defaults of their own: the most likely text, the same every time.
CONVERSATION = {"temperature": 0.0}


@dataclass(frozen=True)
class EngineOptions:
    """How to set up the engine. use: technique specs. options: all others."""

    use: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)

    def load(self, model: str) -> LLM:
        """The model with these options. Raises ModelError, ConfigError or CapacityError."""
        from dovetail.llm import LLM

        return LLM(model, use=self.use, **vars(self.options))

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """Command-line options: --use, and one for each field of `Options` with its default."""
        use = Annotated[list[str], _option("--use", _ENGINE_HELP["use"], "Engine", metavar="NAME[:KEY=VALUE,...]")]
        kinds = get_type_hints(Options)
        found = [_keyword("use", use, [])]
        for f in fields(Options):
            flag = "--" + f.name.replace("_", "-")
            more: dict[str, Any] = {"parser": _size, "metavar": "SIZE"} if f.name in SIZES else {}
            if kinds[f.name] is bool:
                flag = f"{flag}/--no-{flag[2:]}"
            option = _option(flag, _ENGINE_HELP[f.name], "Engine", show_default=f.default is not None, **more)
            found.append(_keyword(f.name, Annotated[kinds[f.name], option], f.default))
        return found

    def words(self) -> list[str]:
        """The command line that asks for these options, defaults left out."""
        found = [word for spec in self.use for word in ("--use", spec)]
        for f in fields(Options):
            value, flag = getattr(self.options, f.name), "--" + f.name.replace("_", "-")
            if value == f.default:
                continue
            if isinstance(value, bool):
                found.append(flag if value else f"--no-{flag[2:]}")
            else:
                found += [flag, str(value)]
        return found

    @classmethod
    def collect(cls, values: dict[str, Any]) -> EngineOptions:
        """Take this bundle's values out of a command's."""
        use = tuple(values.pop("use"))
        return cls(use, Options(**{f.name: values.pop(f.name) for f in fields(Options)}))


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens. Only options that were given on the command line are in `given`."""

    given: Mapping[str, Any] = field(default_factory=dict)

    def params(self, llm: LLM, fallback: Mapping[str, Any] | None = None) -> SamplingParams:
        """The given options, else those of the model's generation_config, else `fallback`.

        Raises RequestError for an impossible value. The seed is the engine's.
        """
        return llm.default_params(fallback, **self.given)

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """Command-line options, all without a default: the model has its own."""
        found = []
        for name, (kind, text) in _SAMPLING.items():
            option = _option("--" + name.replace("_", "-"), text, "Sampling", show_default=False)
            found.append(_keyword(name, Annotated[kind, option], [] if kind is list[str] else None))
        return found

    @classmethod
    def collect(cls, values: dict[str, Any]) -> SamplingOptions:
        """Take this bundle's values out of a command's."""
        taken = {name: values.pop(name) for name in _SAMPLING}
        options = cls({name: value for name, value in taken.items() if value is not None and value != []})
        options.check()
        return options

    def check(self) -> None:
        """Raise RequestError for values that are impossible for any model. Called before a model is loaded."""
        from dovetail.core.sampling import SamplingParams

        SamplingParams(**{"max_tokens": None, **self.given})


class OptionGroup:
    """Base of frozen dataclasses whose fields are options. Each field has a typer.Option and a default."""

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """A command-line option for each field."""
        hints = get_type_hints(cls, include_extras=True)
        return [_keyword(f.name, hints[f.name], f.default) for f in fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def collect(cls, values: dict[str, Any]) -> Self:
        """Take this group's values out of a command's."""
        return cls(**{f.name: values.pop(f.name) for f in fields(cls)})  # type: ignore[arg-type]


class Bundle(Protocol):
    """A dataclass of options that a command asks for by annotation."""

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]: ...

    @classmethod
    def collect(cls, values: dict[str, Any]) -> Any: ...


def _bundle(annotation: Any) -> type[Bundle] | None:
    is_class = isinstance(annotation, type)
    return (
        annotation if is_class and hasattr(annotation, "collect") and hasattr(annotation, "parameters") else None
    )


def spliced(command: C) -> C:
    """`command` with each parameter that is a bundle, like EngineOptions, replaced by that bundle's options."""
    signature = inspect.signature(command, eval_str=True)
    found = {p.name: _bundle(p.annotation) for p in signature.parameters.values()}
    bundles = {name: bundle for name, bundle in found.items() if bundle is not None}
    parameters: list[inspect.Parameter] = []
    for p in signature.parameters.values():
        new = (
            bundles[p.name].parameters() if p.name in bundles else [p.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        )
        parameters += new

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        for name, bundle in bundles.items():
            values[name] = bundle.collect(values)
        return command(**values)

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call  # type: ignore[return-value]


def _option(flag: str, text: str, panel: str, **more: Any) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=panel, **more)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _size(text: str | int) -> int:
    if isinstance(text, int):
        return text
    try:
        return parse_size(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


_ENGINE_HELP = {
    "use": f"Switch on {', '.join(sorted(MODULES))}, with options as in ngram:tokens=4. Repeat to combine.",
    "dtype": "Type to compute in: auto, float32, bfloat16 (bf16), float16 or float64.",
    "device": "Where to run: auto, cpu or cuda.",
    "threads": "Threads to compute with. Default: the cores that this process may use.",
    "kv_memory": "Memory for keys and values, as in 512MiB. Default: a quarter of what is free, at most 4GiB.",
    "kv_cache_dtype": "Type to keep keys and values in: auto, float32, bf16, float16, fp8, int8 or int4.",
    "kv_offloading_size": "Size of a slow tier for keys and values, as in 4GiB; --kv-memory holds those in use.",
    "kv_offloading_backend": "What the slow tier is: disk (read past the page cache), or host (memory).",
    "kv_offloading_path": "Folder of the disk tier's file. Default: the cache folder.",
    "emulate_link": "GB/s at which the slow tier's data arrives at most. For experiments; reports say emulated.",
    "kernels": "Kernels to compute with: auto, torch (the reference), or an instruction set as in avx2.",
    "activations": "Inputs of products with quantized weights: auto, int8, int16 or exact.",
    "packed_cache": "Keep packed weights in the cache folder, for quicker starts and less memory: auto or off.",
    "packed_cache_size": "Size of all packed weights there; those not used for longest go. Default: 20GiB.",
    "block_size": "Tokens in a page of keys and values.",
    "max_model_len": "Longest context in tokens. Default: the model's, or what fits the KV memory.",
    "max_num_batched_tokens": "Most tokens computed in one step. Default: 512.",
    "max_num_seqs": "Most requests that run at once. Default: 64.",
    "enable_prefix_caching": "Keep keys and values of prompts for later requests that begin the same way.",
    "seed": "Seed of everything random. With 0, a server draws one for each request that has none.",
}

_SAMPLING: dict[str, tuple[Any, str]] = {
    "temperature": (float | None, "0 always takes the likeliest token; larger is more random."),
    "top_p": (float | None, "Sample among the likeliest tokens that together have this probability."),
    "top_k": (int | None, "Sample among this many likeliest tokens; 0 means all."),
    "min_p": (
        float | None,
        "Leave out tokens less likely than this share of the likeliest one's probability.",
    ),
    "max_tokens": (int | None, "Longest answer in tokens."),
    "min_tokens": (int | None, "Shortest answer in tokens."),
    "repetition_penalty": (float | None, "Above 1 makes tokens that occurred less likely."),
    "presence_penalty": (float | None, "Above 0 makes tokens of the answer less likely to come again."),
    "frequency_penalty": (float | None, "The same, for each time that a token came."),
    "stop": (list[str], "End the answer before this text. Repeat for several."),
    "ignore_eos": (bool | None, "Do not end the answer where the model would."),
    "logprobs": (int | None, "Report this many likeliest tokens at each place."),
}
