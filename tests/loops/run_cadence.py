"""One of two processes that save by time, for test_cadence: `run_cadence.py FILE RANK`; its clock runs faster or slower."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fts import loops


def main(file, rank):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    now = 0.0

    def agree(number):
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def step(state, batch):
        nonlocal now
        now += (3.0, 2.0)[rank]
        return state + 1, {}

    due = loops.cadence(save="10s", clock=lambda: now, agree=agree)
    events = loops.fit(step, 0, range(11), due=due, save=lambda state, position: Path(str(state)))
    print(*(event.path for event in events if isinstance(event, loops.Saved)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
