"""The prompts of a batch, all rewritten before its first clip is made, and remembered beside the clips."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..jobs import Job, file_digest
from ..prompt import PromptTokenizer
from .backends import Backend, BackendMissingError
from .memory import RewriteFile, with_rewritten
from .rewriter import Draft, rewrite

REWRITES = "rewrites.jsonl"


class BatchRewriter:
    """Rewrites the prompts of a batch's jobs; what it was is in ``rewrites.jsonl`` in the batch's folder.

    A draft that was rewritten there before, with the same picture and settings, is not asked about again, and one that
    was judged twice and kept is not either; one that got no answer is. ``tokenizer``: for the exact length.
    ``max_tokens``, ``temperature``, ``language``: as of a Draft; a clip's prompt is rewritten with seed ``seed``, so
    that all takes of a line share it.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        language: str = "zh",
        seed: int = 0,
        temperature: float = 0.7,
        max_tokens: int = 1024,
        tokenizer: PromptTokenizer | None = None,
    ):
        self.backend, self.tokenizer = backend, tokenizer
        self.settings = {"language": language, "seed": seed, "temperature": temperature, "max_tokens": max_tokens}
        self._file: RewriteFile | None = None
        self._this_run: dict[str, dict] = {}

    def prepare(self, folder: Path, jobs: Iterable[tuple[int, Any]], watcher: Any) -> None:
        """Rewrite the prompts of all jobs. Raises BackendMissingError where there is nobody to ask: nothing is made
        then, and what was rewritten by then is remembered."""
        self._file = RewriteFile(folder / REWRITES)
        self._this_run = {}
        try:
            for number, job in jobs:
                for text, key in self._texts(job):
                    if key not in self._file.records and key not in self._this_run:
                        watcher.note(f"Line {number}: rewriting the prompt")
                        self._ask(key, number, job, text)
        finally:
            close = getattr(self.backend, "close", None)
            if close is not None:  # its memory is needed for the clips
                close()

    def __call__(self, job: Any) -> Any:
        """A job with its rewritten prompts; what is no job as it is."""
        if not isinstance(job, Job):
            return job
        found = [self._this_run.get(key) or self._file.records.get(key) for _, key in self._texts(job)]
        return with_rewritten(job, found) if found else job

    def _texts(self, job: Any) -> list[tuple[int, str]]:
        """Number, from 0, and key of each prompt of a job: a long clip has several. None where its picture cannot be
        read, for which it fails when it is made."""
        if not isinstance(job, Job):
            return []
        with contextlib.suppress(OSError):
            return [(text, self._draft(job, text).key(self.backend.name)) for text in range(1 + len(job.then))]
        return []

    def _ask(self, key: str, number: int, job: Job, text: int) -> None:
        try:
            draft = self._draft(job, text, with_image=True)
        except (ValueError, OSError):  # as in _texts
            return
        result = rewrite(self.backend, draft, tokenizer=self.tokenizer)
        if result.missing:
            raise BackendMissingError(f"Line {number} cannot be rewritten. {result.warning}")
        record = {"key": key, "draft": result.draft, "prompt": result.prompt, "by": self.backend.name}
        if result.warning:
            record["warning"] = f"The draft was used as it is. {result.warning}"
        if result.unavailable:
            self._this_run[key] = record
        else:
            self._file.add(record)

    def _draft(self, job: Job, text: int, *, with_image: bool = False) -> Draft:
        """Of a job's prompt; the first frame is that of the first."""
        image, picture = None, ""
        if job.image is not None and text == 0:
            picture = file_digest(job.image)
            if with_image:
                from ..media import read_image

                image = read_image(job.image)
        draft = (job.prompt, *job.then)[text]
        return Draft(draft, mode=job.mode, image=image, image_key=picture, **self.settings)
