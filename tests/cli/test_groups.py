"""Commands refuse options that contradict each other before they open anything."""

from __future__ import annotations

import json

import pytest

from tests.data.helpers import command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "nowhere", "--format", "safetensors", "--register", "name"], "--register name"),
        (["export", "nowhere", "--register", "name"], "nowhere (here "),
        (["plan", "configs/demo.yaml", "--nodes", "1,-2"], "--nodes 1,-2"),
        (["cancel", "nowhere"], "nowhere (here "),
        (["prepare", "configs/demo.yaml", "data.sources.0.paths=[]"], "data.sources.0.paths"),
    ],
)
def test_a_mistake_in_an_option_is_a_usage_error(arguments, words, capsys):
    assert command(*arguments) == 2
    assert words in capsys.readouterr().err


def test_plan_prints_one_row_per_number_of_nodes(capsys):
    assert command("plan", "configs/demo.yaml", "--nodes", "1,2", "--device", "cpu", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["nodes"] for row in rows] == [1, 2]


def test_logs_end_with_what_was_printed_unless_they_are_followed(monkeypatch, capsys):
    monkeypatch.setattr("pipeline.run.folder.open_run", lambda path: path)
    monkeypatch.setattr("pipeline.launch.watch.logs.printed", lambda run, rank: [f"printed by {rank}\n"])
    monkeypatch.setattr("pipeline.launch.watch.logs.follow", lambda run, rank, ended: [f"followed {rank}\n"])
    assert command("logs", "RUN") == 0
    assert command("logs", "RUN", "-f", "--rank", "3") == 0
    assert capsys.readouterr().out == "printed by 0\nfollowed 3\n"


def test_an_export_is_registered_only_where_a_name_is_given(monkeypatch, capsys):
    monkeypatch.setattr("pipeline.run.folder.open_run", lambda path: path)
    monkeypatch.setattr("pipeline.commands.export.export_run", lambda run, form, step, output, dtype: f"{run}/export")
    monkeypatch.setattr("pipeline.tracking.upload.sync.register_export", lambda run, written, name: f"7 of {written}")
    assert command("export", "RUN") == 0
    assert command("export", "RUN", "--register", "mine") == 0
    assert capsys.readouterr().out == "RUN/export\nRUN/export\nmine: version 7 of RUN/export\n"
