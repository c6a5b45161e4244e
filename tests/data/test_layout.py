"""One module knows the names of the files in a dataset folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pipeline
from pipeline.data import layout

# A checkpoint has a manifest.json too; a run and an exported model have a tokenizer.json.
_OTHER_FOLDERS = {
    layout.MANIFEST: {"run/folder.py"},
    layout.TOKENIZER: {"run/folder.py", "huggingface/model_folder.py"},
}


def _written_names(file: Path) -> set[str]:
    """The constants of a module that are a whole file name, or the name of the slices joined to a path."""
    tree = ast.parse(file.read_text())
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    joined = {
        node.right.value
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant)
    }
    files = {layout.MANIFEST, layout.PLAN, layout.TOKENIZER, layout.SLICE_RECORD}
    return {name for name in files if name in constants} | ({layout.SLICES} & joined)


def test_no_other_module_writes_these_names() -> None:
    package = Path(pipeline.__file__).parent
    found = {(str(file.relative_to(package)), name) for file in package.rglob("*.py") for name in _written_names(file)}
    others = {(file, name) for name, files in _OTHER_FOLDERS.items() for file in files}
    assert {(file, name) for file, name in found if file != "data/layout.py"} - others == set()


def test_slice_names_sort_in_the_order_of_the_tokens(tmp_path: Path) -> None:
    names = [layout.slice_name(task, part) for task in (0, 9, 10, 999_999) for part in (0, 9, 10)]
    assert names == sorted(names)
    for name in names:
        (tmp_path / layout.SLICES / name).mkdir(parents=True)
    (tmp_path / layout.SLICES / f".{names[0]}.0123456789ab.tmp").mkdir()
    assert sorted(folder.name for folder in layout.published_slices(tmp_path)) == names
