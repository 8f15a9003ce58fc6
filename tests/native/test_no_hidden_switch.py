"""What a run computes with follows from its settings, not from what else a process did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
import torch
import reasonalloc
from models import prompt, tiny
from reasonalloc.ops.native import build
from reasonalloc.cpu_step import build as step_build

torch.set_num_threads(1)
model = tiny("llama")

def functions(**settings):
    # Each function of the package that a run calls, and how often.
    calls = {}
    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and "/reasonalloc/" in code.co_filename:
            name = code.co_filename.split("/reasonalloc/")[-1] + ":" + code.co_qualname
            calls[name] = calls.get(name, 0) + 1
    with reasonalloc.attach(model, budget=16, interval=8, **settings):
        sys.setprofile(note)
        model.generate(prompt(20, 2), max_new_tokens=40, do_sample=False)
        sys.setprofile(None)
    return calls

arms = ["rkv/uniform/reasonalloc", "h2o/uniform/adakv"]
functions()
before = [functions(arm=arm) for arm in arms]
assert not build.library.cache_info().currsize and not step_build.library.cache_info().currsize
native = [functions(arm=arm, attention="cpp") for arm in arms]
functions(arm=arms[0], step="compile")
assert build.library.cache_info().currsize and step_build.library.cache_info().currsize
after = [functions(arm=arm) for arm in arms]
print(json.dumps([before, native, after]))
"""


def test_the_reference_runs_the_same_code_after_the_loops_were_compiled() -> None:
    tests = Path(__file__).parents[1]
    code = f"import sys; sys.path[:0] = {[str(tests), *sys.path]!r}\n" + SCRIPT.replace(
        "co_qualname", "co_qualname" if sys.version_info >= (3, 11) else "co_name"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, native, after = json.loads(done.stdout)
    assert before == after
    for calls in before:
        assert not any(name.startswith(("ops/native/", "cpu_step/")) for name in calls)
        assert any(name.startswith("ops/torch.py:") for name in calls)
    for calls in native:
        assert any(name.startswith("ops/native/rows.py:") for name in calls)
        assert not any(name.startswith("ops/torch.py:TorchOperations.") for name in calls)
