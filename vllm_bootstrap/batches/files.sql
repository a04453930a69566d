-- name: insert_file
-- A file whose id was given is written again after a crash: the same file, so only its size can be new.
INSERT INTO files (id, node_id, owner_id, purpose, filename, bytes, status, created_at, expires_at)
VALUES (:id, :node_id, :owner, :purpose, :filename, :bytes, :status, :created_at, :expires_at)
ON CONFLICT (id) DO UPDATE SET bytes = excluded.bytes;

-- name: file
SELECT * FROM files WHERE id = :id AND (expires_at IS NULL OR expires_at > :now);

-- name: files_newest_first
SELECT * FROM files WHERE (:after IS NULL OR id < :after) AND (:purpose IS NULL OR purpose = :purpose)
AND (expires_at IS NULL OR expires_at > :now) ORDER BY id DESC LIMIT :limit;

-- name: files_oldest_first
SELECT * FROM files WHERE (:after IS NULL OR id > :after) AND (:purpose IS NULL OR purpose = :purpose)
AND (expires_at IS NULL OR expires_at > :now) ORDER BY id LIMIT :limit;

-- name: own_files_newest_first
SELECT * FROM files WHERE owner_id = :owner AND (:after IS NULL OR id < :after)
AND (:purpose IS NULL OR purpose = :purpose)
AND (expires_at IS NULL OR expires_at > :now) ORDER BY id DESC LIMIT :limit;

-- name: own_files_oldest_first
SELECT * FROM files WHERE owner_id = :owner AND (:after IS NULL OR id > :after)
AND (:purpose IS NULL OR purpose = :purpose)
AND (expires_at IS NULL OR expires_at > :now) ORDER BY id LIMIT :limit;

-- name: delete_file
DELETE FROM files WHERE id = :id;

-- name: delete_expired
DELETE FROM files WHERE id IN (SELECT id FROM files WHERE expires_at <= :now ORDER BY expires_at LIMIT :limit)
RETURNING id;

-- name: without_row
SELECT value FROM json_each(:names) WHERE value NOT IN (SELECT id FROM files);
