import pytest

from fts.trainer.evaluation.outputs import BestRun, EvalLoopOutput, EvalPrediction, PredictionOutput, TrainOutput


def test_eval_prediction_unpacks_what_is_there():
    assert tuple(EvalPrediction(predictions=1, label_ids=2)) == (1, 2)
    assert tuple(EvalPrediction(1, 2, inputs=3)) == (1, 2, 3)
    assert tuple(EvalPrediction(1, 2, losses=4)) == (1, 2, 4)
    predictions, labels, inputs, losses = EvalPrediction(1, 2, 3, 4)
    assert (predictions, labels, inputs, losses) == (1, 2, 3, 4)
    assert EvalPrediction(1, 2)[1] == 2
    with pytest.raises(IndexError):
        EvalPrediction(1, 2)[2]


def test_predictions_can_be_replaced():
    prediction = EvalPrediction((1, 9), 2)
    prediction.predictions = prediction.predictions[0]
    assert tuple(prediction) == (1, 2)


@pytest.mark.parametrize("kind", [EvalLoopOutput, PredictionOutput, TrainOutput, BestRun])
def test_outputs_have_the_fields_of_transformers(kind):
    theirs = getattr(pytest.importorskip("transformers.trainer_utils"), kind.__name__)
    assert kind._fields == theirs._fields
    assert kind._field_defaults == theirs._field_defaults
