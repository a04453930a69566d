-- Files, batches, their history, single items, and ends of batches to be told to others.
-- The lines of a batch and their records lie in a database of their own (migrations/batch).

CREATE TABLE files (
  id         TEXT PRIMARY KEY,
  node_id    TEXT NOT NULL,
  owner_id   TEXT NOT NULL,
  purpose    TEXT NOT NULL,
  filename   TEXT NOT NULL,
  bytes      INTEGER NOT NULL CHECK (bytes >= 0),
  status     TEXT NOT NULL,
  created_at REAL NOT NULL,
  expires_at REAL
);
CREATE INDEX files_by_owner ON files (owner_id, id);
CREATE INDEX files_by_expiry ON files (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE batches (
  id                     TEXT PRIMARY KEY,
  node_id                TEXT NOT NULL,
  owner_id               TEXT NOT NULL,
  endpoint               TEXT NOT NULL,
  input_file_id          TEXT NOT NULL,
  completion_window      TEXT NOT NULL,
  created_at             REAL NOT NULL,
  expires_at             REAL NOT NULL,
  state                  TEXT NOT NULL CHECK (state IN ('validating', 'failed', 'in_progress', 'finalizing',
                           'completed', 'expired', 'cancelling', 'cancelled')),
  why                    TEXT,
  paused                 INTEGER NOT NULL CHECK (paused IN (0, 1)),
  priority               INTEGER NOT NULL CHECK (priority BETWEEN -100 AND 100),
  launch_id              TEXT,
  metadata               TEXT,           -- JSON
  webhook                TEXT,           -- JSON
  output_expires_after_s REAL,
  output_file_id         TEXT,
  error_file_id          TEXT,
  counts                 TEXT NOT NULL,  -- JSON
  usage                  TEXT NOT NULL,  -- JSON
  errors                 TEXT NOT NULL,  -- JSON
  models                 TEXT NOT NULL,  -- JSON
  stamps                 TEXT NOT NULL,  -- JSON
  ended_at               REAL,
  CHECK ((why IS NOT NULL) = (state = 'finalizing')),
  CHECK ((ended_at IS NOT NULL) = (state IN ('failed', 'completed', 'expired', 'cancelled')))
);
CREATE INDEX batches_by_owner ON batches (owner_id, id);
CREATE INDEX batches_unfinished ON batches (id) WHERE ended_at IS NULL;
CREATE INDEX batches_by_end ON batches (ended_at) WHERE ended_at IS NOT NULL;

-- The history. Append-only: a row changes never and goes only when its batch goes.
CREATE TABLE batch_events (
  seq        INTEGER PRIMARY KEY AUTOINCREMENT,
  batch_id   TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
  at         REAL NOT NULL,
  event      TEXT NOT NULL,
  from_state TEXT,
  to_state   TEXT NOT NULL,
  detail     TEXT NOT NULL  -- JSON
);
CREATE INDEX batch_events_by_batch ON batch_events (batch_id, seq);

CREATE TRIGGER batch_events_are_not_rewritten BEFORE UPDATE ON batch_events
BEGIN
  SELECT RAISE (ABORT, 'history is append-only');
END;

-- Idempotency-Key of what creates batches and items; result_id is the id of what was created.
CREATE TABLE batch_keys (
  owner_id     TEXT NOT NULL,
  key          TEXT NOT NULL,
  request_hash TEXT NOT NULL,
  result_id    TEXT NOT NULL,
  created_at   REAL NOT NULL,
  PRIMARY KEY (owner_id, key)
) WITHOUT ROWID;
CREATE INDEX batch_keys_by_age ON batch_keys (created_at);

-- Ends of batches that somebody wants to be told of, until that has worked or was given up.
CREATE TABLE webhooks (
  id         TEXT PRIMARY KEY,
  batch_id   TEXT NOT NULL,
  owner_id   TEXT NOT NULL,
  url        TEXT NOT NULL,
  secret     TEXT NOT NULL,
  payload    TEXT NOT NULL,
  attempts   INTEGER NOT NULL DEFAULT 0,
  next_at    REAL NOT NULL,
  created_at REAL NOT NULL,
  last_error TEXT
);
CREATE INDEX webhooks_by_next ON webhooks (next_at);

CREATE TABLE items (
  id         TEXT PRIMARY KEY,
  node_id    TEXT NOT NULL,
  owner_id   TEXT NOT NULL,
  path       TEXT NOT NULL,
  model      TEXT,
  launch_id  TEXT,
  body       TEXT,              -- JSON; dropped when it has ended
  priority   INTEGER NOT NULL CHECK (priority BETWEEN -100 AND 100),
  state      TEXT NOT NULL CHECK (state IN ('queued', 'completed', 'failed', 'cancelled', 'expired')),
  attempts   INTEGER NOT NULL DEFAULT 0,
  deaths     INTEGER NOT NULL DEFAULT 0,
  created_at REAL NOT NULL,
  expires_at REAL NOT NULL,
  ended_at   REAL,
  record     TEXT,              -- JSON, what an output line has
  CHECK ((ended_at IS NOT NULL) = (state <> 'queued')),
  CHECK ((record IS NOT NULL) = (state <> 'queued'))
);
CREATE INDEX items_by_owner ON items (owner_id, id);
CREATE INDEX items_waiting ON items (id) WHERE ended_at IS NULL;
CREATE INDEX items_by_end ON items (ended_at) WHERE ended_at IS NOT NULL;
