"""Sixteen clients at once on one server: wrong answers, errors, waiting times, and the server's memory as it goes on.

    python -m benchmarks.server_load                 # ten minutes
    python -m benchmarks.server_load --minutes 1

`hf-gradmem serve` runs with the small key-value adapter of the package on loopback, in a process of its own. Each
client is OpenAI's: it asks for a random pair of a random one of 64 memories, streamed every other time, and every tenth
time it writes one, asks it and deletes it. Every answer is compared with what the model itself gives. The table goes to
`benchmarks/results/server_load.md`.
"""

import argparse
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER as ADAPTER
from hf_gradmem.evaluation import answer_queries
from hf_gradmem.tasks import load_task

ROOT = Path(__file__).parent
TABLE = ROOT / "results" / "server_load.md"
PAIRS: dict[str, Any] = {"num_pairs": 4, "key_length": 1, "value_length": 1, "end_mark": False}


@dataclass
class Report:
    """What the clients met with.

    Attributes:
        seconds: that each answer took.
        written: memories that were written, asked and deleted.
        wrong: answers that are not the model's own.
        errors: whatever was raised.
        megabytes: of the server's process, once every ten seconds.
    """

    seconds: list[float] = field(default_factory=list)
    written: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)


def own_answers(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What the model gives to each query of each row, without a server."""
    model = GradMemForCausalLM.from_pretrained(ADAPTER)
    memory = model.write([row["context"] for row in rows])
    asked = [(number, query) for number, row in enumerate(rows) for query in row["queries"]]
    numbers, queries = [number for number, _ in asked], [query for _, query in asked]
    answers = iter(answer_queries(model, memory, queries, numbers, max_new_tokens=4))
    return [[next(answers) for _ in row["queries"]] for row in rows]


class Client(threading.Thread):
    """One client, until the time is over."""

    def __init__(
        self, number: int, address: str, rows: list[Any], answers: list[list[str]], until: float, told: Report
    ):
        super().__init__()
        self.number, self.address, self.until, self.told = number, address, until, told
        self.rows, self.answers = rows, answers

    def run(self) -> None:
        """Ask."""
        rng = random.Random(self.number)
        with openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0) as client:
            turn = 0
            while time.monotonic() < self.until:
                turn += 1
                try:
                    self._turn(client, rng, turn)
                except Exception as error:
                    self.told.errors.append(f"{type(error).__name__}: {error}")

    def _turn(self, client: openai.OpenAI, rng: random.Random, turn: int) -> None:
        number = rng.randrange(len(self.rows))
        query = rng.randrange(len(self.rows[number]["queries"]))
        name = f"row/{number}"
        if turn % 10 == 0:
            name = f"own/{self.number}/{turn}"
            body = {"context": self.rows[number]["context"], "id": name}
            httpx.post(f"{self.address}/v1/memories", json=body, timeout=60).raise_for_status()
        asked: dict[str, Any] = {"model": ADAPTER.name, "prompt": self.rows[number]["queries"][query], "max_tokens": 4}
        begin = time.monotonic()
        if turn % 2:
            parts = client.completions.create(**asked, stream=True, extra_body={"memory": name})
            text = "".join(part.choices[0].text for part in parts)
        else:
            text = client.completions.create(**asked, extra_body={"memory": name}).choices[0].text
        self.told.seconds.append(time.monotonic() - begin)
        if text != self.answers[number][query]:
            self.told.wrong.append(f"{name}: {text!r} in place of {self.answers[number][query]!r}")
        if turn % 10 == 0:
            httpx.delete(f"{self.address}/v1/memories/{name}", timeout=60).raise_for_status()
            self.told.written += 1


def measure(clients: int, minutes: float) -> tuple[Report, int]:
    """Run server and clients; what they met with, and the server's exit code when it is interrupted at the end."""
    rows = list(load_task("kv_retrieval", "test", num_contexts=64, **PAIRS))
    answers = own_answers(rows)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_gradmem_cli", "--quiet", "serve", str(ADAPTER), "--port", str(port)]
    server = subprocess.Popen(command)
    address, told = f"http://127.0.0.1:{port}", Report()
    try:
        _wait_for(address, server)
        for number, row in enumerate(rows):
            body = {"context": row["context"], "id": f"row/{number}"}
            httpx.post(f"{address}/v1/memories", json=body, timeout=60).raise_for_status()
        until = time.monotonic() + 60 * minutes
        threads = [Client(number, address, rows, answers, until, told) for number in range(clients)]
        for thread in threads:
            thread.start()
        process = psutil.Process(server.pid)
        while any(thread.is_alive() for thread in threads):
            told.megabytes.append(process.memory_info().rss / 2**20)
            time.sleep(min(10.0, 6 * minutes))
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(60)
    return told, code


def _wait_for(address: str, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            httpx.get(f"{address}/health")
            return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"The server ended with {server.returncode}.")


def table(told: Report, clients: int, minutes: float, code: int) -> str:
    """What was measured."""
    middle, most = np.percentile(told.seconds, [50, 99])
    settled = told.megabytes[len(told.megabytes) // 5 :]
    return f"""# A server under load

`python -m benchmarks.server_load --minutes {minutes:g}`: {clients} clients at once for {minutes:g} minutes,
`gradmem-kv-tiny`, on a shared CPU with two cores.

| | |
|---|---|
| answers | {len(told.seconds)} |
| of these wrong | {len(told.wrong)} |
| memories written, asked and deleted | {told.written} |
| errors | {len(told.errors)} |
| seconds to an answer: median, 99 % | {middle:.2f}, {most:.2f} |
| the server's memory after a fifth of the time, at the end, MB | {settled[0]:.0f}, {settled[-1]:.0f} |
| exit code when interrupted | {code} |
"""


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10.0)
    given = parser.parse_args()
    if given.clients < 1 or not given.minutes > 0:
        parser.error("--clients must be at least 1, and --minutes more than 0.")
    told, code = measure(given.clients, given.minutes)
    for line in [*told.wrong[:5], *told.errors[:5]]:
        print(line)
    TABLE.write_text(table(told, given.clients, given.minutes, code), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
