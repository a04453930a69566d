"""One generating request: its sequences in the batch, and its tokens on the way to the client.

Invariant: every sequence is released, by its end or by an abort; a slow client costs no memory, because what it has
not read yet is made again from its index. Pooling requests (embeddings, scores) are sequences without tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

from vllm_bootstrap.engines.simulator.formats import Format, error_body
from vllm_bootstrap.engines.simulator.http import Exchange
from vllm_bootstrap.engines.simulator.sequence import Batch, Sequence

Finished = Callable[[], None]


class Generation:
    """A sink of the batch that writes to an exchange. ``prompt_tokens``, ``prefixes``: of each sequence, in order of
    choices; without prefixes nothing is looked up in the prefix cache."""

    def __init__(
        self,
        exchange: Exchange,
        form: Format,
        *,
        prompt_tokens: Items[int],
        streamed: bool,
        priority: int,
        finished: Finished,
        prefixes: Items[tuple[int, ...]] = (),
    ) -> None:
        self._exchange = exchange
        self._form = form
        self._streamed = streamed
        self._finished = finished
        self._opened = False
        self._sequences = [
            Sequence(
                self, prompt_tokens=tokens, total=answer.count, priority=priority, index=index, streamed=streamed,
                finish_reason=answer.finish_reason, prefix=prefixes[index] if prefixes else (),
            )
            for index, (tokens, answer) in enumerate(zip(prompt_tokens, form.reply.answers, strict=True))
        ]  # fmt: skip
        self._left = len(self._sequences)

    def start(self, batch: Batch) -> None:
        """Submit all sequences. The client's leaving aborts them."""
        self._exchange.on_cancel = lambda: _abort(batch, self._sequences)
        if self._streamed:
            self._exchange.on_resume = self._flush
            self._exchange.start_stream()
        for sequence in self._sequences:
            batch.submit(sequence)

    def on_token(self, sequence: Sequence) -> None:
        exchange = self._exchange
        if not self._streamed or not exchange.writable:
            return
        if not self._opened:
            self._open()
        exchange.write(self._form.token(sequence.index, sequence.sent))
        sequence.sent += 1

    def on_end(self, sequence: Sequence) -> None:  # noqa: ARG002
        self._left -= 1
        if self._left:
            return
        if self._streamed:
            self._flush()
        else:
            self._exchange.respond(200, self._form.body())
            self._finished()

    def on_failure(self, sequence: Sequence, message: str) -> None:  # noqa: ARG002
        if self._exchange.closed:
            return
        error = error_body(500, message, "InternalServerError")
        if self._streamed:
            self._exchange.write(self._form.failure(error))
            self._exchange.end_stream()
        else:
            self._exchange.respond(500, error)

    def _open(self) -> None:
        self._opened = True
        opening = self._form.opening()
        if opening:
            self._exchange.write(opening)

    def _flush(self) -> None:
        """Write what was produced while the client did not read, as far as it reads now; then the end."""
        exchange = self._exchange
        if not self._opened and any(s.produced for s in self._sequences):
            self._open()
        for sequence in self._sequences:
            while sequence.sent < sequence.produced and exchange.writable:
                exchange.write(self._form.token(sequence.index, sequence.sent))
                sequence.sent += 1
        if not self._left and not exchange.closed and all(s.sent == s.total for s in self._sequences):
            exchange.write(self._form.closing())
            exchange.end_stream()
            self._finished()


class Pooling:
    """Sequences that are read and answered at once: ``reply`` makes the body when all are done."""

    def __init__(
        self,
        exchange: Exchange,
        reply: Callable[[], bytes],
        *,
        prompt_tokens: Items[int],
        priority: int,
        finished: Finished,
    ) -> None:
        self._exchange = exchange
        self._reply = reply
        self._finished = finished
        self._sequences = [Sequence(self, prompt_tokens=tokens, total=0, priority=priority) for tokens in prompt_tokens]
        self._left = len(self._sequences)

    def start(self, batch: Batch) -> None:
        self._exchange.on_cancel = lambda: _abort(batch, self._sequences)
        for sequence in self._sequences:
            batch.submit(sequence)

    def on_token(self, sequence: Sequence) -> None:  # noqa: ARG002
        raise AssertionError("a pooling sequence has no tokens")

    def on_end(self, sequence: Sequence) -> None:  # noqa: ARG002
        self._left -= 1
        if not self._left:
            self._exchange.respond(200, self._reply())
            self._finished()

    def on_failure(self, sequence: Sequence, message: str) -> None:  # noqa: ARG002
        self._exchange.respond(500, error_body(500, message, "InternalServerError"))


def _abort(batch: Batch, sequences: Iterable[Sequence]) -> None:
    for sequence in sequences:
        batch.abort(sequence)
