import math

import pytest
import torch
import transformers
from torch.optim import lr_scheduler

from fts import transforms as tx
from fts.errors import ScheduleError

STEPS = range(40)
PEAK, WARMUP, TOTAL = 3e-4, 7, 30


def by_scheduler(make, count=40):
    """The rates that a torch scheduler gives to successive updates."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], PEAK)
    scheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


SCHEDULES = {
    "constant": tx.constant_schedule(PEAK),
    "constant, warmup": tx.constant_schedule(PEAK, warmup_steps=WARMUP),
    "linear": tx.linear_schedule(PEAK, 1e-5, TOTAL),
    "linear, warmup": tx.linear_schedule(PEAK, 0.0, TOTAL - WARMUP, warmup_steps=WARMUP),
    "cosine": tx.cosine_schedule(PEAK, total_steps=TOTAL, end_value=1e-5),
    "cosine, warmup": tx.cosine_schedule(PEAK, warmup_steps=WARMUP, total_steps=TOTAL),
    "polynomial": tx.polynomial_schedule(PEAK, 1e-5, 2.5, TOTAL),
    "polynomial, warmup": tx.polynomial_schedule(PEAK, 1e-5, 0.5, TOTAL, warmup_steps=WARMUP),
    "cosine, waves": tx.cosine_schedule(PEAK, warmup_steps=WARMUP, total_steps=TOTAL, cycles=1.3),
    "restarts": tx.cosine_restarts_schedule(PEAK, warmup_steps=WARMUP, total_steps=TOTAL, cycles=3),
    "restarts, end": tx.cosine_restarts_schedule(PEAK, total_steps=TOTAL, cycles=2, end_value=1e-5),
    "inverse_sqrt": tx.inverse_sqrt_schedule(PEAK, warmup_steps=WARMUP),
    "inverse_sqrt, timescale": tx.inverse_sqrt_schedule(PEAK, timescale=20.5),
    "stable": tx.warmup_stable_decay_schedule(PEAK, warmup_steps=WARMUP, decay_steps=9, total_steps=TOTAL),
    "stable, linear": tx.warmup_stable_decay_schedule(
        PEAK, decay_steps=9, total_steps=TOTAL, end_value=1e-5, decay_shape="linear"
    ),
    "stable, roots": tx.warmup_stable_decay_schedule(
        PEAK,
        warmup_steps=WARMUP,
        decay_steps=9,
        total_steps=TOTAL,
        init_value=2e-5,
        warmup_shape="1-sqrt",
        decay_shape="1-sqrt",
    ),
    "stable, waves": tx.warmup_stable_decay_schedule(
        PEAK, warmup_steps=WARMUP, decay_steps=30, total_steps=TOTAL, warmup_shape="cosine", end_value=1e-5, cycles=1.2
    ),
    "shift": tx.shift_schedule(tx.cosine_schedule(PEAK, warmup_steps=WARMUP, total_steps=TOTAL), 2),
    "warmup": tx.warmup(tx.cosine_schedule(PEAK, total_steps=TOTAL), WARMUP),
    "join": tx.join_schedules(
        [tx.constant_schedule(1.0), tx.linear_schedule(1.0, 0.5, 5), lambda step: 0.5 * 0.9**step], [4, 12]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_tensors_and_numbers_agree(name):
    schedule = SCHEDULES[name]
    for step in STEPS:
        number, tensor = schedule(step), schedule(torch.tensor(step))
        assert isinstance(number, float)
        assert isinstance(tensor, torch.Tensor) and tensor.shape == ()
        # a function of the user's computes in its own dtype
        tolerance = 1e-6 if name == "join" and step >= 12 else 1e-12
        assert tensor.dtype == torch.float64
        assert tensor.item() == pytest.approx(number, rel=tolerance, abs=1e-16)
        assert schedule(float(step)) == number


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("constant, warmup", lambda o: transformers.get_constant_schedule_with_warmup(o, WARMUP)),
        ("linear, warmup", lambda o: transformers.get_linear_schedule_with_warmup(o, WARMUP, TOTAL)),
        ("linear", lambda o: lr_scheduler.LinearLR(o, 1.0, 1e-5 / PEAK, TOTAL)),
    ],
)
def test_equals_other_libraries(name, make):
    assert [SCHEDULES[name](step) for step in STEPS] == pytest.approx(by_scheduler(make), rel=1e-9, abs=1e-15)


def test_cosine_equals_other_libraries_to_its_end():
    ours = [SCHEDULES["cosine, warmup"](step) for step in range(TOTAL + 1)]
    theirs = by_scheduler(lambda o: transformers.get_cosine_schedule_with_warmup(o, WARMUP, TOTAL), count=TOTAL + 1)
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)
    ours = [SCHEDULES["cosine"](step) for step in range(TOTAL + 1)]
    theirs = by_scheduler(lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, 1e-5), count=TOTAL + 1)
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_polynomial_equals_other_libraries(power):
    schedule = tx.polynomial_schedule(PEAK, 1e-7, power, TOTAL - WARMUP, warmup_steps=WARMUP)
    theirs = by_scheduler(
        lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, WARMUP, TOTAL, lr_end=1e-7, power=power)
    )
    assert [schedule(step) for step in STEPS] == pytest.approx(theirs, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("cycles", [0.5, 1.0, 2.75])
def test_cosine_waves_equal_other_libraries(cycles):
    schedule = tx.cosine_schedule(PEAK, warmup_steps=WARMUP, total_steps=TOTAL, cycles=cycles)
    theirs = by_scheduler(lambda o: transformers.get_cosine_schedule_with_warmup(o, WARMUP, TOTAL, cycles), TOTAL + 1)
    assert [schedule(step) for step in range(TOTAL + 1)] == pytest.approx(theirs, rel=1e-9, abs=1e-15)


def test_restarts_equal_other_libraries():
    make = transformers.get_cosine_with_hard_restarts_schedule_with_warmup
    theirs = by_scheduler(lambda o: make(o, WARMUP, TOTAL, 3))
    assert [SCHEDULES["restarts"](step) for step in STEPS] == pytest.approx(theirs, rel=1e-9, abs=1e-15)
    # torch's, whose cycles are an integer number of steps and which has no end
    theirs = by_scheduler(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, TOTAL // 2, eta_min=1e-5), TOTAL)
    assert [SCHEDULES["restarts, end"](step) for step in range(TOTAL)] == pytest.approx(theirs, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("warmup", "timescale"), [(WARMUP, None), (0, None), (WARMUP, 33)])
def test_inverse_sqrt_equals_other_libraries(warmup, timescale):
    schedule = tx.inverse_sqrt_schedule(PEAK, warmup_steps=warmup, timescale=timescale)
    theirs = by_scheduler(lambda o: transformers.get_inverse_sqrt_schedule(o, warmup, timescale))
    assert [schedule(step) for step in STEPS] == pytest.approx(theirs, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("rise", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("fall", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("decay", [0, 9, 28])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_stages_equal_other_libraries(rise, fall, decay, ratio):
    schedule = tx.warmup_stable_decay_schedule(
        PEAK,
        warmup_steps=WARMUP,
        decay_steps=decay,
        total_steps=TOTAL,
        init_value=ratio * PEAK,
        end_value=ratio * PEAK,
        warmup_shape=rise,
        decay_shape=fall,
    )
    theirs = by_scheduler(lambda o: transformers.get_wsd_schedule(o, WARMUP, decay, TOTAL, None, rise, fall, ratio))
    assert [schedule(step) for step in STEPS] == pytest.approx(theirs, rel=1e-9, abs=1e-15)


def test_shifted():
    schedule = SCHEDULES["cosine, warmup"]
    assert [SCHEDULES["shift"](step) for step in STEPS] == [schedule(step + 2) for step in STEPS]


def test_values_stay_after_the_end():
    for name, end in (("linear", 1e-5), ("cosine", 1e-5), ("polynomial", 1e-5), ("cosine, warmup", 0.0)):
        assert SCHEDULES[name](10_000) == pytest.approx(end, abs=1e-18)


def test_warmup_sees_the_first_value_then_the_schedule_from_its_start():
    seen = []

    def schedule(step):
        seen.append(step)
        return 10.0 + step

    warm = tx.warmup(schedule, 4)
    assert [warm(step) for step in range(7)] == [0.0, 2.5, 5.0, 7.5, 10.0, 11.0, 12.0]
    assert seen == [0, 0, 0, 0, 0, 1, 2]
    assert tx.warmup(schedule, 0)(3) == 13.0


def test_a_run_may_be_all_warmup():
    schedule = tx.cosine_schedule(1.0, warmup_steps=4, total_steps=4)
    assert [schedule(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 0.0]


def test_joined_schedules_start_at_their_own_zero():
    schedule = tx.join_schedules([lambda step: step, lambda step: 100 + step, lambda step: 200 + step], [2, 5])
    assert [schedule(step) for step in range(8)] == [0, 1, 100, 101, 102, 200, 201, 202]
    assert [int(schedule(torch.tensor(step))) for step in range(8)] == [0, 1, 100, 101, 102, 200, 201, 202]
    assert tx.join_schedules([lambda step: 0.5], [])(3) == 0.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_in_a_graph_and_under_vmap(name):
    schedule = SCHEDULES[name]
    torch.compiler.reset()  # all cases compile the same lambda
    compiled = torch.compile(lambda step: schedule(step) * 1.0, fullgraph=True, backend="aot_eager")
    steps = torch.arange(0, 40, 3)
    expected = torch.stack([schedule(step) for step in steps])
    torch.testing.assert_close(torch.stack([compiled(step) for step in steps]), expected, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(torch.vmap(schedule)(steps), expected, rtol=1e-12, atol=1e-16)


def test_descriptions():
    assert (
        repr(tx.cosine_schedule(3e-4, warmup_steps=100, total_steps=1_000)) == "cosine_schedule(0.0003, warmup 100, total 1000)"
    )
    assert repr(tx.cosine_schedule(0.1, total_steps=9, end_value=0.01)) == "cosine_schedule(0.1, total 9, end 0.01)"
    assert repr(tx.constant_schedule(0.1)) == "constant_schedule(0.1)"
    assert repr(tx.linear_schedule(0.1, 0, 5, warmup_steps=2)) == "linear_schedule(0.1 to 0 in 5, warmup 2)"
    assert repr(tx.polynomial_schedule(0.1, 0.0, 2, 5)) == "polynomial_schedule(0.1 to 0.0, power 2, in 5)"
    assert repr(tx.cosine_schedule(0.1, total_steps=9, cycles=2)) == "cosine_schedule(0.1, total 9, 2 cycles)"
    assert repr(tx.cosine_restarts_schedule(0.1, total_steps=9)) == "cosine_restarts_schedule(0.1, total 9, 1 cycles)"
    assert repr(tx.inverse_sqrt_schedule(0.1, warmup_steps=3)) == "inverse_sqrt_schedule(0.1, timescale 3, warmup 3)"
    stages = tx.warmup_stable_decay_schedule(0.1, warmup_steps=2, decay_steps=3, total_steps=9)
    assert repr(stages) == "warmup_stable_decay_schedule(0.1, warmup 2, total 9, cosine decay 3)"
    assert repr(tx.shift_schedule(tx.constant_schedule(0.1), 1)) == "shift_schedule(constant_schedule(0.1), 1)"
    assert repr(tx.warmup(tx.constant_schedule(1.0), 3)) == "warmup(constant_schedule(1.0), 3)"
    joined = tx.join_schedules([tx.constant_schedule(1.0), math.exp], [3])
    assert repr(joined) == "join_schedules(constant_schedule(1.0), from 3 exp)"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tx.cosine_schedule(1.0, warmup_steps=11, total_steps=10), "warmup_steps=11 is more than total_steps=10"),
        (lambda: tx.cosine_schedule(1.0, warmup_steps=-1, total_steps=10), "warmup_steps .* at least 0, not -1"),
        (lambda: tx.cosine_schedule(1.0, total_steps=0), "total_steps .* at least 1, not 0"),
        (lambda: tx.cosine_schedule(1.0, total_steps=1.5), "total_steps .* integer .* not 1.5"),
        (lambda: tx.cosine_schedule(math.nan, total_steps=1), "peak_value must be a number .* not nan"),
        (lambda: tx.cosine_schedule("1", total_steps=1), "peak_value must be a number .* not '1'"),
        (lambda: tx.cosine_schedule(1.0, total_steps=1, end_value=math.inf), "end_value must be a number .* not inf"),
        (lambda: tx.cosine_schedule(1.0, total_steps=1, cycles=0), "cycles must be a number .* not 0"),
        (lambda: tx.cosine_restarts_schedule(1.0, total_steps=1, cycles=-1), "cycles must be a number .* not -1"),
        (lambda: tx.cosine_restarts_schedule(1.0, total_steps=1, warmup_steps=2), "warmup_steps=2 is more than"),
        (lambda: tx.inverse_sqrt_schedule(1.0, timescale=0), "timescale must be a number .* not 0"),
        (lambda: tx.inverse_sqrt_schedule(1.0, warmup_steps=-3), "inverse_sqrt_schedule: warmup_steps .* not -3"),
        (lambda: tx.warmup_stable_decay_schedule(1.0, decay_steps=-1, total_steps=2), "decay_steps .* not -1"),
        (
            lambda: tx.warmup_stable_decay_schedule(1.0, decay_steps=1, total_steps=2, decay_shape="sqrt"),
            "decay_shape must be one of 'linear', 'cosine', '1-sqrt', not 'sqrt'",
        ),
        (
            lambda: tx.warmup_stable_decay_schedule(1.0, decay_steps=1, total_steps=2, warmup_shape=3),
            "warmup_shape must be one of .* not 3",
        ),
        (lambda: tx.shift_schedule(0.1, 1), "takes schedules .* not 0.1"),
        (lambda: tx.shift_schedule(tx.constant_schedule(0.1), -1), "steps .* not -1"),
        (lambda: tx.constant_schedule(math.inf), "value must be a number .* not inf"),
        (lambda: tx.constant_schedule(1.0, warmup_steps=-2), "constant_schedule: warmup_steps .* not -2"),
        (lambda: tx.linear_schedule(1.0, 0.0, 0), "transition_steps .* not 0"),
        (lambda: tx.linear_schedule(math.nan, 0.0, 1), "init_value .* not nan"),
        (lambda: tx.linear_schedule(0.0, math.nan, 1), "end_value .* not nan"),
        (lambda: tx.linear_schedule(0.0, 0.0, 1, warmup_steps=-1), "linear_schedule: warmup_steps .* not -1"),
        (lambda: tx.polynomial_schedule(1.0, 0.0, 0, 1), "power must be a number .* not 0"),
        (lambda: tx.polynomial_schedule(1.0, 0.0, 1, -1), "transition_steps .* not -1"),
        (lambda: tx.polynomial_schedule(math.nan, 0.0, 1, 1), "init_value .* not nan"),
        (lambda: tx.polynomial_schedule(0.0, math.nan, 1, 1), "end_value .* not nan"),
        (lambda: tx.polynomial_schedule(0.0, 0.0, 1, 1, warmup_steps=-1), "polynomial_schedule: warmup_steps .* not -1"),
        (lambda: tx.warmup(lambda step: 1.0, -1), "steps .* not -1"),
        (lambda: tx.warmup(0.1, 5), "takes schedules .* not 0.1"),
        (lambda: tx.join_schedules([], []), "0 schedules need 0 boundaries"),
        (lambda: tx.join_schedules([lambda step: 1.0], [3]), "1 schedules need 0 boundaries, not 1"),
        (lambda: tx.join_schedules([lambda step: 1.0] * 3, [3, 3]), r"must increase, not \[3, 3\]"),
        (lambda: tx.join_schedules([lambda step: 1.0] * 2, [0]), "boundary .* at least 1, not 0"),
        (lambda: tx.join_schedules([lambda step: 1.0, 0.1], [1]), "takes schedules .* not 0.1"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ScheduleError, match=words):
        make()


RATED = [tx.sgd, tx.adam, tx.adamw, tx.scale_by_learning_rate]


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("make", RATED)
def test_a_bad_rate_raises_at_once_in_a_fast_path_and_from_check_otherwise(make, bad):
    transform = make(lambda step: step * 0 + (0.1 if not isinstance(step, torch.Tensor) and step < 1 else bad))
    params = {"w": torch.zeros(2)}
    grads = {"w": torch.ones(2)}
    _, state, info = transform.update(grads, transform.init(params), params)
    with pytest.raises(ScheduleError, match=r"'lr' is (-0.1|nan|inf)"):
        transform.check(info)
    fast = transform.apply or transform.update_
    _, state, _ = fast({"w": torch.ones(2)}, transform.init(params), params)
    before = params["w"].clone()
    with pytest.raises(ScheduleError, match=r"returned (-0.1|nan|inf) at step 1; .* not negative"):
        fast({"w": torch.ones(2)}, state, params)
    assert torch.equal(params["w"], before)


def test_a_bad_rate_is_found_in_merged_infos():
    falling = tx.linear_schedule(0.1, -0.1, 1)
    params = {"w": torch.zeros(2), "b": torch.zeros(())}
    grads = {"w": torch.ones(2), "b": torch.ones(())}
    label = {"w": "x", "b": "y"}
    for transform, key in [
        (tx.chain(tx.scale_by_learning_rate(0.1), tx.scale_by_learning_rate(falling)), "lr_2"),
        (tx.chain(one=tx.sgd(0.1), two=tx.sgd(falling)), "lr"),
        (tx.partition({"x": tx.sgd(0.1), "y": tx.adam(falling)}, label), "lr"),
        (tx.masked(tx.sgd(falling), ["w"]), "lr"),
        (tx.skip_nonfinite(tx.sgd(falling)), "lr"),
        (tx.multi_steps(tx.sgd(falling), 1), "lr"),
        (tx.ema_params(tx.sgd(falling), 0.9), "lr"),
    ]:
        _, state, info = transform.update(grads, transform.init(params), params)
        transform.check(info)
        _, _, info = transform.update(grads, state, params)
        with pytest.raises(ScheduleError, match=f"{key!r} is -0.1"):
            transform.check(info)


@pytest.mark.parametrize("make", RATED)
def test_constant_rates_need_no_check(make):
    assert make(0.1).check is None
    assert make(0.0).check is None
    assert make(tx.constant_schedule(0.1)).check is not None
