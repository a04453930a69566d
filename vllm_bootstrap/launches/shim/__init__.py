"""The shim: a small process of its own that starts one engine, keeps its log, and sees its whole tree dead.

Invariant: the standard library only, no asyncio, every module imported at start, so that a shim keeps working while
the daemon above it dies, freezes, or is replaced by another version. It runs by path (``python -I -S .../shim``), not
as part of this package; the daemon imports from here only the vocabulary (``protocol``) and the readings of ``/proc``
(``procfs``, ``cgroup``, ``shm``). It must not know launches' states, the database, engines or HTTP.

Order of life::

    spawned  → own session, subreaper, identity file, control socket         (daemon gone before "go": exit)
    go       → GPU lock files, private TMPDIR, engine in its own process group, log to segments
    running  → serves the control socket to whichever daemon comes
    stop     → SIGTERM to the main process, grace, SIGKILL to the tree, until nothing is left
    ended    → exit record on disk (fsynced), announced, exit
"""
