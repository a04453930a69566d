-- One batch: which lines there are, in which order they are worked off, and the record of each that is finished.
-- A line is finished exactly when it has a row in records. Line numbers count from 1.

CREATE TABLE models (
  model_no INTEGER PRIMARY KEY,
  name     TEXT NOT NULL UNIQUE,
  lines    INTEGER NOT NULL
);

-- start and length: where the request's body lies in the input file, so that nobody must take a line apart again.
CREATE TABLE lines (
  model_no  INTEGER NOT NULL REFERENCES models (model_no),
  pos       INTEGER NOT NULL,
  line      INTEGER NOT NULL,
  start     INTEGER NOT NULL,
  length    INTEGER NOT NULL,
  custom_id TEXT NOT NULL,
  PRIMARY KEY (model_no, pos)
) WITHOUT ROWID;

-- Lines that were tried without getting a record.
CREATE TABLE troubles (
  line     INTEGER PRIMARY KEY,
  attempts INTEGER NOT NULL,
  deaths   INTEGER NOT NULL
);

-- In the order in which they came, so that writing appends. The index on line is slim: whether a line is finished
-- must not cost a look at its record.
CREATE TABLE records (
  record      INTEGER PRIMARY KEY,
  line        INTEGER NOT NULL UNIQUE,
  ok          INTEGER NOT NULL CHECK (ok IN (0, 1)),
  attempts    INTEGER NOT NULL,
  finished_at REAL NOT NULL,
  data        BLOB NOT NULL
);
CREATE INDEX records_failed ON records (line) WHERE ok = 0;

-- Changed in the transaction that changes records: counting a million rows takes too long to be asked for.
CREATE TABLE totals (
  one        INTEGER PRIMARY KEY CHECK (one = 1),
  total      INTEGER NOT NULL,
  completed  INTEGER NOT NULL DEFAULT 0,
  failed     INTEGER NOT NULL DEFAULT 0,
  retried    INTEGER NOT NULL DEFAULT 0,
  prompt     INTEGER NOT NULL DEFAULT 0,
  cached     INTEGER NOT NULL DEFAULT 0,
  completion INTEGER NOT NULL DEFAULT 0,
  reasoning  INTEGER NOT NULL DEFAULT 0,
  CHECK (completed + failed <= total)
);
