-- name: insert_download
INSERT INTO downloads (id, node_id, owner_id, model, repo, revision, load_format, state, commit_id, files, bytes_done,
  files_done, error, hint, created_at, ended_at)
VALUES (:id, :node_id, :owner, :model, :repo, :revision, :load_format, :state, :commit_id, :files, :bytes_done,
  :files_done, :error, :hint, :created_at, :ended_at);

-- name: update_download
UPDATE downloads SET state = :state, commit_id = :commit_id, files = :files, bytes_done = :bytes_done,
  files_done = :files_done, error = :error, hint = :hint, ended_at = :ended_at
WHERE id = :id;

-- name: downloads
SELECT * FROM downloads ORDER BY id;

-- name: forget_downloads
-- Of those that ended, only the last ones are kept, and of each repository and revision the last that was completed.
DELETE FROM downloads WHERE ended_at IS NOT NULL
AND id NOT IN (SELECT id FROM downloads WHERE ended_at IS NOT NULL ORDER BY ended_at DESC, id DESC LIMIT :kept)
AND id NOT IN (SELECT max(id) FROM downloads WHERE state = 'completed' GROUP BY repo, revision)
RETURNING id;

-- name: forget_repo
DELETE FROM downloads WHERE ended_at IS NOT NULL AND repo = :repo AND (:commit_id IS NULL OR commit_id = :commit_id)
RETURNING id;

-- name: insert_adapter
INSERT INTO adapters (id, node_id, owner_id, base, name, bytes, rank, created_at)
VALUES (:id, :node_id, :owner, :base, :name, :bytes, :rank, :created_at);

-- name: adapters
SELECT * FROM adapters ORDER BY id;

-- name: delete_adapter
DELETE FROM adapters WHERE id = :id;
