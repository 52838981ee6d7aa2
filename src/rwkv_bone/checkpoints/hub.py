"""Models and data sets that the user names as on the Hugging Face Hub: `owner/name`, or `owner/name@revision`.

A path that exists is always that path. A name is one of the Hub only if nothing else is likely: it has the form
`owner/name`, no ending of a file, and there is no folder `owner` here, in which a misspelt file would lie.
`hf://owner/name` is always of the Hub.

Only the files that are read here are downloaded, to the cache that huggingface_hub shares with other programs. What is
there is not downloaded again; without a network it is used as it is.
"""

from __future__ import annotations

import difflib
import errno
import glob
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rwkv_bone.errors import UserError

PREFIX = "hf://"
NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
# A name with such an ending is that of a file.
FILES = tuple(
    ".pth .pt .bin .safetensors .st .gguf .ckpt .json .jsonl .gz .csv .tsv .parquet .arrow .txt .text .md .npy .idx"
    " .zst".split()
)
# Read from the folder of a model, besides its weights.
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Weights under these names, or those of their shards, are read first; else the only file with such an ending is.
USUAL = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
ENDINGS = (".safetensors", ".pth", ".st", ".bin")
DATA = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|txt)(\.gz|\.zst|\.xz|\.bz2|\.zip)?|(^|/)README\.md", re.I)


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub, as the user named it."""

    name: str
    kind: str  # model or dataset
    revision: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def local_model(name: str | Path) -> Path:
    """The path of a model: `name` itself, or what was downloaded of the repository of the Hub that it names.

    That is a checkpoint or the index of its shards, beside config.json and the other files of the model. UserError says
    why there is none.
    """
    repository = _repository(str(name), "model")
    if repository is None:
        return Path(name)
    folder = _download(repository, _model_files)
    # Other programs may have put more forms of the weights into the folder.
    return folder / _model_files(_names(folder), repository)[0]


def local_data(name: str) -> str:
    """The path of data: `name` itself, or the folder of the data set of the Hub that it names."""
    repository = _repository(name, "dataset")
    return name if repository is None else str(_download(repository, _data_files))


def origin(path: str | Path) -> str:
    """Where a path in the cache of huggingface_hub is from: "commit 1a2b3c4d5e of the Hugging Face Hub"; else ""."""
    parts = Path(path).parts
    for folder, middle, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if middle == "snapshots" and folder.startswith(("models--", "datasets--")):
            return f"commit {commit[:10]} of the Hugging Face Hub"
    return ""


def _repository(name: str, kind: str) -> Repository | None:
    """The repository that `name` means; None for a path."""
    named = name.removeprefix(PREFIX).removeprefix("datasets/" if kind == "dataset" else "")
    found = NAME.fullmatch(named)
    if name.startswith(PREFIX):
        if not found:
            raise UserError(f"{name}: expected {PREFIX}owner/name or {PREFIX}owner/name@revision")
    elif not found or named.endswith(FILES) or Path(name).exists():
        return None
    elif (owner := Path(name).parent).is_dir():
        near = difflib.get_close_matches(Path(name).name, [path.name for path in owner.iterdir()], n=3)
        there = f"; it has {', '.join(near)}" if near else ""
        raise UserError(
            f"{name} does not exist: the folder {owner} is here and has no {Path(name).name}{there}. "
            f"(If you mean the {kind} {name} of the Hugging Face Hub: {PREFIX}{name})"
        )
    return Repository(found["repository"], kind, found["revision"])


Wanted = Callable[[Iterable[str], Repository], list[str]]


def _model_files(names: Iterable[str], repository: Repository) -> list[str]:
    """Those of a repository's files that are read: a checkpoint or an index, shards, and what belongs to them."""
    top = [name for name in names if "/" not in name]
    beside = [name for name in top if name in BESIDE]
    for usual in USUAL:
        if usual + INDEX in top:
            stem, ending = usual.split(".")
            shard = re.compile(rf"{stem}-\d+-of-\d+\.{ending}")
            return [usual + INDEX, *filter(shard.fullmatch, top), *beside]
        if usual in top:
            return [usual, *beside]
    for ending in ENDINGS:
        weights = [name for name in top if name.endswith(ending)]
        if len(weights) > 1:
            raise UserError(
                f"{repository} has {len(weights)} checkpoints: {_some(weights)}. Download the one you mean and name "
                f"the file: hf download {repository.name} {weights[0]} --local-dir ."
            )
        if weights:
            return [*weights, *beside]
    raise UserError(
        f"{repository} has no weights that are read here: expected one {', '.join(ENDINGS)} file, or shards with an "
        f"index, at its top; found {_some(top) or 'nothing'}"
    )


def _data_files(names: Iterable[str], repository: Repository) -> list[str]:
    wanted = [name for name in names if DATA.search(name)]
    if not any(name for name in wanted if not name.endswith("README.md")):
        raise UserError(f"{repository} has no data that is read here: found {_some(list(names)) or 'nothing'}")
    return wanted


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _download(repository: Repository, wanted: Wanted) -> Path:
    """The folder of the repository's files in the cache, after those that are missing have been downloaded."""
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise UserError(f"{repository}: names of the Hub need a package: pip install huggingface_hub") from error
    site = constants.ENDPOINT.removeprefix("https://")
    cached = _Cached(repository, Path(constants.HF_HUB_CACHE))
    try:
        with _explained(repository, site):
            info = huggingface_hub.HfApi().repo_info(
                repository.name, repo_type=repository.kind, revision=repository.revision, files_metadata=True
            )
            sizes = {file.rfilename: file.size or 0 for file in getattr(info, "siblings", None) or ()}
            files = wanted(list(sizes), repository)
            missing = [file for file in files if not cached.has(info.sha or "", file)]
            if missing:
                size = sum(sizes[file] for file in missing) / 1e9
                print(
                    f"{repository} is not on this machine: {len(missing)} files, {size:,.2f} GB, are downloaded from "
                    f"{site} to {constants.HF_HUB_CACHE}",
                    file=sys.stderr,
                )
            patterns = [glob.escape(file) for file in files]
            return Path(
                huggingface_hub.snapshot_download(
                    repository.name,
                    repo_type=repository.kind,
                    revision=repository.revision,
                    allow_patterns=patterns,
                    max_workers=4,
                )
            )
    except _Unreachable as error:
        return cached.folder(wanted, error)


class _Unreachable(Exception):
    """The Hub does not answer; the message is the reason."""


@contextmanager
def _explained(repository: Repository, site: str) -> Iterator[None]:
    """Errors of huggingface_hub as UserErrors, and as _Unreachable where the cache may help."""
    try:
        yield
    except (UserError, _Unreachable):
        raise
    except Exception as error:
        raise _explanation(error, repository, site) from error


def _explanation(error: BaseException, repository: Repository, site: str) -> UserError | _Unreachable:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        return _explanation(error.__cause__, repository, site)
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{repository} is gated: accept its terms at {site}/{repository.name}, and log in with `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{repository} is neither a path on this machine nor a {repository.kind} of {site}: check the spelling "
            "(a private one needs `hf auth login`)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{repository}: {repository.name} has no revision {repository.revision}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _Unreachable("HF_HUB_OFFLINE is set: unset it to download")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in (401, 403):
            return UserError(f"{repository}: {site} refuses it ({status}): log in with `hf auth login`")
        return _Unreachable(f"{site} answers with status {status}")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{repository}: its download cannot be written: {error}")
    # Whatever the library's network client raises, which was another one before.
    reason = str(error).strip().split("\n")[0]
    return _Unreachable(f"{site} cannot be reached ({type(error).__name__}: {reason})")


class _Cached:
    """A repository in the cache of huggingface_hub: KIND--OWNER--NAME/refs/REVISION, snapshots/COMMIT/FILE."""

    def __init__(self, repository: Repository, cache: Path):
        self._repository, self._cache = repository, cache
        self._path = cache / "--".join([f"{repository.kind}s", *repository.name.split("/")])

    def has(self, commit: str, file: str) -> bool:
        return (self._path / "snapshots" / commit / file).is_file()

    def folder(self, wanted: Wanted, reason: _Unreachable) -> Path:
        """The folder, if everything is there."""
        revision = self._repository.revision or "main"
        reference = self._path / "refs" / revision
        commit = reference.read_text().strip() if reference.is_file() else revision
        folder = self._path / "snapshots" / commit
        name = self._repository.name
        kind = " --repo-type dataset" if self._repository.kind == "dataset" else ""
        advice = (
            "If it is a path, check the spelling. If it is of the Hub, check the network (HTTPS_PROXY names a proxy, "
            f"HF_ENDPOINT a mirror), or run `hf download {name}{kind} --local-dir {name.split('/')[1]}` where there is "
            "one, and name the folder here"
        )
        if not folder.is_dir():
            raise UserError(
                f"{self._repository} is not on this machine, as a path or in {self._cache}, and {reason}. {advice}"
            )
        names = self._listed(commit) or _names(folder)
        missing = [file for file in wanted(names, self._repository) if not (folder / file).is_file()]
        if missing:
            raise UserError(
                f"{self._repository} is on this machine only in part ({_some(missing)} missing in {folder}), and "
                f"{reason}. When you run this again, whole files are kept. {advice}"
            )
        print(f"{self._repository}: taken from {folder}, since {reason}", file=sys.stderr)
        return folder

    def _listed(self, commit: str) -> list[str]:
        """The files of the repository, as far as the library remembers them; its older versions do not."""
        import huggingface_hub

        try:
            tree = huggingface_hub.get_cached_repo_tree(
                self._repository.name, repo_type=self._repository.kind, revision=commit
            )
        except Exception:
            return []
        return [file.path for file in tree]
