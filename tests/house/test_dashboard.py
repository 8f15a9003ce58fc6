"""The Grafana dashboard shows every metric of ReasonAlloc, and how long vLLM's requests take.

That a server exports what panels ask for: ``tests/serving/test_server.py``.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_DASHBOARD = json.loads((_ROOT / "docs/grafana/reasonalloc.json").read_text("utf-8"))
_METRICS = _ROOT / "src/reasonalloc/integrations/vllm/metrics.py"


def exposed() -> set[str]:
    """Names at ``/metrics``, read from the source: vLLM need not be installed."""
    names = set()
    for node in ast.walk(ast.parse(_METRICS.read_text("utf-8"))):
        match node:
            case ast.Assign(targets=[ast.Name(id="_COUNTERS")], value=ast.Dict(keys=keys)):
                names |= {f"{key.value}_total" for key in keys if isinstance(key, ast.Constant)}
            case ast.Call(func=ast.Name(id="Gauge"), args=[ast.JoinedStr(values=parts), *_]):
                names.add("".join(str(p.value) for p in parts if isinstance(p, ast.Constant)))
    return {f"reasonalloc:{name}" for name in names}


def expressions(panel: dict[str, Any]) -> str:
    return " ".join(target["expr"] for target in panel["targets"])


def test_panels_show_every_metric_and_no_other() -> None:
    text = " ".join(expressions(panel) for panel in _DASHBOARD["panels"])
    assert len(exposed()) == 6
    assert set(re.findall(r"reasonalloc:\w+", text)) == exposed()


def test_panels_show_how_long_requests_take() -> None:
    text = " ".join(expressions(panel) for panel in _DASHBOARD["panels"])
    assert set(re.findall(r"vllm:\w+", text)) >= {
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:generation_tokens_total",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:num_preemptions_total",
        "vllm:kv_cache_usage_perc",
    }


def test_every_query_hears_the_choice_of_model_and_engine() -> None:
    for panel in _DASHBOARD["panels"]:
        text = expressions(panel)
        metrics = re.findall(r"(?:vllm|reasonalloc):\w+", text)
        chosen = '{model_name=~"$model_name", engine=~"$engine"}'
        assert text.count(chosen) == len(metrics) > 0, panel["title"]


def test_panels_have_units_and_places_of_their_own() -> None:
    places, ids = set(), set()
    for panel in _DASHBOARD["panels"]:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24 and not cells & places, panel["title"]
        places |= cells
        ids.add(panel["id"])
    assert len(ids) == len(_DASHBOARD["panels"])


def test_the_data_source_is_asked_for_on_import() -> None:
    assert [i["name"] for i in _DASHBOARD["__inputs"]] == ["DS_PROMETHEUS"]
    used = set(re.findall(r'"uid": "([^"]+)"', json.dumps(_DASHBOARD))) - {_DASHBOARD["uid"]}
    assert used == {"${DS_PROMETHEUS}"} and _DASHBOARD["id"] is None


def test_every_counter_is_a_rate_or_an_increase() -> None:
    for panel in _DASHBOARD["panels"]:
        text = expressions(panel)
        counter = r"(?:vllm|reasonalloc):\w+_(?:total|bucket)"
        counters = len(re.findall(counter, text))
        assert counters == len(re.findall(rf"(?:rate|increase)\({counter}", text))


def test_quantiles_are_of_histograms() -> None:
    for target in (target for panel in _DASHBOARD["panels"] for target in panel["targets"]):
        quantile = re.match(r"histogram_quantile\(0\.\d+, sum by \(le\) \(rate\(", target["expr"])
        assert bool(quantile) == ("_bucket" in target["expr"]), target["expr"]
