"""Opening a ledger: new ones, newer ones, and files that are no ledger."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fsu_ray.config import Timings
from fsu_ray.errors import (
    FsuError,
    InvalidConfig,
    LedgerUnavailable,
    StorageError,
)
from fsu_ray.records import ModelSpec, Policy
from fsu_ray.storage.ledger import Ledger, open_ledger


def one_line(caught: pytest.ExceptionInfo[FsuError]) -> bool:
    return "\n" not in str(caught.value)


class TestOpening:
    def test_makes_the_folders_of_a_new_ledger(self, tmp_path: Path) -> None:
        file = tmp_path / "a folder" / "below" / "ledger.db"
        with open_ledger(f"sqlite:///{file}") as ledger:
            assert ledger.models.all() == []
        assert file.exists()

    def test_several_processes_open_a_new_postgresql_ledger_at_once(self, postgresql: str, in_processes: Any) -> None:
        script = """
with open_ledger(sys.argv[1]) as ledger:
    print(len(ledger.models.all()))
"""
        assert in_processes(script, postgresql, processes=4) == ["0\n"] * 4

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"port": 9}, "refused"),
            ({"database": "nowhere"}, 'database "nowhere" does not exist'),
            ({"username": "nobody", "password": "secret"}, 'role "nobody" does not exist'),
        ],
    )
    def test_a_server_that_cannot_be_used_is_explained(
        self, server: sa.Engine, change: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(InvalidConfig, match=words) as caught:
            open_ledger(server.url.set(**change).render_as_string(hide_password=False))
        assert one_line(caught)
        assert "secret" not in str(caught.value)

    def test_several_processes_open_a_new_ledger_at_once(self, tmp_path: Path, in_processes: Any) -> None:
        script = """
import os
folder, number = sys.argv[1:]
for turn in range(6):
    with open_ledger(f"sqlite:///{folder}/{turn}/ledger.db") as ledger:
        print(len(ledger.models.all()))
"""
        assert in_processes(script, str(tmp_path), processes=4) == ["0\n" * 6] * 4

    def test_waits_for_a_process_that_is_making_the_ledger(self, file: Path) -> None:
        """Turning on WAL fails at once while another connection is about to write: it must be retried."""
        other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        later = threading.Timer(0.3, other.execute, ["COMMIT"])
        later.start()
        with open_ledger(f"sqlite:///{file}") as ledger:
            assert ledger.models.all() == []
        later.join()
        other.close()

    def test_a_newer_ledger_is_left_alone(self, ledger: Ledger, url: str, raw: Any) -> None:
        raw.execute("UPDATE fsu_revision SET version_num = '0042'")

        with pytest.raises(InvalidConfig, match=r"was written by a newer fsu_ray \(revision 0042\); upgrade"):
            open_ledger(url)

    def test_a_database_of_another_program_is_left_alone(self, url: str) -> None:
        engine = sa.create_engine(url)
        with engine.begin() as other:
            other.exec_driver_sql("CREATE TABLE models (name text)")

        with pytest.raises(InvalidConfig, match="of another program; set FSU_LEDGER"):
            open_ledger(url)
        assert sa.inspect(engine).get_table_names() == ["models"]
        engine.dispose()

    def test_a_file_that_is_no_database_is_explained(self, file: Path) -> None:
        file.write_text("dear diary, " * 100)

        with pytest.raises(InvalidConfig, match=r"not a database\); set FSU_LEDGER to") as caught:
            open_ledger(f"sqlite:///{file}")
        assert one_line(caught)

    def test_a_folder_that_cannot_be_written_to_is_explained(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")

        for place in (tmp_path / "file" / "ledger.db", Path("/proc/fsu/ledger.db"), Path("/proc/ledger.db"), tmp_path):
            with pytest.raises(InvalidConfig, match=r"cannot be (made|opened) \(.+\); set FSU_LEDGER to") as caught:
                open_ledger(f"sqlite:///{place}")
            assert one_line(caught)

    @pytest.mark.parametrize(
        "url",
        ["", "no url", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=true", "mysql://me:secret@host/x"],
    )
    def test_a_url_that_names_no_ledger_is_explained(self, url: str) -> None:
        with pytest.raises(InvalidConfig, match="set FSU_LEDGER to sqlite:///") as caught:
            open_ledger(url)
        assert "secret" not in str(caught.value)

    def test_a_ledger_that_breaks_while_it_is_open_is_explained(self, file: Path) -> None:
        ledger = open_ledger(f"sqlite:///{file}")
        ledger.close()
        for part in file.parent.glob("ledger.db*"):
            part.unlink()
        file.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)

        with pytest.raises(StorageError, match=r"ledger\.db: .+ then try again") as caught:
            ledger.models.all()
        assert one_line(caught)

    def test_a_ledger_that_somebody_holds_is_waited_for_and_then_explained(self, file: Path) -> None:
        with open_ledger(f"sqlite:///{file}", Timings(lock=0.2)) as ledger:
            other = sqlite3.connect(file, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(
                LedgerUnavailable, match=r"ledger\.db: database is locked; check .+ then try again"
            ) as caught:
                ledger.models.set_policy("digits", Policy())
            assert one_line(caught)
            assert ledger.models.all() == [], "reading waits for nobody"
            other.execute("ROLLBACK")
            other.close()

    def test_a_ledger_that_may_only_be_read_is_explained(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a user who does not own its folder and file: rows can be read, nothing is half written."""
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            with open_ledger(f"sqlite:///{folder}/ledger.db") as ledger:
                ledger.models.register("m", ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10), "w")
            for each in folder.iterdir():
                each.chmod(0o444)
            folder.chmod(0o555)
            with _nobody(), pytest.raises((InvalidConfig, StorageError)) as caught:
                open_ledger(f"sqlite:///{folder}/ledger.db").models.set_policy("m", Policy())
            assert "ledger.db" in str(caught.value)
            assert re.search("readonly|unable to open", str(caught.value))
            assert one_line(caught)
            folder.chmod(0o755)


@contextlib.contextmanager
def _nobody() -> Iterator[None]:
    """Act as another user for a moment, since root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
