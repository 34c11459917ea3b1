"""Models from the Hugging Face hub, in its own cache and under its own environment variables.

Nothing here asks the network about a model that is already complete on disk, so a start costs no round trip. A
repository of GGUF files that is named without a tag is the exception: only the hub knows what else it holds.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from dovetail.core.errors import ModelError
from dovetail.host.files import DISK_ERRORS, explaining, file_part, require_space
from dovetail.hub.gguf_files import all_parts, first_files, listed, with_tag, without_tag
from dovetail.show.progress import note

_REPO = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9][\w-]*", re.ASCII)
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model")
_WEIGHTS = ("*.safetensors",)
# Subfolders hold other formats of the same weights; `consolidated` is Mistral's second copy of them.
_NEVER = ("*/*", "consolidated*")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Reference:
    """A model on the hub: a repository, or a GGUF file in it, by its path there or by a tag such as Q4_K_M."""

    repo: str
    file: str | None = None
    tag: str | None = None


def parse(name: str) -> Reference | None:
    """`org/name`, `org/name:TAG`, `org/name:file.gguf` or `org/name/file.gguf`; None for everything else."""
    repo, colon, file = name.partition(":")
    if not colon:
        pieces = name.split("/", 2)
        repo, file = "/".join(pieces[:2]), pieces[2] if len(pieces) == 3 else ""
    if not _REPO.fullmatch(repo) or (not file and (colon or repo.endswith(".gguf"))):
        return None
    if colon and _TAG.fullmatch(file):
        return Reference(repo, tag=file)
    if file and (not file.endswith(".gguf") or ".." in file.split("/")):
        return None
    return Reference(repo, file or None)


def cached(reference: Reference) -> Path | None:
    """The model's folder, or its (first) GGUF file, if all of it is in the hub's cache.

    Without file and tag, GGUF files are passed over: only the hub knows whether the repository has other weights.
    """
    from huggingface_hub import snapshot_download

    if reference.file or reference.tag:
        return _cached_gguf(reference)
    try:
        folder = Path(
            snapshot_download(
                reference.repo,
                allow_patterns=[*_SMALL, *_WEIGHTS],
                ignore_patterns=list(_NEVER),
                local_files_only=True,
            )
        )
    except (OSError, ValueError):
        return None
    return folder if is_complete(folder) else None


def _cached_gguf(reference: Reference) -> Path | None:
    """The GGUF file that is meant, among those in the hub's cache."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{reference.repo.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    folder = repository / "snapshots" / revision
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf") if path.is_file()}
    try:
        file = choose_file(reference, present).file
    except ModelError:
        return None
    return folder / file if file else None


def fetch(reference: Reference) -> Path:
    """Download what is missing of the model and return its path. Raises ModelError."""
    from huggingface_hub import HfApi, constants

    directory = Path(constants.HF_HUB_CACHE)
    try:
        info = ask_hub(reference, lambda: HfApi().model_info(reference.repo, files_metadata=True, timeout=20))
    except ModelError as error:
        kept = None if reference.file or reference.tag else _cached_gguf(reference)
        if kept is None:
            raise
        note(f"{error}; taking {kept.name}, which is in the cache")
        return kept
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
    chosen = choose_file(reference, sizes)
    if chosen.file and not (reference.file or reference.tag):
        note(
            f"{reference.repo}: taking {chosen.file}; {reference.repo}:TAG or {reference.repo}:FILE takes another"
        )
    needed = _missing_bytes(chosen, sizes, info.sha)
    with explaining(directory, needed, reference.repo):
        require_space(directory, needed, reference.repo)
        if not chosen.file:
            # Weights last: where they are complete, everything else is.
            _download(reference, _SMALL, _NEVER)
            return _download(reference, _WEIGHTS, _NEVER)
        parts = all_parts(chosen.file)
        folder = _download(reference, [glob.escape(name) for name in parts])
    for name in parts:
        if not (folder / name).is_file():
            raise ModelError(f"{reference.repo}: {name} did not arrive; try again")
    return folder / chosen.file


def _download(reference: Reference, patterns: Sequence[str], never: Sequence[str] = ()) -> Path:
    """Let the hub's client fetch what `patterns` match. All files come from one commit, which becomes `main`."""
    from huggingface_hub import snapshot_download

    return Path(
        ask_hub(
            reference,
            lambda: snapshot_download(
                reference.repo, allow_patterns=list(patterns), ignore_patterns=list(never) or None
            ),
        )
    )


def models() -> Iterator[tuple[str, Path, int]]:
    """Name, folder and bytes of each cached repository that holds safetensors or GGUF files."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        if repository.repo_type != "model":
            continue
        names = {file.file_name for revision in repository.revisions for file in revision.files}
        if any(name.endswith((".safetensors", ".gguf")) for name in names):
            yield repository.repo_id, Path(repository.repo_path), repository.size_on_disk


def remove(repo: str) -> int | None:
    """Delete every cached revision of `repo`; the bytes freed, or None if there was none."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return None
    revisions = [
        revision.commit_hash
        for repository in cache.repos
        if repository.repo_type == "model" and repository.repo_id == repo
        for revision in repository.revisions
    ]
    if not revisions:
        return None
    strategy = cache.delete_revisions(*revisions)
    strategy.execute()
    return int(strategy.expected_freed_size)


def is_complete(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.is_file():
        return any(path.exists() for path in folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return False
    return all((folder / str(shard)).exists() for shard in shards)


def choose_file(reference: Reference, files: Collection[str]) -> Reference:
    """The file that is meant, if it is one: a model's only file, or the first of its parts.

    ModelError that lists what there is if the repository has nothing that fits, several that do, or only parts.
    """
    repo = reference.repo
    if reference.file:
        if reference.file not in files:
            models = first_files(files)
            has = f"it has {listed(models)}" if models else "it has no GGUF file"
            raise ModelError(f"{repo} has no file {reference.file}; {has}")
        part = file_part(reference.file)
        if part and part.number > 1:
            raise ModelError(
                f"{reference.file} is part {part.number} of {part.total}; name the first, {part.name(1)}"
            )
        file = reference.file
    elif reference.tag:
        file = with_tag(repo, reference.tag, files)
    elif any("/" not in name and name.endswith(".safetensors") for name in files):
        return reference
    elif not first_files(files):
        raise ModelError(f"{repo} has no weights in a format that is read: safetensors or GGUF")
    else:
        file = without_tag(repo, files)
    if missing := [name for name in all_parts(file) if name not in files]:
        raise ModelError(f"{repo} lacks a part of {file}: {listed(missing)}")
    return Reference(repo, file)


def _missing_bytes(reference: Reference, sizes: dict[str, int], revision: str | None) -> int:
    from huggingface_hub import try_to_load_from_cache

    parts = all_parts(reference.file) if reference.file else []

    def wanted(name: str) -> bool:
        if parts:
            return name in parts
        return any(fnmatch(name, pattern) for pattern in (*_SMALL, *_WEIGHTS)) and not any(
            fnmatch(name, pattern) for pattern in _NEVER
        )

    return sum(
        size
        for name, size in sizes.items()
        if wanted(name) and not isinstance(try_to_load_from_cache(reference.repo, name, revision=revision), str)
    )


def ask_hub(reference: Reference, question: Callable[[], Result]) -> Result:
    """Run one call to the hub, its failures turned into ModelError; a full disk passes through."""
    try:
        return question()
    # The hub's client has changed its HTTP library several times, and with it the errors it raises.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise ModelError(_why(reference, error)) from error


def _why(reference: Reference, error: Any) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    repo = reference.repo
    if "GatedRepoError" in kinds:
        return f"{repo} asks for its terms to be accepted: do so on its page, then set HF_TOKEN"
    if "RepositoryNotFoundError" in kinds or status in (401, 403, 404):
        return (
            f"the Hugging Face hub has no model {repo} that this user may read (HTTP {status}); "
            "check the name, and for a private model set HF_TOKEN"
        )
    if "OfflineModeIsEnabled" in kinds:
        return f"{repo} is not completely in the cache, and HF_HUB_OFFLINE forbids asking the hub for it"
    if "HFValidationError" in kinds:
        return f"{repo} is not a valid repository name on the Hugging Face hub: {error}"
    reason = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {reason[0]}" if reason else type(error).__name__
    return (
        f"could not get {repo} from the Hugging Face hub: {what}; "
        "without the hub, use a local path or an alias (`dovetail list --all`)"
    )
