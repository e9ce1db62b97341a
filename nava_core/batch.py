"""Many clips from a file of JSON lines: what is finished is skipped, a bad line is recorded, a kill loses one clip.

The output folder holds the clips, ``report.jsonl`` (what became of every line, appended as it happens, run after run)
and ``summary.json`` (every line of the last run). A clip is written under ``.unfinished`` and moved to its name when
it is whole. Latents that a line keeps are at their name, beside the clip's, before it is decoded: a clip that was
killed after that is finished from them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import WrongFileError
from .explain import explain, is_fatal
from .jobs import Defaults, Job, LineError
from .json_lines import append_record, read_records
from .lines import parse_line, read_lines

if TYPE_CHECKING:
    from .pipeline import ClipLatents
    from .rewrite.batch import BatchRewriter

REPORT, SUMMARY = "report.jsonl", "summary.json"
UNFINISHED, LOCK = ".unfinished", ".batch.lock"
SEGMENTS = ".segments"  # where long clips lie until they are whole, a folder for each
LATENTS = ".latents.safetensors"  # after a clip's name
MOST_WAITING = 64  # lines that wait for the same content's clip, before a batch reads no further
KEY_LENGTH = 12  # hexadecimal digits of a job's hash in the names of clips without an id

MADE, SKIPPED, DUPLICATE, FAILED = "made", "skipped", "duplicate", "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of a line. ``file`` is the name of its clip in the output folder."""

    line: int
    status: str  # made, skipped (finished before), duplicate (of an earlier line), failed
    file: str | None = None
    key: str | None = None
    size: int | None = None  # bytes
    seconds: float | None = None  # that making it took
    duplicate_of: int | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    take: int | None = None  # of a line that has several, from 0
    latents: str | None = None  # the name of the file with the clip's latents
    from_latents: bool | None = None  # whether it was finished from those that were there
    draft: str | None = None  # of a line whose prompt was rewritten
    prompt: str | None = None  # what it was rewritten to

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value not in (None, ())}


@dataclass
class BatchResult:
    """Counts by status, and the outcome of every line that was reached, or of each of its takes."""

    outcomes: list[Outcome] = field(default_factory=list)
    interrupted: bool = False

    @property
    def counts(self) -> Counter:
        return Counter(outcome.status for outcome in self.outcomes)

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == FAILED]


class Watcher:
    """Is told how a batch goes on; this one keeps quiet."""

    def clip(self, line: int, done: int, total: int, job: Job) -> None:
        """A clip is begun, ``done`` of ``total`` being behind it."""

    def step(self, step: int, steps: int, *_: Any) -> None:
        """A denoising step is done."""

    def outcome(self, outcome: Outcome) -> None:
        """A line, or a take of it, is done with."""

    def note(self, text: str) -> None:
        """Something the person at the terminal should know."""


@dataclass(frozen=True)
class Check:
    """A batch file looked through before anything is loaded: how many lines, which of them cannot be used and why, and
    notes on lines."""

    lines: int
    problems: tuple[tuple[int, str], ...]
    notes: tuple[tuple[int, str], ...] = ()


def check_batch(source: str | os.PathLike, defaults: Defaults | None = None) -> Check:
    """Read and check every line of a batch file; the pictures and voices it names are read, but not decoded."""
    lines, problems, notes, names = set(), {}, [], _Names()
    for number, job in _jobs(Path(source), defaults or Defaults()):
        lines.add(number)
        try:
            if isinstance(job, Exception):
                raise job
            notes += [(number, warning) for warning in job.warnings]
            names.claim(number, job)
        except (ValueError, OSError) as error:
            problems.setdefault(number, explain(error))
    return Check(len(lines), tuple(problems.items()), tuple(notes))


def _jobs(source: Path, defaults: Defaults) -> Iterator[tuple[int, Job | Exception]]:
    """The number of every line, and its job, one for each take, or what is wrong with it."""
    folder = Path(os.path.abspath(source)).parent
    with source.open("rb") as file:
        for number, raw in read_lines(file):
            if isinstance(raw, LineError):
                yield number, raw
                continue
            try:
                takes = parse_line(raw, folder, defaults, source.suffix).split()
            except (ValueError, OSError) as error:
                takes = [error]
            yield from ((number, take) for take in takes)


class _Names:
    """The names of a batch's clips, each of them for one content."""

    def __init__(self) -> None:
        self.line_of: dict[str, tuple[int, str]] = {}  # file without regard to case: line and key

    def claim(self, number: int, job: Job) -> tuple[str, str]:
        """The clip's file and the job's key. Raises LineError where an earlier line gave the name to another clip."""
        key = job.key()
        name = job.name or f"{number:05d}-{key[:KEY_LENGTH]}"
        line, other = self.line_of.setdefault(f"{name}{job.suffix}".casefold(), (number, key))
        if other != key:
            raise LineError(f"The id {name!r} is already that of line {line}: give every clip its own.")
        return f"{name}{job.suffix}", key


@dataclass(frozen=True)
class Task:
    """A clip to make. ``path`` is where it is written, to be moved to its name when it is whole; ``latents``: where its
    latents are kept; ``resume``: whether those that are there are used. ``state``: the folder of a clip of several
    segments until it is whole."""

    line: int
    job: Job
    file: str
    key: str
    path: Path
    latents: Path
    resume: bool = True
    state: Path | None = None

    def kept_latents(self) -> ClipLatents | None:
        """The latents that an earlier run kept of this very content; None where there are none, or none to be used."""
        from .pipeline import ClipLatents

        if not self.resume or not self.latents.is_file():
            return None
        try:
            found = ClipLatents.load(self.latents)
        except (ValueError, ArithmeticError, OSError):
            return None
        return found if found.key == self.key else None

    def keep(self, latents: ClipLatents) -> None:
        """Writes the latents to their name; they are on the disk when this returns."""
        part = self.path.with_name(self.latents.name)
        replace(latents, key=self.key).save(part)
        _onto_the_disk(part)
        os.replace(part, self.latents)


@dataclass(frozen=True)
class Made:
    """A clip that is at its task's path. ``seconds``: that making it took; ``latents``, ``from_latents``: whether they
    were kept, and whether it was finished from those of an earlier run."""

    seconds: float
    warnings: tuple[str, ...] = ()
    latents: bool = False
    from_latents: bool = False


@dataclass(frozen=True)
class Failed:
    """Why a clip was not made: a sentence, and the traceback as text. ``fatal``: what no later clip would get past, so
    that the batch ends with it; ``models``: it is the models' and not the line's."""

    error: str
    details: str = ""
    fatal: Exception | None = None
    models: bool = False


def failure_of(error: Exception, job: Job | None = None) -> Failed:
    """What an error means for the batch; ``job``: of the clip that was being made."""
    models = job is not None and _is_the_models(error, job)
    details = "".join(traceback.format_exception(error))
    return Failed(explain(error), details, error if models or is_fatal(error) else None, models)


def make_clip(pipeline: Any, task: Task, step: Callable[..., None]) -> Made:
    """Make a task's clip: denoised with ``step`` called after each step, or finished from latents that were kept."""
    start = time.monotonic()
    if task.job.segments > 1:
        warnings = _make_long(pipeline, task, step)
        return Made(time.monotonic() - start, warnings)
    latents = task.kept_latents()
    from_latents = latents is not None
    if latents is None:
        latents = pipeline.denoise(**task.job.request(), callback=step)
        if task.job.save_latents:
            task.keep(latents)
    pipeline.save(latents, task.path)
    kept = from_latents or task.job.save_latents
    return Made(time.monotonic() - start, tuple(latents.warnings), kept, from_latents)


def _make_long(pipeline: Any, task: Task, step: Callable[..., None]) -> tuple[str, ...]:
    """Make a clip of several segments, going on with what an earlier run left of it; its warnings, and how it drifts
    from segment to segment."""
    if not task.resume and task.state is not None:
        shutil.rmtree(task.state, ignore_errors=True)
    request = task.job.long_request()
    made = pipeline.make_long(task.path, state=task.state, anew=True, callback=step, **request)
    if task.state is not None:
        shutil.rmtree(task.state, ignore_errors=True)
    return (*made.warnings, *made.drift())


class Runner:
    """Makes clips, at most ``places`` at a time; this one in this process, each as soon as it is asked for.

    ``open_pipeline``'s result has what of ``NavaPipeline`` makes a clip: ``denoise(callback=..., **Job.request())``,
    which returns ``ClipLatents``, and ``save(latents, path)``; and for clips of several segments
    ``make_long(path, state=..., anew=..., callback=..., **Job.long_request())``, which returns ``LongClip``.
    """

    places = 1

    def __init__(self, open_pipeline: Callable[[], Callable[..., Any]], watcher: Watcher) -> None:
        self.pipeline = open_pipeline()
        self.watcher = watcher
        self.results: list[tuple[Task, Made | Failed]] = []

    def start(self, task: Task) -> None:
        """Has a clip made."""
        result = self._make(task)
        if isinstance(result, Failed):
            _free_memory()  # only here, where the error no longer holds the tensors it met
        self.results.append((task, result))

    def finished(self) -> list[tuple[Task, Made | Failed]]:
        """What has ended since the last call; waits until something has."""
        results, self.results = self.results, []
        return results

    def close(self) -> None:
        """Ends what is at work."""

    def _make(self, task: Task) -> Made | Failed:
        try:
            return make_clip(self.pipeline, task, self.watcher.step)
        except Exception as error:
            return failure_of(error, task.job)


def run_batch(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    open_pipeline: Callable[[], Callable[..., Any]],
    defaults: Defaults | None = None,
    *,
    models: Mapping[str, str] | None = None,
    remake: bool = False,
    watcher: Watcher | None = None,
    debug: bool = False,
    make_runner: Callable[[Callable[[], Callable[..., Any]], Watcher], Runner] = Runner,
    rewriter: BatchRewriter | None = None,
) -> BatchResult:
    """Make the clips of a batch file into ``folder`` (made if missing), by default one after another.

    ``make_runner`` is called once, for the first clip that is to be made, with ``open_pipeline``; see ``Runner``. Only
    the lines at work are in memory. A clip is named after the line's ``id``, or
    after its number and content. A line whose clip is there, made from the same content, is skipped, wherever the line
    stands now; the same content twice is made once, and a second ``id`` gets a link to it (a copy where links are not
    possible). ``remake`` makes all again, each content once. With a ``rewriter`` every line's prompt is rewritten
    before the first clip is made, and a clip's content is that of its rewritten prompt. ``models`` (names by role) are
    recorded, and a change since the last run is noted.

    A line that fails is recorded and the rest goes on. Raises what ``open_pipeline`` raises, and the same of models or
    packages that turn out unusable in a clip; OSError where the disk is full, BlockingIOError where another batch is at
    work in ``folder``; KeyboardInterrupt goes through after the summary is written.
    """
    source, folder = Path(source), Path(folder)
    defaults, watcher = defaults or Defaults(), watcher or Watcher()
    numbers = [number for number, _ in _jobs(source, defaults)]
    total, lines = len(numbers), len(set(numbers))
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder), _work_folder(folder) as work:
        report = Report(folder)
        report.begin(source, models or {}, watcher.note)
        run = _Run(folder, work, report, lambda: make_runner(open_pipeline, watcher), watcher, remake, debug, total)
        result = BatchResult(run.outcomes)
        try:
            if rewriter is not None:
                rewriter.prepare(folder, _jobs(source, defaults), watcher)
            for number, job in _jobs(source, defaults):
                run.line(number, job if rewriter is None else rewriter(job))
            run.finish()
        except BaseException as error:
            result.interrupted = isinstance(error, KeyboardInterrupt)
            raise
        finally:
            result.outcomes.sort(key=lambda outcome: (outcome.line, outcome.take or 0))
            _write_summary(folder, source, lines, result)
            run.close()
            with contextlib.suppress(OSError):  # clips are under way in it, or it is not there
                (folder / SEGMENTS).rmdir()
    return result


class Report:
    """``report.jsonl``: appended line by line, and read for what is finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / REPORT
        self.key_of: dict[str, str] = {}  # file: key of the job it was made from
        self.files_of: dict[str, list[str]] = {}  # key: files
        self.size_of: dict[str, int] = {}
        self.models: dict[str, str] | None = None
        if self.path.exists():
            read_records(self.path, self._remember)

    def _remember(self, record: Mapping[str, Any]) -> None:
        if "models" in record:
            self.models = dict(record["models"])
        elif record["status"] in (MADE, DUPLICATE):
            file, key, size = record["file"], record["key"], record["size"]
            if Path(file).name != file:
                return
            self.key_of[file], self.size_of[file] = key, size
            self.files_of.setdefault(key, []).append(file)

    def begin(self, source: Path, models: Mapping[str, str], note: Callable[[str], None]) -> None:
        """Records the run's start, and notes where the folder's clips come from other models."""
        if self.models and models and self.models != dict(models) and self.key_of:
            changed = ", ".join(f"{self.models.get(r)} -> {models.get(r)}" for r in sorted({*self.models, *models})
                                if self.models.get(r) != models.get(r))  # fmt: skip
            note(
                f"The clips in {self.folder} were made with other models ({changed}): they are kept; "
                "--remake makes them again, another --out keeps both."
            )
        self.add({"run": _now(), "source": str(source), "models": dict(models)})

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends a record; it is on the disk when this returns."""
        append_record(self.path, record)
        self._remember({"status": "", **record})

    def has(self, file: str, key: str) -> bool:
        """Whether ``file`` is there, whole, and made from the job with this key."""
        if self.key_of.get(file) != key:
            return False
        with contextlib.suppress(OSError):
            return (self.folder / file).stat().st_size == self.size_of[file]
        return False

    def find(self, key: str) -> str | None:
        """A whole file made from the job with this key."""
        return next((file for file in self.files_of.get(key, ()) if self.has(file, key)), None)


@dataclass
class _Run:
    """A batch at work."""

    folder: Path
    work: Path
    report: Report
    open_runner: Callable[[], Runner]
    watcher: Watcher
    remake: bool
    debug: bool
    total: int
    outcomes: list[Outcome] = field(default_factory=list)
    runner: Runner | None = None
    names: _Names = field(default_factory=_Names)
    done: dict[str, int] = field(default_factory=dict)  # key: first line of this run that has its clip
    made: dict[str, str] = field(default_factory=dict)  # key: file made in this run
    at_work: dict[str, list[Task]] = field(default_factory=dict)  # key: later tasks of the same content
    waiting: int = 0  # of those

    def line(self, number: int, job: Job | Exception) -> None:
        """Sees to a line; when this returns there is a place for another clip."""
        try:
            if isinstance(job, Exception):
                raise job
            file, key = self.names.claim(number, job)
        except (ValueError, OSError) as error:
            self._failed(number, job, failure_of(error))
            return
        latents = self.folder / f"{file}{LATENTS}"
        state = self.folder / SEGMENTS / key[:KEY_LENGTH] if job.segments > 1 else None
        self._begin(Task(number, job, file, key, self.work / file, latents, not self.remake, state))
        while self.runner is not None and len(self.at_work) >= self.runner.places:
            self._collect()

    def finish(self) -> None:
        """Waits for the clips at work."""
        while self.at_work:
            self._collect()

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()

    def _begin(self, task: Task) -> None:
        """Settles a line whose clip is there, lets it wait for its like, or has its clip made."""
        while task.key in self.at_work and self.waiting >= MOST_WAITING:
            self._collect()
        if task.key in self.at_work:
            self.at_work[task.key].append(task)
            self.waiting += 1
            return
        try:
            outcome = self._existing(task)
        except OSError as error:
            self._failed(task.line, task.job, failure_of(error))
            return
        if outcome is not None:
            self._settle(outcome)
            return
        if self.runner is None:
            self.runner = self.open_runner()
        self.at_work[task.key] = []
        self.watcher.clip(task.line, len(self.outcomes), self.total, task.job)
        self.runner.start(task)

    def _collect(self) -> None:
        """Waits until a clip has ended, and settles it and the lines that waited for it."""
        for task, result in self.runner.finished():
            like = self.at_work.pop(task.key)
            self.waiting -= len(like)
            if isinstance(result, Made):
                try:
                    result = self._placed(task, result)
                except OSError as error:
                    result = failure_of(error)
            if isinstance(result, Failed):
                self._failed(task.line, task.job, result)
            else:
                self._settle(result)
            for other in like:
                self._begin(other)

    def _failed(self, number: int, job: Job | Exception, failed: Failed) -> None:
        if self.debug and failed.details:
            self.watcher.note(failed.details)
        if not failed.models:
            about = {"warnings": job.warnings, "take": job.take, **_rewriting(job)} if isinstance(job, Job) else {}
            self._settle(Outcome(number, FAILED, error=failed.error, **about))
        if failed.fatal is not None:
            raise failed.fatal

    def _settle(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        new_to_the_folder = outcome.status in (MADE, FAILED) or outcome.size is not None
        if new_to_the_folder:
            self.report.add({**outcome.record(), "time": _now()})
        self.watcher.outcome(outcome)

    def _existing(self, task: Task) -> Outcome | None:
        """The outcome of a line whose clip is there, under its own name or one that it gets a link to."""
        first = self.done.get(task.key)
        known = {"line": task.line, "key": task.key, "duplicate_of": first}
        known |= {"warnings": task.job.warnings, "take": task.job.take, **_rewriting(task.job)}
        there = self._there(task.file, task.key, task.job)
        if there is not None:
            self.done.setdefault(task.key, task.line)
            return Outcome(status=SKIPPED if first is None else DUPLICATE, file=there, **known)
        twin = self._find(task.key)
        if twin is None:
            return None
        self._link(twin, task.file)
        self.done.setdefault(task.key, task.line)
        return Outcome(status=DUPLICATE, file=task.file, size=self._size(task.file), **known)

    def _there(self, file: str, key: str, job: Job) -> str | None:
        """The file that already holds this job's clip and needs no other name."""
        if not self.remake:
            if self.report.has(file, key):
                return file
            # its name holds the key: the report was lost, or a kill came in between
            if not job.name and (self.folder / file).is_file():
                return file
        found = self._find(key)
        return found if found == file or not job.name else None

    def _find(self, key: str) -> str | None:
        """A whole clip of this content, under ``remake`` one of this run."""
        if not self.remake:
            return self.report.find(key)
        made = self.made.get(key)
        return made if made is not None and self.report.has(made, key) else None

    def _placed(self, task: Task, made: Made) -> Outcome:
        self._move_into_place(task.file)
        self.done.setdefault(task.key, task.line)
        self.made[task.key] = task.file
        warnings = (*task.job.warnings, *(w for w in made.warnings if w not in task.job.warnings))
        size, seconds = self._size(task.file), round(made.seconds, 3)
        about = {"warnings": warnings, "take": task.job.take, "from_latents": made.from_latents or None}
        about |= {"latents": task.latents.name} if made.latents else {}
        about |= _rewriting(task.job)
        return Outcome(task.line, MADE, task.file, task.key, size, seconds, **about)

    def _move_into_place(self, file: str) -> None:
        _onto_the_disk(self.work / file)
        os.replace(self.work / file, self.folder / file)

    def _link(self, existing: str, file: str) -> None:
        part = self.work / file
        part.unlink(missing_ok=True)
        try:
            os.link(self.folder / existing, part)
        except OSError:
            shutil.copy2(self.folder / existing, part)
        self._move_into_place(file)
        part.unlink(missing_ok=True)  # a system leaves it there where both names are links to one file already

    def _size(self, file: str) -> int:
        return (self.folder / file).stat().st_size


def _rewriting(job: Job) -> dict[str, str]:
    """What a job's prompt was rewritten from and to, for the record."""
    return {} if job.draft is None else {"draft": job.draft, "prompt": job.prompt}


def _onto_the_disk(path: Path) -> None:
    with path.open("rb") as whole:
        os.fsync(whole.fileno())


def _is_the_models(error: Exception, job: Job) -> bool:
    """Whether a clip failed for a model file, tokenizer or package that is missing or wrong, so that all others would.

    A file that was not found is one of theirs while the job's own are all there.
    """
    if isinstance(error, FileNotFoundError):
        return all(path.is_file() for path in job.files)
    return isinstance(error, (WrongFileError, ImportError)) or isinstance(error.__cause__, ImportError)


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keeps a second batch out of the folder for as long as this process lives."""
    try:
        import fcntl
    except ImportError:  # a system without them
        yield
        return
    with (folder / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BlockingIOError(
                f"Another batch is at work in {folder}: wait for it, or give another --out."
            ) from None
        yield


@contextlib.contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Where clips are written before they are whole; what a killed run left there goes first."""
    work = folder / UNFINISHED
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_summary(folder: Path, source: Path, lines: int, result: BatchResult) -> None:
    summary = {
        "source": str(source),
        "finished": _now(),
        "interrupted": result.interrupted,
        "lines": lines,
        "counts": dict(result.counts),
        "clips": [outcome.record() for outcome in result.outcomes],
    }
    part = folder / f".{SUMMARY}.part"
    part.write_text(json.dumps(summary, ensure_ascii=False, indent=1), encoding="utf-8", errors="backslashreplace")
    os.replace(part, folder / SUMMARY)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
