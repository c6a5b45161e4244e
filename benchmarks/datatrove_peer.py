"""The peer of benchmarks/prepare_formats.py, in its environment: `datatrove_peer.py FOLDER TOKENIZER TASKS`."""

from __future__ import annotations

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main(folder: str, tokenizer: str, tasks: str) -> None:
    out = Path(folder, "out")
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(Path(folder, "halves"))),
            DocumentTokenizer(
                str(out / "tokens"), tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>",
                shuffle_documents=False, save_filename="tokens",
            ),
        ],
        tasks=int(tasks), workers=int(tasks), logging_dir=str(out / "logs"),
        start_method="fork",  # children of a server would not count as this process's
    ).run()  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
