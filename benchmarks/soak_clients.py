"""Clients of ``soak.py``: their requests to a server, and the outcomes.

Prompts are needles in texts of ``examples/demo/tasks.py``, so that every answer can be checked.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import tasks

CANCELLED = 0.2
"""Share of requests whose connection is closed before they finish."""
SHARED = 0.4
"""Share of prompts with a prefix that other prompts share."""
LONG_ANSWERS = 0.1
STREAMED = 0.5
SHORTEST = 200
CLASSES = ((0.70, SHORTEST, 1 / 16), (0.22, 1 / 16, 1 / 4), (0.08, 1 / 4, 1.0))
"""Share of the prompts, and minimum and maximum length as shares of the longest; the first minimum is in tokens."""
ANSWER_TOKENS = tasks.CODE_DIGITS + 2
LONG_ANSWER_TOKENS = 128
CANCELLED_TOKENS = 512
"""Tokens of a request that will be cancelled; it would run for seconds."""
DOCUMENTS, SECRETS, NEW_DOCUMENT = 4, 8, 0.1
"""Number of shared texts, secret codes in each, and probability that a text is replaced when it is used."""
TIMEOUT = 180.0
"""Maximum seconds of a request."""


class Request(NamedTuple):
    prompt: tasks.Prompt
    max_tokens: int
    stream: bool
    cancel_after: float | None = None
    """Seconds after which the connection is closed."""


class Answer(NamedTuple):
    text: str
    prompt_tokens: int
    first_token: float
    """Seconds; if not streamed, until the whole answer."""


class Document:
    """A text with secret codes in it."""

    def __init__(self, rng: random.Random, tokens: int, secrets: int) -> None:
        self.keys = tasks.random_keys(rng, secrets)
        self.codes = [tasks.random_code(rng) for _ in self.keys]
        statements = [tasks.statement("needle", *fact) for fact in zip(self.keys, self.codes, strict=True)]
        depths = sorted(rng.random() for _ in statements)
        self.words, _ = tasks.document(rng, max(tokens, 10 * len(statements)), statements, depths)

    def ask(self, rng: random.Random, more: int = 0) -> tasks.Prompt:
        """A question for one of the codes, with ``more`` words of filler before it."""
        place = rng.randrange(len(self.keys))
        words = [*self.words, *(word for sentence in tasks.filler(rng, more) for word in sentence)]
        words += tasks.question("needle", self.keys[place])
        return tasks.Prompt(" ".join(words), " ".join(self.codes[place]), len(words) + 1)


class Mix:
    """Draws random requests."""

    def __init__(self, rng: random.Random, longest: int) -> None:
        """``longest``: approximate maximum tokens of a prompt."""
        self.rng, self.longest = rng, longest
        self.documents = [self._document() for _ in range(DOCUMENTS)]

    def draw(self, pace: float) -> Request:
        """A request.

        Args:
            pace: seconds per token of a prompt; sets the time after which requests are cancelled.
        """
        rng = self.rng
        prompt = self._prompt()
        stream = rng.random() < STREAMED
        if rng.random() < CANCELLED:
            return Request(prompt, CANCELLED_TOKENS, stream, 0.01 + rng.uniform(0, 1.2) * pace * prompt.tokens)
        return Request(prompt, LONG_ANSWER_TOKENS if rng.random() < LONG_ANSWERS else ANSWER_TOKENS, stream)

    def longest_request(self) -> Request:
        """A request of maximum length. Two do not fit into the cache together while the first one decodes."""
        return Request(
            tasks.needle(self.longest, self.rng.random(), self.rng.getrandbits(64)), LONG_ANSWER_TOKENS, True
        )

    def _prompt(self) -> tasks.Prompt:
        rng = self.rng
        if rng.random() >= SHARED:
            return tasks.needle(self._length(), rng.random(), rng.getrandbits(64))
        place = rng.randrange(DOCUMENTS)
        if rng.random() < NEW_DOCUMENT:
            self.documents[place] = self._document()
        document = self.documents[place]
        room = max(0, self.longest - len(document.words))
        return document.ask(rng, more=rng.choice([0, rng.randrange(1 + min(room, self.longest // 10))]))

    def _length(self) -> int:
        (_, least, greatest) = self.rng.choices(CLASSES, [share for share, *_ in CLASSES])[0]
        low = least if least >= 1 else least * self.longest
        high = max(low, greatest * self.longest)
        return round(math.exp(self.rng.uniform(math.log(low), math.log(high))))

    def _document(self) -> Document:
        # Half the length, since questions and more filler are appended.
        return Document(self.rng, self._length() // 2, SECRETS)


@dataclass
class Tally:
    """Outcomes of the requests of all clients."""

    sent: int = 0
    right: int = 0
    wrong: list[tuple[Request, Answer]] = field(default_factory=list)
    cancelled: int = 0
    cut_off: int = 0
    """By the kill of the server."""
    failed: int = 0
    """Unexpectedly not answered."""
    streamed: int = 0
    """Answered requests that were streamed."""
    first_tokens: list[tuple[int, float]] = field(default_factory=list)
    """Tokens of the prompt and seconds to the first token, of streamed answers."""
    problems: Counter[str] = field(default_factory=Counter)
    pace: float = 1e-3
    """Moving average of the seconds per token of a prompt."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def done(self) -> int:
        """Requests that have ended in any way."""
        return self.right + len(self.wrong) + self.cancelled + self.cut_off + self.failed

    def count(self, what: str) -> None:
        with self.lock:
            setattr(self, what, getattr(self, what) + 1)

    def problem(self, text: str) -> None:
        with self.lock:
            self.problems[text] += 1

    def add_problems(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.problem(text)

    def failed_by(self, text: str) -> None:
        self.count("failed")
        self.problem(text)

    def answered(self, request: Request, answer: Answer, seconds: float) -> None:
        """Check and count a finished request."""
        expected = request.prompt
        if answer.prompt_tokens != expected.tokens:
            self.problem(f"a prompt of {expected.tokens} tokens was counted as {answer.prompt_tokens}")
        with self.lock:
            if tasks.grade(answer.text, expected.answer):
                self.right += 1
            else:
                self.wrong.append((request, answer))
            self.pace += 0.1 * (seconds / expected.tokens - self.pace)
            if request.stream:
                self.streamed += 1
                self.first_tokens.append((expected.tokens, answer.first_token))


class Clients:
    """Threads that each send one request after the other to a server."""

    def __init__(self, url: str, model: str, count: int, longest: int, seed: str, tally: Tally) -> None:
        self.url, self.model, self.longest, self.tally = url, model, longest, tally
        self.stopped, self.killed = threading.Event(), threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(f"{seed} {i}", i), daemon=True) for i in range(count)]
        for thread in self.threads:
            thread.start()

    def stop(self, killed: bool = False) -> None:
        """Send no more requests. ``killed``: the server is about to be killed, which cuts off running requests."""
        if killed:
            self.killed.set()
        self.stopped.set()

    def join(self) -> None:
        """Wait for the last requests."""
        for thread in self.threads:
            thread.join(TIMEOUT + 10)
            if thread.is_alive():
                self.tally.problem("a client hangs")

    def _run(self, seed: str, number: int) -> None:
        mix = Mix(random.Random(seed), self.longest)
        request = mix.longest_request() if number < 2 else mix.draw(self.tally.pace)
        while not self.stopped.is_set():
            if not send(self.url, self.model, request, self.tally, self.killed):
                self.stopped.wait(1)
            request = mix.draw(self.tally.pace)


def send(url: str, model: str, request: Request, tally: Tally, killed: threading.Event | None = None) -> bool:
    """Send one request and count its outcome; False if the server failed to answer it.

    Args:
        killed: set when the server is expected to break connections.
    """
    begin = time.monotonic()
    tally.count("sent")
    try:
        answer = ask(url, model, request)
    except TimeoutError:
        if request.cancel_after is not None:
            tally.count("cancelled")
        else:
            tally.failed_by(f"no answer to {request.prompt.tokens} tokens in {TIMEOUT:.0f} s")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if killed is not None and killed.is_set():
            tally.count("cut_off")
        else:
            tally.failed_by(f"{type(error).__name__}: {error}"[:200])
            return False
    else:
        tally.answered(request, answer, time.monotonic() - begin)
    return True


def ask(url: str, model: str, request: Request) -> Answer:
    """Send one request over its own connection, which is always closed.

    Raises:
        TimeoutError: it did not finish within ``cancel_after`` or ``TIMEOUT``.
        OSError, http.client.HTTPException: the server is gone.
        ValueError: the response is not a valid answer.
    """
    begin = time.monotonic()
    end = begin + (TIMEOUT if request.cancel_after is None else request.cancel_after)
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt.text,
        "max_tokens": request.max_tokens,
        "ignore_eos": request.max_tokens > ANSWER_TOKENS,
        "temperature": 0,
    }
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        sock = connection.sock
        sock.settimeout(_left(end))
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read()[:200]!r}")
        text, prompt_tokens, first_token = "", 0, 0.0
        for part in _parts(response, sock, end, request.stream):
            if "choices" not in part:
                raise ValueError(f"no answer but {part}")
            if part["choices"]:
                first_token = first_token or time.monotonic() - begin
                text += part["choices"][0]["text"]
            prompt_tokens = (part.get("usage") or {}).get("prompt_tokens", prompt_tokens)
        return Answer(text, prompt_tokens, first_token)
    finally:
        connection.close()


def _parts(response: http.client.HTTPResponse, sock: socket.socket, end: float, stream: bool) -> Iterator[Any]:
    """The JSON objects of a response: one, or a stream of them."""
    if not stream:
        yield json.loads(response.read())
        return
    while True:
        sock.settimeout(_left(end))
        line = response.readline()
        if not line:
            raise http.client.IncompleteRead(b"")
        if line == b"data: [DONE]\n":
            return
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def _left(end: float) -> float:
    """Remaining seconds as a socket timeout; never 0, which means non-blocking."""
    return max(1e-3, end - time.monotonic())
