import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from local_postgresql import (
    BIN_VARIABLE,
    START_ATTEMPTS,
    LocalPostgreSQL,
    find_postgresql,
    local_postgresql,
    running,
    until,
)
from sqlalchemy import Connection, NullPool, create_engine, make_url
from sqlalchemy.exc import OperationalError

STARTS_A_SERVER = """
import json, time
from local_postgresql import local_postgresql

with local_postgresql() as server:
    print(json.dumps([str(server.folder), server.pid]), flush=True)
    time.sleep(600)
"""


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        yield connection


def processes_of(server: LocalPostgreSQL) -> list[int]:
    """The postmaster and its helpers."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()
    pairs = [tuple(map(int, line.split())) for line in listed]
    return [pid for pid, parent in pairs if server.pid in {pid, parent}]


def shared_memory_of(server: LocalPostgreSQL) -> str:
    """The number of the System V segment that its lock file names."""
    return (server.folder / "data/postmaster.pid").read_text().splitlines()[6].split()[1]


def shared_memory() -> set[str]:
    listed = subprocess.run(["ipcs", "-m"], capture_output=True, text=True).stdout.splitlines()
    return {number for line in listed for number in line.split()[1:2]}


def test_server_answers_through_sqlalchemy(postgresql_url):
    with connected(postgresql_url) as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1
        assert connection.exec_driver_sql("SHOW fsync").scalar_one() == "on"


def test_database_is_empty_and_goes_although_somebody_is_connected(postgresql, postgresql_url):
    with ExitStack() as stack:
        with postgresql.database() as url:
            assert make_url(url).database != make_url(postgresql_url).database
            connection = stack.enter_context(connected(url))
            assert connection.exec_driver_sql("SELECT count(*) FROM pg_stat_user_tables").scalar_one() == 0
        with pytest.raises(OperationalError, match="does not exist"), connected(url):
            pass
        connection.invalidate()


def test_server_listens_on_loopback_only(postgresql):
    with connected(postgresql.url()) as connection:
        assert connection.exec_driver_sql("SHOW listen_addresses").scalar_one() == "127.0.0.1"
    # Who listens on all addresses also answers on the rest of 127.0.0.0/8.
    with pytest.raises((ConnectionRefusedError, TimeoutError)):
        socket.create_connection(("127.0.0.2", postgresql.port), timeout=1)


def test_password_is_needed_and_not_shown(postgresql):
    guessed = make_url(postgresql.url()).set(password="guessed").render_as_string(hide_password=False)
    with pytest.raises(OperationalError, match="password authentication failed"), connected(guessed):
        pass
    assert postgresql.password.get_secret_value() not in repr(postgresql)


def test_killed_server_keeps_what_was_committed_and_leaves_nothing_when_closed(postgresql):
    with local_postgresql() as server:
        with server.database() as url:
            with connected(url) as connection:
                connection.exec_driver_sql("CREATE TABLE kept AS SELECT 7 AS number")
                connection.commit()
                connection.exec_driver_sql("INSERT INTO kept VALUES (8)")
                killed = processes_of(server)
                assert len(killed) > 2
                server.kill()
                assert not running(*killed)
                connection.invalidate()
            server.start_again()
            assert server.pid not in killed
            with connected(url) as connection:
                assert connection.exec_driver_sql("SELECT number FROM kept").scalars().all() == [7]
        pids = processes_of(server)
        segment = shared_memory_of(server)
        server.kill()
        assert segment in shared_memory()
    assert segment not in shared_memory()
    assert not running(*pids)
    assert not server.folder.exists()


def test_stopped_server_starts_again_with_its_databases(postgresql, postgresql_url):
    with connected(postgresql_url) as connection:
        connection.exec_driver_sql("CREATE TABLE kept ()")
        connection.commit()
    postgresql.stop()
    assert not postgresql.runs
    postgresql.start_again()
    with connected(postgresql_url) as connection:
        connection.exec_driver_sql("SELECT * FROM kept")


def test_database_is_dropped_although_the_test_left_the_server_dead(postgresql):
    with postgresql.database() as url:
        postgresql.kill()
    with pytest.raises(OperationalError, match="does not exist"), connected(url):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_nothing_stays_of_a_server_whose_python_was_killed(postgresql):
    program = subprocess.Popen(
        [sys.executable, "-c", STARTS_A_SERVER], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    with program:
        folder, pid = json.loads(program.stdout.readline())
        assert running(pid)
        program.kill()
    until(lambda: not running(pid) and not Path(folder).exists(), what="server and folder are gone", timeout_s=20)


@pytest.fixture
def programs(temporary, monkeypatch) -> Path:
    """A folder for programs that take the place of PostgreSQL's. Its user, who may be another, writes there."""
    temporary.chmod(0o777)
    monkeypatch.setenv(BIN_VARIABLE, str(temporary))
    return temporary


def write_program(file: Path, script: str) -> None:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_port_that_somebody_else_took_is_tried_again_with_another(programs):
    write_program(programs / "initdb", "exit 0")
    write_program(programs / "postgres", f'echo "$4" >>{programs}/ports; echo "Address already in use" >&2; exit 1')
    with pytest.raises(RuntimeError, match=r"status 1 while it started: .*already in use"), local_postgresql():
        pass
    ports = (programs / "ports").read_text().splitlines()
    assert len(set(ports)) == START_ATTEMPTS


def test_failed_initdb_is_quoted_and_leaves_nothing(programs, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(programs))
    write_program(programs / "initdb", "echo 'no room' >&2; exit 3")
    shutil.copy(programs / "initdb", programs / "postgres")
    with pytest.raises(RuntimeError, match="status 3: no room"), local_postgresql():
        pass
    assert {file.name for file in programs.iterdir()} == {"initdb", "postgres"}


def test_missing_server_is_an_error_that_says_how_to_install_it(programs):
    assert find_postgresql() is None
    with pytest.raises(RuntimeError, match=r"apt install postgresql.*BROKER_FL_POSTGRESQL_BIN"), local_postgresql():
        pass
