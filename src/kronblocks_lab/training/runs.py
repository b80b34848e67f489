"""The folder of one training: its lock, its content, and how to resume from it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, Self

import torch

from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json, write_json
from kronblocks_lab.training.settings import RESULT_VERSION, TrainConfig

SETTINGS, LOCK = "config.json", ".lock"


def finished(path: Path) -> dict[str, Any] | None:
    """The result of a finished training; None where there is none, or one of an earlier version, which is made again."""
    if not (path / "result.json").exists():
        return None
    result = read_json(path / "result.json")
    return result if result.get("version") == RESULT_VERSION else None


def changed_settings(config: TrainConfig) -> list[str]:
    """Names of the settings in which a training differs from the one that its folder holds; none where that holds none.

    A setting that did not exist yet when the folder was written counts as what it is by default.
    """
    known = config.out.expanduser() / SETTINGS
    if not known.exists():
        return []
    default = TrainConfig(out=config.out, method=config.method).settings()
    before, now = _completed(read_json(known), _plain(default)), _plain(config.settings())
    return [name for name in now if before[name] != now[name]]


def clear_if_changed(config: TrainConfig) -> None:
    """Empty a training's folder if it holds one with other settings.

    Raises:
        KronblocksError: another process works there.
    """
    if not changed_settings(config):
        return
    path = config.out.expanduser()
    lock = _locked(path)
    try:
        for each in path.iterdir():
            if each.is_dir():
                shutil.rmtree(each)
            elif each.name != LOCK:
                each.unlink()
    finally:
        os.close(lock)


def _locked(path: Path) -> int:
    """Take a folder for this process alone, until what is returned is closed; makes it where there is none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise KronblocksError(f"cannot write into {path}: {error.strerror}; choose another --out") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise KronblocksError(f"another process is training in {path}: wait for it, or choose another --out") from error
    return lock


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As they are read from a file: lists for tuples."""
    return json.loads(json.dumps(settings))


def _completed(before: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Settings, those of nested tables too, with what they lack."""
    nested = [name for name, value in default.items() if isinstance(value, dict) and isinstance(before.get(name), dict)]
    return {**default, **before, **{name: _completed(before[name], default[name]) for name in nested}}


class RunFolder:
    """A training's folder, locked while this object is open.

    Use `RunFolder.open(config)` as a context manager. `result` is the finished result, if there is one; `attempt` counts the
    times that the training was started here.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path, self._lock = path, lock
        self.checkpoints = path / "checkpoints"
        self.result: dict[str, Any] | None = None
        self.attempt = len(list((path / "csv").glob("version_*")))

    @classmethod
    def open(cls, config: TrainConfig) -> Self:
        """Lock the folder for this training.

        Raises:
            KronblocksError: another process works there, it holds something already and --resume was not given, or it holds a
                training with other settings.
        """
        path = config.out.expanduser()
        lock = _locked(path)
        folder = cls(path, lock)
        try:
            folder._prepare(config)
        except BaseException:
            os.close(lock)
            raise
        return folder

    def _prepare(self, config: TrainConfig) -> None:
        others = [each.name for each in self.path.iterdir() if each.name != LOCK]
        if not config.resume and others:
            raise KronblocksError(
                f"{self.path} is not empty ({', '.join(sorted(others)[:3])}): add --resume to go on with what is there, or "
                "choose another --out"
            )
        if not (self.path / SETTINGS).exists():
            write_json(self.path / SETTINGS, config.settings())
            return
        if changed := changed_settings(config):
            raise KronblocksError(
                f"{self.path} holds a training with other settings ({', '.join(changed)}): "
                f"use the ones in {self.path / SETTINGS}, or choose another --out"
            )
        self.result = finished(self.path)

    def forget(self) -> None:
        """Let a training with other settings begin here."""
        (self.path / SETTINGS).unlink(missing_ok=True)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, checked to be readable; None where there is none yet.

        Raises:
            KronblocksError: it is damaged or no checkpoint of this program.
        """
        found = sorted(self.checkpoints.glob("*.ckpt"), key=lambda each: each.stat().st_mtime)
        if not found:
            return None
        try:
            content = torch.load(found[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has no common class for what damaged files make it raise
            raise KronblocksError(
                f"the checkpoint {found[-1]} cannot be read ({type(error).__name__}): delete it to go on from the one before, if "
                "there is one, or start again in another folder"
            ) from error
        if not isinstance(content, dict) or not {"sparsifier", "meters", "state_dict"} <= content.keys():
            raise KronblocksError(f"{found[-1]} is not a checkpoint of kronblocks train: start again in another folder")
        return found[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)
