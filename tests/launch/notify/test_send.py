"""A message arrives by webhook, mail and command; what does not answer is said within seconds, without its address."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.launch.notify.send import Message, send
from pipeline.launch.notify.settings import Notify
from tests.launch.notify.support import SECRET, Webhook, script, webhook

MESSAGE = Message({"event": "failed", "run": "/runs/tiny", "job": "7"}, "tiny: ended – \x1b[31mbadly", "job 7")
TEXT = "tiny: ended – \\x1b[31mbadly\njob 7"


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with webhook() as made:
        yield made


def test_a_webhook_gets_the_text_as_json(hook: Webhook):
    assert send(Notify(webhook=hook.address), MESSAGE) == []
    assert hook.posted == [{"text": TEXT}]


def test_a_command_gets_the_text_on_its_input_and_in_its_environment_and_no_shell_reads_it(tmp_path: Path):
    program = script(tmp_path / "tell", f'cat > "{tmp_path}/in"; env > "{tmp_path}/env"; echo "$1" > "{tmp_path}/arg"')
    assert send(Notify(command=(str(program), "$(id); *")), MESSAGE) == []
    assert (tmp_path / "in").read_text() == TEXT
    assert (tmp_path / "arg").read_text() == "$(id); *\n"
    environment = (tmp_path / "env").read_text()
    for line in ("PIPELINE_EVENT=failed", "PIPELINE_RUN=/runs/tiny", "PIPELINE_JOB=7", f"PIPELINE_MESSAGE={TEXT}"):
        assert f"{line}\n" in environment


def test_mail_goes_through_sendmail_with_one_subject_and_one_recipient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script(tmp_path / "sendmail", f'echo "$@" > "{tmp_path}/args"; cat > "{tmp_path}/mail"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    forged = Message({}, "tiny: failed\nBcc: all@example.org")
    assert send(Notify(mail="ada@example.org"), forged) == []
    assert (tmp_path / "args").read_text() == "-i -t\n"
    head, _, body = (tmp_path / "mail").read_text().partition("\n\n")
    names = [line.partition(":")[0].lower() for line in head.splitlines()]
    assert "To: ada@example.org" in head and names.count("subject") == 1 and "bcc" not in names
    assert body == "tiny: failed\nBcc: all@example.org\n"


def test_a_machine_without_sendmail_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("pipeline.launch.notify.send._SENDMAIL_PATH", "")
    (problem,) = send(Notify(mail="ada@example.org"), MESSAGE)
    assert problem.startswith("mail: ") and "sendmail" in problem


@pytest.mark.parametrize("status", [301, 404, 500])
def test_a_server_that_refuses_is_named_by_its_answer_only(hook: Webhook, status: int):
    hook.status, hook.headers = status, {"Location": hook.address}
    (problem,) = send(Notify(webhook=hook.address), MESSAGE)
    assert str(status) in problem and SECRET not in problem
    assert len(hook.posted) == 1, "a redirect is not followed"


def test_nobody_listening_is_said_without_the_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/{SECRET}"
    (problem,) = send(Notify(webhook=address), MESSAGE)
    assert "refused" in problem and SECRET not in problem


def test_three_dead_ways_take_one_time_limit_and_leave_no_process(hook: Webhook, tmp_path: Path, monkeypatch):
    hook.delay_s = 60
    script(tmp_path / "sendmail", f'echo $$ > "{tmp_path}/pid"; sleep 60; true')
    slow = script(tmp_path / "slow", f'sleep 60 & echo $! > "{tmp_path}/child"; wait')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    ways = Notify(webhook=hook.address, mail="ada", command=(str(slow),))
    began = time.monotonic()
    problems = send(ways, MESSAGE, limit_s=2.0)
    assert time.monotonic() - began < 6, "one after another they would take longer"
    assert sorted(problem.partition(":")[0] for problem in problems) == ["command", "mail", "webhook"]
    for name in ("pid", "child"):
        process = Path("/proc") / (tmp_path / name).read_text().strip() / "status"
        end = time.monotonic() + 10
        while process.exists() and "State:\tZ" not in process.read_text():
            assert time.monotonic() < end
            time.sleep(0.02)


def test_a_dead_way_does_not_keep_another_from_sending(hook: Webhook, tmp_path: Path):
    failing = script(tmp_path / "failing", "exit 3")
    (problem,) = send(Notify(webhook=hook.address, command=(str(failing),)), MESSAGE)
    assert problem == "command: exit status 3" and hook.posted
    (problem,) = send(Notify(command=("/not/there",)), MESSAGE)
    assert problem.startswith("command: ")


def test_a_message_has_a_bounded_length(hook: Webhook):
    assert send(Notify(webhook=hook.address), Message({}, "x" * 100_000)) == []
    assert len(hook.posted[0]["text"]) == 2000
