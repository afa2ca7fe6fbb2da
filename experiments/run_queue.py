"""The queue of the ledger: which runs are missing, in which order, and how they are worked off.

A job is a run and the measurements that some claim needs of it. Always next is the claim that is
completed with the least remaining work; parents (the dense models that DyDiT starts from) come
before their children. Whatever stops the queue, the same command goes on where it was: a training
saves when it is asked to stop, and a result is written whole or not at all.
Read next: queue(), then work_off()."""

import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from common.cli import UserError
from experiments import runs
from experiments.runs import Run


@dataclass
class Job:
    run: Run
    needs: set = field(default_factory=set)

    @property
    def name(self):
        return self.run.name


def jobs_of(claim, seeds=None, from_scratch=None, device="cpu", all_needs=None):
    """The jobs of one claim: parents before children, seed by seed. all_needs: what any of
    the chosen claims asks of an arm, so that a run is measured once."""
    jobs = {}
    for seed in range(claim.seeds if seeds is None else seeds):
        for x, needs in claim.needs(seed).items():
            chain = [Run(x, seed, from_scratch, device)]
            while chain[0].parent:
                chain.insert(0, chain[0].parent)
            for run in chain:
                job = jobs.setdefault(run.name, Job(run))
                job.needs |= (needs if run is chain[-1] else {"loss"})
                job.needs |= (all_needs or {}).get(run.arm, set())
    return list(jobs.values())


def unfinished(jobs):
    """The jobs that lack a measurement, and the parents whose checkpoint is missing for them."""
    left = [job for job in jobs if job.run.missing(job.needs)]
    parents = {job.run.parent.name for job in left
               if job.run.parent and not job.run.trained() and not job.run.parent.trained()}
    return [job for job in jobs if job in left or job.name in parents]


def queue(claims, seeds=None, from_scratch=None, device="cpu"):
    """-> unfinished jobs in the order of their value, and the claims in the order of completion:
    always next the claim that is completed with the least remaining work."""
    all_needs = {}
    for c in claims:
        for x, needs in c.needs().items():
            all_needs.setdefault(x, set()).update(needs)
    waiting = {c.id: unfinished(jobs_of(c, seeds, from_scratch, device, all_needs))
               for c in claims}
    cost, order, done = {}, {}, []
    for jobs in waiting.values():
        for job in jobs:
            if job.name not in cost:
                cost[job.name] = job.run.minutes(job.needs)
    while waiting:
        def left(c):
            return sum(cost[j.name] for j in waiting[c] if j.name not in order)
        best = min(waiting, key=left)
        done.append((best, left(best)))
        for job in waiting.pop(best):
            order.setdefault(job.name, job)
    return list(order.values()), done, cost


def work_off(order, jobs=1, deadline=None):
    """Run the queue, `jobs` runs at a time, until it is empty or the deadline has come. A run whose
    parent is not trained yet waits for it; a run that fails is reported and left out."""
    waiting, running, failed = list(order), {}, set()
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            late = deadline is not None and time.time() > deadline
            for job in [] if late else list(waiting):
                if len(running) == jobs:
                    break
                parent = job.run.parent
                if parent and parent.name in failed:
                    failed.add(job.name)
                    waiting.remove(job)
                elif not parent or parent.trained():
                    waiting.remove(job)
                    running[pool.submit(run_one, job, deadline)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                job = running.pop(future)
                try:
                    print(f"{job.name}: {future.result()}", flush=True)
                except UserError as error:
                    failed.add(job.name)
                    print(f"{job.name}: failed, {error}", file=sys.stderr, flush=True)
    return waiting, failed


def run_one(job, deadline=None):
    """Train if necessary, then measure, each in a process of its own -> a line of text."""
    began = time.time()
    if not job.run.trained() and not job.run.train(deadline):
        return "saved before its end; the same command goes on"
    device = ["--device", job.run.device]
    steps = [] if job.run.from_scratch is None else ["--steps", job.run.from_scratch]
    command = ["-m", "experiments.claims", "--measure", job.name, *sorted(job.needs), *device]
    if not runs.call([*command, *steps], deadline):
        return "trained, not measured; the same command goes on"
    loss = job.run.result()["loss"]["mean"]
    return f"loss {loss:.4f}, {(time.time() - began) / 60:.1f} min"
