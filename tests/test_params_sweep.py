"""`params` on every causal language model of transformers: counts, or a documented error."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from families import configure
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_sweep import TYPES
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loratune import config
from loratune.errors import ModelError
from loratune.training.params import params

SHARDS = 9
SAMPLE = ("bart", "bert", "bloom", "gpt2", "jetmoe", "llama", "mamba", "mixtral", "musicgen", "phi3", "xlnet")
"""A fast type for each structure and each kind of refusal. `make test-all` counts all types."""
PARTS = [[*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES][shard::SHARDS] for shard in range(SHARDS)]
SMALL = ["data.max_length=16", "training.per_device_train_batch_size=1"]


def counted(model_type: str, where: Path) -> str:
    """The result of `params` for a model type: `counts`, or its error message. Other exceptions are raised."""
    try:
        found = params(config.for_model(str(where), SMALL))
    except ModelError as error:
        return str(error)
    assert found.count.trainable == sum(group.trainable for group in found.groups) > 0, model_type
    assert found.memory.total > found.memory.weights > 0, model_type
    return "counts"


@pytest.mark.parametrize(
    "types",
    [SAMPLE, *(pytest.param(part, marks=pytest.mark.slow) for part in PARTS)],
    ids=["sample", *(f"{shard + 1} of {SHARDS}" for shard in range(SHARDS))],
)
def test_every_type_is_counted_or_refused(types: Sequence[str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """With few layers if the configuration allows it. Any exception other than ModelError fails. Other tests trace the
    sample."""
    if types is SAMPLE:
        request.getfixturevalue("untraced")
    ends = {}
    for model_type in types:
        where = tmp_path / model_type
        try:
            configure(model_type).save_pretrained(where)
        except StrictDataclassClassValidationError:  # a configuration whose values must be consistent is not shrunk
            CONFIG_MAPPING[model_type]().save_pretrained(where)
        ends[model_type] = counted(model_type, where)
    known = r"encoder-decoder \[model.unsupported\]|nothing in the attention|has no attention|"
    known += r"\[model.unreadable\]|musicgen_(melody_)?decoder\) .*\[model.unsupported\]|"
    known += r"requires the timm library.*\[system.missing_package\]"
    refusals = {one: end for one, end in ends.items() if end != "counts" and not re.search(known, end)}
    if newcomers := {one: refusals.pop(one) for one in refusals.keys() - TYPES}:
        warnings.warn(f"not reviewed yet: {newcomers}", stacklevel=1)
    assert refusals == {}
    assert [*ends.values()].count("counts") > len(ends) / 2


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("model_type", ["blt", pytest.param("dory", marks=pytest.mark.slow)])
def test_default_configurations_are_counted(model_type: str, tmp_path: Path) -> None:
    """Several stacks without layer counts of their own; more layer types listed than there are layers."""
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path / model_type)
    assert counted(model_type, tmp_path / model_type) == "counts"


@pytest.mark.usefixtures("untraced")
def test_additional_outputs_of_a_projection_are_reported(tmp_path: Path) -> None:
    configure("axk2").save_pretrained(tmp_path / "axk2")
    found = params(config.for_model(str(tmp_path / "axk2"), [*SMALL, "lora.target_modules=[q, k, v, o]"]))
    assert "q_gate_proj computes the gate of the attention's output as well, which is adapted with it" in found.notes
