"""One of two processes that train until one of them is asked to stop, for test_preemption: `run_preemption.py FILE RANK`."""

import sys
import time

import torch
import torch.distributed as dist

from fts import loops


def main(file: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)

    def agree(code: int) -> int:
        greatest = torch.tensor(code)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        return int(greatest)

    def step(state: int, batch: int) -> tuple[int, dict]:
        time.sleep(0.002 * (1 + 4 * rank))  # one is slower
        return state + 1, {}

    saved = []
    try:
        with loops.handle_preemption(agree=agree) as request:
            due = loops.with_stop(loops.cadence(save=1000), request)
            for event in loops.fit(step, 0, range(100_000), due=due, save=lambda state, position: saved.append(state)):
                if isinstance(event, loops.StepEnd) and event.counters.step == 5:
                    print("running", flush=True)
            print(f"stopped {event.state} saved {saved} because {request.reason}", flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
