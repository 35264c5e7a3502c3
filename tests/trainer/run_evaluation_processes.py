"""Evaluations and predictions of one or several processes: writes what came out of each to a file of JSON.

torchrun --nproc-per-node 2 run_evaluation_processes.py found.json
"""

import hashlib
import json
import sys

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

from fts import loops, steps, transforms as tx
from fts.distributed import destroy_process_group, init_process_group
from fts.distributed.object_collectives import AllGatherObject
from fts.state import TrainState
from fts.trainer import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

NUM_EXAMPLES = 23  # with batches of 4: 6 of them, the last with 3 examples


class Tagger(nn.Module):
    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 3)
        self.head = nn.Linear(3, 5)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embedding(input_ids)).tanh()
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, "pooled": {"mean": logits.mean(1)}}

    def generate(self, input_ids, max_length=20, **kwargs):
        return (input_ids[:, : min(max_length, 3)] * 7) % 20


def sentences(count=NUM_EXAMPLES):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    ids = [torch.randint(1, 20, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row % 5} for row in ids]


def pad(examples):
    stack = nn.utils.rnn.pad_sequence
    return {
        "input_ids": stack([example["input_ids"] for example in examples], batch_first=True),
        "labels": stack([example["labels"] for example in examples], batch_first=True, padding_value=-100),
    }


class Stream(IterableDataset):
    def __iter__(self):
        return iter(sentences())


def accuracy(prediction):
    counted = prediction.label_ids != -100
    found = prediction.predictions[0].argmax(-1)[..., : counted.shape[1]] == prediction.label_ids
    return {"accuracy": found[counted].mean(), "seen": digest(list(prediction))}


def numbers(text):
    """A text as a number, since a metric must be one."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def digest(tree):
    """A number that differs for any two trees of arrays, bit for bit."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            value = value.numpy()
        if isinstance(value, np.ndarray):
            return [str(value.dtype), list(value.shape), np.ascontiguousarray(value).tobytes().hex()]
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, (list, tuple)) else repr(value)

    return numbers(json.dumps(plain(tree)))


class Streaming:
    """Metrics batch by batch, which depend on the order of the batches."""

    def __init__(self):
        self.seen = 0

    def __call__(self, prediction, compute_result=False):
        self.seen = (31 * self.seen + digest(list(prediction))) % 2**40
        return {"seen": self.seen} if compute_result else {}


def trainer_of(kind=Trainer, arguments=TrainingArguments, compute_metrics=accuracy, **changes):
    own = {name: changes.pop(name) for name in ("preprocess_logits_for_metrics", "data_collator") if name in changes}
    torch.manual_seed(0)
    settings = {"per_device_eval_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    args = arguments(output_dir="unused", **(settings | changes))
    return kind(Tagger(), args, compute_metrics=compute_metrics, **({"data_collator": pad} | own))


def without_speed(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith(("_runtime", "_per_second"))}


def evaluations():
    data = sentences()
    yield "plain", without_speed(trainer_of().evaluate(data))
    yield "small", without_speed(trainer_of().evaluate(data[:3]))
    yield "inputs and losses", without_speed(trainer_of(include_for_metrics=["inputs", "loss"]).evaluate(data))
    yield "by objects", without_speed(trainer_of(eval_use_gather_object=True, eval_accumulation_steps=2).evaluate(data))
    by_batch = trainer_of(batch_eval_metrics=True, compute_metrics=Streaming())
    yield "by batch", without_speed(by_batch.evaluate(data))
    by_batch = trainer_of(batch_eval_metrics=True, include_for_metrics=["inputs"], compute_metrics=Streaming())
    yield "by batch with inputs", without_speed(by_batch.evaluate(data))
    yield "loss alone", without_speed(trainer_of(compute_metrics=None).evaluate(data))
    for dispatch in (None, False):
        streamed = trainer_of(accelerator_config={"dispatch_batches": dispatch})
        yield f"stream, dispatch_batches={dispatch}", without_speed(streamed.evaluate(Stream()))
    workers = trainer_of(dataloader_num_workers=2, accelerator_config={"even_batches": False})
    yield "workers", without_speed(workers.evaluate(data))
    yield "several sets", without_speed(trainer_of().evaluate({"a": data[:9], "b": data[9:]}))
    output = trainer_of().predict(data)
    yield "prediction", [digest(output.predictions), digest(output.label_ids), without_speed(output.metrics)]
    unlabelled = trainer_of(data_collator=lambda examples: {"input_ids": pad(examples)["input_ids"]}).predict(data[:13])
    yield "unlabelled", [digest(unlabelled.predictions), unlabelled.label_ids, without_speed(unlabelled.metrics)]
    output = trainer_of(eval_do_concat_batches=False, compute_metrics=None).predict(data)
    yield "kept apart", [digest(output.predictions), digest(output.label_ids)]
    shrunk = trainer_of(preprocess_logits_for_metrics=lambda logits, labels: (logits[0].argmax(-1),), compute_metrics=None)
    yield "preprocessed", digest(shrunk.predict(data).predictions)
    generating = {"predict_with_generate": True, "generation_max_length": 6}
    writer = trainer_of(Seq2SeqTrainer, Seq2SeqTrainingArguments, compute_metrics=None, **generating)
    writer.processing_class = Padding()
    output = writer.predict(data)
    yield "generated", [digest(output.predictions), digest(output.label_ids), without_speed(output.metrics)]
    for name, examples in (("list", data), ("stream", Stream())):
        yield f"prepared {name}", without_speed(trainer_of(Preparing).evaluate(examples))
    yield "core", core(data)


class Preparing(Trainer):
    """As many a script has it: accelerate gives each process a loader of its own part."""

    def get_eval_dataloader(self, eval_dataset=None):
        return self.accelerator.prepare(super().get_eval_dataloader(eval_dataset))


class Padding:
    pad_token_id = 0


def core(data):
    torch.manual_seed(0)
    net = Tagger()
    step = steps.eval_step(steps.module_loss(net))
    state = TrainState.create(net, tx.identity())
    group = init_process_group(device="cpu")
    full = loops.source(data, batch_size=4, collate=pad)
    shared = loops.shard_source(full, group.rank, group.size)
    *_, last = loops.evaluate(step, state, shared, group=group if group.size > 1 else None)
    return {name: value.hex() for name, value in last.metrics.items()}


def check_exchange(group):
    """What each process has arrives unchanged."""
    kinds = [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.uint8, torch.complex64]
    for use_gather_object in (False, True):
        exchange = AllGatherObject(group, use_gather_object)
        mine = {
            "rank": group.rank,
            "tensors": [torch.arange(group.rank + 3).to(kind) for kind in kinds],
            "scalar": torch.tensor(float(group.rank)),
            "empty": torch.zeros(0, 4),
            "turned": torch.arange(6).reshape(2, 3).t(),
            "array": np.arange(group.rank),
        }
        every = exchange(mine if group.rank != 1 else None)
        ranks = [rank for rank in range(group.size) if rank != 1]
        assert [found["rank"] for found in every] == ranks
        for rank, found in zip(ranks, every, strict=True):
            assert [tensor.dtype for tensor in found["tensors"]] == kinds
            expected = [torch.arange(rank + 3).to(kind) for kind in kinds]
            assert all(map(torch.equal, found["tensors"], expected))
            assert found["scalar"].item() == rank and found["scalar"].ndim == 0
            assert found["empty"].shape == (0, 4) and len(found["array"]) == rank
            assert torch.equal(found["turned"], torch.arange(6).reshape(2, 3).t())
        assert exchange(None) == []
        assert [tensor.shape for tensor in exchange(torch.empty(0, group.rank))] == [(0, rank) for rank in range(group.size)]


def with_split_batches():
    """Parts of batches are computed apart, so equal to rounding alone."""
    output = trainer_of(per_device_eval_batch_size=12, accelerator_config={"split_batches": True}).predict(sentences())
    labels = [[label for label in row if label != -100] for row in output.label_ids.tolist()]
    return {"labels": labels, "loss": output.metrics["test_loss"]}


if __name__ == "__main__":
    found = dict(evaluations())
    group = init_process_group(device="cpu")
    if group.size > 1:
        check_exchange(group)
    everyone = group.all_gather_object(found)
    assert all(other == found for other in everyone), "processes differ"
    split = with_split_batches()
    if group.is_main_process:
        with open(sys.argv[1], "w") as file:
            json.dump({"same": found, "split": split}, file)
    destroy_process_group()
