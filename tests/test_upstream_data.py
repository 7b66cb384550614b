"""What loratune.data uses of other libraries beyond their documented interfaces, one test per name."""

from pathlib import Path

import datasets
import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from loratune.data import upstream

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "because"}]
MARKED = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"


def test_datasets_cache_dir() -> None:
    assert upstream.datasets_cache_dir() == Path(datasets.config.HF_DATASETS_CACHE)


def test_uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.load, "get_session", lambda: asked.append("session"))
    with upstream.uncounted():
        datasets.load.increase_load_count("json")
    assert asked == []
    datasets.load.increase_load_count("json")
    assert asked == ["session"]


def test_hub_dataset_cache_is_where_load_dataset_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps the owner unchanged in the names of cached hub datasets, and writes the name in snake case."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert upstream.hub_dataset_cache("Some-One/MyRows") == tmp_path / "Some-One___my_rows"
    assert upstream.hub_dataset_cache("plain") == tmp_path / "plain"


def test_dataset_fingerprint() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    digests = [upstream.dataset_fingerprint(part) for part in (rows.select([0]), rows.select([0]), rows.select([1]))]
    assert digests[0] == digests[1] != digests[2]


def test_media_are_the_features_that_are_decoded() -> None:
    media = [
        datasets.Image(),
        datasets.Audio(),
        datasets.Video(),
        datasets.List(datasets.Image()),
        {"a": datasets.Image()},
    ]
    plain = [
        datasets.Value("string"),
        datasets.ClassLabel(2),
        datasets.Image(decode=False),
        {"a": datasets.Value("int8")},
    ]
    plain += [datasets.List(datasets.Value("string")), *([datasets.Json()] if hasattr(datasets, "Json") else [])]
    assert all(map(upstream.is_media, media)) and not any(map(upstream.is_media, plain))


def test_slice_bounds() -> None:
    assert upstream.slice_bounds("train[:2]+train[50%:]", 8) == [(0, 2), (4, 8)]
    with pytest.raises(ValueError, match="test"):
        upstream.slice_bounds("test", 8)


def test_tokenizer_settings(tokenizer: PreTrainedTokenizerFast) -> None:
    assert upstream.tokenizer_settings(tokenizer)["eos_token"] == tokenizer.eos_token


def test_chat_template_environment() -> None:
    """It supports what chat templates use beyond plain Jinja, and renders templates that were parsed in it."""
    environment = upstream.chat_template_environment()
    source = MARKED + "{{ messages[0]|tojson }}{{ strftime_now('') }}{% for m in messages %}{% break %}{% endfor %}"
    assert environment.from_string(source).render(messages=MESSAGES) == 'a;b;{"role": "user", "content": "a"}'
    with pytest.raises(jinja2.TemplateError):
        environment.from_string("{{ raise_exception('no') }}").render()
    with pytest.raises(jinja2.exceptions.SecurityError):
        environment.from_string("{{ ''.__class__.__mro__ }}").render()


def test_alias_reasoning_fields() -> None:
    """Templates read the reasoning of an answer as `reasoning_content` or as `thinking`, whatever the row calls it."""
    question, answer = upstream.alias_reasoning_fields(MESSAGES)
    assert question == MESSAGES[0] and answer["thinking"] == answer["reasoning_content"] == "because"


def test_generation_ranges() -> None:
    assert upstream.generation_ranges(MESSAGES, (), MARKED, {"eos_token": "<eos>"}) == [(0, 1), (2, 3)]
