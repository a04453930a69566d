-- Models that were added while the daemon ran (those of the catalogue's file are not stored).

CREATE TABLE models (
  name       TEXT PRIMARY KEY,
  node_id    TEXT NOT NULL,
  owner_id   TEXT NOT NULL,
  entry      TEXT NOT NULL,  -- JSON
  created_at REAL NOT NULL
);

-- How long each device, and the box as a whole ('box'), was claimed, at work and idle, in seconds that were seen.

CREATE TABLE idle_time (
  device    TEXT PRIMARY KEY,  -- UUID of a GPU, or 'box'
  since     REAL NOT NULL,     -- unix seconds
  claimed_s REAL NOT NULL CHECK (claimed_s >= 0),
  working_s REAL NOT NULL CHECK (working_s >= 0 AND working_s <= claimed_s),
  idle_s    REAL NOT NULL CHECK (idle_s >= 0)
);

-- Downloads of weights. One that has not ended is gone on with at the next start; files are those of its commit.

CREATE TABLE downloads (
  id          TEXT PRIMARY KEY,
  node_id     TEXT NOT NULL,
  owner_id    TEXT NOT NULL,
  model       TEXT NOT NULL,
  repo        TEXT NOT NULL,
  revision    TEXT NOT NULL,
  load_format TEXT,
  state       TEXT NOT NULL CHECK (state IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
  commit_id   TEXT,
  files       TEXT NOT NULL,  -- JSON
  bytes_done  INTEGER NOT NULL CHECK (bytes_done >= 0),
  files_done  INTEGER NOT NULL CHECK (files_done >= 0),
  error       TEXT,
  hint        TEXT,
  created_at  REAL NOT NULL,
  ended_at    REAL,
  CHECK ((ended_at IS NOT NULL) = (state IN ('completed', 'failed', 'cancelled')))
);
CREATE UNIQUE INDEX downloads_under_way ON downloads (repo, revision) WHERE ended_at IS NULL;
CREATE INDEX downloads_by_end ON downloads (ended_at) WHERE ended_at IS NOT NULL;

-- LoRA adapters that were uploaded. Their files lie in the folder adapters/ID of the state directory.

CREATE TABLE adapters (
  id         TEXT PRIMARY KEY,
  node_id    TEXT NOT NULL,
  owner_id   TEXT NOT NULL,
  base       TEXT NOT NULL,
  name       TEXT NOT NULL UNIQUE,
  bytes      INTEGER NOT NULL CHECK (bytes >= 0),
  rank       INTEGER,
  created_at REAL NOT NULL
);

-- What a launch is on its way to, where that is more than its state says: a launch that falls asleep is still 'ready'
-- and one that wakes still 'asleep', until it is seen that it has.
ALTER TABLE launches ADD COLUMN step TEXT
  CHECK (step IS NULL OR (step = 'falling_asleep' AND state = 'ready') OR (step = 'waking' AND state = 'asleep'));

-- How an attempt sleeps: level, bytes freed and kept. JSON
ALTER TABLE attempts ADD COLUMN sleep TEXT;

-- What a sleeping launch still uses of a GPU that its parked claim names.
ALTER TABLE gpu_claims ADD COLUMN residue_bytes INTEGER NOT NULL DEFAULT 0
  CHECK (residue_bytes >= 0 AND (residue_bytes = 0 OR owner_kind = 'parked'));

-- A parked claim takes no room: it remembers what its launch will want again.
DROP TRIGGER gpu_claims_fit;
CREATE TRIGGER gpu_claims_fit BEFORE INSERT ON gpu_claims
WHEN NEW.owner_kind = 'launch'
BEGIN
  SELECT RAISE(ABORT, 'gpu_conflict: not shared by all')
  WHERE EXISTS (
    SELECT 1 FROM gpu_claims
    WHERE node_id = NEW.node_id AND gpu_uuid = NEW.gpu_uuid AND owner_kind = 'launch'
      AND (shared = 0 OR NEW.shared = 0)
  );
  SELECT RAISE(ABORT, 'gpu_conflict: no room')
  WHERE NEW.share_milli + (
    SELECT COALESCE(SUM(share_milli), 0) FROM gpu_claims
    WHERE node_id = NEW.node_id AND gpu_uuid = NEW.gpu_uuid AND owner_kind = 'launch'
  ) > 1000;
END;

-- Claims are a launch's or parked, never both, and neither outlives it.
CREATE TRIGGER gpu_claims_are_parked_or_held BEFORE INSERT ON gpu_claims
WHEN EXISTS (SELECT 1 FROM gpu_claims WHERE owner_id = NEW.owner_id AND owner_kind <> NEW.owner_kind)
  OR (NEW.owner_kind = 'parked' AND NOT EXISTS (SELECT 1 FROM launches WHERE id = NEW.owner_id AND ended_at IS NULL))
BEGIN
  SELECT RAISE(ABORT, 'claims are parked or held, by a launch that has not ended');
END;

CREATE TRIGGER launches_end_without_parked_claims BEFORE UPDATE OF state, ended_at ON launches
WHEN NEW.ended_at IS NOT NULL
  AND EXISTS (SELECT 1 FROM gpu_claims WHERE owner_kind = 'parked' AND owner_id = NEW.id)
BEGIN
  SELECT RAISE(ABORT, 'a launch gives its parked claims up before it ends');
END;

-- How long it took to wake, by the same kinds as start_durations. The level tells what had to be brought back.
CREATE TABLE wake_durations (
  id        INTEGER PRIMARY KEY,
  model     TEXT NOT NULL,
  engine    TEXT NOT NULL,
  device    TEXT NOT NULL,
  args_hash TEXT NOT NULL,
  level     INTEGER NOT NULL,
  total_s   REAL NOT NULL,
  at        REAL NOT NULL
);
CREATE INDEX wake_durations_by_kind ON wake_durations (model, engine, device, args_hash, level, id);
