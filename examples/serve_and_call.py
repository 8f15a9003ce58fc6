"""Serve a model with vLLM under a KV budget and call it with the openai client.

    pip install 'reasonalloc[cli,vllm]' openai
    python examples/serve_and_call.py --model Qwen/Qwen3-0.6B --budget 512

With `--url http://host:8000` it calls a server that runs already (`reasonalloc serve MODEL`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from openai import OpenAI


def get(url: str) -> str:
    """Return what a server answers."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


@contextmanager
def served(model: str, budget: int, port: int, more: list[str]) -> Iterator[str]:
    """Start a server, wait until it is ready, stop it at the end; its address."""
    line = [sys.executable, "-m", "reasonalloc", "serve", model, "--budget", str(budget)]
    server = subprocess.Popen([*line, "--port", str(port), *more])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if server.poll() is not None:
                sys.exit(f"the server ended with exit code {server.returncode}")
            try:
                get(f"{url}/health")
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait()


def call(url: str, prompt: str, max_tokens: int) -> None:
    """Print an answer as it comes, then the server's metrics of the cache."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    (model, *_) = client.models.list()
    parts = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=max_tokens,
        stream=True,
    )
    for part in parts:
        print(part.choices[0].delta.content or "", end="", flush=True)
    print()
    for line in get(f"{url}/metrics").splitlines():
        if line.startswith("reasonalloc:") and "_created" not in line:
            print(line)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--budget", type=int, default=512, help="tokens kept per layer and KV head")
    parser.add_argument("--prompt", default="How many primes are there below 100?")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--url", help="of a server that runs already")
    options, more = parser.parse_known_args()  # the rest goes to `reasonalloc serve`
    if options.url:
        call(options.url, options.prompt, options.max_tokens)
        return
    with served(options.model, options.budget, options.port, more) as url:
        call(url, options.prompt, options.max_tokens)


if __name__ == "__main__":
    main()
