"""A command in the foreground: its exit code, its output, the signals that reach it; each in a process of its own."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgetool.errors import BadInput
from edgetool.process import foreground

RUNNER = (
    "import os,sys\nfrom edgetool.process import foreground\n"
    # one write: the command writes to the same pipe
    "said = lambda pid: os.write(1, b'%d\\n' % pid)\n"
    "sys.exit(foreground.run(sys.argv[1:], env=os.environ, started=said))\n"
)
SHOUT = "trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.05; done"


def runner(*command: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-c", RUNNER, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def run(*command: str) -> subprocess.CompletedProcess[str]:
    with runner(*command) as process:
        stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
)
def test_the_exit_code_is_that_of_the_command(script: str, code: int) -> None:
    assert run("sh", "-c", script).returncode == code


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2", "QUIT"])
def test_signals_are_passed_on_and_the_command_decides(name: str) -> None:
    with runner("sh", "-c", SHOUT.format(name=name), start_new_session=True) as process:
        assert process.stdout
        assert "ready\n" in {process.stdout.readline(), process.stdout.readline()}  # the other is its number
        process.send_signal(getattr(signal, f"SIG{name}"))
        assert process.stdout.read() == f"got {name}\n"
    assert process.returncode == 9


def test_what_the_terminal_sends_arrives_once() -> None:
    """Ctrl-C goes to the whole process group: sent on as well it would arrive twice, and end at once what it asks."""
    script = (
        "import select, signal as s\ns.pthread_sigmask(s.SIG_BLOCK, {s.SIGINT})\nprint('ready', flush=True)\n"
        "count = 0\n"
        "while not select.select([0], [], [], 0)[0]:\n"  # until the line is typed
        "    if s.sigtimedwait({s.SIGINT}, 0.1): count += 1; print('got', count, flush=True)\n"
        "print(count, 'times')\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", RUNNER, sys.executable, "-c", script])
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([terminal], [], [], 30)[0], seen
            seen += os.read(terminal, 1000)

    until(b"ready")
    for number in range(1, 11):  # each when the one before has arrived: of two that wait a process sees one
        os.write(terminal, b"\x03")
        until(b"got %d" % number)
    os.write(terminal, b"\n")
    try:
        while chunk := os.read(terminal, 1000):
            seen += chunk
    except OSError:  # the other end of the terminal is closed
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    counted = re.search(rb"(\d+) times", seen)
    assert counted and int(counted[1]) == 10


def test_the_command_can_read_the_terminal_and_is_in_its_foreground() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", RUNNER, "sh", "-c", "read line; echo read $line"])
    os.write(terminal, b"hello\n")
    seen = b""
    try:
        while chunk := os.read(terminal, 1000):
            seen += chunk
    except OSError:
        pass
    os.close(terminal)
    os.waitpid(pid, 0)
    assert b"read hello" in seen


def mask(name: str, text: str) -> int:
    """A set of signals in proc(5)'s words; the number of the process may come before it or after it."""
    found = re.search(rf"{name}:\s*([0-9a-f]+)", text)
    assert found
    return int(found[1], 16)


def test_what_the_user_ignores_stays_ignored_and_python_s_own_does_not() -> None:
    script = "grep SigIgn /proc/self/status"

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with runner("sh", "-c", script, preexec_fn=nohup) as process:
        assert process.stdout
        ignored = mask("SigIgn", process.stdout.read())
    # SIGPIPE, which python ignores, is not; glibc's own signals, 32 and 33, do not count
    assert ignored & 0x7FFFFFFF == 1 << (signal.SIGHUP - 1)


def test_the_command_starts_without_blocked_signals() -> None:
    assert mask("SigBlk", run("grep", "SigBlk", "/proc/self/status").stdout) == 0


def test_given_descriptors_are_inherited_and_no_others() -> None:
    reading, writing = os.pipe()
    other = os.open(os.devnull, os.O_RDONLY)
    command = ["sh", "-c", f"ls /proc/$$/fd > /dev/fd/{writing}"]
    assert foreground.run(command, env=os.environ, pass_fds=(writing,)) == 0
    assert not os.get_inheritable(writing)
    os.close(writing)
    with os.fdopen(reading) as stream:
        seen = {int(number) for number in stream.read().split()}
    os.close(other)
    assert writing in seen
    assert other not in seen


def test_output_goes_where_it_was_asked_to_go(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as stream:
        assert foreground.run(["echo", "hello"], env=os.environ, stdout=stream.fileno()) == 0
    assert (tmp_path / "out").read_text() == "hello\n"


def test_the_end_is_seen_though_another_thread_takes_the_signal() -> None:
    """It ends while this thread is busy: without the regular look it would be waited for for ever."""
    code = (
        "import os,sys,threading,time\nfrom edgetool.process import foreground\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "sys.exit(foreground.run(['true'], env=os.environ, started=lambda pid: time.sleep(0.3)))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "no such program"),
        ("no-such-program", "no such program"),
        ("/etc/passwd", "denied"),
        ("/no/such", "no such program"),
    ],
)
def test_a_program_that_cannot_be_run_is_bad_input(name: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        foreground.run([name], env=os.environ)


def test_a_program_in_this_directory_is_pointed_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.sh").touch()
    with pytest.raises(BadInput) as caught:
        foreground.run(["train.sh"], env=os.environ)
    assert caught.value.hint == "did you mean ./train.sh?"


def test_signals_are_as_before_when_it_is_over() -> None:
    # in a process of its own with one thread: with more, as a test runner has, the kernel chooses who gets the signal
    code = """
import os, signal
from edgetool.process import foreground
before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
interrupt = lambda pid: os.kill(os.getpid(), signal.SIGINT)
# an interrupt that came while the command ran was the command's, and is not raised here afterwards
foreground.run(["sh", "-c", "trap : INT; sleep 0.3"], env=os.environ, started=interrupt)
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
try:
    os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit("interrupts no longer arrive")
except KeyboardInterrupt:
    pass
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
