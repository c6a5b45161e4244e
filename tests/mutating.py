"""How a value, a file's bytes or the file itself is changed, by a random generator alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Values that one reader or another takes for what they are not.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.5, 1e308, float("nan"), float("inf"),
    "", "x", "\x00", "a\nb", "\x1b[31m", "\ud800", "../..", "/etc/passwd", "/dev/zero", "--me", "[red]", "[/red]", "²",
    "010", "1:30", "x" * 5000, [], [[]], [None], ["x"], {}, {"": None}, {"x": {"y": []}}, [1, 2, 3], {"type": "x"},
]  # fmt: skip


def mutate(tree: Any, rng: random.Random) -> Any:
    """Returns a tree of plain values with one to three of its values changed, removed, moved or repeated."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return tree
        node, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1 | 2:
                node[key] = rng.choice(ODD)
            case 3:
                del node[key]
            case 4:
                other, place = rng.choice(places)
                if _has(other, place):
                    node[key] = json.loads(json.dumps(other[place]))
            case 5 if isinstance(node, dict):
                node[rng.choice(["x", "\x1b", "", "--me", "name", "²"])] = node.pop(key)
            case _:
                if isinstance(node, list):
                    node.append(node[key])
    return tree


def _has(node: Any, key: Any) -> bool:
    return key in node if isinstance(node, dict) else key < len(node)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(found) < 5000:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        found += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    return found


def garble(content: bytes, rng: random.Random) -> bytes:
    """Returns bytes with a few of them flipped, cut, repeated, or replaced by something odd."""
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(content) + 1), rng.randint(1, 40)
        match rng.randrange(5):
            case 0:
                content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
            case 1:
                content = content[:at] + content[at + length :]
            case 2:
                content = content[:at] + content[at : at + length] * rng.randint(2, 50) + content[at + length :]
            case 3:
                content = content[:at] + rng.choice(FRAGMENTS) + content[at:]
            case 4:
                content = content[:at]
    return content


FRAGMENTS = [
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"&a", b"*a", b"<<: *a\n", b"!!int x", b"!!python/object:x ", b"[" * 2000,
    b"{" * 2000, b"9" * 5000, b"010", b"1:30", b"? ", b": ", b"- ", b"| \n", b"\t", b'"\\ud800"', b"---\n",
    b"%YAML 9\n", b"\x1b[31m", b"1e999", b"-", b"}", b"]", b"\n", b'"', b"NaN", b"null",
]  # fmt: skip


def put(file: Path, content: bytes, rng: random.Random) -> None:
    """Replaces a file by content, or now and then by something that is no regular file."""
    odd = rng.randrange(40)
    file.unlink(missing_ok=True)
    if odd == 0:
        os.mkfifo(file)
    elif odd == 1:
        file.symlink_to("/dev/zero")
    elif odd == 2:
        file.symlink_to("/etc/hostname")
    elif odd == 3:
        file.mkdir()
    else:
        file.write_bytes(content)


def mutated_json(file: Path, rng: random.Random, seal: Callable[[dict[str, Any]], bytes] | None = None) -> bytes:
    """Returns the mutated content of a JSON file; `seal` gives it a new digest, as whoever made it could."""
    if rng.randrange(4) == 0:
        return garble(file.read_bytes(), rng)
    tree = json.loads(file.read_bytes())
    if seal is not None:
        tree.pop("digest")
    tree = mutate(tree, rng)
    return seal(tree) if seal is not None and isinstance(tree, dict) else json.dumps(tree).encode()


def sealed(separators: tuple[str, str] | None) -> Callable[[dict[str, Any]], bytes]:
    def seal(tree: dict[str, Any]) -> bytes:
        digest = hashlib.sha256(json.dumps(tree, sort_keys=True, separators=separators).encode()).hexdigest()
        return json.dumps({**tree, "digest": digest}).encode()

    return seal
