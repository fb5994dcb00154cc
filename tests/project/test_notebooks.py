"""The notebooks run as they are, in an empty folder."""

import json

import pytest
from pages import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_a_run_left_in_it(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def said(notebook, last):
    """What the cell says that ends with an expression."""
    (cell,) = [cell for cell in notebook.cells if cell.source.splitlines()[-1] == last]
    return cell.outputs[-1].data["text/plain"]


@pytest.mark.slow
def test_the_notebook_on_images(tmp_path):
    notebook = executed("images", tmp_path)
    assert "model.blocks.0.attn.qkv" in said(notebook, "ranks")
    assert float(said(notebook, "result").partition("test_accuracy': ")[2].split(",")[0].rstrip("}")) > 0.8
    assert (tmp_path / "digits.safetensors").is_file()


@pytest.mark.slow
def test_the_notebook_on_a_module_of_ones_own(tmp_path):
    notebook = executed("own_module", tmp_path)
    assert "'body.0'" in said(notebook, "ranks")
    assert float(said(notebook, "difference")) < 1e-3


def executed(name, folder):
    import nbclient  # of these tests alone, which are slow
    import nbformat

    notebook = nbformat.read(ROOT / "docs" / "notebooks" / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(folder)}})
    return client.execute()
