"""The commands of the guides are executed, as a reader would: section by section, in their order.

Random models take the place of real ones, the files of rows are short, and runs have two steps. `ELSEWHERE` lists the
commands that other tests run. Whether each command has its options is also tested in `test_packaging.py`.
"""

import ast
import csv
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import build_recipe_data
import pytest
import yaml
from conftest import ROOT, Ran, byte_tokenizer, formula_for_memory, once, run_command, tiny_llama, tree
from fork_server import ForkServer
from running import before_batch, checkpoints

Cli = Callable[..., Ran]
RECIPES = "configs/recipes/README.md"
GUIDE = ["configs/README.md", *sorted(f"configs/guide/{path.name}" for path in (ROOT / "configs" / "guide").iterdir())]
PAGES = ["README.md", *GUIDE, RECIPES, "configs/preferences/README.md"]
BASE = "models/SmolLM2-135M-Instruct"
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ELSEWHERE = {
    "loratune push": "test_push.py",
    "loratune env --self-test": "test_env.py",
    "loratune evaluate --adapter DIR --tasks": "test_harness.py",
    "torchrun": "test_distributed.py",
    "accelerate": "test_distributed.py",
    "sbatch": "test_slurm_starts_a_run_and_resumes_it, below",
    "python scripts/fetch_smollm2.py": "the fixture smollm2",
    "python scripts/build_recipe_data.py": "the fixture place",
    "make quickstart": "its command is run in test_quickstart.py",
    "loratune quickstart": "test_quickstart.py",
    "pip install": "test_packaging.py",
    "while kill": "test_the_lines_stop_a_run_after_its_first_checkpoint, below",
    "ollama": "it is not in any package registry; what it is given is tried in llama.cpp by `export`",
}
"""The beginning of a command → what runs it."""
COMMANDS = {"loratune", "cat", "cmp"} | {beginning.split()[0] for beginning in ELSEWHERE}
SLOW = {
    "Install", "Chat with tools", "A style from 200 rows", "DPO after SFT", "Several skills on one base",
    "Resume on a preemptible machine", "Evaluate adapters", "Generate and chat", "Commands",
}  # fmt: skip
MADE_BY = {
    "An adapter in Ollama": ("DPO after SFT",),
    "A gate in CI": ("Classify texts from a CSV file",),
    "Several skills on one base": ("Classify texts from a CSV file", "A style from 200 rows", "DPO after SFT"),
    "Resume on a preemptible machine": ("DPO after SFT",),
}
"""A section → the sections whose adapters it uses."""


# What a page has


def sections(page: str) -> dict[str, str]:
    """The sections of a page, by their headings; the text before the first is called `start`."""
    text, found, name = (ROOT / page).read_text(encoding="utf-8"), dict[str, str](), "start"
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if not fenced and (heading := re.fullmatch(r"##+ (.*)", line)):
            name = heading[1]
        found[name] = f"{found.get(name, '')}{line}\n"
    return found


def blocks(text: str) -> Iterator[list[str]]:
    """The lines of each indented block, without the indentation; commands over several lines are joined."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    joined = re.sub(r"(\\|&&)\n +", lambda found: found[1].strip("\\") + " ", text)
    for block in re.findall(r"(?<=\n\n) {4}\S.*\n(?: {4}.*\n)*", f"\n\n{joined}\n"):
        yield [line.strip() for line in block.splitlines()]


def command_lines(text: str) -> Iterator[str]:
    """The commands of the indented blocks. In a block with prompts ($), other lines are output."""
    for lines in blocks(text):
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        yield from (line for line in prompted or lines if line.split()[0] in COMMANDS)


def is_elsewhere(line: str) -> bool:
    """Whether another test runs a command."""
    return any(line.startswith(beginning) for beginning in ELSEWHERE)


WITH_COMMANDS = [
    pytest.param(page, name, marks=pytest.mark.slow if name in SLOW else (), id=name)
    for page in PAGES
    for name, text in sections(page).items()
    if any(not is_elsewhere(line) for line in command_lines(text))
]


# Where they are run


def model_in(path: Path, template: str) -> None:
    """A random model, with a tokenizer that has one token per byte, and the marks of ChatML."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", template
    tiny_llama(max_position_embeddings=8192, eos_token_id=tokenizer.eos_token_id).save_pretrained(path)
    tokenizer.save_pretrained(path)


def shorten(path: Path, lines: int) -> None:
    """Keep the first lines of a file of rows."""
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]
    path.write_text("".join(kept), encoding="utf-8")


def test_rows_of_the_recipes_never_replace_those_of_a_user(tmp_path: Path) -> None:
    build_recipe_data.write(tmp_path)
    build_recipe_data.write(tmp_path)
    (tmp_path / "tools.jsonl").unlink()
    (tmp_path / "manual-unseen" / "own.txt").write_text("mine")
    (tmp_path / "definitions.csv").write_text("text,label\nmine,yes\n")
    before = tree(tmp_path)
    with pytest.raises(SystemExit, match=r"definitions\.csv is there, with other content"):
        build_recipe_data.write(tmp_path)
    assert tree(tmp_path) == before


def fill(folder: Path) -> None:
    """Write what the commands of the guides read: models, configs and rows."""
    model_in(folder / BASE, SMOLLM2)
    model_in(folder / "MODEL", REASONING)
    shutil.copytree(ROOT / "configs", folder / "configs")
    build_recipe_data.write(folder / "recipes")
    shutil.copytree(folder / "recipes", folder / "whole")
    shutil.copytree(ROOT / "loratune" / "data" / "quickstart", folder / "quickstart")
    model_in(folder / "quickstart" / "model", SMOLLM2)
    shutil.copy(folder / "quickstart" / "train.jsonl", folder / "rows.jsonl")
    shorten(folder / "rows.jsonl", 60)
    for path in (
        *(folder / "quickstart").glob("*.jsonl"),
        *(folder / "configs").rglob("*.jsonl"),
        *(folder / "recipes").glob("*.jsonl"),
    ):
        shorten(path, 20)
    for name in ("definitions", "definitions-unseen"):
        shorten(folder / "recipes" / f"{name}.csv", 60 if name == "definitions" else 9)
    for pages in ("manual", "manual-unseen"):
        for path in sorted((folder / "recipes" / pages).iterdir(), key=lambda path: path.stat().st_size)[6:]:
            path.unlink()
    copies = {
        "reviews.csv": "recipes/definitions.csv", "unseen.csv": "recipes/definitions-unseen.csv",
        "rows.csv": "recipes/definitions.csv", "chats.jsonl": "recipes/answers.jsonl",
        "pairs.jsonl": "configs/preferences/train.jsonl",
        "held-out.jsonl": "quickstart/eval.jsonl",
    }  # fmt: skip
    for name, source in copies.items():
        shutil.copy(folder / source, folder / name)
    example = sections("configs/guide/training.md")["Train a model that reasons"]
    thoughts = re.findall(r"^\{.*\}$", example, re.MULTILINE)
    (folder / "thoughts.jsonl").write_text("\n".join(thoughts * 4) + "\n", encoding="utf-8")
    (folder / "wrong.yaml").write_text(
        "model: {name_or_path: MODEL}\ndata: {train: rows.jsonl}\noutput_dir: a\nlora: {rank: 8}\n"
    )


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `fill` has filled."""
    return once(tmp_path_factory, "guides", fill)


@dataclass
class Place:
    """A directory in which commands of guides are run.

    Attributes:
        folder: The directory.
        cli: Runs a command of loratune.
        processes: Forks the commands that are stopped.
        ran: What each command printed.
    """

    folder: Path
    cli: Cli
    processes: ForkServer
    ran: dict[str, Ran] = field(default_factory=dict)

    def run(self, line: str) -> None:
        """Run a line of a guide: commands joined by && or by a pipe. Those of `ELSEWHERE` are left out."""
        for command in [] if is_elsewhere(line) else line.split(" && "):
            stdin = None
            for part in re.split(r" \| (?!\.\.\.)", command.removesuffix(" | ...")):
                words = shlex.split(part, comments=True)
                if not is_elsewhere(part):
                    stdin = self._run(words, stdin)

    def _run(self, words: list[str], stdin: str | None) -> str:
        if words[0] == "cat":
            return (self.folder / words[1]).read_text(encoding="utf-8")
        if words[0] == "cmp":
            one, other = ((self.folder / name).read_bytes() for name in words[1:])
            assert one == other
            return ""
        assert words[0] == "loratune", f"no test runs {words}"
        if words[-1] == "&":
            return self._stop(words[1:-1])
        ran = self.cli(*map(filled_in, shortened(words[1:])), stdin="Hello!\n" if words[1] == "chat" else stdin)
        expected = {0, 11} if "--require" in words else {2} if "wrong.yaml" in words else {0}
        if "ollama" in words and not find_spec("xllamacpp"):
            expected = {2, 5}  # llama.cpp is missing
        assert ran.code in expected, (words, ran.err)
        self.ran[shlex.join(words)] = ran
        return ran.out

    def _stop(self, words: list[str]) -> str:
        """Run a command in a process that is terminated before its second batch."""
        there = f"import os\nos.chdir({str(self.folder)!r})\n"
        stop = before_batch(2, "signal.raise_signal(signal.SIGTERM)")
        assert self.processes.start(*shortened(words), first=there + stop).wait() == 143
        (output,) = (word.partition("=")[2] for word in words if word.startswith("output_dir="))
        assert "checkpoint-2" in [path.name for path in checkpoints(self.folder / f"{output}.partial")]
        return ""


def shortened(words: list[str]) -> list[str]:
    """A command whose training has two steps, and writes its adapter even if it is worse than its base."""
    if words[0] not in ("train", "sweep") or "--dry-run" in words or "wrong.yaml" in words:
        return words
    limited = any(word.startswith(("training.max_steps=", "training.max_minutes=")) for word in words)
    steps = [] if limited else ["--set", "training.max_steps=2"]
    return [*words, *steps, *(["--allow-worse"] if words[0] == "train" else [])]


def filled_in(word: str) -> str:
    """A word in which placeholders are replaced."""
    word = re.sub(r"^\[(.*)\]$", r"\1", word)
    return {"KEY": "lora.r", "...": "1 and"}.get(word, word)


@pytest.fixture
def place(
    filled: Path, cli: Cli, processes: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A copy of the filled folder, in which the test is."""
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with formula_for_memory():
        yield Place(tmp_path, cli, processes)


def adapter_for(place: Place) -> None:
    """Train what the guide calls DIR, and copy it to the other names."""
    config = {"model": {"name_or_path": "MODEL"}, "data": {"train": "rows.jsonl"}, "output_dir": "DIR"}
    (place.folder / "config.yaml").write_text(yaml.safe_dump(config))
    place.run("loratune train config.yaml")
    for name in ("DIR1", "DIR2", "fast", "slow"):
        shutil.copytree("DIR", name)
    config["output_dir"] = "my-adapter"
    (place.folder / "config.yaml").write_text(
        yaml.safe_dump(config | {"training": {"max_steps": 2}, "data": {"train": "rows.jsonl", "validation": 0.2}})
    )


@pytest.mark.parametrize(("page", "name"), WITH_COMMANDS)
def test_the_commands_of_a_section_work(page: str, name: str, place: Place) -> None:
    text = sections(page)
    if page == "README.md":
        shutil.copytree(BASE, "DIR")
    if page in GUIDE and name not in ("Start a config", "Train a model that reasons", "Gate a pipeline"):
        adapter_for(place)
    for needed in MADE_BY.get(name, ()):
        for line in command_lines(text[needed]):
            if line.startswith(("loratune init", "loratune train")):
                place.run(line)
    for line in command_lines(text[name]):
        if line.startswith("loratune init"):
            (place.folder / "config.yaml").unlink(missing_ok=True)
        if line.startswith("loratune sweep"):
            shutil.rmtree("rows-adapter", ignore_errors=True)
        place.run(line)
    check_config(text[name], place)


def check_config(text: str, place: Place) -> None:
    """Check that the config that a recipe shows is what `init` has written, but for what depends on the rows."""
    for block in re.findall(r"```yaml\n# (\S+\.yaml)[^\n]*\n(.*?)```", text, re.DOTALL):
        written = yaml.safe_load((place.folder / block[0]).read_text(encoding="utf-8"))
        for section, values in yaml.safe_load(block[1]).items():
            fixed = {"max_length", "validation", "per_device_train_batch_size", "gradient_accumulation_steps"}
            shown = {key: value for key, value in values.items() if key not in fixed}
            assert shown.items() <= written[section].items(), section


def test_the_rows_that_recipes_show_are_in_their_files(filled: Path) -> None:
    """Functions of the standard library and pages of its manual depend on the Python."""
    text = (ROOT / RECIPES).read_text(encoding="utf-8")
    rows = [line for line in re.findall(r"^\{\".*\}$", text, re.MULTILINE)]
    files = (*(filled / "whole").glob("*.jsonl"), *(ROOT / "configs" / "preferences").glob("*.jsonl"))
    known = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 5 and all(json.loads(row) in known for row in rows if "docstring" not in row)
    with (filled / "whole" / "definitions.csv").open(newline="", encoding="utf-8") as file:
        first = [",".join(row) for row in csv.reader(file)][:3]
    assert "\n".join(first) in text


def test_unseen_rows_are_in_no_training(filled: Path) -> None:
    folder = filled / "whole"
    for name in ("tools", "summaries"):
        seen, unseen = (
            {line for line in (folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()}
            for kind in (name, f"{name}-unseen")
        )
        assert seen and unseen and not seen & unseen
    pages = [{path.name for path in (folder / kind).iterdir()} for kind in ("manual", "manual-unseen")]
    assert all(pages) and not pages[0] & pages[1]


# Python, Slurm, and machines that are taken away


def python_blocks(page: str, name: str) -> list[str]:
    """The Python code of a section."""
    return re.findall(r"```python\n(.*?)```", sections(page)[name], re.DOTALL)


@pytest.mark.parametrize(("page", "name"), [(RECIPES, "From a notebook"), ("configs/guide/programs.md", "From Python")])
def test_python_code_works(page: str, name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Requirements that a random model fails, and `push`, are left out."""
    adapter_for(place)
    shutil.copytree("DIR", "quickstart/adapter")
    (block,) = python_blocks(page, name)
    tree = ast.parse(re.sub(r"max_steps\": \d+", 'max_steps": 2', block))
    tree.body = [one for one in tree.body if not re.search(r"\.(require|push)\(|\"gguf\"", ast.unparse(one))]
    exec(compile(ast.unparse(tree), name, "exec"), {})


@pytest.mark.parametrize(("made", "expected"), [
    ((), ["train answers.yaml"]), (("partial/checkpoints/unfinished",), ["train answers.yaml"]),
    (("partial/checkpoints/checkpoint-2", "partial/checkpoints/checkpoint-4"), ["train answers.yaml --resume"]),
    (("done",), []),
])  # fmt: skip
def test_the_lines_for_preemptible_machines_resume_or_start(
    made: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    """The shell's part, with a command that prints its arguments in place of loratune."""
    (lines,) = re.findall(r"```bash\n(.*?)```", sections(RECIPES)["Resume on a preemptible machine"], re.DOTALL)
    for name in made:
        (tmp_path / name.replace("partial", "spot-adapter.partial").replace("done", "spot-adapter")).mkdir(parents=True)
    script = f'loratune() {{ echo "$@"; }}\n{lines}'
    done = run_command(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [one.replace(" --set output_dir=spot-adapter", "") for one in done.stdout.splitlines()] == expected


@pytest.mark.parametrize(("run", "expected"), [
    ("trap 'echo stopped; exit 143' TERM; sleep 0.2; mkdir -p {}/checkpoint-1; while :; do sleep 0.01; done",
     ["stopped", "143"]),
    ("exit 4", ["4"]),
])  # fmt: skip
def test_the_lines_stop_a_run_after_its_first_checkpoint(run: str, expected: list[str], tmp_path: Path) -> None:
    """Or do not wait for one if the run has failed. A command of the shell takes the place of loratune."""
    start, stop, *_ = command_lines(sections(RECIPES)["Resume on a preemptible machine"])
    run = run.format("spot-adapter.partial/checkpoints")
    script = f"loratune() {{ {run}; }}\n{start}\n{stop}\necho $?\n"
    done = run_command(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout.split() == expected


@pytest.mark.parametrize("script", ["build_recipe_data"])
def test_scripts_of_the_recipes_say_how_to_install_what_they_need(script: str, tmp_path: Path) -> None:
    """Without site-packages, and before anything is downloaded or written."""
    done = run_command(
        [sys.executable, "-S", ROOT / "scripts" / f"{script}.py", tmp_path / "made"],
        env={}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error") and done.stderr.count("\n") == 1
    assert "run `pip install .` in the checkout" in done.stderr and not [*tmp_path.iterdir()]


def test_slurm_starts_a_run_and_resumes_it(tmp_path: Path) -> None:
    """The commands of the batch script, with programs of Slurm that print what they are given."""
    for name, text in (("scontrol", "echo one; echo two"), ("srun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    lines = [line for line in command_lines(sections(RECIPES)["Slurm"]) if line.startswith("sbatch")]
    assert [line.endswith("--resume") for line in lines] == [False, True]
    for line in lines:
        _, script, *words = shlex.split(line)
        variables = {"SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
        done = run_command(
            ["bash", ROOT / script, *words], env={"PATH": f"{tmp_path}:/usr/bin:/bin"} | variables,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.endswith(f" -m loratune train {shlex.join(words)}\n")
        assert "--nnodes 2 --nproc-per-node 8 " in done.stdout and "--rdzv-endpoint one:29500" in done.stdout


# The tests


def test_commands_of_blocks_are_found() -> None:
    text = """
Text.

    $ loratune train a.yaml \\
        --set a.b=1   # why
    loratune 1.0

    adapter_config.json  a
    loratune env &&
    loratune params a.yaml

- a list

      {"messages": []}

```
    loratune no
```
"""
    assert [shlex.split(line, comments=True) for line in command_lines(text)] == [
        ["loratune", "train", "a.yaml", "--set", "a.b=1"], ["loratune", "env", "&&", "loratune", "params", "a.yaml"],
    ]  # fmt: skip


def test_every_recipe_has_rows_commands_and_a_result() -> None:
    _start, _how, *recipes = sections(RECIPES).items()
    assert len(recipes) == 11
    for name, text in recipes:
        assert [*command_lines(text)] or "```python" in text, name
        assert re.search(r"^\*\*Result.\*\* ", text, re.MULTILINE), name


def test_no_command_is_forgotten() -> None:
    """Every beginning of `ELSEWHERE` is used, every command is one that a test runs, and recipes have nothing else."""
    texts = [text for page in (*PAGES, "configs/quickstart/README.md") for text in sections(page).values()]
    lines = [line for text in texts for line in command_lines(text)]
    assert [one for one in ELSEWHERE if not any(line.startswith(one) for line in lines)] == []
    recipe = "\n".join(sections(RECIPES).values())
    assert [*command_lines(recipe)] == [line for lines in blocks(recipe) for line in lines]
