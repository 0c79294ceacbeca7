"""Upload a folder to the Hugging Face hub; only `m2-plugin export --push` does so."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors
from huggingface_hub.utils import validate_repo_id

__all__ = ["check_access", "push_folder"]


def check_access(repo: str) -> None:
    """Check that a repository's name is valid, and that the hub knows who we are.

    Raises:
        ValueError: If not, or if the hub cannot be reached.
    """
    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise ValueError(f"--push {repo!r} is no name of a repository: {error}") from error
    if repo.count("/") != 1:
        raise ValueError(f"--push {repo!r} must be USER/NAME or ORGANISATION/NAME")
    try:
        HfApi().whoami()
    except errors.LocalTokenNotFoundError as error:
        raise ValueError(
            f"--push {repo!r} needs a login: run `huggingface-cli login`, or set HF_TOKEN to a "
            f"token that may write"
        ) from error
    except Exception as error:  # versions of huggingface_hub use different HTTP libraries
        raise _refusal("the hub does not let us in, or cannot be reached", error) from error


def push_folder(folder: str | Path, repo: str, private: bool = False) -> str:
    """Upload a folder to a repository of the hub, which is made if it does not exist.

    Args:
        folder: The folder.
        repo: USER/NAME.
        private: Whether only its owner may see it. The repository must not be public then.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: If the hub refuses it; or the repository is public, and should be private.
    """
    api: Any = HfApi()
    complete = f"{str(folder)!r} is complete, but not on the hub"
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        public = private and not api.repo_info(repo).private
        if not public:
            api.upload_folder(
                repo_id=repo, folder_path=str(folder), commit_message="Upload with m2_plugin"
            )
    except Exception as error:  # as in `check_access`
        again = f"`huggingface-cli upload {repo} {folder}` tries again"
        raise _refusal(f"{complete} ({again})", error) from error
    if public:
        raise ValueError(
            f"{complete}: {repo!r} exists there and is public. Make it private in its settings, or "
            f"leave --private out"
        )
    return str(url)


def _refusal(what: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"{what}: {type(error).__name__}: {reason}")
