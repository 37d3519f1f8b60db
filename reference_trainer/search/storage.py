"""Where a search keeps its trials: a database, or a journal file."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from reference_trainer.search.counting import queue_again
from reference_trainer.search.errors import SearchError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna.storages import BaseStorage

_JOURNAL = "journal:"
_HEARTBEAT_S = 60
_GRACE_S = 300
_SQLITE_TIMEOUT_S = 300


def default_storage(directory: Path) -> str:
    """Return the URL of the SQLite file in the directory of a search."""
    return f"sqlite:///{directory / 'study.db'}"


@contextmanager
def opened(spec: str) -> Iterator[BaseStorage]:
    """Open a storage, made anew if need be, until the block ends.

    Args:
        spec: ``journal:FILE``, or a database URL as SQLAlchemy takes it.

    Raises:
        SearchError: no storage can be opened there.
    """
    if spec.startswith(_JOURNAL):
        yield _journal(Path(spec.removeprefix(_JOURNAL)))
        return
    if "://" not in spec:
        raise SearchError(
            f"storage {spec!r} is no place for a study; give journal:FILE or a database URL such as "
            "sqlite:///study.db or postgresql://user@host/name"
        )
    storage = _database(spec)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _journal(path: Path) -> JournalStorage:
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except (OSError, ValueError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SearchError(f"could not open the journal {path} as a storage: {reason}") from error


def _database(url: str) -> RDBStorage:
    try:
        sqlite = make_url(url).get_backend_name() == "sqlite"
        engine = (
            {"connect_args": {"timeout": _SQLITE_TIMEOUT_S}} if sqlite else {"pool_pre_ping": True}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return RDBStorage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=_HEARTBEAT_S,
                grace_period=_GRACE_S,
                heartbeat_stale_trial_callback=queue_again,
            )
    except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise SearchError(f"could not open the storage {_shown(url)}: {reason}") from error


def _shown(url: str) -> str:
    """Return the URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return repr(url.partition("://")[0] + "://...")
