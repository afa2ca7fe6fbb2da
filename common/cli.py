"""Command lines: the one error that a user sees, the parser, and the exit codes.

Exit code 0: done. 2: one clear line on stderr says what to change. 130: stopped by Ctrl-C."""

import argparse
import math
import os
import sys

import torch
import torch.distributed as dist


class UserError(ValueError):
    """Something that the user can change: a program prints it as one line and exits with code 2."""

    raised_on_all_ranks = False                 # then process 0 alone prints it


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated options, which reports a bad command line as a UserError."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(message)


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of this kind (int or float) in low..high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not low <= value <= high or value in (math.inf, -math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    return parse


def run_program(name, main, argv):
    """main(argv), with errors turned into one line on stderr -> the exit code of the process."""
    if hasattr(sys.stdout, "reconfigure"):      # a terminal may lack the letters of a class's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main(argv) or 0
    except (ValueError, OSError) as error:      # a UserError is a ValueError
        report(name, " ".join(str(error).split()), getattr(error, "raised_on_all_ranks", False))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError))
                or "allocate" in str(error)):
            raise
        report(name, "not enough memory; a smaller --batch needs less (training: --accum, "
                     "--checkpointing and --fsdp, too)", False)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def report(name, text, on_all_ranks):
    """One line on stderr. An error that all processes raise is printed by process 0 alone."""
    alone = dist.is_initialized() and not on_all_ranks
    if alone or os.environ.get("RANK", "0") == "0":
        print(f"{name}: {text}", file=sys.stderr)
