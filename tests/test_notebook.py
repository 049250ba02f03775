"""The notebook in docs/ runs from its first cell to its last, as it is committed: without outputs."""

import os
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "comparing.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell ends without an error, in a kernel of its own."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install parity[test]")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install parity[test]")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        startup_timeout=300,  # of a kernel: a busy machine may need more than the default, a minute
        iopub_timeout=300,  # a cell's output may come later than 4 s after its end, and would be missing
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    printed = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "execute_result"
    ]
    assert len(printed) == 4
