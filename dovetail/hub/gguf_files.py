"""Which GGUF file of a repository is meant: by a tag such as Q4_K_M, or by none.

Repositories hold one model in several quantizations. Their names end in the quantization, or they lie in a folder
whose name does. Large ones are cut into parts, and the first part then stands for the model.
"""

from __future__ import annotations

from collections.abc import Iterable

from dovetail.core.errors import ModelError
from dovetail.host.files import file_part

# What is taken where nobody says which: the usual choice first, then by size and quality around it.
PREFERRED = (
    "Q4_K_M", "Q4_0", "Q4_K_S", "Q4_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q6_K", "Q8_0",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "BF16", "F16", "F32",
)  # fmt: skip
# GGUF files that are no language model: projectors of images, and statistics for quantizing.
_OTHERS = ("mmproj", "imatrix")
_LISTED = 12


def first_files(files: Iterable[str]) -> list[str]:
    """The files that stand for a model, in order: whole ones, and first parts, also of models that lack one."""
    found = set()
    for name in files:
        if name.endswith(".gguf") and not any(word in name.rsplit("/", 1)[-1].lower() for word in _OTHERS):
            part = file_part(name)
            found.add(part.name(1) if part else name)
    return sorted(found)


def all_parts(first: str) -> list[str]:
    """The files of the model that `first` stands for."""
    part = file_part(first)
    return part.names() if part else [first]


def tagged(first: str, tag: str) -> bool:
    """Whether the file's name or one of its folders is `tag` or ends in it behind a dash or a dot, in any case."""
    part, wanted = file_part(first), tag.lower()
    stem = part.stem if part else first.removesuffix(".gguf")
    return any(
        piece == wanted or piece.endswith((f"-{wanted}", f".{wanted}")) for piece in stem.lower().split("/")
    )


def with_tag(repo: str, tag: str, files: Iterable[str]) -> str:
    """The file that `tag` means. ModelError that lists the files if there is none, or more than one."""
    models = first_files(files)
    if not models:
        raise ModelError(f"{repo} has no GGUF file, so none that {tag!r} could mean")
    found = [name for name in models if tagged(name, tag)]
    if not found:
        raise ModelError(f"{repo} has no GGUF file whose name ends in {tag!r}; it has {listed(models)}")
    if len(found) > 1:
        raise ModelError(f"{repo}:{tag} may mean {listed(found)}; name one as {repo}:FILE")
    return found[0]


def without_tag(repo: str, files: Iterable[str]) -> str:
    """The file that is taken if nobody says which. ModelError that lists the files if no choice is obvious."""
    models = first_files(files)
    if len(models) == 1:
        return models[0]
    for tag in PREFERRED:
        found = [name for name in models if tagged(name, tag)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise ModelError(f"{repo} holds GGUF files; name one as {repo}:TAG or {repo}:FILE, of {listed(models)}")


def listed(names: list[str]) -> str:
    """`a, b and 3 more`."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
