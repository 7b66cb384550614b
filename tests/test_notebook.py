"""The quickstart notebook: it has no outputs of another version, and its cells run in a Jupyter kernel."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient

NOTEBOOK = ROOT / "configs" / "quickstart" / "quickstart.ipynb"
SHIPPED = ROOT / "loratune" / "data" / "quickstart"


def cells() -> list[Any]:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    """What a cell printed, and its value."""
    return "".join(
        out.get("text", "") or out["data"]["text/plain"] for out in cell.outputs if out.output_type != "error"
    )


def test_notebook_has_no_outputs() -> None:
    """They would be those of some earlier defaults."""
    assert "parameters" in cells()[0].metadata.tags
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells())


def run_here(cells: list[Any]) -> list[str]:
    """Run cells in this process. Returns what each one printed, and its value."""
    printed, shell = [], InteractiveShell()
    for cell in cells:
        with capture_output() as captured:
            shell.run_cell(cell.source).raise_error()
        printed.append(captured.stdout)
    return printed


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_notebook_cells_run_on_a_tiny_model(kernel: bool, tiny_dir: Path, tmp_path: Path) -> None:
    """In a kernel, or by IPython in this process, with other parameters. The quality required of a real model is not
    asserted."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first, *_ = code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "parameters" in first.metadata.tags
    rows = tmp_path / "quickstart"
    rows.mkdir()
    for name, count in (("train.jsonl", 64), ("eval.jsonl", 8)):
        lines = (SHIPPED / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (rows / name).write_text("".join(lines[:count]), encoding="utf-8")
    (rows / "config.yaml").write_bytes((SHIPPED / "config.yaml").read_bytes())
    given = {"QUICKSTART": rows, "MODEL": tiny_dir, "OUTPUT": tmp_path / "out"}
    first.source = "from pathlib import Path\n\nSTEPS = 8\n"
    first.source += "".join(f"{name} = Path({json.dumps(str(path))})\n" for name, path in given.items())
    if kernel:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
        texts = [printed(cell) for cell in code]
    else:
        texts = run_here(code)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert texts[2].count("held-out loss") >= 1 and "'steps': 8" in texts[3]
