"""Text to measure on: by name, from a folder of data, or any file."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from dovetail.core.errors import ConfigError, ModelError

DEFAULT = "pydoc"
# File names that a corpus commonly has in a folder given with --data.
FILES = {
    "wikitext2": ("wikitext2-valid.txt", "wiki.valid.tokens"),
    "wikitext2-raw": ("wiki.valid.raw", "wikitext-2-raw/wiki.valid.raw"),
    "shakespeare": ("shakespeare.txt", "tinyshakespeare.txt"),
}
# wikitext2 is word by word with <unk> for rare ones; wikitext2-raw, the same text as it was written, is what the
# Hugging Face hub has: repository, archive, file in it.
HUB = ("ggml-org/ci", "wikitext-2-raw-v1.zip", "wikitext-2-raw/wiki.valid.raw")


@dataclass(frozen=True)
class Corpus:
    """A text with the name by which it was asked for. `digest` tells two texts of one name apart."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def corpus(name: str, data: Path | None = None) -> Corpus:
    """The corpus `name`: pydoc, one of FILES, or a UTF-8 file. ConfigError says what was looked for.

    wikitext2 without `data` is the hub's wikitext2-raw, and is named so.
    """
    if data is not None and name not in FILES:
        raise ConfigError(f"--data is where {', '.join(FILES)} are looked for, and --corpus is {name}")
    if name == DEFAULT:
        return Corpus(name, _pydoc())
    if name not in FILES:
        return Corpus(name, _read(Path(name).expanduser(), f"pydoc, {', '.join(FILES)}"))
    if data is not None:
        for file in FILES[name]:
            if (path := data.expanduser() / file).is_file():
                return Corpus(name, _read(path, ""))
        raise ConfigError(f"corpus {name}: {data} has none of {', '.join(FILES[name])}")
    if name.startswith("wikitext2"):
        return Corpus("wikitext2-raw", _from_hub(*HUB))
    raise ConfigError(f"corpus {name}: give the folder that holds {FILES[name][0]} as --data DIR")


def _pydoc() -> str:
    """The language reference that every CPython ships; it differs a little between versions."""
    import pydoc_data.topics

    return "\n".join(pydoc_data.topics.topics.values())


def _read(path: Path, known: str) -> str:
    if known and not path.is_file():
        wrong = "it is a folder" if path.is_dir() else "there is no such file"
        raise ConfigError(f"corpus '{path}': {wrong}, and the corpora known by name are {known}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"corpus {path}: is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigError(f"corpus {path}: cannot be read: {error.strerror or error}") from error


def _from_hub(repository: str, archive: str, member: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repository, archive, repo_type="dataset")
        with zipfile.ZipFile(path) as file:
            return file.read(member).decode("utf-8")
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{repository}/{archive} holds no {member}: {error}") from error
    except Exception as error:  # the hub's own errors are many
        raise ConfigError(
            f"wikitext2-raw cannot be fetched from the hub ({str(error).splitlines()[0][:200]}); "
            f"give a folder that has {FILES['wikitext2-raw'][0]} or {FILES['wikitext2'][0]} as --data DIR"
        ) from error
