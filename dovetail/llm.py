"""The Python API: `LLM(model).generate(prompts)`, `.chat(messages)`, `.stream(prompt)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from dovetail.config import Config, Found, Machine, Options, resolve
from dovetail.core.errors import ConfigError, RequestError
from dovetail.core.model import PLAIN_FORMATS
from dovetail.core.sampling import SamplingParams
from dovetail.core.technique import Technique, compose
from dovetail.core.types import Probe
from dovetail.host.interrupts import uninterrupted
from dovetail.host.units import parse_size
from dovetail.options import SIZES
from dovetail.outputs import Answer, RequestOutput
from dovetail.session import SERVING, Session
from dovetail.tools.request import read_tools
from dovetail.tools.use import ToolUse

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
CALIBRATION = 1 << 16  # characters, which is all that techniques need to measure the model


class LLM:
    """A model, ready to answer.

    model: a path, an alias or a Hugging Face id. use: technique specs (`"ngram:tokens=4"`) or Technique
    records. tokenizer: a directory with another tokenizer.json, or an object. The other options are those of
    `dovetail.options.Options`: dtype, device, threads, kv_memory and kv_offloading_size (bytes, or text such as
    "512MiB"), kv_cache_dtype, packed_cache, block_size, max_model_len, max_num_batched_tokens, max_num_seqs,
    enable_prefix_caching, seed. Raises ModelError, ConfigError or CapacityError.

    Several threads may use one LLM. They take turns step by step, and their requests run in one batch. A forked
    child cannot use it (ForkError).
    """

    def __init__(
        self,
        model: str | Path,
        *,
        use: str | Technique | Sequence[str | Technique] = (),
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        from dovetail.build import build_engine, packed_cache, stored_activation, stored_format
        from dovetail.host.files import home
        from dovetail.hub import resolve as find
        from dovetail.hub.packed import packed_home
        from dovetail.models import facts, geometry, open_checkpoint
        from dovetail.runtime.kv import bytes_per_token
        from dovetail.techniques import technique

        asked = _options(options)
        use = [use] if isinstance(use, (str, Technique)) else use
        parts = [t if isinstance(t, Technique) else technique(t) for t in use]
        checkpoint = open_checkpoint(find(str(model)))
        offered = facts(checkpoint.config)
        if asked.kv_offloading_size is not None:
            offered |= {"a slow tier"}
        stored = stored_format(checkpoint)
        if stored in PLAIN_FORMATS:
            offered |= {"weights that are not quantized"}
        composition = compose(*parts, facts=offered)
        self.config: Config = resolve(
            asked,
            checkpoint.config,
            geometry(checkpoint.config),
            Found(
                str(model),
                stored,
                tuple(composition.specs),
                _machine(asked.device),
                bytes_per_token,
                home() / "kv",
                composition.beside,
                packed_home(),
                stored_activation(checkpoint, stored),
            ),
        )
        self.checkpoint = checkpoint
        self.techniques = composition.techniques
        self.tokenizer = _tokenizer(tokenizer) or checkpoint.tokenizer()
        self.packed = packed_cache(checkpoint, self.config)
        self.engine = build_engine(checkpoint, self.config, composition, self._calibration, self.packed)
        self.session = Session(self.engine, self.tokenizer, self.config, checkpoint.config.vocab_size)
        if self.packed is not None:
            self.session.begun = self.packed.save

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        probes: Probe | Sequence[Probe] = SERVING,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts: a string, a list of strings, or lists of token ids. Outputs are in their order.

        A bad prompt raises RequestError before anything runs. probes: for measurements, see `Probe`. progress:
        show a bar on a terminal's stderr.
        """
        many = _prompts(prompts)
        each = [_params(p) for p in params] if isinstance(params, Sequence) else [_params(params)] * len(many)
        if len(each) != len(many):
            raise RequestError(f"{len(many)} prompts but {len(each)} sets of parameters", param="params")
        looks = [probes] * len(many) if isinstance(probes, Probe) else list(probes)
        if len(looks) != len(many):
            raise RequestError(f"{len(many)} prompts but {len(looks)} probes", param="probes")
        prepare = self.session.prepare
        answers = [prepare(p, s, probe=look) for p, s, look in zip(many, each, looks, strict=True)]
        return self._finish(answers, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        progress: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template.

        Messages, tools and tool_choice are those of the chat completions API. `outputs[i].message` is the
        answer as a message, with its calls.
        """
        if not isinstance(messages, Sequence) or not messages:
            raise RequestError("messages must be a list with at least one message", param="messages")
        many = [messages] if isinstance(messages[0], Mapping) else messages
        use = ToolUse(self.tokenizer, read_tools(tools, tool_choice, parallel_tool_calls))
        params = use.params(_params(params))
        answers = []
        for one in many:
            answers.append(self.session.prepare(use.prompt(one, **template), params))  # type: ignore[arg-type]
            answers[-1].tools = use
        return self._finish(answers, progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt. Yields the growing output after each step. If the reader stops, its pages are
        freed."""
        answer = self.session.prepare(prompt, _params(params))
        with closing(self.session.follow(answer, lambda gained: answer.output() if gained else None)) as outputs:
            yield from (output for output in outputs if output is not None)

    def chat_tokens(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **template: Any
    ) -> list[int]:
        """The tokens of a conversation, ready for the model's answer. Messages are those of the chat completions
        API."""
        return ToolUse(self.tokenizer, read_tools(tools)).prompt(messages, **template)

    def activity(self) -> dict[str, int]:
        """How often each technique in use acted."""
        return {t.name: t.activity(self.engine.seams) for t in self.techniques}

    def counters(self) -> dict[str, float]:
        """Totals that techniques in use count besides, by the technique's name and what is counted."""
        found = ((t.name, t.counters(self.engine.seams)) for t in self.techniques)
        return {f"{name}_{what}": total for name, totals in found for what, total in totals.items()}

    def slow_tier(self) -> Mapping[str, float]:
        """Totals of what moved between the device and the slow tier of KV. Empty without a slow tier."""
        residency = self.engine.seams.residency
        return residency.stats() if hasattr(residency, "stats") else {}

    def keep_packed(self) -> None:
        """Write packed weights now, where they are kept, and wait for it. Measurements are not disturbed then."""
        if self.packed is not None:
            self.packed.save()
            self.packed.finish()

    def default_params(self, fallback: Mapping[str, Any] | None = None, **overrides: Any) -> SamplingParams:
        """The checkpoint's own sampling defaults (generation_config.json), with overrides.

        `fallback` counts only if the checkpoint has no defaults at all.
        """
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        stored = self.checkpoint.generation_config
        found = {n: stored[n] for n in names if stored.get(n) is not None}
        if stored.get("do_sample") is False:
            found = {"temperature": 0.0}
        return SamplingParams(**{**(found or fallback or {}), **overrides})

    def _calibration(self, file: str) -> list[int]:
        """Tokens of the first part of a text: a named corpus, a file, or for "" a text that every Python ships."""
        from dovetail.text.corpus import DEFAULT, corpus

        ids: list[int] = self.tokenizer.encode(corpus(file or DEFAULT).text[:CALIBRATION])
        return ids

    def _finish(self, answers: list[Answer], progress: bool) -> list[RequestOutput]:
        from dovetail.show.progress import counter

        left = set(answers)
        try:
            with counter("answers", len(answers), enabled=progress) as advance:
                with uninterrupted():
                    for answer in answers:
                        self.session.submit(answer)
                for answer in answers:
                    with uninterrupted() as interrupts:
                        while not (answer.finished or interrupts):
                            done = left & {d.answer for d in self.session.step() if d.last}
                            left -= done
                            advance(len(done))
                if left:  # another thread's steps may have finished them
                    advance(len(left))
        finally:  # also after an interrupt or a refusal
            with uninterrupted():
                for answer in answers:
                    self.session.abort(answer)
        with self.session.turns:
            return [a.output() for a in answers]


def _tokenizer(given: Any) -> Any:
    """A tokenizer object as it is, or the tokenizer of a directory with tokenizer.json."""
    from dovetail.text.tokenizer import Tokenizer

    return Tokenizer.from_directory(given) if isinstance(given, (str, Path)) else given


def _options(options: Mapping[str, Any]) -> Options:
    unknown = set(options) - set(Options.__dataclass_fields__)
    if unknown:
        known = ", ".join(Options.__dataclass_fields__)
        raise ConfigError(
            f"LLM takes no option {', '.join(sorted(unknown))}; it takes model, use, tokenizer, {known}"
        )
    sizes = {name: parse_size(options[name]) for name in SIZES if isinstance(options.get(name), str)}
    return Options(**{**options, **sizes})


def _params(given: SamplingParams | None) -> SamplingParams:
    if given is None:
        return SamplingParams()
    if not isinstance(given, SamplingParams):
        raise RequestError(f"params must be SamplingParams, got {type(given).__name__}", param="params")
    return given


def _prompts(prompts: Any) -> list[Prompt]:
    """One prompt or many. A list of whole numbers is one prompt; anything else in a list is a prompt of its
    own."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        kind = type(prompts).__name__
        raise RequestError(f"prompts must be text, token ids or a list of them, got {kind}", param="prompts")
    many = list(prompts)
    single = bool(many) and hasattr(many[0], "__index__") and not getattr(many[0], "shape", ())
    return [many] if single else many


def _machine(device: str) -> Machine:
    from dovetail.host.lazy_torch import cuda_devices, torch
    from dovetail.host.machine import cores, memory
    from dovetail.ops.cpu import emulated, isas

    found, cuda = cores(), device != "cpu" and cuda_devices() > 0
    free = torch.cuda.mem_get_info()[0] if cuda else memory().available
    return Machine(found.budget, found.affinity, free, cuda, isas(), emulated())
