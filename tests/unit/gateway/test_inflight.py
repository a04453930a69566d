"""The registry of what is under way."""

from __future__ import annotations

from vllm_bootstrap.gateway.inflight import Inflight, RequestInfo


class Walker:
    def __init__(self, registry: Inflight, wish: str) -> None:
        self.registry, self.looked = registry, 0
        self.id = registry.add(wish, self)

    def info(self) -> RequestInfo:
        return RequestInfo(self.id, None, "ann", None, None, "reading", "POST", "/", 0.0, 0, 1, 0, False)

    def cancel(self) -> None:
        self.registry.remove(self.id)

    def rights_changed(self) -> None:
        self.looked += 1
        self.cancel()


def test_equal_ids_become_different_ones() -> None:
    registry = Inflight()
    walkers = [Walker(registry, "same") for _ in range(3)]
    assert walkers[0].id == "same"
    assert len({walker.id for walker in walkers}) == len(registry) == 3
    assert [one.id for one in registry.list()] == [walker.id for walker in walkers]
    registry.remove("same")
    registry.remove("same")
    assert Walker(registry, "same").id == "same"


def test_one_can_be_asked_for_and_ended() -> None:
    registry = Inflight()
    walker = Walker(registry, "a")
    assert registry.get("a") == walker.info()
    assert registry.get("b") is None
    assert registry.cancel("a")
    assert not registry.cancel("a")
    assert not registry.list()


def test_all_may_end_while_they_are_told_of_changed_keys() -> None:
    registry = Inflight()
    walkers = [Walker(registry, "a") for _ in range(5)]
    registry.rights_changed()
    assert [walker.looked for walker in walkers] == [1] * 5
    assert not len(registry)
