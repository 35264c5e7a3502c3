"""A program that trains until it is interrupted, for test_preemption and test_worker_signals: `run_preemption.py ROOT WAY`."""

import sys
import time
from pathlib import Path

import torch

import fts
from fts import loops, transforms as tx
from fts.steps import train_step

optimizer = tx.adamw(0.1)
data = [torch.full((2,), float(number)) for number in range(1, 41)]


def loss(params, batch):
    return ((params["w"] - batch + torch.rand(2)) ** 2).sum()


def first_state():
    return fts.TrainState.create({"w": torch.zeros(2)}, optimizer, seed=3)


def say(word):
    print(word, flush=True)


def main(root, way):
    step = train_step(loss, optimizer)

    def save(state, position):
        def write(hidden):
            if way == "twice" and int(state.step) > 2:
                say("saving")
                time.sleep(30)

        return loops.save_checkpoint(root / f"checkpoint-{int(state.step)}", state, position, write=write)

    def evaluate(state):
        def slow(state, batch):
            say("evaluating")
            time.sleep(0.02)
            return {"loss": (batch.mean(), 1)}

        return request.until(loops.evaluate(slow, state, data * 100))

    every = 4 if way == "evaluation" else None
    with loops.handle_preemption(patience=0.1) as request:
        due = loops.with_stop(loops.cadence(save=2, evaluate=every), request)
        source = loops.source(data, workers=2 if way == "workers" else 0)
        for event in loops.fit(step, first_state(), source, due=due, save=save, evaluate=evaluate):
            if isinstance(event, loops.StepEnd):
                say(f"step {event.counters.step}")
                time.sleep(0.1)
            if isinstance(event, loops.Evaluated):
                say("evaluated")
        say(f"stopped by {request.reason}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
