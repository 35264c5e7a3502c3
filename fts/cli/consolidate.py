"""`fts consolidate`: the model of a sharded checkpoint, for `from_pretrained`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fts.errors import ArgumentError
from fts.loops import consolidate_checkpoint


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "consolidate",
        help="write the model of a sharded checkpoint for from_pretrained",
        description="Write the model of a sharded checkpoint (FSDP, sharded state dict) as full tensors, so that from_pretrained "
        "reads it. It needs little memory, and no process group.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint-N directory")
    parser.add_argument("directory", type=Path, metavar="OUT", help="the directory of the model")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Consolidate a checkpoint."""
    if options.directory.exists() and any(options.directory.iterdir()):
        raise ArgumentError(f"{options.directory} is not empty. Give a directory that does not exist yet.")
    path = consolidate_checkpoint(options.checkpoint, options.directory)
    print(f"{path} has the model of {options.checkpoint}.")
    return 0
