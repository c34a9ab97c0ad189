"""Where a study is kept: a journal file on a shared disk, or any database that Optuna takes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from segtrain.errors import UserError, first_line

if TYPE_CHECKING:
    import optuna

#: Attempts to open a database: workers that start at once make the tables of a fresh one at once.
ATTEMPTS = 4


def open_storage(storage: str) -> optuna.storages.BaseStorage:
    """The storage at a URL, or in a journal file at a path; it is made if it is not there.

    Raises:
        UserError: it cannot be used.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    from optuna.storages.journal import JournalFileBackend

    with reported(storage):
        if "://" in storage:
            return _open_database(storage)
        # Absolute, because the lock is a symbolic link to the file: with a relative path it would
        # lead nowhere, and the lock of a killed worker would never be taken for an old one.
        path = Path(storage).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(path))
        return optuna.storages.JournalStorage(backend)


def _open_database(url: str) -> optuna.storages.BaseStorage:
    import optuna
    from sqlalchemy.exc import DatabaseError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return optuna.storages.RDBStorage(url)
        except DatabaseError:
            if attempt == ATTEMPTS:
                raise
            time.sleep(attempt)
    raise AssertionError


@contextmanager
def reported(storage: str) -> Iterator[None]:
    """Turn what a storage raises, whichever it is, into the one line of a UserError."""
    try:
        yield
    except UserError:
        raise
    # Each database has its own driver with its own errors; nothing but a storage runs in here.
    except Exception as error:
        reason = error.__cause__ or error
        if isinstance(reason, ModuleNotFoundError):
            raise UserError(
                f"storage={shown_storage(storage)} needs {reason.name}: "
                f"uv run --with {reason.name} sweep.py ..."
            ) from error
        raise UserError(f"storage={shown_storage(storage)}: {first_line(reason)}") from error


def shown_storage(storage: str) -> str:
    """A storage as messages show it: without a password."""
    password = urlsplit(storage).password if "://" in storage else None
    return storage.replace(f":{password}@", ":***@") if password else storage
