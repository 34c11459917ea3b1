"""Compiled grammars, kept within a fixed number of bytes."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from dovetail.core.errors import RequestError
from dovetail.core.structured import StructuredOutputs
from dovetail.structured.grammar import Grammar, GrammarError

if TYPE_CHECKING:
    from dovetail.structured.compiler import Compiler

CACHE = 64 << 20  # bytes
ENTRY = 1024  # bytes that an entry takes besides its grammar

Key = bytes


class Grammars:
    """The grammars of one vocabulary. Those that were not asked for longest go first, and refusals are kept too.

    A grammar is compiled once however many ask for it at the same time. Whoever holds one finds it again, even if
    it has no room in the cache. make: makes the compiler, with the first grammar. limit: bytes.
    """

    def __init__(self, make: Callable[[], Compiler], limit: int = CACHE) -> None:
        self.limit = limit
        self.bytes = 0
        self._make = make
        self._compiler: Compiler | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, Grammar | str] = OrderedDict()
        self._alive: weakref.WeakValueDictionary[Key, Grammar] = weakref.WeakValueDictionary()
        self._coming: dict[Key, Future[Grammar]] = {}

    def compile(self, asked: StructuredOutputs) -> Grammar:
        """The grammar, which may take a while. RequestError if it is wrong or too expensive."""
        key = hashlib.sha256(repr(asked.key).encode()).digest()
        try:
            with self._lock:
                found = self._find(key)
                coming = self._coming.get(key)
                future = Future() if coming is None else coming
                if found is None:
                    self._coming[key] = future
            if found is not None:
                return found
            return future.result() if coming is not None else self._compile(asked, key, future)
        except GrammarError as error:
            raise RequestError(f"structured_outputs: {asked.form}: {error}", param="structured_outputs") from None

    def close(self) -> None:
        """End the process that compiles."""
        with self._lock:
            compiler, self._compiler = self._compiler, None
        if compiler is not None:
            compiler.close()

    def _find(self, key: Key) -> Grammar | None:
        """What is known of a key, which is now the last to go. GrammarError if it is known to be wrong."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        if isinstance(found, str):
            raise GrammarError(found)
        return self._alive.get(key) if found is None else found

    def _compile(self, asked: StructuredOutputs, key: Key, future: Future[Grammar]) -> Grammar:
        try:
            compiler = self._ready()
            tried = compiler.try_out(asked)
            grammar = Grammar(compiler.vocabulary, tried["source"], tried["bytes"])
        except BaseException as error:
            with self._lock:
                del self._coming[key]
                if isinstance(error, GrammarError):
                    self._keep(key, str(error), len(str(error)))
            future.set_exception(error)
            raise
        with self._lock:
            del self._coming[key]
            self._alive[key] = grammar
            self._keep(key, grammar, grammar.size)
        future.set_result(grammar)
        return grammar

    def _keep(self, key: Key, what: Grammar | str, size: int) -> None:
        if size + ENTRY > self.limit:
            return
        self._kept[key] = what
        self.bytes += size + ENTRY
        while self.bytes > self.limit:
            _, gone = self._kept.popitem(last=False)
            self.bytes -= (len(gone) if isinstance(gone, str) else gone.size) + ENTRY

    def _ready(self) -> Compiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = self._make()
            return self._compiler
