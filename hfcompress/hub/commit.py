"""One commit that arrives whole or not at all, whatever happens on the way.

Every step that writes looks first whether an earlier try of it arrived, so each can be repeated: a repository is found or created, large files
that are there are not sent again, and a commit whose answer was lost is looked for before it is made again. The commit names the one it
was made on, so that nobody else's is ever overwritten.

`HfApi.upload_folder` is not used: where hf_xet is installed it makes several commits of one folder.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hfcompress.hub import retries
from hfcompress.hub.retries import careful_client, is_passing, retrying, status_of
from hfcompress.measurement.provenance import hide_secrets

logger = logging.getLogger(__name__)


class PushError(RuntimeError):
    """The Hub did not take what was pushed; the message is one line, says what is there now, and holds no token."""


def send_commit(
    files: Sequence[CommitOperationAdd],
    repo: str,
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    stale: Callable[[str], bool] | None = None,
) -> CommitInfo:
    """Put files into a repository in one commit; the repository and the branch are created if they are not there.

    Args:
        files: What to add, by path in the repository.
        repo: "user/name".
        message: Of the commit.
        private: Make the repository private if it is created now.
        revision: Branch to commit to; created from "main", right before the commit, if it is not there.
        create_pr: Open a pull request instead of committing to "main".
        token: Instead of the one you logged in with.
        stale: Of a path in the repository: whether the commit deletes it if it is not among the files; None deletes nothing.

    Returns:
        The commit; where nothing changed the one that is there, without a pull request.

    Raises:
        PushError: The Hub refused, or cannot be reached. Either the commit is there whole, or the branch is as it was.
        ValueError: A file holds a token, or `revision` comes together with `create_pr`.
    """
    refuse_both(revision, create_pr)
    _refuse_secrets(files, token)
    with hub_errors(repo, token) as state, careful_client():
        return _Upload(HfApi(token=token), repo, revision, create_pr, state).run(files, message, private, stale)


def refuse_both(revision: str | None, create_pr: bool) -> None:
    """Refuse a pull request onto a branch, which the Hub does not know.

    Raises:
        ValueError: Both are asked for.
    """
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"a pull request is always onto main; leave out the revision {revision}, or the pull request")


def _refuse_secrets(files: Sequence[CommitOperationAdd], token: str | None) -> None:
    """Raise ValueError if a file that people or programs wrote as text holds an access token or a password."""
    for file in files:
        name = file.path_in_repo
        is_vocabulary = name.startswith(("tokenizer.", "vocab", "merges"))  # any text may be a token of a tokenizer
        if not name.endswith((".json", ".md", ".py", ".txt", ".yaml", ".yml")) or is_vocabulary:
            continue
        with file.as_file() as opened:
            text = opened.read().decode("utf-8", errors="replace")
        if hide_secrets(text, token, get_token()) != text:
            raise ValueError(
                f"{name} holds an access token or a password; take it out, make it invalid, and push again; nothing was pushed"
            )


def full_name(repo: str, token: str | None = None) -> str:
    """The name of a repository with its user, who is asked for where it is missing.

    Raises:
        PushError: It is no name that the Hub takes, or the Hub does not know who you are.
    """
    with hub_errors(repo, token), careful_client():
        validate_repo_id(repo)
        if "/" in repo:
            return repo
        return f"{retrying(HfApi(token=token).whoami, 'asking whose token this is')['name']}/{repo}"


def require_access(repo: str, *, create_pr: bool = False, token: str | None = None) -> None:
    """Find out what can be known before anything is sent: that the Hub is there, and knows the token.

    Raises:
        PushError: It is not or does not, or the pull request would be to a repository that is not there.
    """
    with hub_errors(repo, token) as state, careful_client():
        try:
            retrying(_Upload(HfApi(token=token), repo, None, create_pr, state).find_head, f"looking for {repo}")
        except RepositoryNotFoundError as error:
            if status_of(error) != 404 or create_pr:
                raise


def create_repo(repo: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Create a repository if it is not there.

    Returns:
        Its full name.

    Raises:
        PushError: The Hub refused, or cannot be reached.
    """
    repo = full_name(repo, token)
    with hub_errors(repo, token) as state, careful_client():
        _Upload(HfApi(token=token), repo, None, False, state).open(private)
    return repo


_NOTHING = "nothing there was changed"


@dataclass
class _State:
    """What is left at the Hub if the push fails now."""

    left: str = _NOTHING


class _Upload:
    def __init__(self, api: HfApi, repo: str, revision: str | None, create_pr: bool, state: _State) -> None:
        self.api, self.repo, self.create_pr, self.state = api, repo, create_pr, state
        self.branch = revision or "main"

    def run(
        self,
        files: Sequence[CommitOperationAdd],
        message: str,
        private: bool | None,
        stale: Callable[[str], bool] | None,
    ) -> CommitInfo:
        info, is_new_branch = self.open(private)
        parent = str(info.sha)
        present = {sibling.rfilename for sibling in info.siblings or []}
        others = present - {file.path_in_repo for file in files}
        gone = sorted(path for path in others if stale is not None and stale(path))
        size_mb = sum(file.upload_info.size for file in files) / 1e6
        logger.info("sending %d files (%.1f MB) to %s, but what is there", len(files), size_mb, self.repo)
        self.api.preupload_lfs_files(
            self.repo,
            files,
            revision="main" if is_new_branch else self.branch,
            create_pr=self.create_pr,
            free_memory=False,
        )
        if is_new_branch:
            self.make_branch(parent)
        return self.commit([*files, *(CommitOperationDelete(path) for path in gone)], parent, message)

    def open(self, private: bool | None) -> tuple[ModelInfo, bool]:
        """The head to commit on, and whether the branch is still to be made; the repository is created if it is not there."""

        def find_or_create() -> tuple[ModelInfo, bool]:
            try:
                return self.find_head()
            except RepositoryNotFoundError as error:
                if status_of(error) != 404 or isinstance(error, GatedRepoError) or self.create_pr:
                    raise
            self.state.left = f"{self.repo} may be there now, and empty"
            try:
                self.api.create_repo(self.repo, private=private)
            except HfHubHTTPError as error:
                if status_of(error) != 409:  # it is there by now
                    if not is_passing(error):
                        self.state.left = _NOTHING
                    raise
            found = self.find_head()
            self.state.left = f"{self.repo} is there now, and empty"
            return found

        info, is_new_branch = retrying(find_or_create, f"looking for {self.repo}, or creating it")
        if private and not info.private:
            logger.warning("%s was there before and is public; only a new repository is made private", self.repo)
        return info, is_new_branch

    def find_head(self) -> tuple[ModelInfo, bool]:
        try:
            return self.info(self.branch), False
        except RevisionNotFoundError:
            return self.info("main"), True

    def info(self, revision: str, *, with_files: bool = False) -> ModelInfo:
        # Without a time limit of its own, this call waits forever, whatever that of the session is.
        limit_s = retries.TIME_LIMITS_S[1]
        return self.api.model_info(self.repo, revision=revision, files_metadata=with_files, timeout=limit_s)

    def make_branch(self, parent: str) -> None:
        def find_or_make() -> None:
            info, is_new = self.find_head()
            if info.sha != parent:  # then what was found unchanged may not be so on the branch
                raise PushError(f"{self.repo} was not pushed: somebody else committed to it meanwhile; push again")
            if is_new:
                self.state.left = f"the branch {self.branch} may be there now, and is as main"
                self.api.create_branch(self.repo, branch=self.branch, revision=parent)
            self.state.left = f"the branch {self.branch} is there now, as main"

        retrying(find_or_make, f"making the branch {self.branch} of {self.repo}")

    def commit(
        self, operations: Sequence[CommitOperationAdd | CommitOperationDelete], parent: str, message: str
    ) -> CommitInfo:
        before = retrying(self.pull_requests, f"listing the pull requests of {self.repo}") if self.create_pr else set()
        tried = False

        def find() -> CommitInfo | None:
            return self.find_commit(operations, parent, message, before)

        def find_or_make() -> CommitInfo:
            nonlocal tried
            found = find() if tried else None
            if found is not None:
                return found
            tried = True
            try:
                return self.api.create_commit(
                    self.repo,
                    operations,
                    commit_message=message,
                    revision=self.branch,
                    create_pr=self.create_pr,
                    parent_commit=parent,
                )
            except HfHubHTTPError as error:
                found = find() if status_of(error) in (409, 412) else None  # the first try arrived after all
                if found is None:
                    raise
                return found

        try:
            return retrying(find_or_make, f"committing to {self.repo}")
        except HTTPError as error:
            if not is_passing(error):
                raise
            left, self.state.left = self.state.left, "whether the commit arrived is not known; push again to be sure"
            found = find()
            self.state.left = left
            if found is None:
                raise
            return found

    def pull_requests(self) -> set[str]:
        refs = self.api.list_repo_refs(self.repo, include_pull_requests=True).pull_requests or []
        return {ref.ref for ref in refs}

    def find_commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        parent: str,
        message: str,
        before: set[str],
    ) -> CommitInfo | None:
        """The commit on `parent` that did just these operations, if there is one."""
        for ref in sorted(self.pull_requests() - before) if self.create_pr else [self.branch]:
            history = [commit.commit_id for commit in self.api.list_repo_commits(self.repo, revision=ref)]
            at = history.index(parent) if parent in history else 0
            if at and self.did(history[at - 1], operations):
                address = f"{self.api.endpoint}/{self.repo}"
                return CommitInfo(
                    commit_url=f"{address}/commit/{history[at - 1]}",
                    commit_message=message,
                    commit_description="",
                    oid=history[at - 1],
                    pr_url=f"{address}/discussions/{ref.rpartition('/')[2]}" if self.create_pr else None,
                    _endpoint=self.api.endpoint,
                )
        return None

    def did(self, commit: str, operations: Sequence[CommitOperationAdd | CommitOperationDelete]) -> bool:
        siblings = self.info(commit, with_files=True).siblings or []
        there = {s.rfilename: (s.lfs.sha256 if s.lfs is not None else s.blob_id) for s in siblings}
        return all(
            there.get(operation.path_in_repo) in _digests(operation)
            if isinstance(operation, CommitOperationAdd)
            else operation.path_in_repo not in there
            for operation in operations
        )


def _digests(file: CommitOperationAdd) -> tuple[str, str]:
    """Under which names a file may be stored: its SHA-256 in large file storage, its SHA-1 in git."""
    with file.as_file() as opened:
        git = hashlib.sha1(b"blob %d\0" % file.upload_info.size)
        while chunk := opened.read(1 << 20):
            git.update(chunk)
    return file.upload_info.sha256.hex(), git.hexdigest()


_AGAIN = "push again later: large files that arrived are not sent again"
_REASONS = {
    401: "the Hub does not know you; log in with: hf auth login (a token with write access)",
    403: "you may not write there; check the name of the user or organization, and that the token may write",
    404: "there is no such user, organization, repository or branch, or you may not see it",
    409: "somebody else changed it at the same time; look at what is there, and push again",
    412: "somebody else committed to it meanwhile; look at what is there, and push again",
    429: f"the Hub asks for fewer requests; {_AGAIN}",
}


@contextmanager
def hub_errors(repo: str, token: str | None = None) -> Iterator[_State]:
    """Turn whatever the client raises in this block into one line."""
    state = _State()
    try:
        yield state
    except PushError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError, LookupError) as error:
        reason = hide_secrets(_reason(error, repo), token, get_token())
        raise PushError(f"{repo} was not pushed: {reason}; {state.left}") from None


def _reason(error: BaseException, repo: str) -> str:
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__, repo)  # the client wraps what went wrong with a large file
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    status = status_of(error)
    if status >= 500:
        return f"the Hub is out of order (it answered {status}); {_AGAIN}"
    if status:
        return _REASONS.get(status, f"it answered {status}: {line}")
    if isinstance(error, HFValidationError):
        return f"this is not a name the Hub takes ({line}); give user/name"
    if isinstance(error, OfflineModeIsEnabled):
        return "the client is offline; unset HF_HUB_OFFLINE"
    if isinstance(error, HTTPError | ConnectionError):
        return f"the Hub cannot be reached ({line}); {_AGAIN}"
    return line
