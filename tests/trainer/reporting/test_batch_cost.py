import logging
from types import SimpleNamespace

import pytest
import torch

from fts.errors import ArgumentError
from fts.trainer.reporting import batch_cost

transformers = pytest.importorskip("transformers")


def test_operations_are_those_that_transformers_counts():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16
    )
    model = transformers.BertForSequenceClassification(config)
    inputs = {"input_ids": torch.ones(3, 7, dtype=torch.long)}
    wanted = transformers.Trainer.floating_point_ops(SimpleNamespace(model=model), inputs)
    assert batch_cost.floating_point_ops(model, inputs) == wanted > 0
    assert batch_cost.floating_point_ops(model, {"x": torch.ones(2)}) == 0
    assert batch_cost.floating_point_ops(torch.nn.Linear(2, 2), inputs) == 0
    own = SimpleNamespace(floating_point_ops=lambda inputs: 2 * inputs["x"].numel())
    assert batch_cost.floating_point_ops(own, {"x": torch.ones(3)}) == 6


def test_tokens():
    batch = {"input_ids": torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])}
    mask = batch | {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])}
    count = batch_cost.count_input_tokens
    assert count(batch, "no") == 0
    assert count(mask, "all") == 8
    assert count(mask, "non_padding", pad_token_id=0) == 6
    assert count(batch, "non_padding", pad_token_id=0) == 5
    assert isinstance(count(mask, "non_padding"), torch.Tensor)
    assert count({"pixels": torch.ones(2, 3)}, "all", "pixels") == 6
    with pytest.raises(ArgumentError, match="include_num_input_tokens_seen='some' is unknown"):
        count(batch, "some")


def test_tokens_that_cannot_be_counted_are_warned_of_once(caplog):
    batch_cost._warn_once.cache_clear()
    batch = {"ids": torch.ones(2, 3)}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert batch_cost.count_input_tokens(batch, "all") == 0
            assert batch_cost.count_input_tokens(batch, "non_padding", "ids") == 6
    assert [record.getMessage()[:22] for record in caplog.records] == ["Tokens are not counted", "All tokens are counted"]


@pytest.mark.parametrize("mode", ["all", "non_padding"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("pad", [None, 0])
def test_tokens_are_those_that_transformers_counts(mode, masked, pad):
    batch = {"input_ids": torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])}
    if masked:
        batch["attention_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    trainer = SimpleNamespace(
        args=SimpleNamespace(include_num_input_tokens_seen=mode, device="cpu"),
        model=SimpleNamespace(main_input_name="input_ids"),
        processing_class=SimpleNamespace(pad_token_id=pad),
        accelerator=SimpleNamespace(gather=lambda tensor: tensor),
        state=transformers.TrainerState(),
    )
    transformers.Trainer._track_num_input_tokens(trainer, batch)
    assert batch_cost.count_input_tokens(batch, mode, "input_ids", pad) == trainer.state.num_input_tokens_seen
