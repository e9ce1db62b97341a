"""Rewritten prompts that are remembered, so that the same draft is not asked about twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ..json_lines import append_record, read_records

Result = TypeVar("Result")


class Remembered:
    """The last results of this process, by key."""

    def __init__(self, most: int = 256):
        self.most = most
        self._results: OrderedDict[Hashable, object] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Result], keep: Callable[[Result], bool] = bool) -> Result:
        """The result under a key; ``make()`` where there is none, remembered if ``keep`` says so of it."""
        if key in self._results:
            self._results.move_to_end(key)
            return self._results[key]  # type: ignore[return-value]
        result = make()
        if keep(result):
            self._results[key] = result
            while len(self._results) > self.most:
                self._results.popitem(last=False)
        return result


class RewriteFile:
    """Results in a file of JSON lines that is only ever added to; a last line that a kill cut off is taken away."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict] = {}
        if path.is_file():
            read_records(self.path, self._take)

    def _take(self, record: dict) -> None:
        if isinstance(record["prompt"], str) and isinstance(record["draft"], str):
            self.records[record["key"]] = record

    def add(self, record: dict) -> None:
        """Appends a record with "key", "draft" and "prompt"; it is on the disk when this returns."""
        self.records[record["key"]] = record
        append_record(self.path, record)


def with_rewritten(job, records: Sequence[dict | None]):
    """A batch's job with the prompts that the records hold in place of its drafts, one for each of its prompts."""
    drafts = (job.prompt, *job.then)
    warnings = [record["warning"] for record in records if record is not None and record.get("warning")]
    prompts = [
        draft if record is None or record["prompt"] == record["draft"] else record["prompt"]
        for draft, record in zip(drafts, records, strict=True)
    ]
    job = replace(job, warnings=(*job.warnings, *dict.fromkeys(warnings)))
    if tuple(prompts) == drafts:
        return job
    return replace(job, prompt=prompts[0], then=tuple(prompts[1:]), draft=job.prompt)
