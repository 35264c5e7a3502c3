import pytest
from transformers import BertConfig, BertModel, EncoderDecoderConfig, EncoderDecoderModel

from fts.errors import ArgumentError
from fts.trainer.model.preparation import check_has_head

TINY = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}


def test_a_model_of_hidden_states_alone_is_refused():
    with pytest.raises(ArgumentError, match=r"BertModel computes hidden states only .* choose a model with a head"):
        check_has_head(BertModel(BertConfig(**TINY)))


def test_a_model_that_takes_labels_is_not_whatever_its_name():
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**TINY), BertConfig(**TINY))
    check_has_head(EncoderDecoderModel(config))
