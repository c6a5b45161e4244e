"""`pipeline adopt`: makes a dataset of token files that others made, and shows what they decode to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.data.adopt.adopt import adopt
from pipeline.data.adopt.find import FormatName, find_sources
from pipeline.data.build.display import Display, shortened, summary_table
from pipeline.data.inspect import draw_documents
from pipeline.data.layout import TOKENIZER
from pipeline.data.manifest import DatasetManifest
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import UsageError
from pipeline.files import naming
from pipeline.terminal import Terminal
from pipeline.text_format import printable

_SHOWN = 3


def adopt_here(
    format_name: FormatName,
    paths: Sequence[str],
    output: str,
    tokenizer_file: str,
    *,
    dtype: str | None = None,
    validation: Sequence[str] = (),
    validation_fraction: float = 0.0,
    end_of_text: str | None = None,
) -> DatasetManifest:
    """Adopts token files with a progress display, and prints a table, some decoded documents and the config's lines.

    Raises:
        UsageError: The output folder holds something, or an argument does not fit the format.
        DataError: A file is damaged, or is not what the format, the dtype and the tokenizer say.
    """
    folder = Path(output)
    with naming(folder, "the dataset cannot be written", "choose another --output", UsageError):
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder}: is not empty; choose another --output, or remove it")
        sources = find_sources(format_name, paths, validation, dtype)
        tokenizer = Tokenizer.load(tokenizer_file, end_of_text)
        with Display("adopt") as display:
            manifest = adopt(sources, format_name, tokenizer, folder, validation_fraction, display.bytes)
    assert manifest.adopted is not None
    console = Terminal()
    console.print(summary_table(manifest, output))
    for document in draw_documents(folder, "train", _SHOWN, seed=0, token_folder=manifest.adopted["folder"]):
        console.rule(printable(f"document {document.number:,}, source {document.source}, {document.tokens:,} tokens"))
        console.print(shortened(document.text))
    console.rule()
    for text in (_notes(manifest), config_lines(output, manifest)):
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
    return manifest


def _notes(manifest: DatasetManifest) -> str:
    """Returns what the user should know and do next."""
    assert manifest.adopted is not None
    lines = ["Is this text? If it is not, the tokenizer or the dtype is not that of the files."]
    for source in manifest.sources:
        name, documents, ended = source["name"], source["records"], source["ended_documents"]
        if not ended:
            lines.append(f"source {name}: no document ends with the end-of-text token, only the format says where.")
        elif ended < documents:
            lines.append(f"source {name}: {documents - ended:,} files end within a document.")
        if source["inner_ends"]:
            lines.append(f"source {name}: {source['inner_ends']:,} end-of-text tokens are inside of documents.")
    if not manifest.splits["validation"].shards:
        lines.append("There are no tokens for validation, which training needs: --validation or --validation-fraction.")
    return "\n".join([*lines, "In the config of a run:"])


def config_lines(output: str, manifest: DatasetManifest) -> str:
    """Returns what the config of a run on this dataset says of it."""
    assert manifest.adopted is not None
    return (
        f"data: {{path: {output}, token_folder: {manifest.adopted['folder']}}}\n"
        f"tokenizer: {{kind: file, path: {Path(output) / TOKENIZER}}}\n"
        f"model: {{vocab_size: {manifest.vocab_size}}}  # or more"
    )
