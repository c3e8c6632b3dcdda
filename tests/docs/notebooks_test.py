"""The notebooks: text and notebook agree, and each runs from start to end in its short form (`pytest -m notebooks`)."""

import gc
import re
import tempfile

import pytest
from commands import ROOT

jupytext = pytest.importorskip("jupytext", reason="pip install jupytext")
FOLDER = ROOT / "notebooks"
TEXTS = sorted(FOLDER.glob("*.py"))


def cells(notebook):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


def test_there_is_a_notebook_for_each_text():
    assert [path.stem for path in TEXTS] == [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    assert len(TEXTS) == 7


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_text_and_notebook_agree(text):
    """After a change: `jupytext --to ipynb notebooks/*.py`."""
    notebook = jupytext.read(text.with_suffix(".ipynb"))
    assert cells(notebook) == cells(jupytext.read(text))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert f"/blob/main/notebooks/{text.stem}.ipynb)" in notebook.cells[0].source
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert "SHORT = " in parameters.source
    assert any("jax.devices()" in cell.source for cell in code)


@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_runs_from_start_to_end(text, monkeypatch, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    jupyter_client = pytest.importorskip("jupyter_client", reason="pip install nbclient ipykernel")
    monkeypatch.setenv("SAPP_SHORT", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel has its own
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as a user has
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = jupytext.read(text)
    # Through files: kernels that start at a time may choose the same ports.
    with tempfile.TemporaryDirectory(prefix="nb") as folder:  # whose path is short, as those of sockets must be
        manager = jupyter_client.AsyncKernelManager(transport="ipc", ip=f"{folder}/kernel")
        at = {"metadata": {"path": str(FOLDER.parent)}}
        nbclient.NotebookClient(notebook, timeout=300, km=manager, resources=at).execute()
    del manager
    gc.collect()  # its sockets complain when they are deleted: here, and not during another test
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert not re.search(r"Traceback|WARNING:jax", printed)
