"""Checkpoints under a URL that fsspec knows (s3://, gs://, a mounted disk, …).

<url>/step-000120/<files>, then <url>/step-000120/MANIFEST.json    the manifest last: without it there is none
<url>/.uploading/step-000130    the digest of the manifest whose files are being put there
<url>/.pins                     steps that are never deleted, as json
<url>/.old/step-000120.json     the manifest of one that was withdrawn
"""

import json
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rlkd.core.errors import PreflightError
from rlkd.core.faults import fault
from rlkd.store.manifest import LARGEST, MANIFEST, Manifest, as_bytes, parse
from rlkd.store.names import PINS, of_step, step_of

SLOWEST = 1e6  # bytes a second: a transfer may take its size over this, beside `timeout_s`
_ON_DISK = ("file", "local")
_NO_BUCKETS = (*_ON_DISK, "memory")


class Remote:
    """Every method asks the store again, and raises OSError with the store's reason; TimeoutError after `timeout_s`
    (and what a file's size allows). May be used from any thread."""

    def __init__(self, url: str, timeout_s: int | float = 60.0, **options: Any) -> None:
        """`options` go to fsspec. PreflightError RLKD-E190 if nothing installed can open such a URL."""
        import fsspec

        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        protocol = url.partition("://")[0] if "://" in url else "file"
        try:
            more = {"auto_mkdir": True} if protocol in _ON_DISK else {"use_listings_cache": False}
            self.fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **more, **options)
            self.root = str(root).rstrip("/")
            if not self.root:
                raise ValueError("it names no folder")
        except (ImportError, ValueError, TypeError, OSError) as e:
            raise PreflightError(
                "RLKD-E190",
                f"checkpoint.remote={url} cannot be used: {e}",
                where="checkpoint.remote",
                fix="pip install 'rlkd[s3]' for s3://, or give a URL that fsspec knows",
            ) from e
        self._buckets = protocol not in _NO_BUCKETS

    def steps(self) -> list[int]:
        """Steps with a manifest, oldest first."""
        return [step for step in self.begun() if self._exists(f"{self._at(step)}/{MANIFEST}")]

    def begun(self) -> list[int]:
        """Steps of which there is anything, oldest first. OSError too if there is no such bucket."""
        try:
            listed = self._ask("listing", self.fs.ls, self.root, detail=False)
        except FileNotFoundError:
            bucket = self.root.split("/")[0]
            if self._buckets and not self._exists(bucket):
                raise OSError(f"there is no {bucket} there") from None
            return []
        found = (step_of(str(name).rstrip("/").rpartition("/")[2]) for name in listed)
        return sorted(step for step in found if step is not None)

    def manifest(self, step: int) -> Manifest:
        """CheckpointError as `manifest.read`; FileNotFoundError if there is none."""
        path = f"{self._at(step)}/{MANIFEST}"
        if (size := self._ask(f"size of {path}", self.fs.info, path)["size"]) > LARGEST:
            return parse(b"0" * (LARGEST + 1), path)
        return parse(self._ask(path, self.fs.cat_file, path, size=size), path)

    def upload(self, directory: Path, manifest: Manifest) -> bool:
        """Copy a checkpoint; False if it was there already. After a failure it goes on: files that are there stay."""
        at, marker = self._at(manifest.step), f"{self.root}/.uploading/{of_step(manifest.step)}"
        if self._exists(f"{at}/{MANIFEST}") and self._read(f"{at}/{MANIFEST}") == as_bytes(manifest):
            return False
        if self._read(marker) != manifest.digest.encode():  # what is there may be of another attempt at this step
            self.remove(manifest.step)
            self._ask(marker, self.fs.pipe_file, marker, manifest.digest.encode())
        there = self._sizes(manifest.step)
        for file in manifest.files:
            if there.get(file.path) != file.size:
                fault("upload.file")
                there_too = f"{at}/{file.path}"
                self._ask(there_too, self.fs.put_file, str(directory / file.path), there_too, size=file.size)
        if wrong := self.problems(manifest):
            raise OSError(f"after the upload to {at}: {wrong[0]}")
        fault("upload.before_manifest")
        self._ask("manifest", self.fs.pipe_file, f"{at}/{MANIFEST}", as_bytes(manifest))
        fault("upload.after_manifest")
        self._delete(marker)
        return True

    def problems(self, manifest: Manifest) -> list[str]:
        """Files that are missing there or have another size, a line each. Their content is not looked at."""
        there = self._sizes(manifest.step)
        return [
            f"{f.path}: has {there[f.path]} bytes, not {f.size}" if f.path in there else f"{f.path}: is missing"
            for f in manifest.files
            if there.get(f.path) != f.size
        ]

    def download(self, manifest: Manifest, directory: Path) -> None:
        """Copy a checkpoint's files into an empty directory, or that of a try before. What comes is not verified."""
        for file in manifest.files:
            target = directory / file.path
            if target.exists() and target.stat().st_size == file.size:
                continue  # a try before brought it
            target.parent.mkdir(parents=True, exist_ok=True)
            source = f"{self._at(manifest.step)}/{file.path}"
            self._ask(source, self.fs.get_file, source, str(target), size=file.size)

    def remove(self, step: int) -> None:
        """Delete a step: its manifest first, so that it is whole or none at every moment."""
        at = self._at(step)
        self._delete(f"{at}/{MANIFEST}")
        fault("upload.remove")
        if self._exists(at):
            self._ask(f"deleting {at}", self.fs.rm, at, recursive=True)

    def withdraw(self, step: int) -> None:
        """No checkpoint any more: its manifest goes to `.old/`, its files stay until a newer checkpoint is there."""
        manifest = f"{self._at(step)}/{MANIFEST}"
        old = f"{self.root}/.old/{of_step(step)}.json"
        self._ask(old, self.fs.pipe_file, old, self._read(manifest) or b"")
        self._delete(manifest)

    def pins(self) -> set[int]:
        """OSError also if they are no json: then nobody knows what may be deleted."""
        try:
            pins = json.loads(self._read(f"{self.root}/{PINS}") or b"[]")
            return {int(step) for step in pins}
        except (ValueError, TypeError, RecursionError) as e:
            raise OSError(f"{self.url}/{PINS} is no list of steps: {e}") from e

    def set_pins(self, steps: Collection[int]) -> None:
        self._ask(PINS, self.fs.pipe_file, f"{self.root}/{PINS}", json.dumps(sorted(steps)).encode())

    def _at(self, step: int) -> str:
        return f"{self.root}/{of_step(step)}"

    def _exists(self, path: str) -> bool:
        return bool(self._ask(f"looking for {path}", self.fs.exists, path))

    def _read(self, path: str) -> bytes | None:
        """A small file's content; None if it is not there."""
        try:
            return bytes(self._ask(path, self.fs.cat_file, path))
        except FileNotFoundError:
            return None

    def _delete(self, path: str) -> None:
        if self._exists(path):
            self._ask(f"deleting {path}", self.fs.rm_file, path)

    def _sizes(self, step: int) -> Mapping[str, int]:
        at = self._at(step)
        try:
            found = self._ask(f"listing {at}", self.fs.find, at, detail=True)
        except FileNotFoundError:
            return {}
        return {str(name)[len(at) + 1 :]: info["size"] for name, info in found.items()}

    def _ask(self, what: str, call: Callable[..., Any], *args: Any, size: int = 0, **options: Any) -> Any:
        """One request, waited for no longer than it may take. A thread that hangs in it is left behind."""
        answer: dict[str, Any] = {}

        def run() -> None:
            try:
                self.fs.invalidate_cache()
                answer["value"] = call(*args, **options)
            except Exception as e:  # a store's client raises what it likes; the reason is handed on
                answer["error"] = e

        thread = threading.Thread(target=run, name=f"rlkd-remote {what}", daemon=True)
        thread.start()
        limit = self.timeout_s + size / SLOWEST
        thread.join(limit)
        if thread.is_alive():
            raise TimeoutError(f"{what}: no answer within {limit:.0f} s")
        error = answer.get("error")
        if isinstance(error, FileNotFoundError):
            raise error
        if error is not None:
            raise OSError(f"{what}: {type(error).__name__}: {error}") from error
        return answer["value"]
