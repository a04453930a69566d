"""A line that meets one thing after another: tried a bounded number of times, and never waiting more than a minute."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_bootstrap.batches.retrying import BACKOFF_MAX_S, MAX_UNCOUNTED, Again, Facts, Final, WaitForKey, decide
from vllm_bootstrap.errors import BY_CODE, ApiError, Unauthorized

CLASSES = sorted({kind for kind in BY_CODE.values() if kind is not Unauthorized}, key=lambda kind: kind.code)
ERRORS = st.builds(
    lambda kind, wait: kind("words", retry_after=wait),
    st.sampled_from(CLASSES),
    st.none() | st.floats(-10, 1e6, allow_nan=False),
) | st.just(Unauthorized())
WAITS = st.none() | st.floats(allow_nan=False)
CHANCE = st.floats(0, 1, exclude_max=True)


@st.composite
def happenings(draw: st.DrawFn) -> dict[str, object]:
    either: dict[str, object] = draw(
        st.one_of(
            st.builds(lambda status, wait: {"status": status, "retry_after": wait}, st.integers(100, 599), WAITS),
            st.builds(lambda error, sent: {"error": error, "sent": sent}, ERRORS, st.booleans()),
        )
    )
    return {**either, "chance": draw(CHANCE)}


@given(happened=st.lists(happenings(), min_size=1, max_size=40), limit=st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_a_line_ends_after_as_many_attempts_as_are_allowed(happened, limit) -> None:
    counted = uncounted = 0
    for more in happened:
        assert counted < limit
        decision = decide(Facts(attempts=counted + 1, limit=limit, uncounted=uncounted, **more))
        assert decision.reason
        if isinstance(decision, Final):
            return
        if isinstance(decision, Again):
            assert 0 <= decision.delay_s <= BACKOFF_MAX_S
            counted += decision.counts
            uncounted = 0 if decision.counts else uncounted + 1
            assert uncounted <= MAX_UNCOUNTED
        elif not isinstance(decision, WaitForKey):
            assert 0 < getattr(decision, "look_again_s", getattr(decision, "delay_s", 0)) <= BACKOFF_MAX_S


@given(error=ERRORS, attempts=st.integers(1, 9), chance=CHANCE, sent=st.booleans())
def test_every_error_of_ours_has_a_decision(error: ApiError, attempts: int, chance: float, sent: bool) -> None:
    decision = decide(Facts(attempts, 5, chance, error=error, sent=sent))
    assert decision == decide(Facts(attempts, 5, chance, error=error, sent=sent))
