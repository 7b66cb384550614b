"""`loratune push` in real processes, against a local hub that implements the protocol of huggingface_hub."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from conftest import Ran, check_refused, config_in, mainly, process, tree
from fork_server import Child, ForkServer
from hub_server import READ_ONLY, READ_SETTINGS, TOKEN, Fault, Files, Handler, Hub, State
from running import WEIGHTS, flip, until

from loratune import config
from loratune.adapter import card
from loratune.codes import Code
from loratune.export import portable
from loratune.lora import adapter_files
from loratune.system.directories import ROW_HASHES
from loratune.system.files import sha256
from loratune.text import printable

Cli = Callable[..., Ran]
Push = Callable[..., Ran]
Start = Callable[..., Child]
BASE = "who/base"
ME = "me/skill"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    made = Hub()
    Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


@pytest.fixture
def state(hub: Hub) -> State:
    hub.state = State()
    hub.state.add(BASE, private=False, config__json=b"{}")
    return hub.state


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub-home")


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The client's settings, which it reads when it is imported."""
    return {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }  # fmt: skip


@pytest.fixture(scope="module")
def start(processes: ForkServer, hub: Hub, home: Path) -> Start:
    """Start `loratune push ARGS`, logged in with a write token."""

    def run(*arguments: object, first: str = "", token: str = TOKEN, **more: Any) -> Child:
        settings = environment(hub, home) | {"HF_TOKEN": token}
        return processes.start("push", *arguments, first=READ_SETTINGS + first, **settings | more)

    return run


@pytest.fixture
def push(start: Start) -> Push:
    """Run it to the end. The token must never be printed."""

    def run(*arguments: object, token: str = TOKEN, **more: Any) -> Ran:
        child = start(*arguments, token=token, **more)
        ran = Ran(child.wait(), child.out.read_text(), child.said())
        assert not token or token not in ran.out + ran.err
        return ran

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, cli: Cli) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    ran = cli("train", config_in(folder, tiny_dir)(training={"max_steps": 3}))
    assert ran.code == 0, ran.err
    return folder / "out"


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A trained adapter whose base has since moved to the hub, which is not an edit. Other paths refer to the training
    machine."""
    path = tmp_path / "skill"
    shutil.copytree(trained, path)
    point_to(path, BASE)
    return path


def point_to(adapter: Path, base: str) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def downloaded(files: Files, path: Path) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def read_files(path: Path) -> str:
    """The contents of the files that describe a run."""
    return "".join(file.read_text() for file in path.iterdir() if file.suffix in (".md", ".json", ".yaml"))


# What is uploaded


@pytest.mark.parametrize("option", [(), ("--with-system",)])
def test_system_message_is_uploaded_only_if_asked(
    option: tuple[str, ...], adapter: Path, state: State, push: Push, tmp_path: Path
) -> None:
    """It may be confidential, so that no file has it."""
    record = adapter / "loratune.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"system": "You are Max, at Brot & Co."}))
    ran = push("--adapter", adapter, ME, *option)
    assert ran.code == 0, ran.err
    files = state.repositories[ME].files
    assert [name for name, content in files.items() if b"Brot & Co" in content] == ["loratune.json"] * len(option)
    assert ("the system message of the training rows is left out" in ran.err) == (not option)
    assert adapter_files.inspect(downloaded(files, tmp_path / "copy")).edits() == []


def test_uploaded_adapter_works_for_others(
    trained: Path, tiny_dir: Path, state: State, push: Push, hub: Hub, tmp_path: Path, cli: Cli
) -> None:
    before = tree(trained)
    ran = push("--adapter", trained, ME, "--base", BASE)
    assert ran.code == 0, ran.err
    assert tree(trained) == before
    repository = state.repositories[ME]
    assert repository.private and len(repository.commits) == 2
    copy = downloaded(repository.files, tmp_path / "copy")
    files = adapter_files.inspect(copy)
    assert files.edits() == [] and files.base == BASE and files.record["base"]["name_or_path"] == BASE
    assert set(repository.files) == {*before, ".gitattributes"} - {ROW_HASHES}
    original = json.loads(before["loratune.json"])
    assert original.keys() - files.record.keys() == {"prompts"} and original["prompts"]
    assert "prompts of the training rows are left out" in ran.err
    assert ROW_HASHES in before and f"{ROW_HASHES}, hashes of the training rows, is left out" in ran.err
    assert repository.files[WEIGHTS] == before[WEIGHTS]
    said = read_files(copy)
    for path in (trained, trained.parent, tiny_dir, tiny_dir.parent):
        assert str(path) in read_files(trained) or path == trained.parent
        assert str(path) not in said
    run = config.load(copy / "run.yaml")
    assert (run.model.name_or_path, run.data.train_sources[0].path, run.output_dir) == (BASE, "rows.jsonl", "./out")
    card = (copy / "README.md").read_text()
    assert f"base_model: {BASE}\n" in card and f"- base_model:adapter:{BASE}\n" in card
    assert f'AutoPeftModelForCausalLM.from_pretrained("{ME}")' in card
    assert f"vllm serve {BASE} --enable-lora --max-lora-rank 8 --lora-modules out={ME}\n" in card

    lines = dict(line.strip().split(maxsplit=1) for line in ran.out.splitlines()[1:])
    assert lines["repository"] == f"{hub.url}/{ME}" and lines["visibility"] == "private, new"
    assert lines["commit"] == repository.head and lines["checked"] == f"{len(before) - 1} files re-read, equal"
    for seen in state.seen:  # the token is sent to the hub, and not to the storage of large files
        is_told = not seen.host.startswith("localhost") and "/api/agent" not in seen.line
        assert seen.authorization == (f"Bearer {TOKEN}" if is_told else None), seen
    assert any("/cdn/" in seen.line for seen in state.seen)

    point_to(copy, str(tiny_dir))
    answers = [cli("generate", "--adapter", path, "--max-new-tokens", 4, "3 and 3 make") for path in (trained, copy)]
    assert answers[0] == answers[1] and answers[0].code == 0


@pytest.mark.parametrize("home", ["/home/nobody", "{tmp_path}"], ids=["elsewhere", "at home"])
@pytest.mark.parametrize("place", ["secret", "secret place", "secret_`*[1]` <b>\u200f", "secret \t\"\\'ö"])
def test_local_paths_are_not_uploaded(
    home: str, place: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither paths of the config nor earlier ones of a resumed run, which the record and the card mention."""
    monkeypatch.setenv("HOME", home.format(tmp_path=tmp_path))
    secret = tmp_path / place
    several = [f"data.{name}=[rows.jsonl, more.jsonl]" for name in ("train", "validation", "test")]
    run = config.load(adapter / "run.yaml", [*several, "data.chat_template=chat.jinja", "lora.start_from=start"])
    run = config.with_paths(run, lambda key, path: f"{secret}/{key}/{Path(path).name}")
    (adapter / "run.yaml").write_text(config.dump(run))
    old = [{"path": f"{secret}/old/{name}", "split": None, "weight": None} for name in ("a.jsonl", "*_b.jsonl")]
    changes = [
        {"step": 3, "key": "data.test", "was": old, "is": run.resolved()["data"]["test"]},
        {"step": 3, "key": "lora.start_from", "was": f"{secret}/was", "is": run.lora.start_from},
    ]
    with (adapter / "README.md").open("a") as file:
        file.write(printable(card._change_lines(changes) + card._start_lines(run.resolved(), {})))
    record = json.loads((adapter / "loratune.json").read_text())
    record |= {"changes": changes, "start_from": {"adapter": run.lora.start_from}}
    record["files"] = adapter_files.manifest(adapter)
    (adapter / "loratune.json").write_text(json.dumps(record))
    assert read_files(adapter).count("secret") > 20
    copied = portable.copy(adapter_files.inspect(adapter), tmp_path / "copy", ME, BASE)
    assert "secret" not in read_files(copied.path)
    assert config.load(copied.path / "run.yaml").data.test_sources[1].path == "more.jsonl"


def test_pushing_an_unchanged_adapter_makes_no_commit(adapter: Path, state: State, push: Push) -> None:
    first = json.loads(push("--adapter", adapter, ME, "--json").out)
    again = json.loads(push("--adapter", adapter, ME, "--json").out)
    assert (first["created"], first["unchanged"]) == (True, False)
    assert again == first | {"created": False, "unchanged": True}
    assert len(state.repositories[ME].commits) == 2
    assert first["bytes"] == sum(len(state.repositories[ME].files[file["name"]]) for file in first["files"])
    assert first["files_equal"] == len(first["files"]) == len(tree(adapter)) - 1  # all but the row hashes
    (adapter / "README.md").write_text("# Mine\n")
    third = json.loads(push("--adapter", adapter, ME, "--json").out)
    assert third["commit"] == state.repositories[ME].head != first["commit"]
    assert len(state.lines("PUT")) == 1


def test_earlier_adapter_is_replaced_completely(adapter: Path, state: State, push: Push, tmp_path: Path) -> None:
    old = {"adapter_config__json": b"{}", "spiece__model": b"old", "LICENSE": b"mine", "plot__png": b"x"}
    state.add(ME, **old)
    ran = push("--adapter", adapter, ME)
    assert ran.code == 0, ran.err
    assert len(state.repositories[ME].commits) == 2
    assert set(state.repositories[ME].files) == {*tree(adapter), ".gitattributes", "LICENSE", "plot.png"} - {ROW_HASHES}
    assert "removed there   spiece.model" in ran.out
    assert adapter_files.inspect(downloaded(state.repositories[ME].files, tmp_path / "copy")).edits() == []


def test_files_that_are_not_part_of_the_adapter_are_not_uploaded(adapter: Path, state: State, push: Push) -> None:
    for name in (".env", "notes.txt", "runs/events", ".git/config"):
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text("secret")
    values = json.loads(push("--adapter", adapter, ME, "--json").out)
    assert values["left_out"] == [".env", ".git/", "notes.txt", "runs/"]
    assert not [name for name in state.repositories[ME].files if b"secret" in state.repositories[ME].files[name]]


def test_adapter_of_another_tool_can_be_pushed(adapter: Path, state: State, push: Push, trained: Path) -> None:
    for name in ("loratune.json", "run.yaml"):
        (adapter / name).unlink()
    for name in ("training_args.bin", "notes.txt"):
        (adapter / name).write_bytes(b"pickle")
    (adapter / "README.md").write_text(
        f"---\nbase_model: {trained}\n---\nTrained at /home/ada/x y, by /home/ada/run.sh.\n"
    )
    point_to(adapter, str(trained))
    ran = push("--adapter", adapter, ME, "--base", BASE)
    assert ran.code == 0, ran.err
    assert "keeps no record of its files and its base, so neither was verified" in ran.err
    assert "left out        notes.txt, training_args.bin" in ran.out
    card = state.repositories[ME].files["README.md"].decode()
    assert card.startswith(f"---\nbase_model: {BASE}\ntags:\n- base_model:adapter:{BASE}\n---\n")
    assert card.endswith("Trained at x y, by run.sh.\n")


def test_new_repository_is_public_with_the_public_option(adapter: Path, state: State, push: Push, home: Path) -> None:
    """The first push uses the login of the hub's own client."""
    (home / "token").write_text(TOKEN)
    try:
        ran = push("--adapter", adapter, ME, "--public", token="")
    finally:
        (home / "token").unlink()
    assert ran.code == 0 and TOKEN not in ran.out + ran.err, ran.err
    assert not state.repositories[ME].private and "visibility      public, new" in ran.out
    assert push("--adapter", adapter, ME, "--public").code == 0


# Refused before anything is uploaded


@pytest.mark.parametrize("name", ["skill", "a/b/c", "me/", "-me/x", "me/a--b", "me/x.git", "https://hub/me/x", "me/ü"])
def test_invalid_repository_names_are_refused(name: str, cli: Cli) -> None:
    check_refused(cli("push", "--adapter", "none", "--", name), 2, (Code.PUSH_REPOSITORY, name, ""))


def test_damaged_adapters_are_refused(adapter: Path, state: State, push: Push, tmp_path: Path) -> None:
    check_refused(push("--adapter", tmp_path / "gone", ME), 5, (Code.ADAPTER_NOT_FOUND, str(tmp_path / "gone"), ""))
    flip(adapter / WEIGHTS)
    (adapter / "tokenizer.model").write_bytes(b"added")
    expected = [(Code.ADAPTER_CHANGED, WEIGHTS), (Code.ADAPTER_CHANGED, "tokenizer.model")]
    ran = push("--adapter", adapter, ME)
    check_refused(ran, 5, *((code, str(adapter / name), "") for code, name in expected))
    (adapter / WEIGHTS).write_bytes(b"")
    check_refused(push("--adapter", adapter, ME), 5, (Code.ADAPTER_INVALID, str(adapter / WEIGHTS), ""))
    assert state.seen == []


def test_local_base_needs_a_hub_id(trained: Path, state: State, push: Push) -> None:
    ran = push("--adapter", trained, ME)
    where, key = str(trained / "adapter_config.json"), "base_model_name_or_path"
    check_refused(ran, 2, (Code.PUSH_LOCAL_PATH, where, key))
    assert "--base USER/MODEL" in ran.err and state.seen == []
    check_refused(push("--adapter", trained, ME, "--base", "nobody"), 2, (Code.PUSH_REPOSITORY, "nobody", "--base"))
    assert state.seen == []
    ran = push("--adapter", trained, ME, "--base", "who/absent")
    check_refused(ran, 3, (Code.MODEL_NOT_FOUND, "who/absent", "--base"))
    assert "directory" not in ran.err
    assert set(state.repositories) == {BASE}


def test_base_option_must_match_the_adapters_base(adapter: Path, state: State, push: Push) -> None:
    check_refused(
        push("--adapter", adapter, ME, "--base", "who/other"), 2, (Code.PUSH_LOCAL_PATH, "who/other", "--base")
    )
    assert state.seen == []
    assert push("--adapter", adapter, ME, "--base", BASE).code == 0


@pytest.mark.parametrize("token", ["", "hf_\x01secret", "hf_ö"])
def test_missing_or_invalid_login_is_refused(token: str, adapter: Path, state: State, push: Push) -> None:
    ran = push("--adapter", adapter, ME, token=token)
    check_refused(ran, 2, (Code.PUSH_LOGIN, "", ""))
    assert "hf auth login" in ran.err and "secret" not in ran.err
    assert [seen for seen in state.seen if "agent" not in seen.line] == []


def test_local_path_that_cannot_be_replaced_is_refused(adapter: Path, state: State, push: Push) -> None:
    """For example a path that is a key, as keys are not changed."""
    file = adapter / "loratune.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"notes": {"/home/ada/key": 1}}))
    ran = push("--adapter", adapter, ME)
    check_refused(ran, 2, (Code.PUSH_LOCAL_PATH, str(file), ""))
    assert "/home/ada/key" in ran.err and [seen for seen in state.seen if "agent" not in seen.line] == []


def test_record_listing_a_file_outside_the_adapter_is_refused(adapter: Path, state: State, push: Push) -> None:
    (adapter.parent / "secret").write_text("secret")
    file = adapter / "loratune.json"
    record = json.loads(file.read_text())
    record["files"]["../secret"] = sha256(adapter.parent / "secret")
    file.write_text(json.dumps(record))
    check_refused(push("--adapter", adapter, ME), 5, (Code.ADAPTER_CHANGED, str(adapter / "../secret"), ""))
    assert state.seen == []


def test_full_disk_for_the_copy_is_reported(adapter: Path, state: State, push: Push) -> None:
    ran = push("--adapter", adapter, ME, limit=5_000)
    assert ran.code == 8 and f"[{Code.SYSTEM_DISK_FULL}]" in ran.err and ran.err.count("\n") == 1
    assert [seen for seen in state.seen if "agent" not in seen.line] == []


# What the hub answers

INFO, CREATE, COMMIT, BATCH = "GET /api/models/me", "/repos/create", "/commit/main", "/objects/batch"


def at(place: str, answer: Callable[[Handler], Any]) -> Fault:
    """Answer requests whose request line contains this text differently."""

    def fault(handler: Handler, path: str) -> bool:
        if place in f"{handler.command} {path}":
            answer(handler)
            return True
        return False

    return fault


def says(status: int, content: Any = b"", **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.send(status, content, **headers)


# What the repository is


def created_as_public(handler: Handler, path: str) -> bool:
    if path != "/api/repos/create":
        return False
    handler.state.add(ME, private=False)
    handler.send(200, {"url": f"{handler.server.url}/{ME}"})
    return True


def renamed(handler: Handler, path: str) -> bool:
    info = {"id": "me/renamed", "private": True, "sha": "0" * 40, "siblings": []}
    return at(INFO, says(200, info))(handler, path)


@pytest.mark.parametrize(
    ("private", "fault", "arguments", "shown"),
    [
        (False, None, (), "add --public"),
        (True, None, ("--public",), "leave out --public"),
        (None, created_as_public, (), "is public on the hub; nothing was uploaded"),
        (None, renamed, (), "me/renamed"),
    ],
)
def test_repository_of_another_visibility_or_name_is_refused(
    private: bool | None, fault: Any, arguments: Any, shown: str, adapter: Path, state: State, push: Push
) -> None:
    state.fault = fault or state.fault
    if private is not None:
        state.add(ME, private=private)
    ran = push("--adapter", adapter, ME, *arguments)
    check_refused(ran, 2, (Code.PUSH_REPOSITORY, ME, ""))
    assert shown in ran.err
    assert ME not in state.repositories or len(state.repositories[ME].commits) == 1
    assert set(state.lines("POST")) <= {"POST /api/repos/create"}


@pytest.mark.parametrize(
    "files, shown",
    [
        ({"config__json": b"{}", "model__safetensors": b"x"}, "as it has no adapter_config.json: config.json, model"),
        ({name: b"" for name in "abcde"}, "a, b, c (and 2 more)"),
        ({"adapter_config__json": b"{}", "model__safetensors": b"x"}, "read with the adapter: model.safetensors"),
    ],
)
def test_repository_with_other_content_is_refused(
    files: Files, shown: str, adapter: Path, state: State, push: Push
) -> None:
    repository = state.add(ME, **files)
    ran = push("--adapter", adapter, ME)
    check_refused(ran, 2, (Code.PUSH_REPOSITORY, ME, ""))
    assert shown in ran.err
    assert len(repository.commits) == 1 and state.lines("POST") == []


def test_repository_with_only_a_card_can_be_pushed_to(adapter: Path, state: State, push: Push) -> None:
    state.add(ME, README__md=b"# To come\n")
    assert push("--adapter", adapter, ME).code == 0
    assert state.repositories[ME].files["README.md"] != b"# To come\n"


# Errors of the hub


def ignored(handler: Handler, path: str) -> bool:
    """A .gitignore in the repository makes the client omit a file."""
    if "/preupload/" not in path:
        return False
    files = json.loads(handler.body)["files"]
    modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": "yaml" in one["path"]} for one in files]
    handler.send(200, {"files": modes})
    return True


def changed_meanwhile(handler: Handler, path: str) -> bool:
    if path.endswith("/commit/main"):
        handler.state.repositories[ME].commit({"README.md": b"by somebody else"})
    return False


HTML, HUGE = b"<html><p>Hello</p></html>", b"x" * 20_000_000
FULL = {"error": "Private repository storage limit reached, please upgrade your plan"}
LFS = {"objects": [{"oid": "0" * 64, "size": 1, "error": {"code": 422, "message": "virus found"}}]}
FAULTS: dict[str, tuple[Fault, int, Code, str]] = {
    "unauthorized": (at(INFO, says(401)), 2, Code.PUSH_LOGIN, "hf auth login"),
    "forbidden": (at(CREATE, says(403, {"error": "no right here"})), 2, Code.PUSH_REPOSITORY, "no right here"),
    "rate limit": (at(CREATE, says(429, Retry_After="17")), 8, Code.PUSH_HUB, "wait 17 s, and try again"),
    "gateway": (at(COMMIT, says(503)), 8, Code.PUSH_HUB, "try again later"),
    "quota": (at(COMMIT, says(403, FULL)), 8, Code.PUSH_HUB, "storage limit reached"),
    "conflict": (at(CREATE, says(409, {"error": "exists"})), 9, Code.PUSH_HUB, "exists"),
    "changed": (changed_meanwhile, 9, Code.PUSH_HUB, "push again"),
    "refused": (at(COMMIT, says(400, {"error": "too long a path"})), 2, Code.PUSH_REPOSITORY, "too long a path"),
    "refused file": (at(BATCH, says(200, LFS)), 2, Code.PUSH_REPOSITORY, "virus found"),
    "card": (at("yaml", says(400, {"errors": [{"message": "bad tag"}]})), 2, Code.PUSH_REPOSITORY, "bad tag"),
    "html": (at(INFO, says(200, HTML, Content_Type="text/html")), 8, Code.PUSH_HUB, "HF_ENDPOINT"),
    "no commit": (at(INFO, says(200, {"id": ME, "private": True})), 8, Code.PUSH_HUB, "last commit"),
    "dropped": (at(INFO, Handler.drop), 8, Code.PUSH_HUB, "check the connection"),
    "dropped at last": (at(COMMIT, Handler.drop), 8, Code.PUSH_HUB, "not sent again"),
    "huge page": (at(INFO, says(200, HUGE)), 8, Code.PUSH_HUB, ""),
    "an echo": (at(CREATE, says(403, {"error": f"not with {TOKEN}"})), 2, Code.PUSH_REPOSITORY, "not with [token]"),
}  # fmt: skip


OF_A_KIND = ("unauthorized", "forbidden", "rate limit", "quota", "conflict", "changed", "html", "dropped", "an echo")
"""Faults that are told apart, each at one of the requests."""


@pytest.mark.parametrize("name", mainly(OF_A_KIND, FAULTS))
def test_hub_errors_are_distinguished(name: str, adapter: Path, state: State, push: Push) -> None:
    state.fault, exit_code, code, text = FAULTS[name]
    ran = push("--adapter", adapter, ME)
    check_refused(ran, exit_code, (code, ME, ""))
    assert text in ran.err and len(ran.err) < 1500 and ran.out == ""
    assert ME not in state.repositories or state.repositories[ME].files.keys() <= {".gitattributes", "README.md"}
    assert not any(seen.authorization for seen in state.seen if seen.host.startswith("localhost"))


def test_debug_output_does_not_contain_the_token(adapter: Path, state: State, push: Push) -> None:
    state.fault = FAULTS["an echo"][0]
    ran = push("--adapter", adapter, ME, "--debug")
    assert ran.code == 2 and "Traceback" in ran.err and "not with [token]" in ran.err


def test_tokens_without_permission_are_refused(adapter: Path, state: State, push: Push) -> None:
    check_refused(push("--adapter", adapter, ME, token="hf_other"), 2, (Code.PUSH_LOGIN, ME, ""))
    check_refused(push("--adapter", adapter, ME, token=READ_ONLY), 2, (Code.PUSH_REPOSITORY, ME, ""))
    check_refused(push("--adapter", adapter, "you/skill"), 2, (Code.PUSH_REPOSITORY, "you/skill", ""))
    assert set(state.repositories) == {BASE}


def spoiled(name: str) -> Fault:
    """A hub that stores different content."""

    def spoil(handler: Handler, path: str) -> bool:
        for repository in handler.state.repositories.values() if "/resolve/" in path else ():
            if content := repository.files.get(name):
                repository.files[name] = content[:-1] + b"?"
        return False

    return spoil


@pytest.mark.parametrize(
    ("fault", "name", "shown"),
    [
        (spoiled(WEIGHTS), WEIGHTS, "as it was sent"), (spoiled("run.yaml"), "run.yaml", "as it was sent"),
        (ignored, "run.yaml", "after the upload"),
    ],
)  # fmt: skip
def test_hub_storing_different_content_is_detected(
    fault: Fault, name: str, shown: str, adapter: Path, state: State, push: Push
) -> None:
    state.fault = fault
    ran = push("--adapter", adapter, ME)
    check_refused(ran, 5, (Code.EXPORT_DIFFERS, name, ""))
    assert f"is not in the repository {shown}" in ran.err and ran.out == ""


@pytest.mark.slow  # the client retries five times, for 23 s
def test_broken_connection_during_the_upload_is_reported(adapter: Path, state: State, push: Push) -> None:
    state.fault = at("PUT", Handler.drop)
    check_refused(push("--adapter", adapter, ME), 8, (Code.PUSH_HUB, ME, ""))
    assert state.repositories[ME].files.keys() == {".gitattributes"}
    state.fault = State().fault
    assert push("--adapter", adapter, ME).code == 0


@pytest.mark.parametrize("place", [*(pytest.param(place, marks=pytest.mark.slow) for place in (INFO, CREATE)), COMMIT])
def test_hub_that_does_not_answer_is_reported(place: str, adapter: Path, state: State, start: Start) -> None:
    hold = Hold()
    state.fault = at(place, hold)
    child = start("--adapter", adapter, ME, first="from loratune.export import hub; hub._SECONDS = 0.5")
    code = child.wait(50)
    hold.over.set()
    assert (
        code == 8
        and f"{ME}: the hub cannot be reached, or does not answer as a hub does (ReadTimeout: " in child.said()
    )


def test_missing_network_is_reported(adapter: Path, trained: Path, state: State, push: Push) -> None:
    ran = push("--adapter", adapter, ME, HF_HUB_OFFLINE="1")
    check_refused(ran, 8, (Code.PUSH_HUB, ME, ""))
    assert "HF_HUB_OFFLINE" in ran.err and state.seen == []
    ran = push("--adapter", adapter, ME, HF_ENDPOINT="http://127.0.0.1:9")
    check_refused(ran, 8, (Code.PUSH_HUB, ME, ""))
    ran = push("--adapter", trained, ME, "--base", BASE, HF_ENDPOINT="http://127.0.0.1:9")
    check_refused(ran, 8, (Code.PUSH_HUB, BASE, "--base"))
    assert "directory" not in ran.err and ran.err.endswith("; check the connection\n")


def test_hub_without_xet_is_reported(adapter: Path, state: State, push: Push) -> None:
    ran = push("--adapter", adapter, ME, HF_HUB_DISABLE_XET="0")
    check_refused(ran, 8, (Code.PUSH_HUB, ME, ""))
    assert "HF_HUB_DISABLE_XET=1" in ran.err and state.repositories[ME].files.keys() == {".gitattributes"}


def test_push_imports_neither_torch_nor_transformers(adapter: Path, state: State, hub: Hub, home: Path) -> None:
    first = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'datasets', 'peft')))"
    (home / "site").mkdir(exist_ok=True)
    (home / "site" / "sitecustomize.py").write_text(first)
    settings = environment(hub, home) | {"HF_TOKEN": TOKEN}
    path = f"{home / 'site'}:{Path(adapter_files.__file__).parents[2]}"
    ran = process("push", "--adapter", adapter, ME, **settings, PYTHONPATH=path)
    assert ran.code == 0, ran.err


# Ctrl-C


class Hold:
    """A hub that stops answering at some request. reached: it was sent; over: the hub may continue."""

    def __init__(self, first: Callable[[Handler], None] = lambda _: None):
        self.reached, self.over, self._first = Event(), Event(), first

    def __call__(self, handler: Handler) -> None:
        self._first(handler)
        self.reached.set()
        self.over.wait(60)

    def stop(self, child: Child, number: int = signal.SIGINT) -> int:
        """Send a signal to a client that waits for the answer. Returns its exit code."""
        until(self.reached.is_set, child)
        time.sleep(0.2)  # by then, the client is waiting for the answer
        child.send(number)
        code = child.wait(50)
        self.over.set()
        return code


@pytest.mark.parametrize("number, expected", [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGKILL, -9),
])  # fmt: skip
def test_interrupted_while_uploading_weights(
    number: int, expected: int, adapter: Path, state: State, start: Start, push: Push
) -> None:
    hold = Hold()
    state.fault = at("PUT", hold)
    child = start("--adapter", adapter, ME)
    assert hold.stop(child, number) == expected
    assert child.said().count("error: ") == child.said().count("the same command completes it") == (expected > 0)
    assert state.repositories[ME].files.keys() == {".gitattributes"}
    state.fault = State().fault
    assert push("--adapter", adapter, ME).code == 0


def test_interrupted_while_xet_waits_for_the_network(adapter: Path, state: State, start: Start) -> None:
    """Its library waits in native code, where Python handles no signals."""
    hold = Hold()
    state.fault = at("xet-write-token", hold)
    child = start("--adapter", adapter, ME, HF_HUB_DISABLE_XET="0")
    assert hold.stop(child) == 130 and child.said().count("error: ") == 1
    assert state.repositories[ME].files.keys() == {".gitattributes"}


def test_interrupted_while_committing(adapter: Path, state: State, start: Start, push: Push) -> None:
    def commit(handler: Handler) -> None:
        handler.send = lambda *arguments, **headers: None  # type: ignore[method-assign]
        handler.respond(handler.path)

    hold = Hold(commit)
    state.fault = at(COMMIT, hold)
    child = start("--adapter", adapter, ME)
    assert hold.stop(child) == 130 and child.said().count("error: ") == 1
    assert state.repositories[ME].files.keys() == {*tree(adapter), ".gitattributes"} - {ROW_HASHES}
    state.fault = State().fault
    values = json.loads(push("--adapter", adapter, ME, "--json").out)
    assert values["unchanged"] and values["commit"] == state.repositories[ME].head
