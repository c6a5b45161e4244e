"""Builds English text for benchmarks from Debian's documentation packages, with no document twice.

    python -m benchmarks.corpus FOLDER

Copies of one text would flatter every tokenizer that caches words; these are real documents, about 340 MB in all.
Translations are skipped. A dictionary, which is one file, is cut into documents of a few pages.
"""

from __future__ import annotations

import argparse
import gzip
import html
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Dictionaries, manuals and guides; HTML is reduced to its text.
PACKAGES = (
    "dict-gcide", "dict-wn", "dict-foldoc", "dict-jargon", "bible-kjv-text", "fortunes", "perl-doc", "manpages",
    "manpages-dev", "python3.11-doc", "linux-doc-6.1", "postgresql-doc-15", "git-doc", "debian-handbook",
    "debian-policy", "developers-reference", "python-django-doc", "libboost1.81-doc", "erlang-doc",
    "openjdk-17-doc", "libstdc++-12-doc", "octave-doc",
)  # fmt: skip
SEPARATOR = "\x1e"
_HIDDEN = re.compile(r"<(script|style|head|nav)\b.*?</\1>", re.S | re.I)
_TAG = re.compile(r"<[^>]*>")
_BLANK_LINES = re.compile(r"\s*\n\s*\n\s*")
# Folders of other languages: `translations/`, `zh_CN/`, `pt-BR/`.
_TRANSLATED = re.compile(r"/(translations|(?!en)[a-z]{2,3}[-_][A-Z]{2})/")
# The start of a dictionary entry, and how many characters of entries make a document.
_ENTRY = re.compile(r"\n(?=\S)")
_ENTRIES_CHARACTERS = 4000


def build(folder: Path) -> Path:
    """Writes all documents to `folder/english.txt`, each followed by the record separator; returns the path."""
    target = folder / "english.txt"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    size, seen = 0, set()
    with tempfile.TemporaryDirectory() as temp, (folder / "english.part").open("w", encoding="utf-8") as out:
        for package in PACKAGES:
            for text in _documents(package, Path(temp)):
                if len(text) < 200 or hash(text) in seen:
                    continue
                seen.add(hash(text))
                out.write(text.replace(SEPARATOR, " ") + SEPARATOR)
                size += len(text.encode())
            print(f"{package}: {size / 1e6:.0f} MB so far", file=sys.stderr)
    (folder / "english.part").rename(target)
    return target


def _documents(package: str, temp: Path) -> Iterator[str]:
    done = subprocess.run(["apt-get", "download", "-qq", package], cwd=temp, capture_output=True, text=True)
    archives = list(temp.glob("*.deb"))
    if done.returncode != 0 or not archives:
        print(f"{package}: cannot be downloaded, skipped", file=sys.stderr)
        return
    unpacked = temp / "unpacked"
    subprocess.run(["dpkg-deb", "-x", archives[0], unpacked], check=True)
    archives[0].unlink()
    for path in sorted(p for p in unpacked.rglob("*") if p.is_file() and not p.is_symlink()):
        name = path.name.removesuffix(".gz")
        if path.suffix == ".dz":
            yield from _entries(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
            continue
        if _TRANSLATED.search(str(path)):
            continue
        if not name.endswith((".html", ".txt", ".pod", ".1", ".2", ".3", ".5", ".7", ".rst", ".md")):
            continue
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8", "replace")
        if name.endswith(".html"):
            text = html.unescape(_TAG.sub("", _HIDDEN.sub("", text)))
        yield _BLANK_LINES.sub("\n\n", text).strip()
    subprocess.run(["rm", "-rf", str(unpacked)], check=True)


def _entries(dictionary: str) -> Iterator[str]:
    start = 0
    for entry in _ENTRY.finditer(dictionary):
        if entry.start() - start >= _ENTRIES_CHARACTERS:
            yield dictionary[start : entry.start()]
            start = entry.end()
    yield dictionary[start:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(build(parser.parse_args().folder))
