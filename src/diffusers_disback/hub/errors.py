"""Errors of the Hub's client, in words that say what the user has to do."""

import errno
import re


class HubError(ValueError):
    """What the Hub did not do, and what to do about it.

    Args:
        message (`str`): In words for the user.
        kind (`str`): What the code asks for: `unreachable` (the same may succeed later), `changed` (by somebody else, at
            the same time), `unknown` (to this token, or gone), `gated`, `cache` (a file of this machine), `offline`; by default the message.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind or message


def explain(error: Exception, repo_id: str) -> HubError:
    """What the user has to do about an error of the Hub's client. Addresses are left out: they may hold a right to upload."""
    from huggingface_hub import constants, errors

    # The client tells of a failed upload by a RuntimeError, caused by the error that says why.
    uploading, cause = type(error) is RuntimeError, error.__cause__
    error = cause if uploading and isinstance(cause, Exception) else error
    if not isinstance(error, errors.HfHubHTTPError):
        return _explain_without_answer(error, repo_id)
    status, words, kind = error.response.status_code, _in_brackets(error.server_message or ""), ""
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}"
        message = (
            f"{repo_id} is gated: accept its conditions at {page}, and log in as who accepted them (`hf auth login`)."
        )
        kind = "gated"
    elif isinstance(error, errors.RevisionNotFoundError):
        message, kind = f"{repo_id} has no such branch, tag or commit.", "unknown"
    elif status == 401 or isinstance(error, errors.RepositoryNotFoundError):
        message = (
            f"The Hub knows no {repo_id} for this token: the name is wrong, the repository is private, or the token "
            "has expired or is missing. Log in with `hf auth login`, or pass a token."
        )
        kind = "unknown"
    elif status == 412:
        message, kind = f"{repo_id} was changed by somebody else at the same time.", "changed"
    elif status in (402, 413) or re.search(r"quota|storage limit|too large", words, re.IGNORECASE):
        message = f"The Hub does not take more into {repo_id}: a quota or limit of the account."
    elif status == 403 and not uploading:  # an upload's address, which goes to the storage, may just have expired
        message = f"This token has no right to do this with {repo_id}: it belongs to somebody else, or the token is for reading."
    elif status in (403, 408, 429) or status >= 500:
        message, kind = f"The Hub cannot serve {repo_id} now (status {status}).", "unreachable"
    else:
        message = f"The Hub refused {repo_id} (status {status})."
    return HubError(f"{message}{words}", kind)


def _explain_without_answer(error: Exception, repo_id: str) -> HubError:
    """The same of an error of this machine, or of the network."""
    from huggingface_hub import errors

    words = _in_brackets(f"{type(error).__name__}: {error}")
    if errors.OfflineModeIsEnabled in (type(error), type(error.__cause__)):
        message = f"What is asked of {repo_id} is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub."
        return HubError(message, "offline")
    if "No space left" in words:
        return HubError(f"There is no space left on this machine's disk.{words}")
    is_local = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
    is_local |= isinstance(error, OSError) and error.errno == errno.EROFS
    if is_local and not isinstance(error, errors.LocalEntryNotFoundError):
        remedy = "If it is in the Hub's cache, pass another with --cache_dir."
        return HubError(f"A file that {repo_id} needs cannot be written to or read.{words} {remedy}", "cache")
    return HubError(f"The Hub cannot be reached for {repo_id}.{words}", "unreachable")


def _in_brackets(text: str) -> str:
    """The first line of what the client said, without addresses."""
    lines = re.sub(r"https?://\S+", "...", text).strip().splitlines()
    return f" ({lines[0]})" if lines else ""
