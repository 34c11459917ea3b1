"""Models from the Hugging Face hub, in its own cache and under its own environment variables.

Nothing here asks the network about a model that is already complete on disk, so a start costs no round trip.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from dovetail.core.errors import ModelError
from dovetail.host.files import DISK_ERRORS, explaining, require_space
from dovetail.show.progress import note

_REPO = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model")
_WEIGHTS = ("*.safetensors",)
# Subfolders hold other formats of the same weights; `consolidated` is Mistral's second copy of them.
_NEVER = ("*/*", "consolidated*")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Reference:
    """A model on the hub: a repository, or one GGUF file in it."""

    repo: str
    file: str | None = None


def parse(name: str) -> Reference | None:
    """`org/name`, `org/name:file.gguf` or `org/name/file.gguf`; None if `name` is none of these."""
    repo, colon, file = name.partition(":")
    if not colon:
        pieces = name.split("/", 2)
        repo, file = "/".join(pieces[:2]), pieces[2] if len(pieces) == 3 else ""
    if not _REPO.fullmatch(repo) or (not file and (colon or repo.endswith(".gguf"))):
        return None
    if file and (not file.endswith(".gguf") or ".." in file.split("/")):
        return None
    return Reference(repo, file or None)


def cached(reference: Reference) -> Path | None:
    """The model's file or folder if all of it is in the hub's cache."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if reference.file:
        found = try_to_load_from_cache(reference.repo, reference.file)
        return Path(found) if isinstance(found, str) else None
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


def fetch(reference: Reference) -> Path:
    """Download what is missing of the model and return its path. Raises ModelError."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    directory = Path(constants.HF_HUB_CACHE)
    info = ask_hub(reference, lambda: HfApi().model_info(reference.repo, files_metadata=True, timeout=20))
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
    reference = choose_file(reference, sizes)
    needed = _missing_bytes(reference, sizes, info.sha)
    with explaining(directory, needed, reference.repo):
        require_space(directory, needed, reference.repo)
        if file := reference.file:
            return Path(ask_hub(reference, lambda: hf_hub_download(reference.repo, file, revision=info.sha)))
        # Weights last: where they are complete, everything else is.
        for patterns in (_SMALL, _WEIGHTS):
            folder = ask_hub(
                reference,
                lambda patterns=patterns: snapshot_download(  # type: ignore[misc]
                    reference.repo, allow_patterns=list(patterns), ignore_patterns=list(_NEVER)
                ),
            )
    return Path(folder)


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
    if not index.is_file():
        return any(path.exists() for path in folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return False
    return all((folder / str(shard)).exists() for shard in shards)


def choose_file(reference: Reference, files: dict[str, int]) -> Reference:
    """Check that the repository has what is asked for; a repository of one GGUF file needs no file name."""
    ggufs = sorted(name for name in files if name.endswith(".gguf"))
    listed = ", ".join(ggufs[:12]) + (f" and {len(ggufs) - 12} more" if len(ggufs) > 12 else "")
    if reference.file:
        if reference.file in files:
            return reference
        has = f"it has {listed}" if ggufs else "it has no GGUF file"
        raise ModelError(f"{reference.repo} has no file {reference.file}; {has}")
    if any("/" not in name and name.endswith(".safetensors") for name in files):
        return reference
    if len(ggufs) == 1:
        note(f"{reference.repo}: taking its one GGUF file, {ggufs[0]}")
        return Reference(reference.repo, ggufs[0])
    if ggufs:
        raise ModelError(f"{reference.repo} holds GGUF files; name one as {reference.repo}:FILE, of {listed}")
    raise ModelError(f"{reference.repo} has no weights in a format that is read: safetensors or GGUF")


def _missing_bytes(reference: Reference, sizes: dict[str, int], revision: str | None) -> int:
    from huggingface_hub import try_to_load_from_cache

    def wanted(name: str) -> bool:
        if reference.file:
            return name == reference.file
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
