"""`params` on every causal language model that transformers knows: counts, or a documented error (row 91)."""

from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_sweep import DECODERS, configure
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loratune import config
from loratune.errors import ModelError
from loratune.params import params

SMALL = ["data.max_length=16", "training.per_device_train_batch_size=1"]

ENCODERS = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
    "prophetnet", "trocr", "whisper", "xlm-prophetnet",
}  # fmt: skip
"""Configurations of an encoder and a decoder, of which loratune adapts none."""
WITHOUT_ATTENTION = {"falcon_mamba", "jetmoe", "mamba", "mamba2", "rwkv", "xlnet", "xlstm"}
"""Models without modules that serve all of q, k, v and o; see test_sweep.py."""


def counted(model_type: str, where: Path) -> str:
    """How `params` ends on the configuration of a type: `counts`, or its error. Anything else is raised."""
    try:
        found = params(config.of_model(str(where), SMALL))
    except ModelError as error:
        return str(error)
    assert found.count.trainable == sum(group.trainable for group in found.groups) > 0, model_type
    assert found.memory.total > found.memory.weights > 0, model_type
    return "counts"


def test_every_type_is_counted_or_refused(tmp_path: Path) -> None:
    """With few layers; every exception but a ModelError fails."""
    ends = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        where = tmp_path / model_type
        try:
            configure(model_type).save_pretrained(where)
        except StrictDataclassClassValidationError:  # a configuration whose numbers must agree is not made smaller
            CONFIG_MAPPING[model_type]().save_pretrained(where)
        ends[model_type] = counted(model_type, where)
    refused = {model_type: end for model_type, end in ends.items() if end != "counts"}
    assert {one for one, end in refused.items() if "is an encoder-decoder" in end} == ENCODERS
    assert {one for one, end in refused.items() if "no attention" in end or "role " in end} == WITHOUT_ATTENTION
    assert {one: end for one, end in refused.items() if one not in ENCODERS | WITHOUT_ATTENTION | {*DECODERS}} == {}


@pytest.mark.parametrize("model_type", ["blt", "dory"])
def test_a_default_configuration(model_type: str, tmp_path: Path) -> None:
    """Several stacks without a number of layers of their own; more kinds of layers listed than there are layers."""
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path / model_type)
    assert counted(model_type, tmp_path / model_type) == "counts"


def test_what_a_projection_computes_besides_is_told(tmp_path: Path) -> None:
    configure("axk2").save_pretrained(tmp_path / "axk2")
    found = params(config.of_model(str(tmp_path / "axk2"), SMALL))
    assert "q_gate_proj computes the gate of the attention's output as well, which comes along" in found.notes
