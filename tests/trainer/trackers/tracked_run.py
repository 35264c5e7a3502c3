"""Trains with one tracker, crashes after a checkpoint, resumes and evaluates; prints what the tracker's own reader finds.

Called as `python tracked_run.py TRACKER DIRECTORY`, in a separate process, since trackers keep global state.
"""

import contextlib
import csv
import json
import os
import struct
import sys
from pathlib import Path

from fts.trainer import TrainerCallback
from tests.trainer.helpers import make_trainer


class Breaks(TrainerCallback):
    """A crash at step 5, after the checkpoint of step 2 and the log of step 4."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise ConnectionResetError("power cut")


def trainer(name, root, **own):
    settings = {"report_to": name, "run_name": "mine", "project": "tests", "trackio_space_id": None}
    settings |= {"max_steps": 6, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 6}
    settings |= {"hub_token": "sesame", "save_strategy": "steps", "save_steps": 2}
    return make_trainer(root / "out", **settings, **own)


def tensorboard(root):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (root / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    metrics = {tag: [[one.step, one.value] for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    import yaml

    configs = [yaml.safe_load(path.read_text()) for path in folder.glob("*/hparams.yml")]
    return {"runs": 1, "metrics": metrics, "configs": configs}


def mlflow(root):
    import mlflow

    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    run = runs[0]
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    metrics = {key: [[one.step, one.value] for one in values] for key, values in history.items()}
    return {
        "runs": len(runs),
        "name": run.info.run_name,
        "status": run.info.status,
        "metrics": metrics,
        "configs": [run.data.params],
    }


def trackio(root):
    import trackio as package
    from trackio.sqlite_storage import SQLiteStorage

    runs = list(package.Api().runs("tests"))
    metrics = {}
    for row in SQLiteStorage.get_logs("tests", runs[0].name):
        for key, value in row.items():
            metrics.setdefault(key, []).append([row["train/global_step"], value])
    return {"runs": len(runs), "name": runs[0].name, "metrics": metrics, "configs": [dict(runs[0].config)]}


def wandb(root):
    from wandb.proto import wandb_internal_pb2

    metrics, configs, runs, names, exits = {}, [], set(), set(), []
    for file in sorted(root.glob("wandb/offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                runs.add(record.run.run_id)
                names.add(record.run.display_name)
            if record.HasField("exit"):
                exits.append(record.exit.exit_code)
            if record.HasField("config"):
                items = {item.key: json.loads(item.value_json) for item in record.config.update if item.key != "_wandb"}
                configs += [items] if items else []
            if record.HasField("history"):
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                for key, value in row.items():
                    metrics.setdefault(key, []).append([row["train/global_step"], value])
    (name,) = names
    return {"runs": len(runs), "name": name, "exits": exits, "metrics": metrics, "configs": configs}


def records(data):
    """The records of a file in LevelDB's documented log format, after W&B's header of 7 bytes."""
    assert data[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a full one, or the last part
            yield record
            record = b""


def dvclive(root):
    metrics = {}
    for path in (root / "dvclive" / "plots" / "metrics").rglob("*.tsv"):
        with path.open() as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        (key,) = (key for key in rows[0] if key not in ("step", "timestamp"))
        metrics[f"{path.parent.name}/{key}"] = [[int(row["step"]), float(row[key])] for row in rows]
    import yaml

    return {"runs": 1, "metrics": metrics, "configs": [yaml.safe_load((root / "dvclive" / "params.yaml").read_text())]}


def aim(root):
    from aim import Run

    hashes = [path.name for path in (root / ".aim" / "meta" / "chunks").iterdir()]  # before Aim's server has listed them
    run = Run(hashes[0], repo=str(root), system_tracking_interval=None, capture_terminal_logs=False)
    tables = {metric.name: metric.dataframe() for metric in run.metrics()}
    metrics = {name: [[int(row.step), row.value] for row in table.itertuples()] for name, table in tables.items()}
    return {"runs": len(hashes), "name": run.name, "metrics": metrics, "configs": [dict(run["hparams"])]}


def main(name, root):
    os.chdir(root)
    with contextlib.suppress(ConnectionResetError):
        broken = trainer(name, root, callbacks=[Breaks])
        broken.train()
    again = trainer(name, root)
    again.train(resume_from_checkpoint=str(root / "out" / "checkpoint-2"))
    again.evaluate()
    again.predict(again.eval_dataset)
    found = {"crashed": broken.state.log_history, "history": again.state.log_history}
    reader = globals().get(name)
    print("FOUND " + json.dumps(found | (reader(root) if reader else {})))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
