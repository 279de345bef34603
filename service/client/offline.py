"""Is this token good, by what is known here? Nothing is waited for, so that any thread may ask."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from hashlib import sha256 as _sha256
from time import time

from msgspec import Struct

from .clock import boot_seconds
from .jwts import TOKEN_CHARS_MAX, Malformed, claims_of, read, well_formed_reference
from .keys import PublicKeys
from .knowledge import CLOCK_SECONDS_MAX, Knowledge
from .ledger import Answer
from .revoked import ASK, NEVER, REVOKED
from .uses import Uses
from .verdicts import Asked, Code, Verdict

_REFERENCE = "tl_"
_CLOCK_SECONDS = 60  # by so much the ledger's clock may be ahead of ours when a token is new
_CACHED_SECONDS = 600.0
# What the ledger's answer about a JWT close to a cut-off says of the cut-off. Any other answer says nothing about it.
_STANDING: dict[str, float] = {
    **dict.fromkeys(("revoked", "client_disabled", "subject_disabled"), REVOKED),
    **dict.fromkeys(("not_yet_valid", "expired", "wrong_audience", "insufficient_scope", "valid"), NEVER),
}


class Known(Struct, gc=False):
    """A token that was found to be the ledger's.

    `standing`: since which generation of what is revoked, and the boot time from which it is revoked: one value, since
    threads write it. `answer_until`, by the boot clock: for reference tokens, how long the answer counts. `good`: the
    last verdict that it is valid.
    """

    token_id: str
    grant_id: str
    kind: str | None
    subject: str
    client_id: str | None
    kid: str | None
    scope: str
    scopes: frozenset[str]
    audience: tuple[str, ...]
    issued: float
    expires: float
    not_before: float
    issued_at: datetime
    expires_at: datetime
    standing: tuple[int, float]
    code: Code = "valid"
    answer_until: float = 0.0
    good: Verdict | None = None


@functools.lru_cache(maxsize=1024)
def _granted(scope: str, audience: tuple[str, ...]) -> tuple[str, frozenset[str], tuple[str, ...]]:
    """Scope, its names, audience: the same objects for all tokens that were given the same, which most share."""
    return scope, frozenset(scope.split()), audience


class _Cache:
    """Bounded; what was not asked for lately goes first, half of it at a time."""

    def __init__(self, entries_max: int) -> None:
        self._half = max(1, entries_max // 2)
        self.new: dict[object, Known] = {}
        self._old: dict[object, Known] = {}
        self._turned_at = boot_seconds()

    def get(self, key: object) -> Known | None:
        found = self.new.get(key)
        if found is None:
            found = self._old.get(key)
            if found is not None:
                self.put(key, found)
        return found

    def put(self, key: object, known: Known) -> None:
        if len(self.new) >= self._half or boot_seconds() - self._turned_at > _CACHED_SECONDS:
            self._old, self.new = self.new, {}
            self._turned_at = boot_seconds()
        self.new[key] = known

    def __len__(self) -> int:
        return len(self.new.keys() | self._old.keys())


class Offline:
    """Answers by signatures, claims and the revocations that are known, and records each use that it answers for."""

    def __init__(
        self,
        knowledge: Knowledge,
        keys: PublicKeys,
        uses: Uses | None,
        *,
        issuer: str,
        audience: tuple[str, ...],
        stale_seconds_max: float,
        tokens_max: int,
        reference_seconds_max: float,
    ) -> None:
        self._knowledge = knowledge
        self._keys = keys
        self._uses = uses
        self._issuer = issuer
        self._audience = audience
        self._audience_text = " ".join(audience)
        self._stale_seconds_max = stale_seconds_max
        self._reference_seconds_max = reference_seconds_max
        self._tokens_max = tokens_max
        self._jwts, self._jwts_generation = _Cache(tokens_max), keys.generation
        self._references = _Cache(tokens_max)
        self._revoked_keys = 0  # when the key set was last taken for out of date

    @property
    def stale(self) -> bool:
        knowledge = self._knowledge
        too_old = boot_seconds() - knowledge.complete_at > self._stale_seconds_max
        return too_old or abs(knowledge.clock_ahead) > CLOCK_SECONDS_MAX

    def check(self, token: str, asked: Asked) -> Verdict | None:
        """None if the ledger has to be asked."""
        if token.startswith(_REFERENCE):
            return self._check_reference(token, asked)
        knowledge = self._knowledge
        seq = knowledge.ledger_seq
        here, now = boot_seconds(), time()
        if (
            here - knowledge.complete_at > self._stale_seconds_max
            or abs(now - here - knowledge.clock_offset) > CLOCK_SECONDS_MAX
        ):
            return self.stale_verdict()
        if len(token) > TOKEN_CHARS_MAX or not token.isascii():
            return Verdict(False, "malformed", seq, True)
        keys_generation = self._keys.generation
        if keys_generation != self._jwts_generation:
            self._jwts, self._jwts_generation = _Cache(self._tokens_max), keys_generation
        digest = _sha256(token.encode()).digest()
        known = self._jwts.new.get(digest) or self._jwts.get(digest)
        if known is None:
            found = self._read(token)
            if found is None or isinstance(found, str):
                return None if found is None else Verdict(False, found, seq, True)
            known = found
            if keys_generation == self._keys.generation:
                self._jwts.put(digest, known)
        generation, begins = known.standing
        if generation != knowledge.revoked.generation:
            begins = self._revoked_from(known)
            if begins == ASK:
                return None
        code: Code = "revoked" if here >= begins else self._judge(known, now, asked)
        uses = self._uses
        if uses is not None:
            audience = self._audience_text if asked.audience is None else " ".join(asked.audience)
            uses.record((known.token_id, now, code, asked.scope, audience, asked.context))
        if code != "valid":
            return _verdict(known, code, seq)
        verdict = known.good
        if verdict is None or verdict.ledger_seq != seq:
            verdict = known.good = _verdict(known, code, seq)
        return verdict

    def _revoked_from(self, known: Known) -> float:
        """As `RevokedSet.check`, which need not be asked again until something more is revoked."""
        revoked = self._knowledge.revoked
        generation = revoked.generation  # before the look: what comes meanwhile is looked at the next time
        owners = (known.client_id, known.subject, known.kid)
        begins = revoked.check(known.token_id, known.grant_id, owners, known.issued)
        if begins != ASK:
            known.standing = (generation, begins)
        return begins

    def _judge(self, known: Known, now: float, asked: Asked) -> Code:
        if now < known.not_before:
            return "not_yet_valid"
        if now >= known.expires:
            return "expired"
        wanted = self._audience if asked.audience is None else asked.audience
        if known.audience != wanted and not any(name in known.audience for name in wanted):
            return "wrong_audience"
        scope = asked.scope
        if scope and scope not in known.scopes and not known.scopes.issuperset(scope.split()):
            return "insufficient_scope"
        return "valid"

    def _read(self, token: str) -> Known | Code | None:
        """The token behind a string that is new here, or what is wrong with it. None if its key must be fetched."""
        try:
            jwt = read(token)
            if self._knowledge.revoked.has_key(jwt.kid):  # its signature proves nothing any more
                return "revoked"
            key = self._keys.get(jwt.kid)
            if key is None:
                self._expect_successors()
                return None if self._keys.may_come else "unknown"
            if jwt.algorithm != key.algorithm or not key.verify(jwt.signed, jwt.signature):
                return "unknown"
            claims = claims_of(jwt.payload)
        except Malformed:
            return "malformed"
        if claims.issuer != self._issuer:
            return "unknown"
        return Known(
            claims.token_id,
            claims.grant_id,
            "access",
            claims.subject,
            claims.client_id,
            jwt.kid,
            *_granted(claims.scope, claims.audience),
            claims.issued_at,
            claims.expires_at,
            max(claims.not_before, claims.issued_at - _CLOCK_SECONDS),
            datetime.fromtimestamp(claims.issued_at, UTC),
            datetime.fromtimestamp(claims.expires_at, UTC),
            (-1, NEVER),
        )

    def _expect_successors(self) -> None:
        """The key that took the place of a revoked one was announced to nobody, and signs from that moment on."""
        revoked = self._knowledge.revoked.keys
        if revoked != self._revoked_keys:
            self._revoked_keys = revoked
            self._keys.renew()

    def lacks_key(self, token: str) -> bool:
        """Whether it is for want of a key that nothing can be said of this JWT."""
        try:
            return self._keys.get(read(token).kid) is None
        except Malformed:
            return False

    # Reference tokens: only the ledger can tell, and what it told counts for some seconds, unless it is revoked since.

    def _check_reference(self, token: str, asked: Asked) -> Verdict | None:
        if not well_formed_reference(token):
            return Verdict(False, "malformed", self._knowledge.ledger_seq, True)
        if self.stale:
            return None
        seq = self._knowledge.ledger_seq
        known = self._references.get(question_key(token, asked))
        if known is None:
            return None
        here, now = boot_seconds(), time()
        generation, begins = known.standing
        if generation != self._knowledge.revoked.generation:
            begins = self._revoked_from(known)
        if begins == ASK or here >= known.answer_until or now >= known.expires:
            return None
        code: Code = "revoked" if here >= begins else known.code
        if self._uses is not None:
            audience = self._audience_text if asked.audience is None else " ".join(asked.audience)
            self._uses.record((known.token_id, now, code, asked.scope, audience, asked.context))
        return _verdict(known, code, seq)

    def seen(self, token: str, asked: Asked) -> bool:
        """Whether the ledger, or its signature, has said lately that there is such a token."""
        if token.startswith(_REFERENCE):
            return self._references.get(question_key(token, asked)) is not None
        return self._jwts.get(_sha256(token.encode()).digest()) is not None

    @property
    def generation(self) -> int:
        """To be handed to `keep` with the answer of a question that was put later."""
        return self._knowledge.revoked.generation

    def keep(self, token: str, asked: Asked, answer: Answer, generation: int, asked_at: float) -> None:
        """Remembers the ledger's answer, unless something was revoked since the question: it may not know of it.

        `asked_at`: by the boot clock; the answer counts from then.
        """
        if generation != self._knowledge.revoked.generation:
            return
        if not token.startswith(_REFERENCE):
            known = self._jwts.get(_sha256(token.encode()).digest())
            begins = _STANDING.get(answer.code)
            if known is not None and begins is not None:
                known.standing = (generation, begins)
            return
        if answer.token_id is None or answer.code == "stale":
            return
        known = _known_by(answer, generation, asked_at + self._reference_seconds_max)
        if known is not None:
            self._references.put(question_key(token, asked), known)

    def stale_verdict(self) -> Verdict:
        """Nothing can be said: what is known of revocations is too old."""
        return Verdict(False, "stale", self._knowledge.ledger_seq, True, detail=self.why_stale())

    def why_stale(self) -> str:
        """What is too old, and why it is, as far as that can be told from here."""
        knowledge = self._knowledge
        age, ahead = knowledge.age_seconds, knowledge.clock_ahead
        if abs(ahead) > CLOCK_SECONDS_MAX:
            return f"this host's clock is {ahead:+.0f} s off the ledger's; set it right"
        since = f"{age:.1f} s old" if age < float("inf") else "not complete yet"
        why = knowledge.problem or "the ledger announces nothing newer; `token-ledger doctor` there says why"
        return f"what is known of revocations is {since}; {self._stale_seconds_max:g} s are allowed: {why}"


def question_key(token: str, asked: Asked) -> tuple[object, ...]:
    """The same for questions that have the same answer."""
    digest = _sha256(token.encode()).digest()
    return (digest, asked.scope, asked.audience, asked.context.ip if asked.context else None)


def _known_by(answer: Answer, generation: int, until: float) -> Known | None:
    if answer.token_id is None or answer.grant_id is None or answer.issued_at is None or answer.expires_at is None:
        return None
    return Known(
        answer.token_id,
        answer.grant_id,
        answer.kind,
        answer.subject or "",
        answer.client_id,
        None,
        answer.scope or "",
        frozenset(),
        answer.audience,
        answer.issued_at.timestamp(),
        answer.expires_at.timestamp() if answer.code != "expired" else float("inf"),
        0.0,
        answer.issued_at,
        answer.expires_at,
        (generation, NEVER),
        answer.code,
        until,
    )


def _verdict(known: Known, code: Code, seq: int) -> Verdict:
    return Verdict(
        code == "valid",
        code,
        seq,
        True,
        known.token_id,
        known.grant_id,
        known.kind,
        known.subject,
        known.client_id,
        known.scope,
        known.audience,
        known.issued_at,
        known.expires_at,
    )
