"""The verb `classify` of an adapter."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import loratune
from loratune.api import Messages, Rows, computing, libraries
from loratune.api.rows import read_prompts
from loratune.codes import Code
from loratune.config.arguments import checked
from loratune.errors import AdapterError, ConfigError, Problem
from loratune.events import Listener, listening

if TYPE_CHECKING:
    from loratune.adapter.generation import LoadedAdapter
    from loratune.compare.classification import Prediction
    from loratune.compare.labels import Labels
    from loratune.data.sources.rows import Row


@checked
def classify(
    adapter: "loratune.Adapter",
    rows: Rows | Sequence[str | Messages],
    *,
    labels: Sequence[str] = (),
    system: str | None = None,
    on_event: Listener | None = None,
) -> "list[Prediction]":
    """Give each row the most probable label, with its probability among all labels.

    Args:
        rows: Rows, texts or conversations; rendered as in training.
        labels: The labels to choose from; by default those of the training rows.
        system: The system message of conversations without one; empty for none; by default the one that all rows
            had which the adapter was trained on.
        on_event: Receives events.

    Raises:
        AdapterError: The adapter cannot be used; it has not recorded labels, and none are given.
        ModelError, DataError: Its base or the rows cannot be used.
        ConfigError: The labels are not two or more different ones; a prompt exceeds the model's context.
    """
    with listening(on_event):
        return [prediction for _, prediction in classify_rows(adapter, rows, labels=labels, system=system)]


def classify_rows(
    adapter: "loratune.Adapter",
    rows: "Rows | Sequence[str | Messages] | BinaryIO",
    *,
    labels: Sequence[str] = (),
    system: str | None = None,
) -> "list[tuple[Row, Prediction]]":
    """As `classify`, with the row of each prediction."""
    read = read_prompts(rows)
    if len({label.strip() for label in labels} - {""}) != len(labels) or len(labels) == 1:
        what, fix = "labels are empty, equal, or only one", "name at least two different ones"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="labels", fix=fix))
    with libraries():
        from loratune.adapter import answering
        from loratune.adapter.options import UNNAMED
        from loratune.compare.classification import Prediction
        from loratune.compare.evaluation import engine_of
        from loratune.compare.labels import KEY, Labels, probabilities
        from loratune.compare.temperature import temperature_of

    if not labels and KEY not in adapter.record:
        what, fix = "was not trained on labels, or by an earlier release", "name them with `labels=...`"
        raise AdapterError(Problem(Code.USAGE_CONFLICT, what, str(adapter.path), fix=fix))
    with computing():
        loaded = adapter.opened.loaded
        vocabulary = loaded.default.model.config.get_text_config().vocab_size
        own = Labels.of_adapter(adapter.directory.files, vocabulary)
        chosen = _named(loaded.default, own, labels) if own is None or labels else own
        _, requests = answering.render(loaded, [UNNAMED] * len(read), read, max(map(len, chosen.ids)), system)
        scores = chosen.score(engine_of(loaded.default), [ids for _, ids in requests])
        found = probabilities(scores, temperature_of(adapter.directory.files) if chosen is own else 1.0)
    names = [text.strip() for text in chosen.texts]
    predictions = []
    for of_labels in found.tolist():
        shares = dict(zip(names, of_labels, strict=True))
        label = max(shares, key=shares.__getitem__)
        predictions.append(Prediction(label, shares[label], shares))
    return [*zip(read, predictions, strict=True)]


def labelled(row: "Row", prediction: "Prediction", abstain_below: float) -> dict[str, Any]:
    """The fields of a row, with `label` and `probability`; the label is empty if it is less probable than a bound."""
    from loratune.data.sources.rows import with_own_fields

    label = prediction.label if prediction.probability >= abstain_below else ""
    return with_own_fields(row.values, {"label": label, "probability": prediction.probability})


def _named(loaded: "LoadedAdapter", own: "Labels | None", labels: Sequence[str]) -> "Labels":
    """Labels by their names. Those that the adapter was trained on have the ids of the training rows, and others are
    rendered as an answer, with the white space that the others begin with."""
    from loratune.compare.labels import Labels
    from loratune.data.formats import Conversation, Plain

    known = {text.strip(): (text, ids) for text, ids in zip(own.texts, own.ids, strict=True)} if own else {}
    first = own.texts[0] if own else ""
    space = first[: len(first) - len(first.lstrip())]
    found = []
    for name in map(str.strip, labels):
        if name in known:
            found.append(known[name])
            continue
        turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": space + name})
        example = Conversation("label", turns) if loaded.chat else Plain("label", "?", space + name)
        found.append((space + name, loaded.renderer.row(example).completion))
    return Labels(tuple(text for text, _ in found), tuple(tuple(ids) for _, ids in found))
