"""What all commands that talk to a daemon have in common: their options, their client, and how a launch is named."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_bootstrap.client import Client
from vllm_bootstrap.ids import is_group_id, is_launch_id
from vllm_bootstrap.wire import LaunchStatus

Url = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help="Address of the daemon. Default: VLLM_BOOTSTRAP_URL, else the local one."
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        help="Key for the daemon. Better set VLLM_BOOTSTRAP_KEY: arguments can be seen by everybody on this machine.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
LaunchName = Annotated[
    str, typer.Argument(metavar="ID", help="A launch: its id, the beginning or end of it, or its model's name.")
]


class Failure(Exception):
    """The command could not do what was asked; exit code 1."""


class UsageError(Exception):
    """The command cannot be carried out as it was given; exit code 2."""


def connect(url: str | None, key: str | None) -> Client:
    """The client of this command. Raises ``UsageError`` for an address that is none."""
    try:
        return Client(url, key)
    except ValueError as exc:
        raise UsageError(str(exc)) from None


def resolve(client: Client, name: str, *, include_ended: bool = True) -> str:
    """The id of the launch that ``name`` means, or of the group when it fits all of a group of replicas. Raises
    ``Failure`` when there is none, ``UsageError`` when it may be several.

    Active launches are preferred: an ended one is only meant when no active one fits. A whole id is not looked up, so
    that keys without the scope to list launches can use it.
    """
    if is_launch_id(name) or is_group_id(name):
        return name
    found = [launch for launch in client.launches(limit=1000).data if _fits(launch, name)]
    if not found and include_ended:
        found = [launch for launch in client.launches(include_ended=True, limit=1000).data if _fits(launch, name)]
        if all(name in (launch.served_model_name, launch.model) for launch in found):
            # Of a model's ended launches the newest is meant, with its group.
            found = [launch for launch in found if launch.group_id == found[0].group_id]
    if not found:
        raise Failure(f"No launch is called {name!r}. 'vllm-bootstrap ps --all' lists them.")
    groups = list(dict.fromkeys(launch.group_id for launch in found))
    if len(groups) == 1 and not any(_bears(launch.launch_id, name) for launch in found):
        return groups[0]
    if len(found) > 1:
        ids = ", ".join(groups[:5] if len(groups) > 1 else [launch.launch_id for launch in found[:5]])
        raise UsageError(f"{name!r} may mean several launches ({ids}): give more of the id.")
    return found[0].launch_id


def _fits(launch: LaunchStatus, name: str) -> bool:
    exact = name in (launch.served_model_name, launch.model)
    return exact or _bears(launch.launch_id, name) or _bears(launch.group_id, name)


def _bears(whole_id: str, name: str) -> bool:
    return len(name) >= 3 and (whole_id.startswith(name) or whole_id.endswith(name))
