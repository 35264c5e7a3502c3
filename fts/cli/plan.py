"""`fts plan`: memory of each process and bytes sent in a step, before training starts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from fts.distributed.fsdp import no_split_modules
from fts.distributed.model_shapes import ModelShapes, numel, shapes_from_counts, shapes_from_module
from fts.distributed.resource_plan import OPTIMIZERS, PRECISIONS, STRATEGIES, Memory, ResourcePlan, TrainingSetup, plan_resources
from fts.errors import ArgumentError, MissingDependencyError
from fts.messages import install_hint

REDUCE = {"fp32": 4, "bf16": 2}

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "plan",
        help="memory of each process and bytes sent in a step, for each strategy",
        description="Compute the resources of a run: bytes of memory on each process, and bytes that each sends in a step. "
        "Nothing is started. Without --strategy, all strategies are compared. docs/scale.md derives the formulas.",
    )
    size = parser.add_argument_group("the model")
    known = size.add_mutually_exclusive_group(required=True)
    known.add_argument("--params", type=integer, metavar="N", help="how many parameters, such as 7e9")
    known.add_argument("--model", metavar="DIR", help="a directory with a config.json of transformers: weights are not read")
    size.add_argument("--layers", type=integer, default=0, metavar="N", help="blocks of the transformer")
    size.add_argument("--hidden", type=integer, default=0, metavar="N", help="its width")
    size.add_argument("--heads", type=integer, default=0, metavar="N", help="of attention (default: one per 128 of the width)")
    size.add_argument("--vocabulary", type=integer, default=0, metavar="N", help="size of the vocabulary")

    processes = parser.add_argument_group("the processes")
    processes.add_argument("--strategy", choices=STRATEGIES, help="how the model is distributed (default: show all)")
    processes.add_argument("--world", type=integer, default=1, metavar="N", help="processes (default: 1)")
    processes.add_argument(
        "--shard",
        type=integer,
        default=8,
        metavar="N",
        help="processes that shard one replica, for hsdp (default: 8)",
    )
    processes.add_argument(
        "--tensor", type=integer, metavar="N", help="processes that share each matrix (default: 1; all of them for tp)"
    )
    processes.add_argument(
        "--reshard-after-forward",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fsdp and hsdp: free parameters after the forward pass, and gather them again (the default)",
    )
    processes.add_argument(
        "--each-batch",
        action="store_true",
        help="fsdp and hsdp: reduce gradients in each micro-batch (default: once a step; until then they are unsharded)",
    )
    processes.add_argument(
        "--reduce",
        choices=list(REDUCE),
        help="fsdp and hsdp: type of the gradient reduction (default: that of the gradients)",
    )
    processes.add_argument(
        "--bucket-view",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ddp: gradients are views of the buckets (gradient_as_bucket_view; the default)",
    )

    step = parser.add_argument_group("the step")
    step.add_argument(
        "--precision", choices=list(PRECISIONS), default="bf16", help="(default: bf16, cast from float32 parameters)"
    )
    step.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="(default: adamw)")
    step.add_argument("--batch", type=integer, default=1, metavar="N", help="examples in one process's micro-batch (default: 1)")
    step.add_argument(
        "--sequence", type=integer, default=0, metavar="N", help="tokens of an example; without it, activations are not counted"
    )
    step.add_argument("--accumulate", type=integer, default=1, metavar="N", help="micro-batches of a step (default: 1)")
    step.add_argument(
        "--checkpointing",
        action="store_true",
        help="keep the inputs of layers only, and recompute the rest",
    )
    step.add_argument(
        "--attention", choices=["fused", "eager"], default="fused", help="eager keeps the weights of attention (default: fused)"
    )

    parser.add_argument("--json", action="store_true", help="print all bytes as JSON")
    parser.set_defaults(run=run)


def integer(text: str) -> int:
    """A whole number, which may be written as 7e9 or 7B.

    >>> integer("7e9"), integer("350M")
    (7000000000, 350000000)
    """
    digits, unit = (text[:-1], UNITS[text[-1:]]) if text[-1:] in UNITS else (text, 1)
    try:
        number = float(digits) * unit
    except ValueError:
        number = -1.0
    if number < 0 or not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; write one as 7000000000, 7e9 or 7B")
    return int(number)


def run(options: argparse.Namespace) -> int:
    """Compute and print."""
    model = _of_transformers(options) if options.model else _counted(options)
    plans = dict(_plans(model, options))
    if options.json:
        print(json.dumps({name: as_dict(found) for name, found in plans.items()}, indent=2))
        return 0
    lines = detailed(plans[options.strategy]) if options.strategy else compared(plans)
    params = numel(model.shapes)
    print(f"{params:,} parameters, {options.world} processes, {options.precision}, {options.optimizer}")
    print("\n".join(lines))
    if not (options.sequence and model.layers and model.hidden):
        print("Activations are not counted: give --sequence, --layers and --hidden.")
    if len(model.units) == 1:
        print("The model is one unit, which FSDP gathers in full, and tp cannot shard: give --layers and --hidden.")
    return 0


def as_dict(found: ResourcePlan) -> dict[str, Any]:
    """A plan as a JSON object.

    Args:
        found: the plan.
    """
    memory = attrs.asdict(found.memory) | {"total": found.memory.total}
    return {"memory": memory, "traffic": [attrs.asdict(one) | {"sent": one.sent} for one in found.traffic], "sent": found.sent}


def detailed(found: ResourcePlan) -> Iterator[str]:
    """Each part of a plan, in lines.

    Args:
        found: the plan.

    >>> from fts.distributed.resource_plan import TrainingSetup, plan_resources
    >>> print(*detailed(plan_resources(shapes_from_counts(7_000_000_000), TrainingSetup("fsdp", world=64))), sep=chr(10))
    memory of a process, in GB
      parameters     0.438
      gradients      0.438
      moments        0.875
      gathered      84.000
      total         85.750
    sent by a process in a step, in GB
      all-gather other parameters        2 x 28.000 over 64   55.125
      reduce-scatter gradients           1 x 28.000 over 64   27.562
      total                                                   82.688
    """
    yield "memory of a process, in GB"
    for name, count in (attrs.asdict(found.memory) | {"total": found.memory.total}).items():
        if count:
            yield f"  {name:<12}{count / 1e9:>9.3f}"
    yield "sent by a process in a step, in GB"
    for one in found.traffic:
        amount = f"{one.times} x {one.nbytes / 1e9:.3f} over {one.processes}"
        yield f"  {f'{one.kind} {one.what}':<31}{amount:>22}{one.sent / 1e9:>9.3f}"
    yield f"  {'total':<53}{found.sent / 1e9:>9.3f}"


def compared(plans: dict[str, ResourcePlan]) -> Iterator[str]:
    """Plans in the lines of a table.

    Args:
        plans: by the names of their strategies.

    >>> from fts.distributed.resource_plan import TrainingSetup, plan_resources
    >>> model = shapes_from_counts(7_000_000_000)
    >>> print(*compared({name: plan_resources(model, TrainingSetup(name, world=64)) for name in ("ddp", "fsdp")}), sep=chr(10))
    GB a process parameters gradients moments master copies buckets gathered activations  total   sent
    ddp              28.000    28.000  56.000  0.000  0.000   0.000    0.000       0.000 112.000 55.125
    fsdp              0.438     0.438   0.875  0.000  0.000   0.000   84.000       0.000  85.750 82.688
    """
    names = [field.name for field in attrs.fields(Memory)]
    rows = [("GB a process", *names, "total", "sent")]
    for name, found in plans.items():
        values = [*attrs.astuple(found.memory), found.memory.total, found.sent]
        rows.append((name, *(f"{value / 1e9:.3f}" for value in values)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *others in rows:
        yield " ".join([f"{first:<{widths[0]}}", *(f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))])


def _plans(model: ModelShapes, options: argparse.Namespace) -> Iterator[tuple[str, ResourcePlan]]:
    taken = (
        "world",
        "shard",
        "precision",
        "optimizer",
        "batch",
        "sequence",
        "accumulate",
        "bucket_view",
        "checkpointing",
        "attention",
    )
    given = {name: getattr(options, name) for name in taken}
    given |= {"no_sync": not options.each_batch, "reshard": options.reshard_after_forward, "reduce": REDUCE.get(options.reduce)}
    for name in [options.strategy] if options.strategy else STRATEGIES:
        if name == "tp" and len(model.units) == 1:  # no matrix is known to shard
            if options.strategy is not None:
                raise ArgumentError("tp shards the matrices of the layers: give --layers and --hidden, or --model.")
            continue
        tensor = options.tensor or (options.world if name == "tp" else 1)
        own: dict[str, Any] = {}
        if options.strategy is None and name == "single":
            own, tensor = {"world": 1}, 1
        try:
            yield name, plan_resources(model, TrainingSetup(name, **(given | {"tensor": tensor} | own)))
        except ArgumentError:
            if options.strategy is not None or name != "hsdp":  # when all are shown, one that is not possible is left out
                raise


def _counted(options: argparse.Namespace) -> ModelShapes:
    sizes = ("layers", "hidden", "heads", "vocabulary")
    return shapes_from_counts(options.params, **{name: getattr(options, name) for name in sizes})


def _of_transformers(options: argparse.Namespace) -> ModelShapes:
    """The dimensions of a model that is built on the meta device, without its weights."""
    if not (Path(options.model) / "config.json").is_file():
        raise ArgumentError(f"There is no file config.json in {options.model}. Give the directory of a model of transformers.")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"--model needs transformers. Install it: {install_hint('trainer')}.") from error
    config = transformers.AutoConfig.from_pretrained(options.model)
    name = (config.architectures or [None])[0]
    kind = getattr(transformers, name or "", None)
    if kind is None:
        raise ArgumentError(
            f"{options.model}/config.json names no model of transformers (architectures: {config.architectures})."
        )
    with torch.device("meta"):
        module = kind._from_config(config)
    module.tie_weights()
    text = config.get_text_config()
    found = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads", "vocabulary": "vocab_size"}
    sizes = {own: getattr(options, own) or getattr(text, foreign, None) or 0 for own, foreign in found.items()}
    return shapes_from_module(module, no_split_modules(module), **sizes)
