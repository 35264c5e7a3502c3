"""The command line: `fts checkpoints DIR`, `fts checkpoints prune DIR`, `fts consolidate`, `fts replay`, `fts plan`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fts.cli import checkpoints, consolidate, plan, replay
from fts.errors import FtsError
from fts.messages import check_installation


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after `fts`; None for those of the process.

    Returns:
        The exit status: 0; 1 if the command found a problem; 2 if the command failed.

    >>> main(["checkpoints", "/nowhere"])
    2
    """
    check_installation()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:2] == ["checkpoints", "prune"]:
        arguments[:2] = ["checkpoints prune"]
    parser = argparse.ArgumentParser(prog="fts", description="Checkpoints of a run, and the resources that a run needs.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    checkpoints.add_to(commands)
    consolidate.add_to(commands)
    replay.add_to(commands)
    plan.add_to(commands)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # of --help, or of arguments that argparse rejects
        return int(stop.code or 0)
    try:
        return int(options.run(options))
    except (FtsError, OSError) as error:
        print("\n".join([f"fts: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 2
