"""Load on `bitfold serve`: tokens per second, latencies and memory with 1, 4 and 16 clients.

    python benchmarks/bench_serving.py MODEL --minutes 5

Starts the server, lets so many clients ask for streams one after the other (chats of random lengths, half of which go
on with a conversation), and prints for each number of clients: requests, tokens per second of all together, time to
the first token and between tokens (median and 95th percentile), resident memory at the start and at the end; with
--memory FILE, seconds, megabytes, and requests begun, answered and lost, every ten seconds. Needs httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

WORDS = Path(__file__).read_text(encoding="utf-8").split()


@dataclass
class Load:
    """What clients saw."""

    requests: int = 0
    answered: int = 0
    failed: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


async def talk(client: httpx.AsyncClient, model: str, until: float, load: Load, seed: int, pause: float):
    """One client: conversations, one message after the other, with pauses of so many seconds on average."""
    draw, messages = random.Random(seed), []
    while time.monotonic() < until:
        if len(messages) > 4 or draw.random() < 0.5:
            messages = []
        messages.append({"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randrange(5, 120)))})
        body = {
            "model": model,
            "messages": messages,
            "stream": True,
            "max_tokens": draw.randrange(16, 129),
            "seed": seed,
        }
        await asyncio.sleep(draw.uniform(0, 2 * pause))
        start, last, text = time.monotonic(), None, ""
        load.requests += 1
        try:
            async with client.stream("POST", "chat/completions", json=body) as answer:
                if answer.status_code == 400 and "context_length_exceeded" in (await answer.aread()).decode():
                    load.requests, messages = load.requests - 1, []
                    continue
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        load.answered += 1
                        break
                    if not line or not (choice := json.loads(line[6:])["choices"][0])["delta"].get("content"):
                        continue
                    now = time.monotonic()
                    (load.first if last is None else load.between).append(now - (start if last is None else last))
                    last, text = now, text + choice["delta"]["content"]
                    load.tokens += 1
                else:
                    load.failed += 1
        except (httpx.HTTPError, KeyError, ValueError) as error:
            load.failed += 1
            print(f"a request failed: {error!r}", file=sys.stderr)
        messages.append({"role": "assistant", "content": text})


async def run(url: str, clients: int, seconds: float, pause: float, watch: Callable[[Load], None]) -> Load:
    """So many clients, so long; `watch` sees what they have every ten seconds."""
    load, until = Load(), time.monotonic() + seconds

    async def watching() -> None:
        while time.monotonic() < until:
            watch(load)
            await asyncio.sleep(10)

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        (model,) = (await client.get("models")).json()["data"]
        talks = (talk(client, model["id"], until, load, seed, pause) for seed in range(clients))
        await asyncio.gather(watching(), *talks)
    watch(load)
    return load


def resident(pid: int) -> float:
    """Megabytes."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1000 if found else float("nan")


def quantiles(values: list[float]) -> str:
    """Median and 95th percentile, in milliseconds."""
    if len(values) < 2:
        return "-"
    return f"{1e3 * statistics.median(values):.0f} / {1e3 * statistics.quantiles(values, n=20)[-1]:.0f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=3.0, help="of all together")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between the requests of a client")
    parser.add_argument("--memory", type=Path, help="a file for what is seen every ten seconds")
    args = parser.parse_args()
    command = [sys.executable, "-m", "bitfold", "serve", args.model, "--port", "0"]
    command += ["--sequences", str(args.sequences), "--context", str(args.context)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        said = ""
        while not (found := re.search(r"http://\S+", said)):
            line = server.stderr.readline()
            if not line:
                raise SystemExit(said)
            said += line
        print(said.strip())
        print(
            "clients  requests  failed  tokens/s  first token (p50 / p95)  between (p50 / p95)  memory before / after"
        )
        for clients in args.clients:
            before, start = resident(server.pid), time.monotonic()

            def watch(load: Load, start: float = start) -> None:
                if args.memory is not None:
                    seen = f"{time.monotonic() - start:.0f} {resident(server.pid):.1f}"
                    with args.memory.open("a") as file:
                        print(seen, load.requests, load.answered, load.failed, load.tokens, file=file)

            load = asyncio.run(run(found[0], clients, 60 * args.minutes / len(args.clients), args.pause, watch))
            speed = load.tokens / (time.monotonic() - start)
            figures = f"{quantiles(load.first):>22}  {quantiles(load.between):>19}"
            memory = f"{before:.0f} / {resident(server.pid):.0f} MB"
            print(f"{clients:7d}  {load.requests:8d}  {load.failed:6d}  {speed:8.1f}  {figures}  {memory}", flush=True)
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
