"""Files of the Hugging Face hub: the local cache first, then the network, and one sentence where neither has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from t2i_align.pipelines.models import PipelineError

TIMEOUT = 10.0  # seconds for the hub's first answer


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `organisation/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of the local cache's snapshot of a repository, whole or not, or None; no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # No pattern, no file: a snapshot is found however few of its files were ever wanted.
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None


def offline(local_files_only: bool = False) -> str:
    """Why the network is not to be asked; "" if it may be."""
    from huggingface_hub import constants

    if local_files_only:
        return "local_files_only forbids the network"
    return "HF_HUB_OFFLINE forbids the network" if constants.HF_HUB_OFFLINE else ""


def ask(repo: str, revision: str | None = None) -> list[str]:
    """Make sure that the hub has a repository, by one short request without retries; the names of its files.

    Raises:
        PipelineError: it cannot be reached, or has no such repository or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
    except HfHubHTTPError as error:
        raise _refusal(repo, revision, error) or absent(repo, f"the hub answers {_short(error)!r}") from error
    except (OSError, HTTPError) as error:
        raise absent(repo, f"the hub cannot be reached ({_short(error)})") from error
    return [file.rfilename for file in info.siblings or []]


def fetch(repo: str, revision: str | None, download: Callable[[list[str]], str | Path]) -> Path:
    """Ask for a repository, then download it: `download` gets the names of its files and returns the folder.

    Raises:
        PipelineError: what `ask` raises, a licence that must be accepted first, or a download that failed.
    """
    from huggingface_hub.errors import HTTPError

    files = ask(repo, revision)
    try:
        return Path(download(files))
    except PipelineError:
        raise
    except (OSError, ValueError, HTTPError) as error:
        failure = PipelineError(
            f"Downloading {repo} failed ({_short(error)}): try again, or see what `hf download {repo}` says."
        )
        raise _refusal(repo, revision, error) or failure from error


def absent(repo: str, why: str) -> PipelineError:
    """What to download, and where to put it."""
    from huggingface_hub import constants

    folder = f"models--{repo.replace('/', '--')}"
    return PipelineError(
        f"{repo} is neither a folder here nor wholly in the cache of the hub, and {why}: run `hf download {repo}` "
        f"where there is a network and copy {folder} from its cache into {constants.HF_HUB_CACHE} (HF_HOME moves it), "
        "or add `--local-dir DIR` and pass DIR, which brings no call defaults."
    )


def _refusal(repo: str, revision: str | None, error: Exception) -> PipelineError | None:
    """The sentence for an answer that says what to do, else None."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):  # a kind of RepositoryNotFoundError
        return PipelineError(
            f"{repo} is gated: accept its licence on https://huggingface.co/{repo}, then run `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return PipelineError(
            f"There is no folder {repo} here, and the hub shows no model of that name: check the spelling, or run `hf "
            "auth login` if it is private."
        )
    if isinstance(error, RevisionNotFoundError):
        return PipelineError(f"{repo} has no revision {revision!r} on the hub.")
    return None


def _short(error: Exception) -> str:
    """An error in a few words: its first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 120 else f"{lines[0][:117]}..."
