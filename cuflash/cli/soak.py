"""``check --soak``: thousands of random problems around the cases, with a progress bar and what went wrong."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing

from cuflash import device, jit
from cuflash.cases.table import CASES
from cuflash.cli.console import bar, console, followed
from cuflash.errors import InvalidArgument
from cuflash.plan import Step
from cuflash.verify.soak import Job, Outcome, soak, steps_of

_MOST_FAILURES = 5
"""After so many wrong draws, more of them say nothing new."""


def run(job: Job, seconds: float) -> bool:
    """Run the draws, print each that goes wrong with the command that repeats it; whether all went well."""
    if job.gpu:
        check_cublas("--soak on a GPU", ", or give --numpy")
        compile_all(steps_of([CASES[case_id] for case_id in job.case_ids], device.current(0)))
    screen = console()
    started_s = time.perf_counter()
    failures, ran, variants, left_out = 0, 0, 0, Counter[str]()
    with bar() as progress, closing(soak(job)) as outcomes:
        task = progress.add_task("", total=job.count)
        for outcome in outcomes:
            progress.update(task, advance=1, description=outcome.case_id)
            if outcome.left_out:
                left_out[outcome.left_out] += 1
            else:
                ran, variants = ran + 1, max(variants, outcome.variants)
            if outcome.complaints:
                failures += 1
                screen.print(_report(job, outcome))
            if failures == _MOST_FAILURES or time.perf_counter() - started_s > seconds:
                break
    where = f"the GPU, {variants} kernel variants" if job.gpu else "the NumPy backend"
    took_s = time.perf_counter() - started_s
    screen.print(f"{ran} draws around {len(job.case_ids)} cases on {where}, {took_s:.0f} s: {failures} went wrong.")
    for reason, count in left_out.items():
        screen.print(f"{count} left out: {reason}")
    return failures == 0 and ran > 0


def check_cublas(what: str, otherwise: str = "") -> None:
    """The exact answers are products of whole matrices on the GPU, which CuPy leaves to cuBLAS."""
    import cupy

    try:
        _ = cupy.cuda.cublas  # loaded when asked for
    except ImportError as error:
        raise InvalidArgument(
            f"{what} needs cuBLAS, which CuPy does not find: {error}. "
            f"Install nvidia-cublas (nvidia-cublas-cu12 with CUDA 12){otherwise}."
        ) from error


def compile_all(steps: list[Step]) -> None:
    """Fill the kernel cache, on all cores; what does not compile will be said by what needs it."""
    arch = device.current(0).arch
    cubins = jit.compile_many([(step.kernel, step.config, step.params, arch) for step in steps], None)
    for _ in followed(cubins, "compiling", len(steps)):
        pass


def _report(job: Job, outcome: Outcome) -> str:
    head = f"draw {outcome.number}, {outcome.case_id}:"
    return "\n  ".join([head, *outcome.complaints, *outcome.problem.splitlines(), job.again(outcome)])
