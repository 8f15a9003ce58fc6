"""What is installed here, and whether it works: versions, devices, a self-test."""

from __future__ import annotations

import importlib.metadata as metadata
import platform
from collections.abc import Callable
from typing import Any

from reasonalloc.errors import ReasonAllocError

#: Packages whose versions are reported.
PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "typer",
    "rich",
    "gguf",
    "accelerate",
    "triton",
)


def diagnose() -> dict[str, Any]:
    """Return versions, devices and the results of a self-test as plain JSON values.

    ``passed`` says whether every check of the self-test held.
    """
    requirements = _requirements()
    devices, tests = _test_everything()
    return {
        "reasonalloc": _version("reasonalloc"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": [_package(name, requirements) for name in PACKAGES],
        "devices": devices,
        "self_test": tests,
        "passed": all(check["passed"] for test in tests for check in test["checks"]),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, tuple[Any, str | None]]:
    """Return the supported range of each package, and its extra (None: it is always there)."""
    try:
        from packaging.requirements import Requirement

        lines = metadata.requires("reasonalloc") or []
        extras = metadata.metadata("reasonalloc").get_all("Provides-Extra") or []
    except (ImportError, metadata.PackageNotFoundError):  # run from a source tree
        return {}
    ranges: dict[str, tuple[Any, str | None]] = {}
    for line in lines:
        requirement = Requirement(line)
        extra = None
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            matches = [e for e in extras if requirement.marker.evaluate({"extra": e})]
            if not matches:
                continue  # not for this platform
            extra = matches[0]
        ranges[requirement.name.lower()] = (requirement.specifier, extra)
    return ranges


def _package(name: str, requirements: dict[str, tuple[Any, str | None]]) -> dict[str, Any]:
    version = _version(name)
    specifier, extra = requirements.get(name, (None, None))
    supported = None
    if version is not None and specifier is not None:
        supported = bool(specifier.contains(version, prereleases=True))
    return {
        "name": name,
        "version": version,
        "range": None if specifier is None else ",".join(sorted(str(specifier).split(","))[::-1]),
        "supported": supported,
        "newest_tested": _newest_tested(name, version),
        "extra": extra,
    }


def _newest_tested(name: str, version: str | None) -> str | None:
    """Return the newest release that was tested, if the installed one is newer."""
    if name != "transformers" or version is None:
        return None
    from reasonalloc.integrations.hf.versions import NEWEST_TESTED, untested

    return None if untested(version) is None else NEWEST_TESTED


def _test_everything() -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    from reasonalloc.attention.interface import BACKENDS
    from reasonalloc.loading import available_devices

    names = available_devices()
    devices = [{"device": name, "name": _device_name(name)} for name in names]
    tests = []
    for device in names:
        tests += [_test_backend(backend, device) for backend in BACKENDS.entries()]
        tests += [_test_step(step, device) for step in ("static", "graph", "compile")]
    return devices, tests


def _test_backend(backend: str, device: str) -> dict[str, Any]:
    import torch

    from reasonalloc.attention.interface import BACKENDS
    from reasonalloc.diagnose import selftest

    def run() -> list[selftest.Check]:
        BACKENDS.create(backend).check(torch.device(device))
        return selftest.self_test(backend, device)

    return _tested({"device": device, "attention": backend}, run)


def _test_step(step: str, device: str) -> dict[str, Any]:
    from reasonalloc.diagnose import selftest

    what = {"device": device, "attention": "auto", "step": step}
    return _tested(what, lambda: selftest.step_test(step, device))


def _tested(what: dict[str, Any], run: Callable[[], list[Any]]) -> dict[str, Any]:
    try:
        return {**what, "checks": [vars(check) for check in run()]}
    except ReasonAllocError as error:
        return {**what, "checks": [], "skipped": str(error)}


def _device_name(device: str) -> str:
    import torch

    from reasonalloc.tables import human

    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return f"{name}, {human(free)} of {human(total)} free"
    if device == "mps":
        return "Apple GPU"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
