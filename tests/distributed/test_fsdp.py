"""The parts of FSDP that need one process only."""

import pytest
import torch

from fts.distributed.fsdp import _checkpoint_activations


@pytest.mark.parametrize(("offload", "kept"), [(True, 1.0), (False, 0.0)])
def test_inputs_of_checkpointed_units_are_offloaded(offload, kept):
    unit = torch.nn.Linear(64, 1, bias=False)
    _checkpoint_activations(unit, offload=offload)
    given = torch.ones(64, 64, requires_grad=True) * 1.0
    loss = unit(given).sum()
    given.data.zero_()  # unseen by autograd: a copy has the old numbers
    loss.backward()
    assert unit.weight.grad.tolist() == [[64 * kept] * 64]
