"""Object stores: the objects under ``gs://BUCKET/PATH`` and ``s3://BUCKET/PATH``, by TensorStore.

A store has no folders, no renaming and no file locks. It has objects that are written whole or not
at all, that every reader sees from then on, and that can be written on condition that nobody else
has written them meanwhile. What many objects make up is therefore committed by one that names
them, written last; without it they are as good as absent.

Credentials are those of the store's own tools: for Google ``GOOGLE_APPLICATION_CREDENTIALS``, what
``gcloud auth application-default login`` leaves, or a machine's service account; for S3
``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``, ``~/.aws`` (``AWS_PROFILE``), or a machine's
role. ``AWS_ENDPOINT_URL`` and ``AWS_REGION`` lead to other stores that speak S3, and
``TENSORSTORE_GCS_HTTP_URL`` to another server that speaks Google's.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_jax.core.errors import ConfigError, DiskFullError, StepError, StorageError

DRIVERS = {"gs": "gcs", "s3": "s3"}
#: A request that fails for the moment is made so often again, after 0.5 s, 1 s, 2 s ... 8 s.
RETRIES = 6
_FIRST_DELAY, _LAST_DELAY = "500ms", "8s"
#: The generation of an object that is not there.
ABSENT = b"\x02"
_THREADS = 16
#: A connection that takes longer, or over which so little comes for so long, is a failed request.
_LIMITS = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1000",
}
#: words of TensorStore's errors -> what is wrong and what to do about it
_REASONS: tuple[tuple[tuple[str, ...], type[StepError], str], ...] = (
    (
        ("'507'", "quotaexceeded", "insufficient storage"),
        DiskFullError,
        "the store's quota is used up: free some of it or have it raised",
    ),
    (
        ("'429'", "ratelimitexceeded", "slowdown", "resource_exhausted"),
        StorageError,
        "the store says that it is asked too often, and went on saying so: start again later, "
        "or save less often (run.checkpoint.every_steps)",
    ),
    (
        ("unauthenticated", "'401'", "credentials", "invalidaccesskeyid", "signaturedoesnotmatch"),
        ConfigError,
        "the store does not know who asks: for gs:// run `gcloud auth application-default login` "
        "or set GOOGLE_APPLICATION_CREDENTIALS; for s3:// set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    ),
    (
        ("permission_denied", "'403'", "accessdenied"),
        ConfigError,
        "who asks may not do that there (a run must read, write, list and delete objects: "
        "roles/storage.objectUser; s3:GetObject, PutObject, DeleteObject, ListBucket), or brought "
        "no credentials (gcloud auth application-default login; AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)",
    ),
    (
        ("not_found", "'404'", "nosuchbucket"),
        ConfigError,
        "there is no such bucket: check its name, or make it (gcloud storage buckets create; "
        "aws s3 mb)",
    ),
)


def is_url(name: object) -> bool:
    """Whether a name is one of an object store, known or not, and no path of a file system."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(name)) is not None


def local(path: Path | str, what: str) -> Path:
    """A path of a file system.

    Raises:
      ConfigError: it is a URL, which ``what`` (a setting, a command's option) cannot be.
    """
    # A Path has one of the two slashes left.
    if is_url(path) or str(path).startswith(tuple(f"{scheme}:/" for scheme in DRIVERS)):
        raise ConfigError(
            f"{what} is {path}: only run directories, data.path and data.cache_dir may be in an "
            "object store. Give a folder"
        )
    return Path(path).expanduser()


@dataclass(frozen=True)
class Objects:
    """All objects whose names begin with a URL and a slash; names below are relative to it.

    Every method raises ConfigError where asking again cannot help (no such bucket, no credentials,
    no permission), DiskFullError for a quota that is used up, and StorageError where the store does
    not answer or refuses after ``RETRIES`` attempts. The error names the object.
    """

    scheme: str
    bucket: str
    path: str

    @classmethod
    def at(cls, url: str) -> Objects:
        """Raises ConfigError for a URL that names no bucket of a known kind of store."""
        scheme, _, rest = str(url).partition("://")
        bucket, _, path = rest.partition("/")
        if scheme not in DRIVERS:
            known = " and ".join(f"{name}://" for name in DRIVERS)
            raise ConfigError(f"{url}: the object stores that are known are {known}")
        path = path.rstrip("/")
        parts = path.split("/") if path else []
        if not bucket or any(part in ("", ".", "..") for part in parts):
            raise ConfigError(f"{url}: write it as {scheme}://BUCKET/PATH")
        return cls(scheme, bucket, path)

    def __truediv__(self, name: str) -> Objects:
        return Objects(self.scheme, self.bucket, f"{self.path}/{name}" if self.path else name)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.path}".rstrip("/")

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> Objects:
        return Objects(self.scheme, self.bucket, self.path.rpartition("/")[0])

    @property
    def spec(self) -> dict[str, Any]:
        """TensorStore's specification of the key-value store that the objects are."""
        return _bucket(self.scheme, self.bucket) | {"path": self._key("")}

    def _key(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name

    def _ask(self, name: str, do: str, ask: Callable[[Any], Any]) -> Any:
        try:
            return ask(_opened(self.scheme, self.bucket)).result()
        except Exception as error:  # noqa: BLE001 - TensorStore has an exception for every status
            raise failure(error, f"{do} {self}/{name}".rstrip("/")) from error

    def list(self) -> list[str]:
        """Names of all objects, sorted."""
        import tensorstore as ts

        prefix = self._key("").encode()
        keys = ts.KvStore.KeyRange(prefix, prefix[:-1] + b"0") if prefix else ts.KvStore.KeyRange()
        found = self._ask("", "list", lambda store: store.list(keys))
        # A server may know nothing of ranges and answer with all there is.
        return sorted(key[len(prefix) :].decode() for key in found if key.startswith(prefix))

    def get(self, name: str) -> bytes | None:
        """An object; None if there is none."""
        key = self._key(name)
        found = self._ask(name, "read", lambda store: store.read(key))
        return found.value if found.state == "value" else None

    def read(self, name: str) -> bytes:
        """An object. Raises FileNotFoundError if there is none."""
        data = self.get(name)
        if data is None:
            raise FileNotFoundError(2, "there is no such object", f"{self}/{name}")
        return data

    def generation(self, name: str) -> bytes:
        """What changes whenever an object is written; ``ABSENT`` if there is none."""
        key = self._key(name)
        # Of no byte at all, which is one request for what is known about the object.
        read = self._ask(name, "read", lambda store: store.read(key, byte_range=slice(0, 0)))
        return read.stamp.generation

    def write(self, name: str, data: bytes, *, instead_of: bytes | None = None) -> bytes | None:
        """Writes an object.

        Args:
          instead_of: the generation that it must have at the moment, ``ABSENT`` for none at all.

        Returns:
          The new generation; None if the object had another one, and is left as it is.
        """
        key = self._key(name)
        made = self._ask(name, "write", lambda store: store.write(key, data, if_equal=instead_of))
        return made.generation or None

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects, those that are not there too."""

        def delete(name: str) -> None:
            key = self._key(name)
            self._ask(name, "delete", lambda store: store.write(key, None))

        together(delete, names)

    def upload(self, folder: Path, names: Iterable[str]) -> None:
        """Writes files of a folder as objects of the same names."""
        together(lambda name: self.write(name, (folder / name).read_bytes()), names)

    def download(self, folder: Path, names: Iterable[str]) -> None:
        """Writes objects as files of the same names into a folder.

        Raises:
          FileNotFoundError: one is not there.
          ConfigError: its name would lead out of the folder.
        """

        def fetch(name: str) -> None:
            if any(part in ("", ".", "..") for part in name.split("/")):
                raise ConfigError(f"{self}/{name} has a name that no file can have")
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.read(name))

        together(fetch, names)


def together(do: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
    """What a function gives for each name, several at once: a request is mostly waiting."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(do, names))


def failure(error: Exception, doing: str) -> StepError:
    """The error of a request that failed; ``doing`` says which: ``write gs://bucket/object``."""
    if isinstance(error, StepError):
        return error
    text = str(error)
    words = text.lower()
    for signs, kind, remedy in _REASONS:
        if any(sign in words for sign in signs):
            return kind(f"cannot {doing}: {remedy} ({_brief(text)})")
    return StorageError(
        f"cannot {doing}: the store failed or did not answer; what may pass was tried {RETRIES} "
        f"times more ({_brief(text)})"
    )


def _brief(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]}..."


def _bucket(scheme: str, bucket: str) -> dict[str, Any]:
    spec: dict[str, Any] = {"driver": DRIVERS[scheme], "bucket": bucket}
    if scheme == "s3":
        spec["use_conditional_write"] = True
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        elif region:
            spec["aws_region"] = region
    return spec


@functools.cache
def context() -> Any:
    """TensorStore's context of all requests: how often, and for how long, they are tried."""
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)
    import tensorstore as ts

    tries = {
        "max_retries": RETRIES,
        "initial_delay": _FIRST_DELAY,
        "max_delay": _LAST_DELAY,
    }
    return ts.Context({"gcs_request_retries": tries, "s3_request_retries": tries})


@functools.cache
def _opened(scheme: str, bucket: str) -> Any:
    limits = context()
    import tensorstore as ts

    try:
        return ts.KvStore.open(_bucket(scheme, bucket), context=limits).result()
    except ValueError as error:
        raise ConfigError(f"{scheme}://{bucket} is no bucket: {_brief(str(error))}") from None


def staged(objects: Objects, *names: str) -> Path:
    """A folder of this process with copies of objects: those of these names, and below them."""
    import atexit
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="step_jax_")) / objects.name
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    wanted = tuple(f"{name}/" for name in names)
    found = [name for name in objects.list() if name in names or name.startswith(wanted)]
    objects.download(folder, found)
    return folder
