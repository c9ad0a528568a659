"""Job files: one JSON object a line, each the options of one command line.

    {"prompt": "a red fox", "seed": 1, "width": 512, "output": "fox.png"}
    {"prompt": "make it blue", "image": ["fox.png"], "steps": 8}

Keys are the command's options without their dashes, values what would follow them: lists for several, an object for
pairs, true or false for switches.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..fields import flag_of, type_of
from ..options import GenerationOptions, ModelOptions
from ..pipeline import Flux2Pipeline
from ..regions import parse_region
from ..runtime.distributed import any_process, launched
from .arguments import Task, build_parser, check, complete
from .command import tell, tell_fault
from .common import Parser
from .runner import generate, identity, open_pipeline, remove_unfinished, start

# Options whose flag is repeated for each value, and options that concern the whole run.
SEVERAL = (
    "image",
    *(
        flag_of(f)
        for cls in (ModelOptions, GenerationOptions)
        for f in fields(cls)
        if f.metadata.get("repeated") or type_of(cls, f.name) == tuple[str, ...]
    ),
)
COMMAND_ALONE = ("help", "version", "prompt-file", "jobs", "resume", "interactive", "plan", "measure", "stats", "quiet")


@dataclass(frozen=True)
class Job:
    """One line of a job file.

    Attributes:
        number: the line's number, from 1.
        text: the line's text, a JSON object.
    """

    number: int
    text: str

    @property
    def seed(self) -> int:
        """The seed of a line that gives none, 0 to 2^32 - 1: always the same for this text in this line."""
        return int.from_bytes(hashlib.sha256(f"{self.number} {self.text}".encode()).digest()[:4], "big")

    def arguments(self, parser: Parser, given: argparse.Namespace) -> argparse.Namespace:
        """This line's options on top of those that the command line gives for all lines.

        Raises:
            InputError: for what is no JSON object, or no option.
        """
        try:
            values = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"no JSON ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"a job must be a JSON object, got {self.text[:40]}")
        return arguments_of(values, parser, given)


def arguments_of(values: Mapping[str, Any], parser: Parser, given: argparse.Namespace) -> argparse.Namespace:
    """Options as JSON has them, on top of those that are given.

    Raises:
        InputError: for what is no option, or not its value.
    """
    arguments = copy.copy(given)
    prompt = values.get("prompt", given.prompt)
    if not isinstance(prompt, (str, type(None))):
        raise InputError(f"a prompt must be a string, got {prompt!r}")
    words: list[str] = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if option == "prompt":
            continue
        if option in COMMAND_ALONE:
            raise InputError(f"--{option} is for the command line, not for a job")
        if value is not None and option in ("steps", "num-steps", "schedule"):
            arguments.sigmas = None  # the command line's: the job's steps or schedule replace them
        if value is not None and option in SEVERAL:
            setattr(arguments, option.replace("-", "_"), None)  # the job's list replaces the command line's
        words += command_words(option, value)
    arguments = parser.parse_args(words, arguments)
    arguments.prompt = prompt
    return arguments


def command_words(option: str, value: Any) -> list[str]:
    """An option and its value as the words of a command line; none for null."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if option in SEVERAL:
        return [f"--{option}={part}" for part in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        value = ",".join(map(str, value))
    elif isinstance(value, dict):
        value = ",".join(f"{key}={part}" for key, part in value.items())
    return [f"--{option}={value}"]


def read_jobs(path: Path) -> list[Job]:
    """The lines of a job file that are not empty.

    Raises:
        InputError: for a file that cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold other line breaks
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    jobs = [Job(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not jobs:
        raise InputError(f"{path} has no jobs: one JSON object a line")
    return jobs


def is_there(output: Path) -> bool:
    """Whether an image is there. An empty file is none: a power cut, or a killed program where files have no links,
    leaves one under an image's name.
    """
    return os.path.lexists(output) and not (output.is_file() and output.stat().st_size == 0)


def missing_runs(outputs: Sequence[Path]) -> list[range]:
    """Indices of the files that are not there, as ranges of consecutive ones."""
    runs: list[range] = []
    for index, output in enumerate(outputs):
        if is_there(output):
            continue
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs


@contextlib.contextmanager
def faults_passed_over() -> Iterator[None]:
    """Pass over what costs one job, and is told when that one is generated."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException:
        return


ENCODED_AHEAD = 16  # jobs whose prompts are encoded together


class Jobs:
    """A file of jobs, generated line by line.

    Attributes:
        failed: numbers of the lines that could not be generated.
        generated, skipped: how many images were generated, and how many existed.
    """

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.parser = build_parser()
        self.failed: list[int] = []
        self.generated = self.skipped = 0
        self.claimed: dict[Path, int] = {}  # number of the line that writes each output
        self.pipe: Flux2Pipeline | None = None
        self.opened: dict[str, Any] = {}  # the identity of the open pipeline

    def run(self, jobs: Sequence[Job]) -> None:
        for k in range(0, len(jobs), ENCODED_AHEAD):
            self._encode(jobs[k : k + ENCODED_AHEAD])
            for job in jobs[k : k + ENCODED_AHEAD]:
                try:
                    self._generate(job)
                except BaseException as error:
                    tell_fault(error, f"line {job.number}: ")
                    self.failed.append(job.number)

    def _encode(self, jobs: Sequence[Job]) -> None:
        """Encode the prompts of the jobs that use the same model as the first, in one go, written out before where
        they are to be. A faulty job is passed over here and reported when it is generated.
        """
        prompts: dict[str, None] = {}
        short: dict[tuple[bool, int | None], list[str]] = {}  # prompts to write out, by whether of an edit, and seed
        first_needed = None
        for job in jobs:
            with faults_passed_over():
                task = self._task(job)
                check(task)
                if self.given.resume and not missing_runs(task.outputs):
                    continue
                needed = (identity(task), task.options.max_sequence_length)
                first_needed = first_needed or needed
                if needed == first_needed:
                    pipe = self._open(task)
                    if task.batch.enhance:
                        short.setdefault((task.is_edit, task.batch.enhance_seed), []).append(task.inputs.prompt)
                    else:
                        prompts[task.inputs.prompt] = None
                    prompts |= dict.fromkeys(parse_region(text).prompt for text in task.options.region)
                    if task.options.force_guidance or not pipe.checkpoint.is_distilled:
                        prompts[task.options.negative_prompt] = None
        with faults_passed_over():
            if first_needed is not None and self.pipe is not None:
                for (edit, seed), texts in short.items():
                    prompts |= dict.fromkeys(self.pipe.enhance.write(texts, edit=edit, seed=seed).values())
                self.pipe.encode(list(prompts), first_needed[1])

    def _generate(self, job: Job) -> None:
        task = self._task(job)
        check(task)
        outputs, count = task.outputs, task.batch.num_images
        if self.given.resume and len(set(outputs)) < len(outputs):
            raise InputError(f"{count} images of one name; with --resume, --output needs {{seed}} or {{index}}")
        for output in outputs if self.given.resume else ():
            writer = self.claimed.setdefault(output.resolve(), job.number)
            if writer != job.number:
                raise InputError(f"line {writer} writes {output} too; with --resume each job needs files of its own")
        runs = missing_runs(outputs) if self.given.resume else [range(count)]
        self.skipped += count - sum(map(len, runs))
        if not runs:
            remove_unfinished(task)  # which is done where an image is begun
        for run in runs:
            for output in outputs[run.start : run.stop] if self.given.resume else ():
                output.unlink(missing_ok=True)  # an empty one
            options = replace(task.options, seed=task.seed + run.start)
            part = replace(task, options=options, batch=replace(task.batch, num_images=len(run)))
            started = time.perf_counter()
            steps = start(part, self._open(part))
            generate(steps, part, started, first_index=run.start, on_saved=self._count)

    def _count(self, *_: object) -> None:
        self.generated += 1

    def _task(self, job: Job) -> Task:
        return complete(job.arguments(self.parser, self.given), None, lambda: job.seed)

    def _open(self, task: Task) -> Flux2Pipeline:
        if self.pipe is None or self.opened != identity(task):
            self.pipe = None  # give its memory back first
            self.pipe, self.opened = open_pipeline(task), identity(task)
        return self.pipe

    def report(self) -> str:
        parts = [f"{self.generated} images generated"]
        if self.skipped:
            parts.append(f"{self.skipped} skipped because they exist")
        if self.failed:
            parts.append(f"{len(self.failed)} lines failed: {', '.join(map(str, self.failed))}")
        return f"jobs: {', '.join(parts)}"


def generate_jobs(given: argparse.Namespace) -> int:
    """Generate the images of --jobs and report; several processes share the lines.

    Returns:
        The exit code: 0, 1 where a line failed, in any process.
    """
    if given.plan or given.prompt_file is not None:
        raise InputError("--jobs goes neither with --plan nor with --prompt-file")
    lines, group = read_jobs(given.jobs), launched()
    jobs = Jobs(given)
    try:
        jobs.run(lines if group is None else lines[group.rank() :: group.size()])
    except KeyboardInterrupt:
        raise KeyboardInterrupt("--resume generates what is missing") from None
    finally:
        tell(jobs.report())
    return int(any_process(bool(jobs.failed), group))  # told by all together: a launcher ends the others at the first 1
