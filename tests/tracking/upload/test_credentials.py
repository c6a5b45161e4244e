"""A real server with passwords: it tells users apart, and no secret is written anywhere."""

import base64

import pytest

from pipeline.errors import PipelineError
from pipeline.tracking.upload.sync import sync
from pipeline.tracking.upload.ui import local_server
from tests.processes import free_port
from tests.tracking.support import begin, feed, make_run, of_journal, of_mlflow, wait_for

NAMES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
ADMIN, PASSWORD = "ada-lovelace", "difference-engine"
AUTH = """
[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/auth.db
admin_username = {admin}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "auth.ini").write_text(AUTH.format(folder=folder, admin=ADMIN))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(folder / "auth.ini"))
        patch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", PASSWORD)
        patch.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "of this test")
        options = ("--app-name", "basic-auth", "--artifacts-destination", str(folder / "artifacts"))
        store, log = f"sqlite:///{folder}/server.db", folder / "server.log"
        with local_server(store, free_port(), log, options) as started:
            yield started


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def become(monkeypatch):
    def as_user(name, password):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    return as_user


def recorded(folder, server, *overrides):
    run, config = make_run(folder, server.url, *overrides)
    tracker = begin(run, config)
    feed(tracker, 1, 20, 0.01)
    tracker.close("FINISHED")
    return run, config


def assert_nowhere(secrets, folder, *texts):
    for file in [f for f in folder.rglob("*") if f.is_file()]:
        assert not any(secret.encode() in file.read_bytes() for secret in secrets), file
    assert not any(secret in text for secret in secrets for text in texts)


def test_without_credentials_training_ends_well_and_sync_names_what_to_set_and_then_sends_everything(
    server, tmp_path, caplog, become
):
    run, config = recorded(tmp_path, server)
    with pytest.raises(PipelineError) as refused:
        sync(run)
    (told,) = [r.getMessage() for r in caplog.records if "Training continues" in r.getMessage()]
    for message in (told, str(refused.value)):
        assert "asks for credentials (401)" in message and "\n" not in message
        assert server.url in message and all(name in message for name in NAMES)
    become(ADMIN, PASSWORD)
    assert sync(run).status == "FINISHED"
    assert of_mlflow(run, config) == of_journal(run)
    assert_nowhere([PASSWORD, base64.b64encode(f"{ADMIN}:{PASSWORD}".encode()).decode()], tmp_path)


def test_a_wrong_password_is_reported_without_being_repeated(server, tmp_path, become, real_helper, capfd):
    become(ADMIN, "analytical-engine")
    run, config = make_run(tmp_path, server.url)
    tracker = begin(run, config)
    heard = []

    def warned():
        heard.append("".join(capfd.readouterr()))
        return "Training continues" in "".join(heard)

    wait_for(warned, 120)
    feed(tracker, 1, 20, 0.01)
    tracker.close("FAILED")
    with pytest.raises(PipelineError) as refused:
        sync(run)
    warned()
    (told,) = [line for line in "".join(heard).splitlines() if "Training continues" in line]
    for message in (told, str(refused.value)):
        assert "not accept these credentials (401)" in message and all(name in message for name in NAMES)
    assert_nowhere([ADMIN, "analytical-engine"], tmp_path, *heard, str(refused.value))


def test_a_user_without_write_access_is_told(server, tmp_path, become):
    from mlflow import MlflowClient
    from mlflow.server import get_app_client

    become(ADMIN, PASSWORD)
    MlflowClient(server.url).create_experiment("of-ada")
    get_app_client("basic-auth", tracking_uri=server.url).create_user("grace-hopper", "a long password")
    become("grace-hopper", "a long password")
    run, _ = recorded(tmp_path, server, "tracking.experiment=of-ada")
    with pytest.raises(PipelineError, match=r"\(403, 'Permission denied'\): .*MLFLOW_TR"):
        sync(run)
