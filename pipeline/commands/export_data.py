"""`pipeline export-data`: indices by which other programs read the token shards, beside links to the shards."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.adopt.megatron import write_index
from pipeline.data.manifest import DatasetManifest, check_sizes
from pipeline.data.shard_maps import mapped
from pipeline.errors import DataError, UsageError
from pipeline.files import naming, staged_dir

# Megatron-LM holds the length of a sequence in a signed 32-bit number.
_LONGEST = (1 << 31) - 1


def export_megatron(dataset: str, output: str, token_folder: str | None = None) -> str:
    """Writes `SPLIT-NUMBER.idx` for each shard and links `SPLIT-NUMBER.bin` to its tokens; returns a report.

    Raises:
        UsageError: The output folder holds something.
        DataError: A file of the dataset is missing or damaged, or a document is too long for Megatron-LM.
    """
    path, folder = Path(dataset), Path(output)
    manifest = DatasetManifest.load(path)
    tokens_in = manifest.tokens_in(path, token_folder)
    check_sizes(path, manifest.shards, manifest.numpy_dtype, tokens_in=tokens_in)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: is not empty; choose another --output, or remove it")
    lines = []
    with naming(folder, "cannot be written", "choose another --output", UsageError), staged_dir(folder) as staged:
        for split in manifest.splits.values():
            for number, shard in enumerate(split.shards):
                if shard.longest > _LONGEST:
                    raise DataError(
                        f"{path / shard.file}: a document has {shard.longest:,} tokens, too many for an index"
                    )
                name = f"{split.name}-{number:06d}"
                starts = mapped(path / shard.index, "<u8")
                write_index(staged / f"{name}.idx", manifest.numpy_dtype, starts, shard.offset)
                (staged / f"{name}.bin").symlink_to(((tokens_in or path) / shard.file).resolve())
            if split.shards:
                last = len(split.shards) - 1
                lines.append(f"{folder}/{split.name}-000000 to {split.name}-{last:06d}: {split.tokens:,} tokens")
    return "\n".join([*lines, "Give Megatron-LM these names as --train-data-path and --valid-data-path."])
