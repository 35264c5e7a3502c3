"""The enums have transformers' names and values."""

import pickle

import pytest

from fts.errors import ArgumentError
from fts.trainer.arguments import enums

ALL = ("IntervalStrategy", "SaveStrategy", "HubStrategy", "SchedulerType", "OptimizerNames", "HPSearchBackend")
ALL += ("ParallelMode", "FSDPOption", "DebugOption")


def theirs(name):
    from transformers import debug_utils, trainer_utils, training_args

    return next(getattr(module, name) for module in (trainer_utils, training_args, debug_utils) if hasattr(module, name))


@pytest.mark.parametrize("name", ALL)
def test_names_and_values_are_those_of_transformers(name):
    ours = {member.name: member.value for member in getattr(enums, name)}
    assert ours == {member.name: member.value for member in theirs(name)}


@pytest.mark.parametrize("name", ALL)
def test_a_member_is_its_value_as_a_string(name):
    for member in getattr(enums, name):
        assert member == member.value == str(member) == f"{member}" and isinstance(member, str)
        assert pickle.loads(pickle.dumps(member)) is member  # noqa: S301


@pytest.mark.parametrize("name", ALL)
def test_members_of_transformers_are_taken(name):
    assert [getattr(enums, name)(member).value for member in theirs(name)] == [member.value for member in theirs(name)]


def test_the_error_of_an_unknown_value_lists_the_known_ones():
    with pytest.raises(ArgumentError, match=r"'weekly' is no SaveStrategy\. Use one of 'no', 'steps', 'epoch', 'best'"):
        enums.SaveStrategy("weekly")
