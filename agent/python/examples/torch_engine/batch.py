"""The sequences that run on this rank: continuous batching, prompts in chunks, greedy decoding.  A request waits, and those
behind it, until the KV cache has room for all that it can become.

A sequence's position advances only when a step has completed; a failed step is planned again as it was.
"""
from __future__ import annotations

import queue
from dataclasses import dataclass, field

from frontend import Frontend, Request


@dataclass
class Sequence:
    request: Request
    row: int  # of the batch
    tokens: list[int] = field(default_factory=list)  # prompt, then what was generated
    done: int = 0  # positions whose keys and values are there

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclass
class Plan:
    prefill: Sequence | None
    chunk: list[int]
    decode: dict[int, Sequence]  # by row
    more: bool  # there will be work after it


class Batch:
    def __init__(self, frontend: Frontend, rows: int, chunk: int):
        self.frontend, self.chunk = frontend, chunk
        self.free = list(range(rows - 1, -1, -1))
        self.sequences: list[Sequence] = []
        self.waiting: Request | None = None  # for room in the cache
        self.cache = None  # model.Cache, while weights are bound

    def admit(self, length: int, vocab: int) -> None:
        """Takes requests while there are rows.  Drops sequences whose client is gone."""
        for s in [s for s in self.sequences if s.request.gone]:
            self._end(s)
        while self.free and (r := self.waiting or self._next()):
            self.waiting, tokens = None, len(r.prompt) + r.max_tokens
            why = ("too long for the model" if tokens > length else
                   "token out of range" if not all(0 <= t < vocab for t in r.prompt) else
                   "too long for the KV cache" if not self.cache.fits(tokens) else None)
            if why:
                r.say(refused=why)
            elif r.gone:
                continue
            elif self.cache.reserve(self.free[-1], tokens):
                self.sequences.append(Sequence(r, self.free.pop(), list(r.prompt)))
            else:
                self.waiting = r
                break
        self.frontend.flush()

    def _next(self) -> Request | None:
        try:
            return self.frontend.requests.get_nowait()
        except queue.Empty:
            return None

    def plan(self) -> Plan:
        prefill = next((s for s in self.sequences if s.left > 1), None)
        chunk = prefill.tokens[prefill.done:prefill.done + self.chunk] if prefill else []
        decode = {s.row: s for s in self.sequences if s.left == 1}
        more = self.waiting is not None or not self.frontend.requests.empty() or any(
            s.generated + 1 < s.request.max_tokens or (s.left > 1 and (s is not prefill or s.left > len(chunk)))
            for s in self.sequences)
        return Plan(prefill, chunk, decode, more)

    def advance(self, plan: Plan, prefilled: int | None, decoded: list[int]) -> None:
        """The planned step has completed, with these tokens."""
        if plan.prefill:
            plan.prefill.done += len(plan.chunk)
            if plan.prefill.left == 0:
                self._token(plan.prefill, prefilled)
        for row, s in plan.decode.items():
            s.done += 1
            self._token(s, decoded[row])
        self.frontend.flush()

    def _token(self, s: Sequence, token: int) -> None:
        s.request.say(token=token, index=s.generated)
        s.tokens.append(token)
        if s.generated == s.request.max_tokens:
            s.request.say(done=True)
            self._end(s)

    def _end(self, s: Sequence) -> None:
        self.sequences.remove(s)
        self.cache.release(s.row)
        self.free.append(s.row)

    def hand_back(self, why: str) -> None:
        """Gives every sequence back; `why` is said to those that were not begun."""
        for s in list(self.sequences):
            s.request.say(handback=True, tokens=s.tokens[len(s.request.prompt):])
            self._end(s)
        while r := self.waiting or self._next():
            self.waiting = None
            r.say(refused=why)
        self.frontend.flush()
