"""Rules of the source code, checked on the code itself. Each rule is tested to detect a planted violation."""

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
from conftest import ROOT
from setuptools import find_packages

import loratune
from loratune.cli import app
from loratune.codes import Code

PACKAGE = ROOT / "loratune"
LEVELS = {
    "codes": 0, "outputs": 0, "events": 0, "text": 0, "statistics": 0, "__init__": 0, "errors": 0, "system": 0,
    "console": 0,
    "config": 1, "kernels": 1,
    "data": 2, "model": 2, "lora": 2,
    "adapter": 3, "compare": 3, "memory": 3,
    "training": 4, "export": 4, "report": 4,
    "study": 5, "api": 5,
    "cli": 6, "__main__": 6,
}  # fmt: skip
GROUPS = (
    ("codes", "outputs", "events", "text", "statistics", "__init__", "errors", "system", "console"),
    ("adapter", "compare"),
    ("study", "api"),
    ("cli", "__main__"),
)
"""Packages that share a level: the foundation; a loaded adapter and its evaluation; studies and the public API; the
command line. Each may import those before it."""
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Rule = Callable[[Path], Iterator[str]]


def modules(root: Path) -> Iterator[tuple[Path, str, ast.Module]]:
    """Every file below a directory: its path, its package, and its syntax tree."""
    for path in sorted(root.rglob("*.py")):
        package = path.relative_to(root).parts[0].removesuffix(".py")
        yield path.relative_to(root), package, parsed(path)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Dotted names that are imported at run time. `from a import b` counts as `a.b`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((child.lineno, f"{'.' * child.level}{child.module}.{alias.name}") for alias in child.names)
        elif not for_type_checkers(child):
            yield from imports(child)


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def imports_point_down(root: Path) -> Iterator[str]:
    for path, package, tree in modules(root):
        if package not in LEVELS:
            yield f"{path}: a package without a level"
            continue
        for line, name in imports(tree):
            first, *rest = name.split(".")
            other = rest[0] if rest and rest[0] in LEVELS else "__init__"
            if first == "" or (first == "loratune" and not may_import(package, other)):
                yield f"{path}:{line}: {package} imports {name}"


def may_import(package: str, other: str) -> bool:
    """Whether one package is below another, or before it in the same group."""
    if package == other or LEVELS[package] != LEVELS[other]:
        return LEVELS[other] <= LEVELS[package]
    return any({package, other} <= {*group} and group.index(other) < group.index(package) for group in GROUPS)


def only_lora_imports_peft(root: Path) -> Iterator[str]:
    for path, package, tree in modules(root):
        yield from (
            f"{path}:{line}" for line, name in imports(tree) if name.split(".")[0] == "peft" != package != "lora"
        )


def only_config_reads_yaml(root: Path) -> Iterator[str]:
    writing = {"yaml.safe_dump", "yaml.dump"}
    for path, package, tree in modules(root):
        if package == "config":
            continue
        yield from (f"{path}:{line}: {name}" for line, name in imports(tree) if name.startswith("yaml."))
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and ast.unparse(node.value) == "yaml"
                and ast.unparse(node) not in writing
            ):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def nothing_global_no_utils(root: Path) -> Iterator[str]:
    for path, _, tree in modules(root):
        if "util" in path.stem or any("util" in part for part in path.parts):
            yield f"{path}: utils"
        yield from (f"{path}:{node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global))


def config_is_not_probed(root: Path) -> Iterator[str]:
    """Sections are named config, run, section, or after the section. In package `model`, config is a model's
    configuration."""
    sections = {"config", "run", "section", "lora", "training", "data"}
    for path, package, tree in modules(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr") and node.args:
                names = {part for part in ast.unparse(node.args[0]).split(".") if part not in ("self",)}
                if names & sections and not (package == "model" and "model" in names):
                    yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def imports_stand_on_top(root: Path) -> Iterator[str]:
    for path, package, tree in modules(root):
        if package not in ("api", "cli", "__main__"):
            for function in functions(tree):
                yield from (f"{path}:{line}: {name} in {function.name}" for line, name in imports(function))


BELOW_CLI = {"api", "cli", "codes", "config", "console", "errors", "events", "system", "text"}
"""What the command line may import besides the public API. `system` is the operating-system package."""


def cli_only_calls_the_public_api(root: Path) -> Iterator[str]:
    """`display` also names what results consist of."""
    for path, package, tree in modules(root):
        for line, name in imports(tree) if package == "cli" and path.stem != "display" else ():
            first, second = f"{name}.".split(".")[:2]
            if first == "loratune" and second and second not in {*BELOW_CLI, *loratune.__all__, "__version__"}:
                yield f"{path}:{line}: {name}"


OF_PROCESS = {
    "print", "exit", "quit", "sys.exit", "os._exit", "os.abort", "signal.signal", "signal.set_wakeup_fd",
    "warnings.simplefilter", "warnings.filterwarnings", "warnings.resetwarnings", "logging.basicConfig",
    "torch.set_num_threads", "torch.set_num_interop_threads", "os.putenv", "os.unsetenv", "os.environ.update",
    "os.environ.setdefault", "os.environ.pop", "os.environ.clear", "threading.Thread", "sys.stdout.write",
    "sys.stderr.write", "sys.stdout.flush",
    "raise_on_signals", "exit_on_signals", "hold_signals", "default_actions", "ignore_signals", "write_line",
    "limit_threads", "secure",
}  # fmt: skip
"""Calls that print, end the process, or change it for other code. The last ones are defined in `system`."""
OF_THE_COMMAND_LINE = ("cli/", "__main__.py", "console.py", "system/signals.py")
RESTORED = {
    "system/environment.py": "os.environ", "compare/harness.py": "os.environ",
    "export/llama_cpp_process.py": "print", "system/output_dir.py": "signals.hold_signals",
}  # fmt: skip
"""File → its exception: it sets variables for the command line, restores them or handlers of signals at the end, or
prints in its own process."""


def only_the_command_line_changes_the_process(root: Path) -> Iterator[str]:
    """Warning filters may be set only inside `warnings.catch_warnings`, which restores them."""
    for path, _, tree in modules(root):
        if str(path).startswith(OF_THE_COMMAND_LINE):
            continue
        restored = [
            node for outer in ast.walk(tree) if isinstance(outer, ast.With)
            and any(ast.unparse(item.context_expr) == "warnings.catch_warnings()" for item in outer.items)
            for node in ast.walk(outer)
        ]  # fmt: skip
        for node in ast.walk(tree):
            found = ""
            if isinstance(node, ast.Call) and node not in restored:
                name = ast.unparse(node.func)
                found = name if OF_PROCESS & {name, name.rpartition(".")[2] if "." in name else name} else ""
            elif isinstance(node, ast.Assign | ast.Delete | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
                names = [ast.unparse(target) for target in targets]
                found = next(
                    (name for name in names if re.match(r"os\.environ\[|sys\.(stdin|stdout|stderr)$", name)), ""
                )
            if found and not found.startswith(RESTORED.get(path.as_posix(), " ")):
                yield f"{path}:{node.lineno}: {found}"


def public_things_are_documented(root: Path) -> Iterator[str]:
    def public(node: ast.AST, prefix: str) -> Iterator[tuple[str, Documented]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Documented) and not child.name.startswith("_"):
                yield f"{prefix}{child.name}", child
                if isinstance(child, ast.ClassDef):
                    yield from public(child, f"{prefix}{child.name}.")

    for path, _, tree in modules(root):
        if ast.get_docstring(tree) is None:
            yield f"{path}: no docstring"
        for name, node in public(tree, ""):
            if ast.get_docstring(node) is None:
                yield f"{path}:{node.lineno}: {name} has no docstring"


def codes_in(tree: ast.Module) -> set[str]:
    """The names in `Code.NAME`."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if ast.unparse(node.value) == "Code"}


def definitions(tree: ast.Module) -> dict[str, str]:
    """Name → value of the members of the class `Code`, if the module defines it."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Code"]
    members = [node for owner in classes for node in owner.body if isinstance(node, ast.Assign)]
    return {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in members}


def every_code_is_used(root: Path) -> Iterator[str]:
    trees = [tree for _, _, tree in modules(root)]
    used = {name for tree in trees for name in codes_in(tree)}
    yield from (name for tree in trees for name in definitions(tree) if name not in used)


def no_two_classes_have_one_name(root: Path) -> Iterator[str]:
    """Names that differ only in a leading underscore are duplicates; names within the package are resolved without the
    module."""
    owners: dict[str, str] = {}
    for path, _, tree in modules(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                place = f"{path}:{node.lineno}"
                other = owners.setdefault(node.name.removeprefix("_"), place)
                if other != place:
                    yield f"{place}: {node.name}, as in {other}"


def is_private(name: str) -> bool:
    """Whether a name is private. `__name__` and enum's `_value_` are documented, so they are not."""
    return name.startswith("_") and not name.endswith("_")


def own_private_names(root: Path) -> set[str]:
    """The private attributes and functions that the package itself defines."""
    names = set[str]()
    for _, _, tree in modules(root):
        for node in ast.walk(tree):
            if isinstance(node, Documented):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def only_upstream_modules_use_private_names(root: Path) -> Iterator[str]:
    """Private names of other libraries may be used only in modules named `upstream`."""
    own = own_private_names(root)
    for path, _, tree in modules(root):
        if path.stem == "upstream":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
        yield from (
            f"{path}:{line}: {name}"
            for line, name in imports(tree)
            if name.partition(".")[0] != "loratune" and any(map(is_private, name.split(".")))
        )


WAITS = {"join", "get", "result", "accept", "recv", "acquire"}
"""Methods of threads, queues, futures, sockets and locks that without arguments wait for ever."""
STARTS = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output"}
EVENTS = {"Event", "Barrier", "Condition"}
NOT_YET = {"test_env.py", "test_packaging.py"}


def waits_have_a_limit(root: Path) -> Iterator[str]:
    """In tests, processes are started by `run_command` and `Process` of `conftest.py`, whose waits end, as do those of
    `fork_server.Child`. A wait for something else has an argument."""
    for path, _, tree in modules(root):
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and path.name not in NOT_YET]
        events = {
            ast.unparse(target)
            for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call | ast.Tuple)
            if any(isinstance(one, ast.Call) and ast.unparse(one.func).rpartition(".")[2] in EVENTS
                   for one in ast.walk(node.value))
            for whole in node.targets for target in (whole.elts if isinstance(whole, ast.Tuple) else [whole])
        }  # fmt: skip
        for call in calls:
            owner, _, method = ast.unparse(call.func).rpartition(".")
            has_no_limit = not call.args and not call.keywords and bool(owner)
            waits = has_no_limit and (method in WAITS or (method == "wait" and owner in events))
            starts = f"{owner}.{method}" in STARTS and all(one.arg != "timeout" for one in call.keywords)
            if waits or starts:
                yield f"{path}:{call.lineno}: {ast.unparse(call)}"


RULES: list[tuple[Rule, str, str]] = [
    *(
        (waits_have_a_limit, "test_it.py", text)
        for text in (
            "subprocess.run(['x'], check=True)",
            "child = subprocess.Popen(['x'])",
            "thread.join()",
            "queue.get()",
            "connection, _ = listener.accept()",
            "begun, over = Event(), Event()\nover.wait()",
            "begun = threading.Barrier(2)\nbegun.wait()",
        )
    ),
    (imports_point_down, "model.py", "from loratune.training.trainer import fit"),
    (imports_point_down, "model.py", "from loratune.api import train"),
    (imports_point_down, "errors.py", "import loratune.config"),
    (imports_point_down, "data/splits.py", "from loratune.model import load"),
    (imports_point_down, "api/train.py", "from loratune import cli"),
    (imports_point_down, "config/schema.py", "def f():\n    from loratune.training import trainer"),
    (imports_point_down, "training/trainer.py", "from loratune.api import evaluate"),
    (imports_point_down, "api/train.py", "from . import generate"),
    (imports_point_down, "new_package.py", ""),
    (only_lora_imports_peft, "model.py", "from peft.utils import x"),
    (only_lora_imports_peft, "cli.py", "def f():\n    import peft"),
    (only_config_reads_yaml, "card.py", "import yaml\nyaml.safe_load('')"),
    (only_config_reads_yaml, "card.py", "from yaml import load"),
    (nothing_global_no_utils, "model.py", "def f():\n    global x\n    x = 1"),
    (nothing_global_no_utils, "data/utils.py", ""),
    (config_is_not_probed, "training/trainer.py", "def f(section): return getattr(section, 'r', 8)"),
    (config_is_not_probed, "model.py", "def f(self): return hasattr(self.run.lora, 'r')"),
    (imports_stand_on_top, "model.py", "class C:\n    def f(self):\n        import torch"),
    (cli_only_calls_the_public_api, "cli/train.py", "def f():\n    from loratune.adapter import loading"),
    (cli_only_calls_the_public_api, "cli/train.py", "from loratune import data"),
    *(
        (only_the_command_line_changes_the_process, "api/train.py", text)
        for text in (
            "print(1)",
            "sys.exit(2)",
            "os._exit(1)",
            "signal.signal(2, f)",
            "warnings.simplefilter('ignore')",
            "torch.set_num_threads(1)",
            "os.environ['A'] = '1'",
            "del os.environ['A']",
            "os.environ.setdefault('A', '1')",
            "sys.stdout = None",
            "Thread = threading.Thread(target=f)",
            "signals.raise_on_signals()",
            "with warnings.catch_warnings():\n    pass\nwarnings.filterwarnings('ignore')",
        )
    ),
    (public_things_are_documented, "model.py", '"""Doc."""\ndef f(): pass'),
    (public_things_are_documented, "model.py", '"""Doc."""\nclass C:\n    """Doc."""\n    def f(self): pass'),
    (public_things_are_documented, "model.py", "x = 1"),
    (no_two_classes_have_one_name, "model.py", "class Loader: pass\nclass _Loader: pass"),
    (only_upstream_modules_use_private_names, "model.py", "def f(config): return config._attn_implementation"),
    (only_upstream_modules_use_private_names, "model.py", "from torch._subclasses import FakeTensor"),
    (only_upstream_modules_use_private_names, "model.py", "from peft.utils import _set_trainable"),
    (only_upstream_modules_use_private_names, "model.py", "def f(trainer):\n    trainer._n_gpu = 1"),
    (every_code_is_used, "codes.py", "class Code:\n    ONE = 'a.one', 'One.'\n    TWO = 'a.two', 'Two.'\nCode.ONE"),
]


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _, _ in RULES), ids=lambda rule: rule.__name__)
def test_source_follows_every_rule(rule: Rule) -> None:
    assert list(rule(ROOT / "tests" if rule is waits_have_a_limit else PACKAGE)) == []


@pytest.mark.parametrize("rule, name, text", RULES, ids=lambda value: getattr(value, "__name__", None))
def test_rule_detects_a_violation(rule: Rule, name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert len(list(rule(tmp_path))) == 1


@pytest.mark.parametrize(
    "rule, name, text",
    [
        (
            imports_point_down,
            "api/train.py",
            "import os\nfrom loratune import config, lora\nfrom loratune.data import x",
        ),
        (
            imports_point_down,
            "data/__init__.py",
            "from loratune.data import formats\nfrom loratune.data.rendering import x",
        ),
        (imports_point_down, "model.py", "if TYPE_CHECKING:\n    from loratune.training.run import Plan"),
        (
            waits_have_a_limit,
            "test_it.py",
            "run_command(['x'])\nchild.wait()\nover = Event()\nover.wait(60)\nthread.join(60)\n','.join(names)",
        ),
        (only_lora_imports_peft, "lora/attach.py", "import peft"),
        (only_config_reads_yaml, "card.py", "import yaml\nyaml.safe_dump({})"),
        (only_config_reads_yaml, "config/yaml_files.py", "import yaml\nyaml.safe_load('')"),
        (imports_stand_on_top, "cli.py", "def f():\n    import torch"),
        (
            cli_only_calls_the_public_api,
            "cli/train.py",
            "import loratune\nfrom loratune import Adapter, config, errors",
        ),
        (
            cli_only_calls_the_public_api,
            "cli/train.py",
            "if TYPE_CHECKING:\n    from loratune.training.run import Plan",
        ),
        (only_the_command_line_changes_the_process, "cli/boundary.py", "print(1)\nos.environ['A'] = '1'"),
        (
            only_the_command_line_changes_the_process,
            "lora/attach.py",
            "with warnings.catch_warnings():\n    warnings.filterwarnings('ignore')\nx = os.environ['A']",
        ),
        (only_upstream_modules_use_private_names, "lora/upstream.py", "from peft.utils import _set_trainable"),
        (only_upstream_modules_use_private_names, "model.py", "class C:\n    def f(self): self._x = self.__dict__"),
        (public_things_are_documented, "model.py", '"""Doc."""\nclass _C:\n    def f(self): pass\ndef _g(): pass'),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_rule_allows_valid_code(rule: Rule, name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert list(rule(tmp_path)) == []


def test_package_table_in_the_readme_matches_the_levels() -> None:
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, flags=re.MULTILINE)
    table = {name: int(level) for level, names in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", names)}
    assert table == LEVELS


def test_codes_are_unique_described_and_named_after_their_value() -> None:
    """`__members__` also lists aliases, which duplicate values become."""
    assert len(Code) == len(Code.__members__) > 50
    for name, code in Code.__members__.items():
        assert code.name == name == code.value.replace(".", "_").upper()
        assert code.meaning.endswith("."), code
    assert len({code.meaning for code in Code}) == len(Code)


def options(application: typer.Typer) -> dict[str, int]:
    """Command → number of its options, without `--help`."""
    commands = typer.main.get_command(application).commands  # type: ignore[attr-defined]
    return {
        name: sum(parameter.param_type_name == "option" for parameter in command.params)
        for name, command in commands.items()
    }


MOST_OPTIONS = {"evaluate": 20, "export": 16, "generate": 20}
"""Of commands that need more: what is measured, with what it is compared, how a base is told the task, what is required
of it, when it abstains, what is shown; five clients; the system message, and how tokens are sampled."""


def test_commands_have_at_most_twelve_options() -> None:
    counts = options(app)
    assert {"train", "generate", "params", "evaluate"} <= set(counts)
    assert {name: count for name, count in counts.items() if not 1 <= count <= MOST_OPTIONS.get(name, 12)} == {}


def test_thirteen_options_are_detected() -> None:
    other = typer.Typer()

    @other.command()
    def many(
        a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0, f: int = 0, g: int = 0, h: int = 0, i: int = 0,
        j: int = 0, k: int = 0, m: int = 0, n: int = 0,
    ) -> None:  # fmt: skip
        pass

    @other.callback()
    def group() -> None:
        pass

    assert options(other) == {"many": 13}


def test_every_package_is_installed() -> None:
    """pyproject.toml must find each directory with modules. A missing one would work only in a checkout."""
    rule = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert rule["find"].pop("namespaces") is False  # a directory without __init__.py is no package
    listed = find_packages(str(ROOT), **rule["find"])
    packages = {".".join(("loratune", *path.parts[:-1])) for path, _, _ in modules(PACKAGE)}
    assert sorted(listed) == sorted(packages)
