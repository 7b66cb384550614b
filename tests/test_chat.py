"""`loratune chat`: over pipes, and in a terminal, where the tests press the keys."""

import json
import os
import pty
import re
import select
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PLAIN, Ran, check_refused, tiny_llama, tree, write_rows
from fork_server import Child, ForkServer
from running import Cli
from typer.testing import CliRunner

from loratune.adapter import loading, options
from loratune.adapter.chat import Chat, Exchange
from loratune.adapter.directory import AdapterDirectory
from loratune.cli import app
from loratune.codes import Code
from loratune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("untraced_module")

NEW = 8
HINT = "/help lists what can be typed"


def train(path: Path, base: Path, rows: list[dict[str, Any]], steps: int) -> Path:
    path.mkdir(exist_ok=True)
    values = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        **PLAIN,
        "data": {"train": str(write_rows(path / "rows.jsonl", rows))},
        "training": {"learning_rate": 2e-2, "max_steps": steps},
        "output_dir": str(path / "adapter"),
    }
    (path / "run.yaml").write_text(yaml.safe_dump(values))
    ran = CliRunner().invoke(app, ["train", str(path / "run.yaml"), "--allow-worse"])
    assert ran.exit_code == 0, ran.stderr
    return path / "adapter"


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def short(place: Path, tiny_dir: Path) -> Path:
    """Trained on conversations with one-token answers followed by the end token, with a context of 512."""
    rows = [conversation(f"{number}:", "xyz"[number % 3]) for number in range(12)]
    return train(place / "short", tiny_dir, rows, 60)


@pytest.fixture(scope="module")
def raw(place: Path, tiny_dir: Path) -> Path:
    rows = [{"prompt": f"{number}:", "completion": " ab"} for number in range(12)]
    return train(place / "raw", tiny_dir, rows, 8)


@pytest.fixture(scope="module")
def babbling(place: Path, tiny_dir: Path) -> Path:
    """An adapter that repeats `a` without ever ending its answer, with a context of 512."""
    return train(place / "babbling", tiny_dir, [conversation("go:", "a" * 200)] * 12, 25)


@pytest.fixture(scope="module")
def endless(place: Path, tokenizer: Any) -> Path:
    """An adapter that repeats `a` without ever ending its answer, on a base with a long context."""
    base = place / "long"
    tiny_llama(max_position_embeddings=65536).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [conversation(f"{number}:", "a" * 200) for number in range(12)]
    return train(place / "endless", base, rows, 25)


def answers(cli: Cli, adapter: Path, rows: list[dict[str, Any]], folder: Path, *options: object) -> list[str]:
    """The answers of `generate` to rows."""
    out = folder / "expected.jsonl"
    source = write_rows(folder / "asked.jsonl", rows)
    ran = cli("generate", "--adapter", adapter, "--input", source, "--output", out, "--overwrite", *options)
    assert ran.code == 0, ran.err
    return [json.loads(line)["base" if "--base" in options else "completion"] for line in out.read_text().splitlines()]


# Over pipes


def test_each_line_is_a_turn_of_one_conversation(cli: Cli, short: Path, tmp_path: Path) -> None:
    """Only answers are printed; each is what `generate` answers to the messages so far."""
    questions, messages, expected = ["first:", "second:", "third:"], [{"role": "system", "content": "Be short."}], []
    for question in questions:
        messages = [*messages, {"role": "user", "content": question}]
        expected += answers(cli, short, [{"messages": messages}], tmp_path, "--max-new-tokens", NEW)
        messages = [*messages, {"role": "assistant", "content": expected[-1]}]
    tail = ("--adapter", short, "--max-new-tokens", NEW)
    ran = cli("chat", *tail, "--system", "Be short.", stdin="first:\n\nsecond:\r\nthird:")
    assert (ran.code, ran.out) == (0, "".join(f"{answer}\n" for answer in expected)), ran.err
    said = cli("chat", *tail, stdin="/system Be short.\n" + "\n".join(questions))
    assert said.out == ran.out
    changed = cli("chat", *tail, stdin="first:\n/reset\n/system Be short.\nfirst:\n/system\n/reset\nfirst:\n/quit\nno:")
    first, second, third = changed.out.splitlines()
    assert (first, second) == (third, expected[0])


def test_answers_are_printed_as_they_are_generated(
    processes: ForkServer, short: Path, tmp_path: Path, cli: Cli
) -> None:
    """A program that waits for each answer before it sends its next line gets it."""
    stdin, stdout = tmp_path / "in", tmp_path / "out"
    os.mkfifo(stdin)
    os.mkfifo(stdout)
    child = processes.start(
        "chat", "--adapter", short, first=f"import os; os.open({str(stdin)!r}, os.O_RDONLY)", stdout=f"{stdout}"
    )
    with stdout.open() as reader, stdin.open("w") as writer:
        for _ in range(2):
            print("first:", file=writer, flush=True)
            assert reader.readline().strip() in "xyz"
    assert (child.wait(), child.said()) == (0, "")


def test_an_adapter_of_raw_prompts_has_no_turns(cli: Cli, raw: Path, tmp_path: Path) -> None:
    """Each line is completed separately, which is reported, and rows are saved in the format of training."""
    prompts = ["5:", "something else:"]
    options = ("--max-new-tokens", 4)
    expected = answers(cli, raw, [{"prompt": prompt} for prompt in prompts], tmp_path, *options)
    ran = cli("chat", "--adapter", raw, *options, stdin="\n".join(prompts))
    assert (ran.code, ran.out) == (0, "".join(f"{answer}\n" for answer in expected))
    assert f"{raw}: was trained on raw prompts, which have no turns" in ran.err
    for arguments, lines in ((("--system", "x"), "5:"), ((), "/system x\n5:")):
        refused = cli("chat", "--adapter", raw, *arguments, stdin=lines)
        check_refused(refused, 2, (Code.USAGE_CONFLICT, "", ""))
        assert refused.out == ""


def test_base_answers_the_last_turn_without_joining_the_conversation(cli: Cli, short: Path, tmp_path: Path) -> None:
    """The answer of `/base` is not part of the conversation."""
    options = ("--max-new-tokens", NEW)
    plain = cli("chat", "--adapter", short, *options, stdin="first:\nsecond:\n").out.splitlines()
    ran = cli("chat", "--adapter", short, *options, stdin="first:\n/base\nsecond:\n")
    (of_base,) = answers(cli, short, [{"prompt": "first:"}], tmp_path, *options, "--base")
    first, second = plain
    assert ran.out == f"{first}\n{of_base}\n{second}\n" and of_base != first


def test_several_adapters_can_answer_in_one_conversation(cli: Cli, short: Path, raw: Path, tmp_path: Path) -> None:
    several = ("chat", "--adapter", f"short={short}", "--adapter", f"raw={raw}", "--max-new-tokens", NEW)
    ran = cli(*several, stdin="5:\n/adapter raw\n5:\n/adapter\n/adapter short\n/reset\n5:\n")
    (of_short,) = answers(cli, short, [{"prompt": "5:"}], tmp_path, "--max-new-tokens", NEW)
    (of_raw,) = answers(cli, raw, [{"prompt": "5:"}], tmp_path, "--max-new-tokens", NEW)
    assert ran.out == f"{of_short}\n{of_raw}\n{of_short}\n"
    assert "raw answers, of short, raw\n" in ran.err
    check_refused(cli(*several, stdin="/adapter sql\n"), 2, (Code.USAGE_BAD_VALUE, "", "/adapter"))
    ran = cli("chat", "--adapter", short, stdin="/adapter short\n")
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, "", "/adapter"))
    ran = cli("chat", "--adapter", f"a={short}", "--adapter", f"a={raw}", stdin="5:\n")
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, str(raw), "--adapter"))


def test_a_saved_conversation_can_be_trained_on(cli: Cli, short: Path, raw: Path, tmp_path: Path) -> None:
    """One row of messages, or one row for each raw prompt. Non-ASCII characters are not escaped."""
    chat, pairs = tmp_path / "chat.jsonl", tmp_path / "pairs.jsonl"
    ran = cli("chat", "--adapter", short, "--system", "Ü", stdin=f"5:\n//etc\n/save {chat}\n")
    assert ran.code == 0 and ran.err == f"{chat}: 1 row written\n"
    first, second = ran.out.splitlines()
    (row,) = [json.loads(line) for line in chat.read_text().splitlines()]
    texts = [("system", "Ü"), ("user", "5:"), ("assistant", first), ("user", "/etc"), ("assistant", second)]
    assert "Ü" in chat.read_text()
    assert row == {"messages": [{"role": role, "content": text} for role, text in texts]}
    train(tmp_path / "again", Path(json.loads((short / "adapter_config.json").read_text())["base_model_name_or_path"]),
          [row] * 4, 1)  # fmt: skip
    ended = [exchange for exchange in cli("chat", "--adapter", raw, stdin="5:\n6:\n").out.splitlines() if exchange]
    ran = cli("chat", "--adapter", raw, stdin=f"5:\n6:\n/save {pairs}\n")
    assert ran.code == 0, ran.err
    assert [json.loads(line) for line in pairs.read_text().splitlines()] == [
        {"prompt": prompt, "completion": answer} for prompt, answer in zip(["5:", "6:"], ended, strict=True)
    ]


def test_a_conversation_of_truncated_answers_is_not_saved(cli: Cli, endless: Path, tmp_path: Path) -> None:
    path = tmp_path / "saved.jsonl"
    ran = cli("chat", "--adapter", endless, "--max-new-tokens", 3, stdin=f"5:\n/save {path}\n")
    check_refused(ran, 2, (Code.USAGE_CONFLICT, "", "/save"))
    assert ran.out == "aaa\n" and "cut off: --max-new-tokens is 3\n" in ran.err and not path.exists()


def test_existing_files_are_replaced_only_on_request(cli: Cli, short: Path, tmp_path: Path) -> None:
    path = tmp_path / "saved.jsonl"
    path.write_text("precious\n")
    saved = ("chat", "--adapter", short, "--max-new-tokens", NEW)
    ran = cli(*saved, stdin=f"5:\n/save {path}\n")
    check_refused(ran, 2, (Code.OUTPUT_EXISTS, str(path), "/save"))
    assert tree(tmp_path) == {"saved.jsonl": b"precious\n"}
    for target, code in {
        short / "adapter_model.safetensors": Code.OUTPUT_UNUSABLE, tmp_path: Code.OUTPUT_UNUSABLE,
        tmp_path / "absent" / "x": Code.OUTPUT_UNUSABLE,
    }.items():  # fmt: skip
        ran = cli(*saved, stdin=f"5:\n/save --overwrite {target}\n")
        check_refused(ran, 2, (code, str(target), "/save"))
    check_refused(cli(*saved, stdin="5:\n/save\n"), 2, (Code.USAGE_BAD_VALUE, "", "/save"))
    assert cli(*saved, stdin=f"5:\n/save --overwrite {path}\n").code == 0
    assert json.loads(path.read_text())["messages"][0] == {"role": "user", "content": "5:"}


def test_rows_of_a_saved_conversation(short: Path, raw: Path) -> None:
    """A truncated answer has the weight 0, and is left out for raw prompts. Without any complete answer there are no
    rows."""
    cut, whole = Exchange("a", "b", is_whole=False), Exchange("c", "d", is_whole=True)
    paths = {"short": short, "raw": raw}
    selected = options.parse_selection([f"{name}={path}" for name, path in paths.items()])
    opened = {name: AdapterDirectory.open(path) for name, path in paths.items()}
    talk = Chat(loading.load_selection(opened, selected), system="s")
    talk.exchanges.extend([cut, whole])
    assert talk.rows() == [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "weight": 0},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ]
        }
    ]
    talk.use("raw")
    assert talk.rows() == [{"prompt": "c", "completion": "d"}]
    talk.exchanges.remove(whole)
    for name in ("raw", "short"):
        talk.use(name)
        with pytest.raises(ConfigError):
            talk.rows()


@pytest.mark.parametrize(
    ("lines", "code", "expected"),
    [
        ("/bye\n", 2, (Code.USAGE_BAD_VALUE, "", "")),
        ("/base\n", 2, (Code.USAGE_CONFLICT, "", "/base")),
        ("/save x\n", 2, (Code.USAGE_CONFLICT, "", "/save")),
        ("a" * 600, 2, (Code.DATA_TOO_LONG, "", "")),
    ],
)
def test_an_invalid_line_of_a_pipe_ends_the_chat(
    cli: Cli, short: Path, lines: str, code: int, expected: tuple[Code, str, str]
) -> None:
    ran = cli("chat", "--adapter", short, stdin=lines)
    check_refused(ran, code, expected)
    assert ran.out == ""


def test_a_full_context_is_reported(cli: Cli, babbling: Path) -> None:
    """First an answer is truncated at the limit, then there is no room for another, and a reset makes room again."""
    question = "b" * 400  # the template adds <|user|>, <|end|>, a line break and <|assistant|>
    full = "cut off: the model's context of 512 tokens is full; /reset begins anew\n"
    ran = cli("chat", "--adapter", babbling, "--max-new-tokens", 107, stdin=f"{question}\n")
    assert ran.code == 0 and "cut off: --max-new-tokens is 107\n" in ran.err and len(ran.out) == 108
    ran = cli("chat", "--adapter", babbling, stdin=f"{question}\n/reset\n{question}\n")
    assert (ran.code, ran.err.count(full)) == (0, 2) and [len(line) for line in ran.out.splitlines()] == [108, 108]
    ran = cli("chat", "--adapter", babbling, stdin=f"{question}\nmore\n")
    check_refused(ran, 2, (Code.DATA_TOO_LONG, "", ""))
    assert "the conversation has 522 tokens, and the model's context 512" in ran.err and full in ran.err


def test_bytes_that_are_not_utf8(processes: ForkServer, short: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"5:\n\xff\n")
    child = processes.start(
        "chat", "--adapter", short, first=f"import os; os.open({str(tmp_path / 'in')!r}, os.O_RDONLY)"
    )
    code = child.wait()
    check_refused(Ran(code, child.out.read_text(), child.said()), 4, (Code.USAGE_BAD_VALUE, "the line", ""))
    assert child.out.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--temperature", "1e9"], 2, "[usage.bad_value]"),
        (["--max-new-tokens", "0"], 2, "max-new-tokens"),
        (["--adapter", "absent"], 2, "[usage.bad_value]"),
    ],
)
def test_invalid_options_are_refused(cli: Cli, short: Path, arguments: list[str], code: int, expected: str) -> None:
    ran = cli("chat", "--adapter", short, *arguments, stdin="5:\n")
    assert (ran.code, ran.out) == (code, "") and expected in ran.err


def test_missing_and_damaged_adapters_are_refused(cli: Cli, short: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    check_refused(cli("chat", "--adapter", absent, stdin="5:\n"), 5, (Code.ADAPTER_NOT_FOUND, str(absent), ""))
    damaged = Path(shutil.copytree(short, tmp_path / "damaged"))
    (damaged / "tokenizer_config.json").write_text("{}")
    where = str(damaged / "tokenizer_config.json")
    check_refused(cli("chat", "--adapter", damaged, stdin="5:\n"), 5, (Code.ADAPTER_CHANGED, where, ""))


# In a terminal


ATTACH = """
import os
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) % 256)
os.setsid()
handle = os.open({!r}, os.O_RDWR)
for number in (1, 2):
    os.dup2(handle, number)
"""
"""Gives the command, whose stdin is closed, a controlling terminal, and connects its streams to it."""


class Terminal:
    """A command in a terminal of its own. seen: output that no call has consumed yet."""

    def __init__(self, child: Child, master: int):
        self.child, self._master, self._seen = child, master, ""

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C at the prompt until a text is shown. It is repeated if nothing happens.

        Between the echo of a key and the wait for the next one Python's readline does not notice a signal.
        """
        for _ in range(18):
            self.press("\x03")
            with suppress(AssertionError):
                self.until(text, seconds=5)
                return
        self.until(text, seconds=0)

    def until(self, text: str, seconds: float = 90) -> str:
        """The output up to and including a text."""
        end = time.monotonic() + seconds
        spaced = r"\s+".join(re.escape(word) for word in text.split(" "))  # a long path before it may wrap the line
        while (found := re.search(spaced, self._seen)) is None:
            assert time.monotonic() < end, (text, self._seen)
            if select.select([self._master], [], [], 0.1)[0]:
                self._seen += os.read(self._master, 1 << 16).decode(errors="replace").replace("\r\n", "\n")
        shown, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return shown


@contextmanager
def terminal(processes: ForkServer, *arguments: object) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    try:
        child = processes.start("chat", *arguments, first=ATTACH.format(os.ttyname(slave)), TERM="vt100")
        yield Terminal(child, master)
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("end", ["\x04", pytest.param("/quit\n", marks=pytest.mark.slow)])
def test_a_conversation_in_a_terminal(processes: ForkServer, cli: Cli, short: Path, tmp_path: Path, end: str) -> None:
    """Editing, history, commands, errors that do not end the chat, and Ctrl-D or the command that ends it."""
    path = tmp_path / "saved.jsonl"
    with terminal(processes, "--adapter", f"s={short}", "--max-new-tokens", NEW) as window:
        assert str(short) in window.until(HINT)
        window.until("s> ")
        window.press("5:\x01no \n")  # Ctrl-A: to the start of the line
        window.until("s> ")
        window.press("\x1b[A\n")  # the previous line
        window.until("s> ")
        window.press("/bye\n")
        assert "[usage.bad_value]" in window.until("s> ")
        window.press("unfinished")
        window.until("unfinished")
        window.interrupt("s> ")
        window.press("/help\n")
        assert "/save FILE" in window.until("s> ")
        window.press(f"/save {path}\n")
        assert f"{path}: 1 row written" in " ".join(window.until("s> ").split())
        window.press(end)
        assert window.child.wait() == 0
    messages = json.loads(path.read_text())["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["no 5:", "no 5:"]
    expected = cli("chat", "--adapter", short, "--max-new-tokens", NEW, stdin="no 5:\nno 5:\n").out.splitlines()
    assert [message["content"] for message in messages if message["role"] == "assistant"] == expected


def test_ctrl_c_stops_an_answer_and_keeps_its_beginning(
    processes: ForkServer, endless: Path, short: Path, tmp_path: Path
) -> None:
    """It is streamed and part of the conversation, but not trained on later; the chat continues."""
    path = tmp_path / "saved.jsonl"
    with terminal(processes, "--adapter", endless, "--max-new-tokens", 50_000) as window:
        window.until("> ")
        window.press("go:\n")
        window.until("aaaaaaaa")
        window.press("\x03")
        shown = window.until("the beginning of the answer is kept")
        assert "stopping; once more ends the chat" in shown and "cut off: stopped" in shown
        window.until("> ")
        window.press(f"/save {path}\n")
        assert "[usage.conflict]" in window.until("> ")
        window.press("/system x\n")
        window.until("> ")
        window.press("go:\n")
        window.until("aaaaaaaa")
        window.press("\x03")
        window.until("stopping")
        window.until("> ")
        window.press("\x04")
        assert window.child.wait() == 0


def test_a_closed_terminal_ends_the_chat(processes: ForkServer, endless: Path) -> None:
    with terminal(processes, "--adapter", endless, "--max-new-tokens", 50_000) as window:
        window.until("> ")
        window.press("go:\n")
        window.until("aaaaaaaa")
    assert window.child.wait() == 143


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(
    processes: ForkServer, place: Path, tiny_dir: Path
) -> None:
    """An escape sequence in an answer is shown as text."""
    answer = "\x1b]0;title\x07"
    rows = [conversation("go:", answer)] * 12
    adapter = train(place / "escapes", tiny_dir, rows, 60)
    with terminal(processes, "--adapter", adapter, "--max-new-tokens", 16) as window:
        window.until("> ")
        window.press("go:\n")
        window.until("go:\n")
        shown = window.until("\n> ")
        assert "\\x1b]0;title\\x07" in shown and not re.search("\x1b\\]|\x07", shown)
        window.press("\x04")
        assert window.child.wait() == 0
