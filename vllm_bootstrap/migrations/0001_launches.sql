-- Launches, their attempts, their history, who owns which GPU, and what is remembered for later starts.
--
-- Every row that belongs to a machine or to somebody says so (node_id, owner_id: the key's name, never its token).
-- Times are unix seconds, sizes are bytes, columns named in capitals at their end of line hold JSON objects.

CREATE TABLE launches (
  id                TEXT PRIMARY KEY,
  node_id           TEXT NOT NULL,
  owner_id          TEXT NOT NULL,
  group_id          TEXT NOT NULL,
  model             TEXT NOT NULL,
  engine            TEXT NOT NULL,
  served_model_name TEXT NOT NULL,
  spec              TEXT NOT NULL,  -- JSON
  labels            TEXT NOT NULL,  -- JSON
  restart           TEXT NOT NULL,  -- JSON
  placement         TEXT,           -- JSON
  state             TEXT NOT NULL CHECK (state IN ('bootstrapping', 'ready', 'stopping', 'stopped', 'failed', 'asleep')),
  why               TEXT,
  attempt           INTEGER NOT NULL,
  created_at        REAL NOT NULL,
  changed_at        REAL NOT NULL,
  ended_at          REAL,
  failure           TEXT,           -- JSON
  transitions       TEXT NOT NULL,  -- JSON
  CHECK ((why IS NOT NULL) = (state = 'stopping')),
  CHECK ((ended_at IS NOT NULL) = (state IN ('stopped', 'failed')))
);
CREATE INDEX launches_by_group ON launches (group_id);
CREATE INDEX launches_unfinished ON launches (id) WHERE ended_at IS NULL;
CREATE INDEX launches_by_end ON launches (ended_at) WHERE ended_at IS NOT NULL;

CREATE TABLE attempts (
  launch_id  TEXT NOT NULL REFERENCES launches (id) ON DELETE CASCADE,
  attempt    INTEGER NOT NULL,
  handle     TEXT,  -- JSON
  engine     TEXT,  -- JSON
  baseline   TEXT,  -- JSON
  placement  TEXT,  -- JSON
  endpoint   TEXT,  -- JSON
  exit       TEXT,  -- JSON
  started_at REAL,
  ready_at   REAL,
  ended_at   REAL,
  PRIMARY KEY (launch_id, attempt)
) WITHOUT ROWID;

-- The history. Append-only: a row changes never and goes only when its launch goes.
CREATE TABLE launch_events (
  seq        INTEGER PRIMARY KEY AUTOINCREMENT,
  launch_id  TEXT NOT NULL REFERENCES launches (id) ON DELETE CASCADE,
  attempt    INTEGER NOT NULL,
  at         REAL NOT NULL,
  event      TEXT NOT NULL,
  from_state TEXT,
  to_state   TEXT NOT NULL,
  detail     TEXT NOT NULL  -- JSON
);
CREATE INDEX launch_events_by_launch ON launch_events (launch_id, seq);

CREATE TRIGGER launch_events_never_change BEFORE UPDATE ON launch_events
BEGIN
  SELECT RAISE(ABORT, 'history is append-only');
END;

-- The cascade from launches runs after the launch's own row is gone, so it passes here.
CREATE TRIGGER launch_events_go_with_their_launch BEFORE DELETE ON launch_events
WHEN EXISTS (SELECT 1 FROM launches WHERE id = OLD.launch_id)
BEGIN
  SELECT RAISE(ABORT, 'history goes only with its launch');
END;

-- Who owns which part of which GPU, in thousandths. Owners are launches, later also parked models.
CREATE TABLE gpu_claims (
  node_id     TEXT NOT NULL,
  gpu_uuid    TEXT NOT NULL,
  owner_kind  TEXT NOT NULL CHECK (owner_kind IN ('launch', 'parked')),
  owner_id    TEXT NOT NULL,
  share_milli INTEGER NOT NULL CHECK (share_milli BETWEEN 1 AND 1000),
  shared      INTEGER NOT NULL CHECK (shared IN (0, 1)),
  PRIMARY KEY (node_id, gpu_uuid, owner_kind, owner_id),
  CHECK (shared = 1 OR share_milli = 1000)
) WITHOUT ROWID;
CREATE INDEX gpu_claims_by_owner ON gpu_claims (owner_kind, owner_id);

CREATE TRIGGER gpu_claims_fit BEFORE INSERT ON gpu_claims
BEGIN
  SELECT RAISE(ABORT, 'gpu_conflict: not shared by all')
  WHERE EXISTS (
    SELECT 1 FROM gpu_claims
    WHERE node_id = NEW.node_id AND gpu_uuid = NEW.gpu_uuid AND (shared = 0 OR NEW.shared = 0)
  );
  SELECT RAISE(ABORT, 'gpu_conflict: no room')
  WHERE NEW.share_milli + (
    SELECT COALESCE(SUM(share_milli), 0) FROM gpu_claims WHERE node_id = NEW.node_id AND gpu_uuid = NEW.gpu_uuid
  ) > 1000;
END;

CREATE TRIGGER gpu_claims_never_change BEFORE UPDATE ON gpu_claims
BEGIN
  SELECT RAISE(ABORT, 'claims are given back and taken anew, never changed');
END;

-- GPUs are owned exactly while the launch's state is not terminal.
CREATE TRIGGER gpu_claims_need_a_live_launch BEFORE INSERT ON gpu_claims
WHEN NEW.owner_kind = 'launch'
  AND NOT EXISTS (SELECT 1 FROM launches WHERE id = NEW.owner_id AND ended_at IS NULL)
BEGIN
  SELECT RAISE(ABORT, 'only a launch that has not ended owns GPUs');
END;

CREATE TRIGGER launches_end_without_claims BEFORE UPDATE OF state, ended_at ON launches
WHEN NEW.ended_at IS NOT NULL
  AND EXISTS (SELECT 1 FROM gpu_claims WHERE owner_kind = 'launch' AND owner_id = NEW.id)
BEGIN
  SELECT RAISE(ABORT, 'a launch gives its GPUs back before it ends');
END;

CREATE TRIGGER launches_deleted_only_when_ended BEFORE DELETE ON launches
WHEN OLD.ended_at IS NULL
BEGIN
  SELECT RAISE(ABORT, 'only an ended launch can be forgotten');
END;

-- GPUs whose memory did not come back after a launch ended.
CREATE TABLE unsettled_gpus (
  node_id        TEXT NOT NULL,
  gpu_uuid       TEXT NOT NULL,
  baseline_bytes INTEGER NOT NULL,
  reason         TEXT NOT NULL,
  at             REAL NOT NULL,
  PRIMARY KEY (node_id, gpu_uuid)
) WITHOUT ROWID;

-- Answers to creates that carried an Idempotency-Key.
CREATE TABLE idempotency_keys (
  owner_id     TEXT NOT NULL,
  key          TEXT NOT NULL,
  request_hash TEXT NOT NULL,
  launch_id    TEXT NOT NULL REFERENCES launches (id) ON DELETE CASCADE,
  created_at   REAL NOT NULL,
  PRIMARY KEY (owner_id, key)
) WITHOUT ROWID;
CREATE INDEX idempotency_keys_by_launch ON idempotency_keys (launch_id);

-- How long earlier starts took, for the time left that is shown while one is under way.
CREATE TABLE start_durations (
  id        INTEGER PRIMARY KEY,
  model     TEXT NOT NULL,
  engine    TEXT NOT NULL,
  device    TEXT NOT NULL,
  args_hash TEXT NOT NULL,
  total_s   REAL NOT NULL,
  phases    TEXT NOT NULL,  -- JSON
  at        REAL NOT NULL
);
CREATE INDEX start_durations_by_kind ON start_durations (model, engine, device, args_hash, id);
