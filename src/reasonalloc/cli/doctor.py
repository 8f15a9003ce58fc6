"""``reasonalloc doctor``: what is installed, and whether it works here."""

from __future__ import annotations

import importlib.metadata as metadata
import platform
from typing import Any

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import ReasonAllocError

_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "typer",
    "rich",
    "gguf",
    "accelerate",
    "triton",
)


def command(as_json: o.Json = False) -> None:
    """Show versions and devices, and run a self-test on a tiny random model."""
    packages = [_package(name, _requirements()) for name in _PACKAGES]
    with output.stderr().status("Testing"):
        devices, tests = _test_everything()
    passed = all(check["passed"] for test in tests for check in test["checks"])
    report = {
        "reasonalloc": _version("reasonalloc"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": devices,
        "self_test": tests,
        "passed": passed,
    }
    if as_json:
        output.print_json(report)
    else:
        _show(report)
    if not passed:
        raise typer.Exit(1)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, tuple[Any, str | None]]:
    """Supported range of each package and the extra that brings it (None: always there)."""
    try:
        from packaging.requirements import Requirement

        lines = metadata.requires("reasonalloc") or []
        extras = metadata.metadata("reasonalloc").get_all("Provides-Extra") or []
    except (ImportError, metadata.PackageNotFoundError):  # run from a source tree
        return {}
    found: dict[str, tuple[Any, str | None]] = {}
    for line in lines:
        requirement = Requirement(line)
        extra = None
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            matches = [e for e in extras if requirement.marker.evaluate({"extra": e})]
            if not matches:
                continue  # not for this platform
            extra = matches[0]
        found[requirement.name.lower()] = (requirement.specifier, extra)
    return found


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
    """The newest release that was tested, if the installed one is newer."""
    if name != "transformers" or version is None:
        return None
    from reasonalloc.integrations.hf.versions import NEWEST_TESTED, untested

    return None if untested(version) is None else NEWEST_TESTED


def _test_everything() -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    import torch

    from reasonalloc.attention.interface import BACKENDS
    from reasonalloc.cli.selftest import self_test
    from reasonalloc.loading import available_devices

    names = available_devices()
    devices = [{"device": name, "name": _device_name(name)} for name in names]
    tests = []
    for device in names:
        for backend in BACKENDS.entries():
            found: dict[str, Any] = {"device": device, "attention": backend, "checks": []}
            try:
                BACKENDS.create(backend).check(torch.device(device))
            except ReasonAllocError as error:
                found["skipped"] = str(error)
            else:
                found["checks"] = [vars(check) for check in self_test(backend, device)]
            tests.append(found)
        tests += [_test_step(step, device) for step in ("static", "graph", "compile")]
    return devices, tests


def _test_step(step: str, device: str) -> dict[str, Any]:
    from reasonalloc.cli.selftest import step_test

    found: dict[str, Any] = {"device": device, "attention": "auto", "step": step, "checks": []}
    try:
        found["checks"] = [vars(check) for check in step_test(step, device)]
    except ReasonAllocError as error:
        found["skipped"] = str(error)
    return found


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return f"{name}, {output.human(free)} of {output.human(total)} free"
    if device == "mps":
        return "Apple GPU"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _show(report: dict[str, Any]) -> None:
    console = output.stdout()
    rows = [("reasonalloc", str(report["reasonalloc"])), ("python", report["python"])]
    rows += [(p["name"], _state(p)) for p in report["packages"]]
    console.print(output.pairs(rows, title="Versions"))
    console.print()
    devices = [(d["device"], d["name"]) for d in report["devices"]]
    console.print(output.pairs(devices, title="Devices"))
    console.print()
    checks = [
        (test["device"], _what(test), _mark(check["passed"]), check["name"], check["detail"])
        for test in report["self_test"]
        for check in test["checks"]
    ]
    checks += [
        (test["device"], _what(test), "-", "not tested", test["skipped"])
        for test in report["self_test"]
        if "skipped" in test
    ]
    titles = ("device", "what", "", "check", "detail")
    console.print(output.grid([(t, False) for t in titles], checks, "Self-test"))
    if report["passed"]:
        console.print("\nEverything works.")
    else:
        console.print(
            "\nThe self-test failed: compressed generation cannot be trusted here. Install "
            "versions in the supported range, or report this output.",
            style="red",
        )


def _what(test: dict[str, Any]) -> str:
    return f"step {test['step']}" if "step" in test else str(test["attention"])


def _state(package: dict[str, Any]) -> str:
    if package["version"] is None:
        extra = package["extra"]
        remedy = f"pip install 'reasonalloc\\[{extra}]'" if extra else "pip install reasonalloc"
        return f"not installed: {remedy}"
    if package["supported"] is None:
        return f"{package['version']} (supported range unknown)"
    if package["newest_tested"] is not None:
        tested = package["newest_tested"]
        return (
            f"[yellow]{package['version']} is newer than {tested}, the newest tested: if something "
            "fails, report it with this output[/yellow]"
        )
    if package["supported"]:
        return f"{package['version']} (supported: {package['range']})"
    return f"[red]{package['version']} is outside the supported range {package['range']}[/red]"


def _mark(passed: bool) -> str:
    return "[green]ok[/green]" if passed else "[red]FAILED[/red]"
