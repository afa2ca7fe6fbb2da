"""Reading ahead: while one step trains, threads read the batches of the next ones."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

from common.cli import UserError
from common.distributed import on_all_ranks


def read_ahead(fetch, steps, world_size, save, depth=1):
    """Yields step, fetch(step) for each of the steps; `depth` threads read as many steps ahead.

    If a process cannot read its batch (a broken image), all of them call save(), because the steps
    before it are sound, and raise the UserError, which names the file."""
    with ThreadPoolExecutor(depth) as reader:
        ahead = deque(reader.submit(fetch, steps[0] + i) for i in range(depth))
        for step in steps:
            try:
                batches = on_all_ranks(ahead.popleft().result, world_size)
            except UserError as error:
                if step > steps[0]:
                    save()
                    error.args = (f"{error}; step {step} is saved: replace what cannot be read, "
                                  "then continue with --resume",)
                raise
            ahead.append(reader.submit(fetch, step + depth))
            yield step, batches


def fetch_readable(fetch, step, other):
    """fetch(step), or fetch(other) if that batch cannot be read."""
    try:
        return fetch(step)
    except UserError:
        return fetch(other)
