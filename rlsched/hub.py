"""Policies on the Hugging Face Hub: a repository with a policy file, and its card."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEME = "hf://"
POLICY, CARD = "policy.safetensors", "README.md"  # the files of a repository
HEADER = """\
---
library_name: rlsched
tags: [rlsched, pytorch, optimizer, learning-rate-schedule, reinforcement-learning]
---

"""
TOKEN = "a token that may do so comes from `hf auth login` or HF_TOKEN"
PINNED = re.compile(r"(?:sha256:)?([0-9a-f]{64})")


class Shared:
    """What a policy can do on the Hub. `pip install 'rlsched[hub]'` brings `huggingface_hub`.

    Its `PyTorchModelHubMixin` is a base class that has to be imported with ours, and a training loop needs none; so its
    functions are called where they are needed.
    """

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        digest: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        endpoint: str | None = None,
    ) -> Self:
        """The policy of a repository of the Hugging Face Hub. No pickle is read.

        It is kept in the Hub's cache, from which it comes where the Hub cannot be reached.

        Args:
            repo_id: as "user/name".
            revision: branch, tag or commit; the main branch by default.
            digest: that the policy must have, as "sha256:…" (`policy.digest`): what was put in its place is refused.
            cache_dir, local_files_only, token, endpoint: as of `huggingface_hub.hf_hub_download`. By default the
                environment decides: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN or `hf auth login`, HF_ENDPOINT.

        Raises:
            ModuleNotFoundError: `huggingface_hub` is missing.
            FileNotFoundError: there is no such repository or revision, or no policy file in it; or the Hub cannot be
                reached, and the cache does not have it.
            ValueError: `repo_id` or `digest` is none, or the policy has another digest or is no policy.
            OSError: the Hub answers with an error.
        """
        wanted = None if digest is None else PINNED.fullmatch(digest)
        if digest is not None and wanted is None:
            raise ValueError(f"digest must be 'sha256:' and 64 hexadecimal digits, got {digest!r}")
        hub = _huggingface_hub()
        with _told(repo_id, revision, endpoint):
            path = hub.hf_hub_download(
                repo_id,
                POLICY,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                endpoint=endpoint,
                library_name="rlsched",
            )
        policy: Any = _policies(cls).load(path)
        if wanted is not None and policy.digest != wanted[1]:
            raise ValueError(
                f"policy: {SCHEME}{repo_id} has the digest sha256:{policy.digest}, and not sha256:{wanted[1]}: it is "
                "another policy than the one that was asked for"
            )
        found: Self = policy
        return found

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Put the policy on the Hugging Face Hub, in one commit with its card; returns the address of that.

        Args:
            repo_id: as "user/name"; it is made if there is none.
            card: what is to be known of the policy, in Markdown; by default what its file tells.
            revision: the branch to commit to; the main branch by default.
            private: whether a repository that is made is private.
            token, endpoint: as of `from_pretrained`.

        Raises:
            ModuleNotFoundError: `huggingface_hub` is missing.
            FileNotFoundError: there is no such revision, or the token may not write there.
            ValueError: `repo_id` is none.
            OSError: the Hub cannot be reached, or answers with an error.
        """
        hub, policy = _huggingface_hub(), _policies(self)
        text = self.card(repo_id) if card is None else card
        contents = {POLICY: policy.content(), CARD: (text if text.startswith("---\n") else HEADER + text).encode()}
        with _told(repo_id, revision, endpoint):
            api = hub.HfApi(endpoint=endpoint, token=token, library_name="rlsched")
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.create_commit(
                repo_id,
                [hub.CommitOperationAdd(name, content) for name, content in contents.items()],
                commit_message=f"Policy sha256:{policy.digest[:12]}",
                revision=revision,
            )
        return str(done.commit_url)

    def card(self, repo_id: str) -> str:
        """What is to be known of the policy, in Markdown, as its file tells it."""
        policy = _policies(self)
        scores = policy.info.get("evaluation", {})
        lines = [
            f"# {repo_id.rpartition('/')[2]}",
            "A policy that schedules the hyperparameters of a PyTorch optimizer: `pip install 'rlsched[hub]'`.",
            "```python\n"
            "from rlsched import ScheduledOptimizer, SchedulePolicy\n\n"
            f'policy = SchedulePolicy.from_pretrained(\n    "{repo_id}",\n    digest="sha256:{policy.digest}",\n)\n'
            "optimizer = ScheduledOptimizer(torch.optim.AdamW(model.parameters()), total_steps=10_000, policy=policy)\n"
            "```",
            f"- moves: {', '.join(policy.controls)}\n"
            f"- sees: {', '.join(policy.observations)}\n"
            f"- base schedule: {policy.base_schedule.name}\n"
            f"- network: {policy!r}",
        ]
        if scores:
            lines += ["## Evaluation in training", "\n".join(f"- {name}: {value}" for name, value in scores.items())]
        return "\n\n".join(lines) + "\n"


def _policies(shared: Any) -> Any:
    """The same, known to be a `SchedulePolicy`, which this file cannot import."""
    return shared


def parts(address: str) -> tuple[str, str | None]:
    """The repository and the revision of "hf://user/name" or "hf://user/name@revision"."""
    repo_id, _, revision = address.removeprefix(SCHEME).partition("@")
    return repo_id, revision or None


@contextmanager
def _told(repo_id: str, revision: str | None, endpoint: str | None) -> Iterator[None]:
    """What goes wrong inside is told in a line."""
    from huggingface_hub import constants, errors

    where, hub = f"policy: {SCHEME}{repo_id}", endpoint or constants.ENDPOINT
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"policy: a repository is 'user/name', got {repo_id!r}: {error}") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{where} has no revision {revision!r} on {hub}") from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{where} is not in the cache, and {hub} was not, or could not be, asked") from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{where} has no {POLICY}: it is no repository of a policy") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{where}: there is no such repository on {hub}, or it is private: {TOKEN}") from error
    except errors.OfflineModeIsEnabled as error:
        raise OSError(f"{where}: HF_HUB_OFFLINE keeps it from {hub}") from error
    except (OSError, RuntimeError) as error:  # of the library for an error of the Hub, which shows pages of it
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise PermissionError(f"{where}: {hub} refuses: {TOKEN}") from error
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(f"{where}: {hub} answers: {said[0]}") from error


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "policy: the Hub needs huggingface_hub: pip install 'rlsched[hub]'", name="huggingface_hub"
        ) from error
    return huggingface_hub
