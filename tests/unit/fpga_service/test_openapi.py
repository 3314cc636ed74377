"""The gateway's OpenAPI document, and what schemathesis finds by it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.fakes.fake_host import FakeHost
from tests.fakes.gateway_server import run, serving

ROUTES = {
    "/": {"get"}, "/health": {"get"}, "/ready": {"get"}, "/metrics": {"get"}, "/v1/models": {"get"},
    "/v1/models/{name}": {"get"}, "/v1/chat/completions": {"post"}, "/v1/completions": {"post"}, "/predict": {"post"},
}  # fmt: skip


def test_the_document_names_every_route_and_its_errors() -> None:
    async def test() -> None:
        async with FakeHost() as host, serving(host, keys={"a": "k"}, key="k") as served:
            document = (await served.client.get("/openapi.json")).json()
            assert {path: set(methods) for path, methods in document["paths"].items()} == ROUTES
            for path, methods in document["paths"].items():
                for operation in methods.values():
                    assert "422" not in operation["responses"]  # errors of bodies are 400, as OpenAI's
                    assert ("401" in operation["responses"]) == (path != "/health"), path
            assert document["security"] == [{"key": []}]

    run(test)


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_and_no_answer_outside_the_document(tmp_path: Path) -> None:
    # valid bodies may still be refused: top_logprobs without logprobs is one that a schema cannot forbid
    options = ["--exclude-checks", "positive_data_acceptance", "--max-examples", "60", "--seed", "7", "--no-color"]

    async def test() -> None:
        async with FakeHost() as host, serving(host, keys={"a": "k"}, max_queue=1000) as served:
            command = [Path(sys.executable).parent / "st", "run", f"{served.url}/openapi.json", *options]
            command += ["-H", "Authorization: Bearer k"]
            child = await asyncio.create_subprocess_exec(
                *command, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            said, _ = await child.communicate()
            assert child.returncode == 0, said.decode()
            assert "Tested: 9" in said.decode()
            assert len(host.asked) > 50  # it went through to the host

    asyncio.run(asyncio.wait_for(test(), 400))
