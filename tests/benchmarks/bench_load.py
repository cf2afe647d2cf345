"""How a server copes with many clients at once: questions about pictures, streamed from any server with OpenAI's API.

    python -m dataset.demo.world                                           # the questions
    python web_server.py --demo --queue 40                           # one server or both, each in a terminal of its own;
    vllm serve my-minimind-v --max-model-len 512                     # --queue: more than clients
    python tests/benchmarks/bench_load.py http://127.0.0.1:7788/v1 http://127.0.0.1:8000/v1

Each client asks one question after the other of a labelled file, greedily; all clients together ask `--questions` of them. A
row for each server and number of clients: answers/s, tokens/s, and how long a client waits for the first token and for the
answer (median, 95th percentile). The last line is JSON.
"""

import argparse
import base64
import http.client
import json
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent.parent


def read_questions(file, images):
    """(OpenAI's messages, expected answer) of a labelled file's records."""
    questions = []
    for record in json.loads(file.read_text(encoding="utf-8")):
        text, answer = (turn["content"] for turn in record["conversations"][:2])
        picture = base64.b64encode((images / record["image"]).read_bytes()).decode()
        url = {"url": f"data:image/jpeg;base64,{picture}"}
        content = [
            {"type": "image_url", "image_url": url},
            {"type": "text", "text": text.replace("<image>", "").strip()},
        ]
        questions.append(([{"role": "user", "content": content}], answer))
    return questions


class Server:
    """A server of OpenAI's API, and the first model that it offers."""

    def __init__(self, url):
        self.url = url
        self.address, self.path = urlsplit(url).netloc, urlsplit(url).path.rstrip("/")
        with self.request("GET", "/models") as response:
            self.model = json.load(response)["data"][0]["id"]

    def request(self, method, path, body=None):
        connection = http.client.HTTPConnection(self.address, timeout=300)
        try:
            connection.request(method, self.path + path, body, {"Content-Type": "application/json"})
        except OSError as error:
            raise SystemExit(f"no server at {self.url} ({error})") from None
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{self.url}{path} answered {response.status}: {response.read(300).decode()}")
        return response

    def ask(self, messages, max_tokens):
        """One question: (text, tokens, seconds to the first token, seconds to the end)."""
        options = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        begun = time.perf_counter()
        text, first, tokens = "", None, 0
        with self.request(
            "POST", "/chat/completions", json.dumps({"model": self.model, "messages": messages, **options})
        ) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
                if piece:
                    first = first or time.perf_counter() - begun
                    text += piece
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
        seconds = time.perf_counter() - begun
        return text, tokens, first or seconds, seconds


def measure(server, questions, clients, max_tokens):
    """All questions, shared among so many clients: a row of the table."""
    waiting, answered, lock = iter(questions), [], threading.Lock()

    def client():
        while True:
            with lock:
                messages, expected = next(waiting, (None, None))
            if messages is None:
                return
            text, *numbers = server.ask(messages, max_tokens)
            answered.append((text == expected, *numbers))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun

    assert len(answered) == len(questions), f"{len(questions) - len(answered)} questions were not answered"
    right, tokens, first, last = zip(*answered, strict=True)

    def quantiles_ms(values):
        """That of half of all values, and of 95%."""
        return [round(sorted(values)[int(share * len(values))] * 1000) for share in (0.5, 0.95)]

    return {
        "url": server.url,
        "clients": clients,
        "answers_per_s": round(len(answered) / seconds, 1),
        "tokens_per_s": round(sum(tokens) / seconds),
        "first_token_ms": quantiles_ms(first),
        "answer_ms": quantiles_ms(last),
        "right": f"{sum(right)}/{len(right)}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+", help="e.g. http://127.0.0.1:7788/v1")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--max_tokens", type=int, default=48)
    parser.add_argument("--data", type=Path, default=ROOT / "dataset/demo_world/score_heldout.json")
    args = parser.parse_args()
    if not args.data.exists():
        raise SystemExit(f"{args.data} not found: python -m dataset.demo.world makes the demo's")
    questions = read_questions(args.data, args.data.parent / "images")[: args.questions]
    servers = [Server(url) for url in args.urls]
    rows = []
    print(
        f"{'server':<28}{'clients':>8}{'answers/s':>11}{'tokens/s':>10}{'first token, ms':>18}{'answer, ms':>14}{'right':>10}"
    )
    for clients in args.clients:
        for server in servers:
            server.ask(questions[0][0], 2)  # warm
            row = measure(server, questions, clients, args.max_tokens)
            rows.append(row)
            first, last = (" / ".join(map(str, row[name])) for name in ("first_token_ms", "answer_ms"))
            print(
                f"{row['url']:<28}{clients:>8}{row['answers_per_s']:>11}{row['tokens_per_s']:>10}{first:>18}{last:>14}{row['right']:>10}"
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
