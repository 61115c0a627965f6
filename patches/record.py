"""The record of one change made to Megatron at run time, and how it is applied and undone."""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any


class PatchRefused(RuntimeError):
    """The source that a patch replaces is not one that it was tested on."""


def version(package: str) -> str:
    """The installed version of a distribution, read without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # on the path without having been installed
        return "of unknown version"


def megatron_version() -> str:
    """The installed megatron-core's version."""
    return version("megatron-core")


def fingerprint(target: Any) -> str:
    """The first 16 hex digits of the SHA-256 of an object's source."""
    return hashlib.sha256(inspect.getsource(target).encode()).hexdigest()[:16]


def always_needed() -> str | None:
    return None


@dataclass(frozen=True)
class Patch:
    """One change, at one place.

    Attributes:
        name: how messages call it; the file's name.
        target: "package.module:attribute" or "package.module:Class.attribute".
        reason: what breaks without it.
        tested: version of ``package`` to :func:`fingerprint` of the source that is replaced.
        build: makes the replacement from the original object.
        why_not: None where the change is needed here, else the reason it is not.
        package: the distribution that the target is in.
        with_flag: the one flag that needs the change, or None where mHC always does.
    """

    name: str
    target: str
    reason: str
    tested: Mapping[str, str]
    build: Callable[[Any], Any]
    why_not: Callable[[], str | None] = always_needed
    package: str = "megatron-core"
    with_flag: str | None = None

    def _owner(self) -> tuple[Any, str]:
        module, path = self.target.split(":")
        owner = importlib.import_module(module)
        *parents, attribute = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, attribute

    def current(self) -> Any:
        """The object at the target now: the original, or the replacement once applied."""
        owner, attribute = self._owner()
        return getattr(owner, attribute)

    def put(self, value: Any) -> None:
        """Bind the target to ``value``."""
        owner, attribute = self._owner()
        setattr(owner, attribute, value)

    def check(self, original: Any) -> None:
        """Refuse a source that the patch was not tested on.

        Raises:
            PatchRefused: names the version, the fingerprints and the flag that forces the patch.
        """
        found = fingerprint(original)
        if found not in self.tested.values():
            known = ", ".join(f"{version}: {mark}" for version, mark in self.tested.items())
            raise PatchRefused(
                f"patch {self.name}: {self.target} of {self.package} {version(self.package)} has "
                f"fingerprint {found}, tested are {known}. Install a tested version, or pass "
                "--mhc-force-patches (megatron_mhc.patches.apply(force=True)) to take the risk."
            )
