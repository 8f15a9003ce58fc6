"""``reasonalloc doctor``: what is installed, and whether it works here."""

from __future__ import annotations

from typing import Any

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output


def command(as_json: o.Json = False) -> None:
    """Show versions and devices, and run a self-test on a tiny random model."""
    from reasonalloc.diagnose import diagnose

    with output.stderr().status("Testing"):
        report = diagnose()
    if as_json:
        output.print_json(report)
    else:
        _show(report)
    if not report["passed"]:
        raise typer.Exit(1)


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
