"""A run over several processes: the strategy's model, step and checkpoints, the accelerator, and DeepSpeed's engine.

It may use `arguments`, `data`, `model` and `optimization`.
"""

from fts.trainer.distributed.accelerator import make_accelerator, scaler_of
from fts.trainer.distributed.deepspeed import (
    OptimizerMethods,
    check_deepspeed,
    check_deepspeed_resume,
    check_unpartitioned,
    fill_config,
    placeholder_optimizer,
    start_engine,
)
from fts.trainer.distributed.strategy import (
    distribute_step,
    make_checkpointer,
    parallelize_model,
    reading_group,
    setup_parallelism,
)

__all__ = [
    "OptimizerMethods",
    "check_deepspeed",
    "check_deepspeed_resume",
    "check_unpartitioned",
    "distribute_step",
    "fill_config",
    "make_accelerator",
    "make_checkpointer",
    "parallelize_model",
    "placeholder_optimizer",
    "reading_group",
    "scaler_of",
    "setup_parallelism",
    "start_engine",
]
