"""Tests of the OpenAPI document with third-party tools, against a running web process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from followups.api.app import openapi_document
from followups.embedded import Processes
from web import Api, start

if TYPE_CHECKING:
    from types import ModuleType

    from followups.settings import Settings
    from world import World

SNAPSHOT = Path(__file__).with_name("openapi.json")
BINARIES = Path(sys.executable).parent

SEED = "20240601"
EXAMPLES = "8"
"""Number of random requests per operation, besides those derived from the schemas' limits."""


def test_snapshot() -> None:
    """The OpenAPI document equals the reviewed copy in `openapi.json`.

    To update `openapi.json`, run ``followups openapi > tests/integration/api/openapi.json``.
    """
    assert openapi_document() == json.loads(SNAPSHOT.read_text())


def test_valid() -> None:
    """The document is valid according to OpenAPI 3.1."""
    document = openapi_document()
    assert document["openapi"].startswith("3.1")
    validate(document, cls=OpenAPIV31SpecValidator)


def test_complete() -> None:
    """Every response in the OpenAPI document has a schema and an example.

    Every error is an RFC 9457 problem, and every endpoint requires an API key.
    """
    for path, operations in openapi_document()["paths"].items():
        for operation in operations.values():
            assert operation["security"] == ([{"apiKey": []}, {"bearer": []}] if path.startswith("/api/") else [])
            for status, answer in operation["responses"].items():
                if status == "204":
                    continue
                ((media_type, content),) = answer["content"].items()
                assert content["schema"]
                assert "example" in content or content["examples"]
                assert (media_type == "application/problem+json") == (int(status) >= 400)


def test_served(api: Api) -> None:
    """The web process serves the same OpenAPI document that the command line prints."""
    assert api.client.get("/openapi.json", headers={"authorization": ""}).json() == openapi_document()


def test_schemathesis(settings: Settings, world: World, tmp_path: Path) -> None:
    """All checks of Schemathesis, including the stateful ones, find no error with a fixed seed."""
    world.sql("UPDATE dispatcher_state SET last_tick_at = now() + interval '1 hour'")
    with Processes() as processes:
        api = Api(start(processes, settings.environment())[1], world)
        api.client.close()
        arguments = {
            "--checks": "all",
            "--exclude-checks": "positive_data_acceptance",  # replaced by a check in `schemathesis_hooks.py`
            "--phases": "examples,coverage,fuzzing,stateful",
            "--max-examples": EXAMPLES,
            "--seed": SEED,
            "--header": f"authorization: {api.key}",
            "--generation-database": "none",
            "--warnings": "off",
        }
        run = subprocess.run(
            [BINARIES / "schemathesis", "run", f"{api.url}/openapi.json", *sum(arguments.items(), ())],
            env={"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(Path(__file__).parent), "PATH": "/"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, f"seed {SEED}\n{run.stdout}\n{run.stderr}"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Generate a client from the OpenAPI document with openapi-python-client, and return its package."""
    directory = tmp_path_factory.mktemp("generated")
    (directory / "openapi.json").write_text(json.dumps(openapi_document()))
    # The generator's post hooks would only format the generated code.
    (directory / "config.yaml").write_text("post_hooks: []\n")
    options = ["--path", "openapi.json", "--output-path", "followups_client", "--meta", "none", "--fail-on-warning"]
    subprocess.run(
        [BINARIES / "openapi-python-client", "generate", *options, "--config", "config.yaml"],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    place = directory / "followups_client" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "followups_client", place, submodule_search_locations=[str(place.parent)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["followups_client"] = package
    spec.loader.exec_module(package)
    return package


def test_generated_client(api: Api, generated: ModuleType) -> None:
    """A generated client can create, list and reschedule follow-ups, and receives errors as problem details.

    After a reply, the generated client reads the follow-up as cancelled.
    """

    def part(name: str) -> Any:
        return importlib.import_module(f"{generated.__name__}.{name}")

    follow_ups, chats, models = part("api.chat_message_follow_ups"), part("api.chats"), part("models")
    for name in ("create_follow_up", "list_follow_ups", "change_follow_up"):
        part(f"api.chat_message_follow_ups.{name}")
    for name in ("put_chat", "receive_chat_message"):
        part(f"api.chats.{name}")
    client = generated.AuthenticatedClient(base_url=api.url, token=api.key, verify_ssl=False)
    chat_id, due = uuid4(), datetime.now(UTC) + timedelta(days=1)

    with client:
        chats.put_chat.sync(chat_id, client=client, body=models.ChatPut(channel=models.Channel.WIDGET))
        new = models.NewFollowUp(chat_id=chat_id, due_date=due, message="Still there?")
        refused = follow_ups.create_follow_up.sync(client=client, body=new)
        assert isinstance(refused, models.Problem)
        assert refused.status == 409

        agent = models.NewChatMessage(id=uuid4(), chat_id=chat_id, role=models.Role.AGENT)
        chats.receive_chat_message.sync(client=client, body=agent)
        created = follow_ups.create_follow_up.sync(client=client, body=new, idempotency_key="key")
        assert created.due_date == due
        assert follow_ups.create_follow_up.sync(client=client, body=new, idempotency_key="key") == created
        assert follow_ups.list_follow_ups.sync(client=client, statuses=[models.Status.PENDING]) == [created]

        later = models.FollowUpChanges(due_date=due + timedelta(days=1))
        assert follow_ups.change_follow_up.sync(created.id, client=client, body=later).due_date == later.due_date

        reply = models.NewChatMessage(id=uuid4(), chat_id=chat_id, role=models.Role.USER)
        assert chats.receive_chat_message.sync(client=client, body=reply).cancelled_follow_up_ids == [created.id]
        (ended,) = follow_ups.list_follow_ups.sync(client=client, chat_ids=[chat_id])
        assert (ended.id, ended.status.value, ended.reason) == (UUID(str(created.id)), "cancelled", "user_replied")
