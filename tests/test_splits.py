"""Held-out fractions: which rows stay together, what is stratified, and how close the fraction is met."""

import json
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROWS, Ran, check_refused, meanings, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from running import MakeConfig

from loratune import data
from loratune.codes import Code
from loratune.config import DataSection
from loratune.data import holding_out
from loratune.data.formats import Conversation, Example, Ids, Plain
from loratune.data.row_keys import HASHED_ROW, completion_key, group_key, prompt_key
from loratune.errors import DataError

Rows = list[dict[str, Any]]

TOPICS = [{"prompt": f"p{number}", "completion": f"c{number}", "topic": number // 4} for number in range(80)]


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    """A file that tests overwrite."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "rows.jsonl"


def divided(file: Path, rows: Rows, fraction: float, seed: int = 0, **section: Any) -> tuple[Rows, Rows, list[str]]:
    """The training rows, the held-out rows, and the remarks on the latter."""
    values = {"train": str(write_rows(file, rows)), "validation": fraction} | section
    split = data.read_datasets(DataSection.model_validate(values), seed)
    assert split.validation is not None

    def taken(part: data.DatasetSplit) -> Rows:
        return [rows[int(example.where.split(":")[-1]) - 1] for example in part.examples()]

    return taken(split.train), taken(split.validation), split.validation.remarks()


@pytest.mark.parametrize(
    ("prompt", "completion", "joined"),
    [
        ("capital of France", "Paris", "`FranceParis`"), ("Wie heißt du", "Ümit hier", "`duÜmit`"),
        ("capital of France ", "Paris", ""), ("capital of France", " Paris", ""), ("Paris:", "yes", ""),
        ("中文", "答", ""), ("ไทย", "ดี", ""), ("질문", "대답", "`질문대답`"),
        ("क्या", "हाँ जी", "`क्याहाँ`"), ("", "Paris", ""), ("\x1b[31m a", "b\x07", "`ab"),
    ],
)  # fmt: skip
def test_words_joined_across_prompt_and_completion_are_reported(
    file: Path, prompt: str, completion: str, joined: str
) -> None:
    rows = [{"prompt": prompt, "completion": completion}] * 3
    write_rows(file, rows)
    remarks = data.read_datasets(DataSection.model_validate({"train": str(file)}), 0).train.remarks()
    assert [joined in remark for remark in remarks] == ([True] if joined else [])
    write_rows(file, [*rows, *[{"prompt": "", "completion": "b"}] * 3])
    assert data.read_datasets(DataSection.model_validate({"train": str(file)}), 0).train.remarks() == []


def test_skipped_files_are_reported_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": f"{number}"} for number in range(9)])
    (tmp_path / "more.md").touch()
    datasets = data.read_datasets(DataSection.model_validate({"train": str(tmp_path), "validation": 0.3}), 0)
    assert ["more.md" in line for split in datasets.splits.values() for line in split.remarks()] == [True]


def test_draw_of_unrelated_rows_is_stable_across_releases(file: Path) -> None:
    """The same rows as in the first release."""
    rows = [{"prompt": f"p{number}", "completion": "c"} for number in range(40)]
    for seed, expected in ((0, [2, 8, 10, 16, 18, 28, 32, 34, 35, 36]), (7, [3, 6, 8, 9, 17, 20, 24, 26, 28, 37])):
        _, held_out, remarks = divided(file, rows, 0.25, seed)
        assert [int(row["prompt"][1:]) for row in held_out] == expected
        assert remarks == []
    rows = [{"text": f"text {number}"} for number in range(40)]
    assert [rows.index(row) for row in divided(file, rows, 0.25)[1]] == [2, 8, 10, 16, 18, 28, 32, 34, 35, 36]


ROW = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["", *(f"p {number}" for number in range(30)), "p  3 "])}
    | {"completion": st.sampled_from("abcdefgh")},
    optional={"doc": st.sampled_from([None, 1, 1.0, [1, {"a": 2}], *range(2, 20)])},
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.lists(ROW, min_size=4, max_size=60), fraction=st.floats(0.05, 0.6), seed=st.integers(0, 5))
def test_train_and_held_out_rows_share_no_prompt_copy_or_group(
    file: Path, rows: Rows, fraction: float, seed: int
) -> None:
    grouped = {"group_by": "doc"} if any(row.get("doc") is not None for row in rows) else {}
    count = max(1, round(fraction * len(rows)))
    most = max(len(rows) / 20, min(10, count))
    by_prompt = Counter(" ".join(row["prompt"].split()) for row in rows)
    templates = {prompt for prompt, number in by_prompt.items() if number > most}

    def links(row: dict[str, Any]) -> Iterator[Any]:
        prompt = " ".join(row["prompt"].split())
        yield "content", prompt, row["completion"]
        if prompt and prompt not in templates:
            yield "prompt", prompt
        if row.get("doc") is not None and grouped:
            yield "doc", json.dumps(row["doc"] if isinstance(row["doc"], list) else int(row["doc"]))

    try:
        train, held_out, _ = divided(file, rows, fraction, seed, **grouped)
    except DataError as error:
        assert meanings(error) == [(Code.DATA_EMPTY, "", "data.validation")]
        assert components(rows, links) == 1 or count == len(rows)
        return
    sides = [{link for row in side for link in links(row)} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert held_out and len(train) + len(held_out) == len(rows)
    assert divided(file, rows, fraction, seed, **grouped)[1] == held_out
    if len(held_out) > count:
        assert components(held_out, links) == 1


def components(rows: Rows, links: Callable[[dict[str, Any]], Iterator[Any]]) -> int:
    """The number of groups of linked rows."""
    groups: list[set[Any]] = []
    for row in rows:
        whole = set(links(row))
        apart = [group for group in groups if not group & whole]
        groups = [*apart, whole.union(*(group for group in groups if group & whole))]
    return len(groups)


def test_prompts_and_copies_stay_together(file: Path) -> None:
    pairs = [{"prompt": f"p {number // 2}", "completion": f"c{number}"} for number in range(200)]
    train, held_out, remarks = divided(file, pairs, 0.1)
    assert len(held_out) == 20
    assert remarks == ["held out 20 rows in 10 groups: rows with the same prompt stay together"]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    copies = [{"prompt": f"p{' ' * (number % 2)} {number // 2}", "completion": "c"} for number in range(200)]
    _, held_out, remarks = divided(file, copies, 0.1)
    assert Counter(number % 2 for number, row in enumerate(copies) if row in held_out) == {0: 10, 1: 10}
    assert remarks == ["held out 20 rows in 10 groups: copies of a row stay together"]


def test_groups_stay_together_with_weights_and_indirect_links(file: Path, tmp_path: Path) -> None:
    train, held_out, remarks = divided(file, TOPICS, 0.2, group_by="topic")
    assert Counter(Counter(row["topic"] for row in held_out).values()) == {4: 4}
    assert remarks == ["held out 16 rows in 4 groups: rows with the same `topic` stay together"]
    assert len(train) == 64
    chain = [
        {"prompt": f"p{number // 2}", "completion": str(number), "topic": (number + 1) // 2} for number in range(9)
    ]
    alone = [{"prompt": f"q{number}", "completion": "", "topic": None} for number in range(41)]
    _, held_out, remarks = divided(file, [*chain, *alone], 0.3, group_by="topic")
    assert sum(row in chain for row in held_out) in (0, 9) and len(held_out) == 15
    assert "rows without `topic`: 41, which belong to no group" in remarks
    sources = []
    for weight in (1, 2):
        rows = [row | {"prompt": f"{weight} {row['prompt']}"} for row in TOPICS]
        sources.append({"path": str(write_rows(tmp_path / f"{weight}.jsonl", rows)), "weight": weight})
    values = {"train": sources, "validation": 0.25, "group_by": "topic"}
    split = data.read_datasets(DataSection.model_validate(values), 0)
    assert split.validation is not None and len(split.train) + len(split.validation) == 120
    topics = [
        {TOPICS[int(example.where.split(":")[-1]) - 1]["topic"] for example in part.examples()}
        for part in (split.train, split.validation)
    ]
    assert topics[1] and not topics[0] & topics[1]


def test_very_common_prompts_do_not_keep_rows_together(file: Path) -> None:
    rows = [{"prompt": "a review: ", "completion": f"c{number}"} for number in range(150)]
    _, held_out, remarks = divided(file, [*rows, *TOPICS[:50]], 0.1)
    assert len(held_out) == 20 and 0 < sum(row in rows for row in held_out) < 20
    assert remarks[0].startswith("a prompt of 150 rows (") and "too common" in remarks[0]
    assert divided(file, rows[:10], 0.3)[1]


@pytest.mark.parametrize("fraction", [0.07, 0.5])
def test_split_is_stratified_by_label(file: Path, fraction: float) -> None:
    """Exact to one row without groups. A label with a single row is assigned at random."""
    labels = [label for label, count in zip("abcde", (301, 150, 77, 9, 1), strict=True) for _ in range(count)]
    rows = [{"prompt": f"p{number}", "completion": label} for number, label in enumerate(labels)]
    _, held_out, remarks = divided(file, rows, fraction)
    assert remarks == ["stratified by 5 labels"]
    assert len(held_out) == round(fraction * len(rows))
    counts, held = Counter(labels), Counter(row["completion"] for row in held_out)
    assert all(abs(held[label] - fraction * count) < 1 for label, count in counts.items())
    assert divided(file, rows, fraction, seed=1)[1] != held_out
    pairs = [row | {"prompt": f"p{number // 2}"} for number, row in enumerate(rows)]
    _, held_out, remarks = divided(file, pairs, fraction)
    assert remarks[1] == "stratified by 5 labels, each group by that of most of its rows"
    held = Counter(row["completion"] for row in held_out)
    assert all(abs(held[label] - fraction * count) <= 3 for label, count in counts.items())


@pytest.mark.parametrize(
    ("rows", "group_by", "said"),
    [
        (TOPICS, "topics", "did you mean `topic`?"),
        (TOPICS, "xyz", "`completion`, `prompt`, `topic`"),
        ([row | {"doc": None} for row in ROWS], "doc", "null in every row"),
    ],
)
def test_missing_group_by_field_is_refused(file: Path, rows: Rows, group_by: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        divided(file, rows, 0.1, group_by=group_by)
    assert meanings(caught.value) == [(Code.DATA_FORMAT, str(file), "data.group_by")]
    assert said in str(caught.value)


def test_single_group_is_refused(run_config: MakeConfig, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    rows = write_rows(tmp_path / "one.jsonl", [row | {"doc": "a"} for row in ROWS])
    ran = cli("train", run_config(data={"train": str(rows), "validation": 0.1, "group_by": "doc"}), "--dry-run")
    check_refused(ran, 4, (Code.DATA_EMPTY, "", "data.validation"))
    assert "rows with the same `doc` stay together" in ran.err


def test_dry_run_reports_which_rows_stay_together(
    run_config: MakeConfig, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    """A field that `columns` maps can also be used in `group_by`."""
    rows = [{"question": f"{number // 2}?", "completion": f"c{number}", "doc": number} for number in range(40)]
    values = {"columns": {"prompt": "question"}, "validation": 0.25, "group_by": "question"}
    path = write_rows(tmp_path / "questions.jsonl", rows)
    ran = cli("train", run_config(data=values | {"train": str(path)}), "--dry-run")
    assert ran.code == 0, ran.err
    assert "validation: held out 10 rows in 5 groups: rows with the same prompt stay together" in ran.out
    assert "fields not read: `doc`" in ran.out
    _, _, remarks = divided(path, rows, 0.25, columns={"prompt": "question"}, group_by="doc")
    assert len(remarks) == 1  # the field is now read


USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("some", "other", "same"),
    [
        (Plain("", " a  b", "c"), Plain("", "a b", "d"), True),
        (Plain("", "a", "c"), Plain("", "b", "c"), False),
        (Conversation("", (USER, BOT)), Conversation("", (USER, BOT | {"content": "x"}, USER, BOT)), True),
        (Conversation("", (USER, BOT)), Conversation("", (SYSTEM, USER, BOT)), False),
        (Conversation("", (USER, BOT)), Conversation("", (USER, BOT), tools=({"name": "f"},)), False),
        (Conversation("", (USER, BOT, USER, BOT), 3), Conversation("", (USER, BOT)), False),
        (Conversation("", (USER, BOT, USER, BOT), zero_weight=frozenset({1})), Conversation("", (USER, BOT)), False),
        (Ids("", (1, 2, 3), (-100, 2, 3)), Ids("", (1, 4), (-100, 4)), True),
        (Ids("", (1, 2, 3), (-100, -100, 3)), Ids("", (1, 4), (-100, 4)), False),
    ],
)
def test_prompt_keys_of_examples(some: Example, other: Example, same: bool) -> None:
    assert (prompt_key(some, "completion") == prompt_key(other, "completion")) == same
    assert completion_key(some, "completion") != prompt_key(some, "completion")


@pytest.mark.parametrize(
    "example", [Plain("", " \n", "c"), Plain("", "", "t", whole=True), Conversation("", (BOT,)), Ids("", (1, 2))]
)
def test_examples_without_a_prompt_have_no_prompt_key(example: Example) -> None:
    assert prompt_key(example, "completion") is None


def test_prompt_key_of_a_conversation_depends_on_loss_on() -> None:
    long, short = Conversation("", (USER, BOT, USER, BOT), 3), Conversation("", (USER, BOT))
    assert prompt_key(long, "assistant") == prompt_key(short, "assistant")
    assert prompt_key(long, "all") == prompt_key(long, "completion") != prompt_key(short, "all")
    assert completion_key(long, "completion") == completion_key(short, "completion")


def test_group_keys_compare_json_values() -> None:
    equal: Sequence[tuple[Any, Any]] = [(1, 1.0), ({"a": 1, "b": [2.0]}, {"b": [2], "a": 1}), ("\ud800", "\ud800")]
    values = [1, "1", True, "true", [1], {"a": 1}, 1.5, "", [], {}, 10**30, 1e30 + 1e20, "a", "A"]
    assert all(group_key({"x": some}, "x") == group_key({"x": same}, "x") for some, same in equal)
    assert len({group_key({"x": value}, "x") for value in values}) == len(values)
    assert {group_key(row, "x") for row in ({}, {"x": None}, {"x": float("nan")})} == {None}


def test_group_by_value_with_duplicate_keys_is_refused(file: Path) -> None:
    file.write_text('{"text": "a", "x": 1}\n{"text": "b", "x": {"a": 1, "a": 2}}\n')
    with pytest.raises(DataError) as caught:
        data.read_datasets(DataSection.model_validate({"train": str(file), "validation": 0.5, "group_by": "x"}), 0)
    assert meanings(caught.value) == [(Code.DATA_FIELD, f"{file}:2", "")]


@pytest.mark.parametrize(
    ("count", "linked"),
    [(300_000, True), *(pytest.param(2_000_000, linked, marks=pytest.mark.slow) for linked in (False, True))],
)
def test_memory_is_proportional_to_the_rows(count: int, linked: bool) -> None:
    """With unrelated rows, and with shared copies, prompts and groups; 100 labels."""
    random = np.random.default_rng(0)
    hashes = random.permutation(count) * 2**40
    pairs = hashes // 2 if linked else hashes
    groups = random.integers(0, count // 10, count) if linked else hashes
    columns = (hashes, pairs, hashes, np.roll(pairs, count // 3), hashes % 100, groups, hashes)
    rows = np.rec.fromarrays(columns, dtype=HASHED_ROW)
    tracemalloc.start()
    held_out, remarks = holding_out.hold_out(rows, 0.1, "doc", 0, str)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert remarks and held_out.any()
    assert peak < 100 * count
