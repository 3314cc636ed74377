"""The shared directory: what is refused, what is ignored, and what other users can and cannot do."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetool.errors import ConfigError, EdgetoolError, ResourceUnavailable
from edgetool.scheduler import leases
from edgetool.scheduler.lease_records import Share, new_record, shown_command, write_record
from edgetool.scheduler.leases import LeaseDirectory
from tests.fakes.other_user import NOBODY, as_root, in_a_child


@pytest.fixture
def directory() -> Iterator[LeaseDirectory]:
    # not tmp_path, which other users cannot enter
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield LeaseDirectory(Path(made) / "leases")


def add(directory: LeaseDirectory, command: str = "job") -> tuple[int, str]:
    with directory.locked() as opened:
        record = new_record(command, gpus=(Share("GPU-0", 5),))
        return opened.add_lease(record), record.id


def held(directory: LeaseDirectory) -> list[str]:
    return [entry.record.id for entry in directory.scan().leases if entry.held]


def test_the_directory_is_made_open_to_all_and_sticky_whatever_the_umask(directory: LeaseDirectory) -> None:
    before = os.umask(0o077)
    try:
        descriptor, identity = add(directory)
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o1777
    assert stat.S_IMODE((directory.path / f"lease-{identity}.json").stat().st_mode) == 0o644
    os.close(descriptor)


def test_a_lease_is_held_as_long_as_any_copy_of_its_descriptor_is_open(directory: LeaseDirectory) -> None:
    descriptor, identity = add(directory)
    copy = os.dup(descriptor)
    os.close(descriptor)
    assert held(directory) == [identity]
    assert not directory.remove_if_free(identity)
    os.close(copy)
    assert held(directory) == []
    assert directory.remove_if_free(identity)
    assert list(directory.path.iterdir()) == []


def test_what_killed_processes_left_is_removed_by_their_user(directory: LeaseDirectory) -> None:
    for _ in range(3):
        os.close(add(directory)[0])
    (directory.path / ".new-0123456789abcdef").touch()
    with directory.locked() as opened:
        opened.scan(clean=True)
    assert list(directory.path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o707])
def test_a_directory_in_which_others_can_remove_leases_is_refused(directory: LeaseDirectory, mode: int) -> None:
    directory.path.mkdir()
    directory.path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}") as caught:
        directory.scan()
    assert "chmod 1777" in str(caught.value.hint)


def test_a_private_directory_of_ones_own_is_taken_as_it_is(directory: LeaseDirectory) -> None:
    directory.path.mkdir(mode=0o700)
    os.close(add(directory)[0])
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_a_link_or_a_file_in_place_of_the_directory_is_refused(directory: LeaseDirectory, kind: str) -> None:
    elsewhere = directory.path.with_name("elsewhere")
    if kind == "file":
        directory.path.touch()
    else:
        directory.path.symlink_to(elsewhere)
        if kind == "link":
            elsewhere.mkdir()
    with pytest.raises(ConfigError, match="not a directory"):
        directory.scan()
    assert not elsewhere.exists() or list(elsewhere.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        LeaseDirectory(tmp_path / "file" / "leases").scan()
    assert "EDGETOOL_LOCK_DIR" in str(caught.value.hint)


def strange_files(path: Path, real: str) -> None:
    """Everything that another user could put beside real leases."""
    text = (path / f"lease-{real}.json").read_text()
    (path / "lease-00000000000000aa.json").symlink_to(f"lease-{real}.json")
    elsewhere = path.with_name("elsewhere")  # a text that its owner has not written to be a lease
    elsewhere.write_text(text.replace(real, "00000000000000ab"))
    (path / "lease-00000000000000ab.json").symlink_to(elsewhere)
    os.mkfifo(path / "lease-00000000000000bb.json")
    (path / "lease-00000000000000cc.json").write_text("{" * 100_000)
    (path / "lease-00000000000000dd.json").write_text(text)  # says that it is another one
    os.link(path / f"lease-{real}.json", path / "lease-00000000000000ee.json")
    (path / "lease-00000000000000ff.json").mkdir()
    (path / "wait-999999999999-0000000000000011.json").write_text("null")
    (path / "lease-..json").write_text("{}")
    for number, (key, value) in enumerate(
        {"pid": "x", "gpus": [1], "members": [[1]], "since_unix_s": None, "gpus ": 0, "start_ticks": 1e400}.items()
    ):
        damaged = json.loads(text) | {"id": f"{number:016x}", key: value}
        if key == "gpus ":
            del damaged["gpus"]
        (path / f"lease-{number:016x}.json").write_text(json.dumps(damaged))


def test_files_that_are_no_records_are_ignored(directory: LeaseDirectory) -> None:
    descriptor, identity = add(directory)
    strange_files(directory.path, identity)
    locks = []
    for path in (*directory.path.iterdir(), directory.path.with_name("elsewhere")):
        if path.is_file() and not path.is_symlink():
            locks.append(os.open(path, os.O_RDONLY))
            try:
                fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert identity in path.name or "ee" in path.name
    assert held(directory) == [identity]
    assert directory.scan().waiting == ()
    with directory.locked() as opened:
        opened.scan(clean=True)
        number, name = opened.add_ticket(new_record("next"))
    assert [entry.record.command for entry in directory.scan().waiting] == ["next"]
    for lock in (*locks, number, descriptor):
        os.close(lock)
    assert name.startswith("wait-999999999999-")  # the last number there is, and still a place


def test_a_record_may_grow_and_shrink_while_it_is_held(directory: LeaseDirectory) -> None:
    descriptor, identity = add(directory, "a rather long command line " * 10)
    entry = directory.scan().leases[0]
    for command in ("short", "x" * 400, "y"):
        record = dataclasses.replace(entry.record, command=command)
        write_record(descriptor, record)
        assert directory.scan().leases[0].record == record
    os.close(descriptor)
    assert identity == entry.record.id


def test_the_owner_is_told_from_a_later_process_of_the_same_number(directory: LeaseDirectory) -> None:
    descriptor, _ = add(directory)
    (entry,) = directory.scan().leases
    assert not entry.orphaned
    for other in (
        dataclasses.replace(entry.record, start_ticks=entry.record.start_ticks + 1),
        dataclasses.replace(entry.record, pid=2**22 + 1),
        dataclasses.replace(entry.record, released=True),
    ):
        write_record(descriptor, other)
        assert directory.scan().leases[0].orphaned
    # in another container the number means another process: only the lock counts
    write_record(descriptor, dataclasses.replace(entry.record, pid=2**22 + 1, pid_namespace=1))
    assert not directory.scan().leases[0].orphaned
    os.close(descriptor)


def test_grants_are_made_one_at_a_time_and_who_is_in_the_way_is_named(directory: LeaseDirectory) -> None:
    with directory.locked():
        answer = in_a_child(lambda: directory.locked(limit_s=0.05).__enter__())
    assert answer.startswith("ResourceUnavailable")
    assert f"process {os.getpid()} of " in answer
    assert in_a_child(lambda: directory.locked(limit_s=0.05).__enter__()).startswith(
        "<edgetool.scheduler.leases.OpenDirectory"
    )


def test_a_directory_that_was_replaced_meanwhile_is_not_the_one_that_is_locked(directory: LeaseDirectory) -> None:
    descriptor, _ = add(directory)
    with directory.opened() as old:
        directory.path.rename(directory.path.with_name("old"))
        fcntl.flock(old, fcntl.LOCK_EX)
        identity = add(directory)[1]  # would wait for ever on the old one
    assert held(directory) == [identity]
    os.close(descriptor)


def test_looking_never_waits_for_a_grant(directory: LeaseDirectory) -> None:
    descriptor, identity = add(directory)
    with directory.locked():
        assert in_a_child(lambda: held(directory)) == repr([identity])
    os.close(descriptor)


@as_root
def test_other_users_see_our_leases_and_can_neither_change_nor_remove_them(directory: LeaseDirectory) -> None:
    descriptor, identity = add(directory, "ours")
    path = directory.path / f"lease-{identity}.json"

    def seen() -> tuple[str, str, bool]:
        (entry,) = directory.scan().leases
        return entry.record.command, entry.user, entry.orphaned

    assert in_a_child(seen, NOBODY) == repr(("ours", "root", False))
    assert "PermissionError" in in_a_child(path.unlink, NOBODY)
    assert "PermissionError" in in_a_child(lambda: path.write_text("{}"), NOBODY)
    assert "PermissionError" in in_a_child(lambda: path.rename(path.with_name("x")), NOBODY)
    assert in_a_child(lambda: add(directory, "theirs")[0] > 2, NOBODY) == "True"
    assert in_a_child(lambda: directory.remove_if_free(identity), NOBODY) == "False"
    os.close(descriptor)
    # nobody can lock a lease that is over and so keep it: it is told by its owner's processes only
    assert held(directory) == []


@as_root
def test_who_says_to_be_somebody_else_is_not_believed(directory: LeaseDirectory) -> None:
    def forge() -> str:
        with directory.locked() as opened:
            record = new_record("python", gpus=(Share("GPU-0", 1),))
            opened.add_lease(record)
            return next(entry.user for entry in directory.scan().leases if entry.record.id == record.id)

    add(directory)
    assert in_a_child(forge, NOBODY) == repr("nobody")


@as_root
def test_grants_of_two_users_keep_each_other_out(directory: LeaseDirectory) -> None:
    os.close(add(directory)[0])
    with directory.locked():
        assert "ResourceUnavailable" in in_a_child(lambda: directory.locked(limit_s=0.05).__enter__(), NOBODY)

    def hold_and_look() -> str:
        with directory.locked():
            return "held"

    assert in_a_child(hold_and_look, NOBODY) == repr("held")


@as_root
@pytest.mark.parametrize(("mode", "accepted"), [(0o1777, True), (0o755, False), (0o700, False), (0o1775, False)])
def test_a_directory_of_another_user_must_be_open_to_all(
    directory: LeaseDirectory, mode: int, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_MAKING_LIMIT_S", 0.1)
    directory.path.mkdir()
    os.chown(directory.path, 1, 1)
    directory.path.chmod(mode)

    def use() -> str:
        os.close(add(directory)[0])
        return "used"

    answer = in_a_child(use, NOBODY)
    assert (answer == repr("used")) if accepted else answer.startswith("ConfigError")


@as_root
@pytest.mark.parametrize("looker", [None, NOBODY])
def test_who_comes_while_another_user_makes_the_directory_waits_for_it(
    directory: LeaseDirectory, looker: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_MAKING_LIMIT_S", 60.0)
    directory.path.mkdir(mode=0o700)
    os.chown(directory.path, 1, 1)  # made, and not yet opened to all
    opening = threading.Timer(0.2, directory.path.chmod, (0o1777,))
    opening.start()
    assert in_a_child(lambda: directory.scan().leases, looker) == "()"
    opening.join()


def test_a_lock_directory_that_is_full_or_closed_is_a_clear_error(
    directory: LeaseDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    add(directory)
    monkeypatch.setattr(leases, "write_record", full)
    with pytest.raises(ResourceUnavailable, match="No space left"):
        add(directory)
    assert not [path for path in directory.path.iterdir() if path.name.startswith(".new-")]


def test_errors_of_the_directory_are_never_bugs(directory: LeaseDirectory) -> None:
    directory.path.mkdir()
    directory.path.chmod(0o555)
    answer = in_a_child(lambda: add(directory), None if os.geteuid() else NOBODY)
    assert answer.startswith(("ConfigError", "ResourceUnavailable"))
    assert issubclass(ConfigError, EdgetoolError)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["python", "train.py", "--lr", "1e-4"], "python train.py --lr 1e-4"),
        (["vllm", "--api-key", "hunter2", "--port", "1"], "vllm --api-key *** --port 1"),
        (["vllm", "--api-key=hunter2"], "vllm --api-key=***"),
        (["env", "HF_TOKEN=hunter2", "python"], "env HF_TOKEN=*** python"),
        (["x", "--password", "hunter2"], "x --password ***"),
        (["sh", "-c", "a\nb\tc"], "sh -c a b c"),
        (["python", "tokenizer.py"], "python tokenizer.py"),
    ],
)
def test_commands_are_shown_without_secrets(arguments: list[str], shown: str) -> None:
    assert shown_command(arguments) == shown


def test_the_shared_directory_is_never_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shared = tmp_path / "run" / "edgetool"
    monkeypatch.setattr(leases, "SHARED_DIRECTORY", shared)
    assert leases.choose_directory(tmp_path) == tmp_path
    assert leases.choose_directory(None) == tmp_path / "state" / "edgetool" / "leases"  # no /run/lock at all
    shared.mkdir(parents=True)
    assert leases.choose_directory(None) == shared


def test_a_record_that_nobody_would_read_is_not_written(directory: LeaseDirectory) -> None:
    with directory.locked() as opened, pytest.raises(ValueError, match="read by nobody"):
        opened.add_lease(new_record("x", gpus=tuple(Share(f"GPU-{n}", n) for n in range(5000))))
    assert list(directory.path.iterdir()) == []
