"""An exported folder on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from dskd_lightning.errors import UserError

__all__ = ["hub_token", "push_folder"]

_TOKEN_VARIABLE = "HF_TOKEN"


def hub_token() -> str:
    """The token of the environment.

    Raises:
        UserError: there is none.
    """
    token = os.environ.get(_TOKEN_VARIABLE)
    if not token:
        raise UserError(f"--push: set the environment variable {_TOKEN_VARIABLE} to a token that may write.")
    return token


def push_folder(folder: str | Path, repository: str, private: bool = True) -> str:
    """Upload what ``dskd export`` wrote, with the token in ``$HF_TOKEN``.

    Args:
        folder: to upload.
        repository: ``owner/name``, made where it is missing.
        private: of a repository that is made now.

    Returns:
        The repository's address.

    Raises:
        UserError: there is no token, or the Hub refuses.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi(token=hub_token())
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=str(folder), commit_message="Student exported by dskd-lightning"
        )
    except errors.OfflineModeIsEnabled as error:
        raise UserError("--push: HF_HUB_OFFLINE is set; unset it to upload.") from error
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
        raise UserError(
            f"--push {repository}: {reason[:300].rstrip('.:')}: check the name, the token's rights and the "
            f"network; the student is in '{folder}'."
        ) from error
    return str(made)
