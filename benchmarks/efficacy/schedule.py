"""The study as a list of jobs in the order in which they are worth most, and the workers that do them.

Takes the study's folder; runs what isn't there yet, one process with one thread per worker, each of which imports
Megatron once. A job is done when the file that it makes exists, so a study that was stopped goes on where it was.

The order: tuning at the small size, then all its arms for the first seed, the second and so on, then the large size. A
study that is stopped anywhere compares all arms on the same seeds, but for the last.
"""

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.efficacy import arms, runs, sampling, seeds, task
from benchmarks.efficacy.arms import ARMS, SEEDS, SIZES, START, TUNING_SEED
from benchmarks.efficacy.runs import number_of_settings, run, run_file, tune, tuning_file
from benchmarks.efficacy.seeds import make_seed, make_start, seed_folder, start_folder
from megatron_amopo.certification.ranks import RankPool
from megatron_amopo.errors import ConfigError
from megatron_amopo.files import write_whole

#: Seconds on a quiet core, before a study has measured its own: (kind, size).
TYPICAL_SECONDS = {
    ("data", ""): 15.0,
    ("start", "small"): 50.0,
    ("start", "large"): 110.0,
    ("tuning", "small"): 25.0,
    ("tuning", "large"): 65.0,
    ("run", "small"): 25.0,
    ("run", "large"): 70.0,
}
RECENT = 6  # finished jobs of a kind, by which the next one's time is estimated
RESERVE = 1.25  # how much longer than estimated a job may take and still end in time
#: A worker that has a core to itself needs a tenth of it.
JOB_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Job:
    """Something that makes a file. ``needs`` are files that other jobs make."""

    kind: tuple[str, str]  # what takes the same time
    makes: Path
    needs: tuple[Path, ...]
    function: Callable[..., None]
    arguments: tuple[Any, ...]

    @property
    def ready(self) -> bool:
        return all(path.exists() for path in self.needs)


def claim_folder(output: Path) -> None:
    """Make the folder of a study, or check that it is one of this very study.

    Raises:
        ConfigError: its runs were made under other constants, and can't be compared with those to come; or it is no
            study's folder.
    """
    constants = {
        module.__name__: {name: value for name, value in vars(module).items() if _is_constant(name)}
        for module in (task, arms, seeds, sampling, runs)
    }
    text = json.dumps(constants, indent=1, default=_as_json)
    file = output / "study.json"
    if not file.exists():
        if output.is_dir() and any(output.iterdir()):
            raise ConfigError(f"--output {output}: the folder holds other files, and no study; name a new one")
        output.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    elif file.read_text(encoding="utf-8") != text:
        raise ConfigError(f"--output {output}: {file.name} says that its runs are of another study; name a new folder")


def _is_constant(name: str) -> bool:
    return name.isupper() and not name.startswith("_")


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return value.read_text(encoding="utf-8")
    if isinstance(value, re.Pattern):
        return value.pattern
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.__name__


def all_jobs(output: Path) -> list[Job]:
    """Every job of the study, each after those that it needs."""
    every_seed = (TUNING_SEED, *SEEDS)
    data = {seed: Job(("data", ""), seed_folder(output, seed), (), make_seed, (output, seed)) for seed in every_seed}
    jobs: list[Job] = []
    for size in (size.name for size in SIZES):
        starts = {
            seed: Job(
                ("start", size), start_folder(output, seed, size), (data[seed].makes,), make_start, (output, seed, size)
            )
            for seed in every_seed
        }
        tuning = list(_tuning_jobs(output, size, starts[TUNING_SEED].makes))
        jobs += [data[TUNING_SEED], starts[TUNING_SEED], *tuning]
        tuned = tuple(job.makes for job in tuning)
        for seed in SEEDS:
            jobs += [data[seed], starts[seed]]
            for arm, needs in ((START, ()), *((arm.name, tuned) for arm in ARMS)):
                arguments = (output, size, arm, seed)
                jobs.append(Job(("run", size), run_file(*arguments), (starts[seed].makes, *needs), run, arguments))
    return list({job.makes: job for job in jobs}.values())


def _tuning_jobs(output: Path, size: str, start: Path) -> Iterator[Job]:
    for arm in ARMS:
        if arm.tunes_as != arm.name:
            continue
        first = SIZES[0].name
        before = (
            ()
            if size == first
            else tuple(tuning_file(output, first, arm.name, number) for number in range(number_of_settings(first, arm)))
        )
        for number in range(number_of_settings(size, arm)):
            makes = tuning_file(output, size, arm.name, number)
            yield Job(("tuning", size), makes, (start, *before), tune, (output, size, arm.name, number))


@dataclass(frozen=True)
class Progress:
    """What a call has left."""

    finished: int
    left: int
    seconds_left: float  # of all workers together, estimated

    @property
    def done(self) -> bool:
        return self.left == 0


def work(jobs: Sequence[Job], *, workers: int, minutes: float | None) -> Progress:
    """Do the jobs that aren't done, in their order as far as what they need allows.

    Args:
        jobs: of :func:`all_jobs`.
        workers: processes of one thread.
        minutes: after which nothing may run; a job that isn't expected to end in time isn't started, except that each
            worker starts one.

    Raises:
        RuntimeError: a job failed, which it names; others that were under way have been finished.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    seconds = Seconds.measured(jobs)
    pending = [job for job in jobs if not job.makes.exists()]
    with ExitStack() as stack, tqdm(total=len(jobs), initial=len(jobs) - len(pending), unit="job") as bar:
        idle = [stack.enter_context(RankPool(1, timeout_s=JOB_TIMEOUT_S)) for _ in range(min(workers, len(pending)))]
        fresh = set(idle)
        threads = stack.enter_context(ThreadPoolExecutor(max(1, workers)))
        running: dict[Future[Any], tuple[Job, RankPool, float]] = {}
        while True:
            while idle and (job := next((job for job in pending if job.ready), None)) is not None:
                in_time = deadline is None or time.monotonic() + RESERVE * seconds.of(job.kind) < deadline
                if not in_time and idle[-1] not in fresh:
                    break
                pool = idle.pop()
                fresh.discard(pool)
                pending.remove(job)
                running[threads.submit(pool.run, job.function, 1, *job.arguments)] = (job, pool, time.monotonic())
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job, pool, begun = running.pop(future)
                if (error := future.exception()) is not None:
                    raise RuntimeError(f"{' '.join(job.kind)} {job.makes.stem} failed: {error}") from error
                seconds.add(job.kind, time.monotonic() - begun)
                idle.append(pool)
                bar.update()
    left = [job for job in jobs if not job.makes.exists()]
    return Progress(len(jobs) - len(left), len(left), sum(seconds.of(job.kind) for job in left))


class Seconds:
    """How long jobs of a kind take, by those that were done last."""

    def __init__(self) -> None:
        self._taken: dict[tuple[str, str], list[float]] = {}

    @classmethod
    def measured(cls, jobs: Sequence[Job]) -> "Seconds":
        """What the files of finished jobs say, oldest first."""
        seconds = cls()
        files = [(job.makes / "start.json" if job.kind[0] == "start" else job.makes, job.kind) for job in jobs]
        there = [(path.stat().st_mtime, path, kind) for path, kind in files if path.is_file()]
        for _, path, kind in sorted(there):
            seconds.add(kind, json.loads(path.read_text(encoding="utf-8"))["seconds"])
        return seconds

    def add(self, kind: tuple[str, str], taken: float) -> None:
        """A job of a kind was done."""
        self._taken.setdefault(kind, []).append(taken)

    def of(self, kind: tuple[str, str]) -> float:
        """What the next job of a kind is expected to take."""
        taken = self._taken.get(kind)
        return statistics.median(taken[-RECENT:]) if taken else TYPICAL_SECONDS[kind]
