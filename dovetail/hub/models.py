"""Where models come from and where they are kept: a local path, a built-in alias, or the Hugging Face hub."""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass
from pathlib import Path

from dovetail.core.errors import ModelError
from dovetail.host.files import explaining, home, tree_bytes
from dovetail.hub import aliases, huggingface
from dovetail.hub.aliases import ALIASES


@dataclass(frozen=True)
class CachedModel:
    """A model on disk. `source` is `alias` or `hugging face`; `size` is in bytes."""

    name: str
    path: Path
    size: int
    source: str


def models_home() -> Path:
    """The folder of cached alias models."""
    return home() / "models"


def resolve(name: str, *, refresh: bool = False) -> Path:
    """The folder or GGUF file that `name` stands for, fetched first if need be.

    Tried in order: a local folder or .gguf file, a built-in alias, a Hugging Face id (`org/name`,
    `org/name:TAG`, `org/name:file.gguf`). A model in several files is named by the first of them. `refresh` asks
    the hub for a newer revision of a cached model. Raises ModelError.
    """
    if local := _local(name):
        return local
    if alias := ALIASES.get(name):
        return aliases.cached(alias, models_home()) or aliases.fetch(alias, models_home())
    if reference := huggingface.parse(name):
        found = None if refresh else huggingface.cached(reference)
        return found or huggingface.fetch(reference)
    raise ModelError(_unknown(name))


def place(name: str) -> Path:
    """Where the model `name` lies, or would lie. Nothing is fetched."""
    if not Path(name).expanduser().exists():
        if alias := ALIASES.get(name):
            return aliases.location(alias, models_home())
        if (reference := huggingface.parse(name)) and (found := huggingface.cached(reference)):
            return found
    return Path(name).expanduser()


def verify(name: str) -> Path:
    """Fetch `name` if need be, and read an alias' whole file against its pinned hash. Raises ModelError."""
    path = resolve(name)
    alias = ALIASES.get(name)
    if alias and path == aliases.location(alias, models_home()):
        aliases.verify(alias, path)
    return path


def list_models() -> list[CachedModel]:
    """What is on disk: alias models first, then the repositories in Hugging Face's cache."""
    found = [
        CachedModel(alias.name, path, path.stat().st_size, "alias")
        for alias in ALIASES.values()
        if (path := aliases.cached(alias, models_home()))
    ]
    return found + [CachedModel(name, path, size, "hugging face") for name, path, size in huggingface.models()]


def remove(name: str) -> int:
    """Delete the cached model `name`; the bytes freed. Never a user's own path. Raises ModelError."""
    if alias := ALIASES.get(name):
        directory = models_home() / alias.name
        if directory.is_dir():
            with explaining(directory, 0, name), aliases.locked(alias, models_home()):
                freed = tree_bytes(directory)
                shutil.rmtree(directory)
                return freed
    elif reference := huggingface.parse(name):
        if reference.file or reference.tag:
            raise ModelError(f"whole repositories are removed, not single files: `dovetail rm {reference.repo}`")
        repository = huggingface.remove(reference.repo)
        if repository is not None:
            return repository
    if Path(name).expanduser().exists():
        raise ModelError(f"{name} is a file or folder of yours, not in the cache; delete it yourself")
    names = ", ".join(model.name for model in list_models()) or "nothing"
    raise ModelError(f"no model {name!r} is cached; there is {names}")


def _local(name: str) -> Path | None:
    """The local path that `name` is, or None; ModelError if it can only be a path and is not there."""
    if not name or "\0" in name:
        raise ModelError(f"{name!r} is not the name of a model; {_accepted()}")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        if path.suffix == ".gguf":
            return path
        raise ModelError(f"{name} is a file, but not a .gguf file; give a .gguf file or a Hugging Face folder")
    if name.startswith(("/", "./", "../", "~")) or (name.endswith(".gguf") and huggingface.parse(name) is None):
        raise ModelError(f"no such file or folder: {name}")
    return None


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, ALIASES, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown model {name!r}{hint}; {_accepted()}"


def _accepted() -> str:
    return (
        f"a model is a folder or .gguf file, an alias ({', '.join(ALIASES)}), or a Hugging Face id such as "
        "org/name, org/name:Q4_K_M or org/name:file.gguf"
    )
