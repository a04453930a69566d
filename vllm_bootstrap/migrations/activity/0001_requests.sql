-- Finished requests of the data plane, oldest first. Never content, never keys: ``owner`` is a key's name.
--
-- Times are unix seconds, durations milliseconds, sizes bytes. NULL: not known, or it never came to that.

CREATE TABLE requests (
  id                INTEGER PRIMARY KEY,
  node_id           TEXT NOT NULL,
  request_id        TEXT NOT NULL,
  started_at        REAL NOT NULL,
  class             TEXT,
  owner             TEXT NOT NULL,
  model             TEXT,
  launch_id         TEXT,
  method            TEXT NOT NULL,
  path              TEXT NOT NULL,
  status            INTEGER NOT NULL,
  code              TEXT,
  stream            INTEGER NOT NULL CHECK (stream IN (0, 1)),
  queue_ms          INTEGER NOT NULL,
  ttft_ms           REAL,
  duration_ms       REAL NOT NULL,
  prompt_tokens     INTEGER,
  completion_tokens INTEGER,
  bytes_in          INTEGER NOT NULL,
  bytes_out         INTEGER NOT NULL
);
