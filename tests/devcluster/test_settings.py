"""The names, addresses and files of a devcluster; a real one is in tests/cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.devcluster.cluster import up
from pipeline.devcluster.settings import Settings, exists, load, refuse_private, state_folder
from pipeline.errors import PipelineError, UsageError


def cluster(state: Path, nodes: int = 3) -> Settings:
    return Settings(state, nodes, "n", True)


def test_every_host_has_its_own_name_and_address(tmp_path: Path):
    settings = cluster(tmp_path)
    assert settings.hosts == ["login", "n1", "n2", "n3"]
    assert [settings.address(host) for host in settings.hosts] == [f"10.66.0.{i}" for i in (1, 2, 3, 4)]
    assert [settings.hardware_address(host)[-5:] for host in settings.hosts] == ["00:01", "00:02", "00:03", "00:04"]


def test_a_node_is_named_by_its_number_or_its_name(tmp_path: Path):
    settings = cluster(tmp_path)
    assert (settings.node("2"), settings.node("n3")) == ("n2", "n3")
    for name in ("4", "0", "login", "m1"):
        with pytest.raises(UsageError, match=f"{name}: .*n1, n2, n3"):
            settings.node(name)


def test_settings_are_read_back_from_the_state_folder(tmp_path: Path):
    with pytest.raises(PipelineError, match=str(tmp_path)):
        load(tmp_path)
    cluster(tmp_path).save()
    assert exists(tmp_path) and load(tmp_path) == cluster(tmp_path)


def test_a_state_folder_whose_path_is_too_long_for_sockets_is_refused():
    longest = "/" + "x" * 79
    assert state_folder(longest) == Path(longest)
    with pytest.raises(UsageError, match="80 .*--state"):
        state_folder(longest + "x")


@pytest.mark.parametrize("name", ["a b", "a,b", "a#b", "a%n", "a'b", 'a"b', "a:b", "a\\b", "a$b"])
def test_a_state_folder_that_mariadb_or_slurm_would_misread_is_refused(name: str):
    with pytest.raises(UsageError, match="choose another --state"):
        state_folder(f"/{name}/devcluster")
    assert state_folder("/dü.x-y_z/devcluster")


def test_what_the_nodes_would_not_see_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hidden, seen = tmp_path / "hidden", tmp_path / "seen"
    hidden.mkdir()
    seen.mkdir()
    monkeypatch.setattr("pipeline.devcluster.settings.PRIVATE", (str(hidden),))
    monkeypatch.setattr("pipeline.devcluster.cluster._check_machine", lambda: pytest.fail("looked further"))
    (seen / "link").symlink_to(hidden)
    monkeypatch.chdir(seen)
    for state in (hidden / "state", seen / "link" / "state"):
        with pytest.raises(UsageError, match=r"hidden/state: the folder of --state is below .*hidden.* /var/tmp"):
            up(state, 1)
    monkeypatch.chdir(hidden)
    with pytest.raises(UsageError, match=r"hidden: the working folder is below"):
        up(seen / "state", 1)
    refuse_private("the folder", seen)
    assert not any(hidden.iterdir()) and {path.name for path in seen.iterdir()} == {"link"}
