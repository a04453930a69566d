-- Batches, their history, single items: the statements of store.py and items_store.py.

-- name: insert_batch
INSERT INTO batches (id, node_id, owner_id, endpoint, input_file_id, completion_window, created_at, expires_at, state,
  why, paused, priority, launch_id, metadata, webhook, output_expires_after_s, output_file_id, error_file_id, counts,
  usage, errors, models, stamps, ended_at)
VALUES (:id, :node_id, :owner_id, :endpoint, :input_file_id, :completion_window, :created_at, :expires_at, :state,
  :why, :paused, :priority, :launch_id, :metadata, :webhook, :output_expires_after_s, :output_file_id, :error_file_id,
  :counts, :usage, :errors, :models, :stamps, :ended_at);

-- name: update_batch
UPDATE batches SET expires_at = :expires_at, state = :state, why = :why, paused = :paused, priority = :priority,
  output_file_id = :output_file_id, error_file_id = :error_file_id, counts = :counts, usage = :usage, errors = :errors,
  models = :models, stamps = :stamps, ended_at = :ended_at
WHERE id = :id;

-- name: note_batch
UPDATE batches SET counts = :counts, usage = :usage WHERE id = :id AND ended_at IS NULL;

-- name: batch
SELECT * FROM batches WHERE id = :id;

-- name: unfinished_batches
SELECT * FROM batches WHERE ended_at IS NULL ORDER BY id;

-- name: count_unfinished
SELECT count(*) FROM batches WHERE ended_at IS NULL;

-- name: batches_newest_first
SELECT * FROM batches WHERE (:after IS NULL OR id < :after) ORDER BY id DESC LIMIT :limit;

-- name: batches_of_owner
SELECT * FROM batches WHERE owner_id = :owner_id AND (:after IS NULL OR id < :after) ORDER BY id DESC LIMIT :limit;

-- name: batches_ended_before
SELECT id FROM batches WHERE ended_at < :before LIMIT :limit;

-- name: delete_batch
DELETE FROM batches WHERE id = :id AND ended_at IS NOT NULL;

-- name: append_event
INSERT INTO batch_events (batch_id, at, event, from_state, to_state, detail)
VALUES (:batch_id, :at, :event, :from_state, :to_state, :detail);

-- name: events
SELECT * FROM batch_events WHERE batch_id = :batch_id AND seq > :after ORDER BY seq LIMIT :limit;

-- name: remembered
SELECT request_hash, result_id FROM batch_keys WHERE owner_id = :owner_id AND key = :key;

-- name: remember
INSERT INTO batch_keys (owner_id, key, request_hash, result_id, created_at)
VALUES (:owner_id, :key, :request_hash, :result_id, :created_at);

-- name: forget_old_keys
DELETE FROM batch_keys WHERE created_at < :before;

-- name: insert_item
INSERT INTO items (id, node_id, owner_id, path, model, launch_id, body, priority, state, created_at, expires_at)
VALUES (:id, :node_id, :owner_id, :path, :model, :launch_id, :body, :priority, 'queued', :created_at, :expires_at);

-- name: item
SELECT * FROM items WHERE id = :id;

-- name: items_newest_first
SELECT * FROM items WHERE (:after IS NULL OR id < :after) AND (:state IS NULL OR state = :state)
ORDER BY id DESC LIMIT :limit;

-- name: items_of_owner
SELECT * FROM items WHERE owner_id = :owner_id AND (:after IS NULL OR id < :after)
  AND (:state IS NULL OR state = :state)
ORDER BY id DESC LIMIT :limit;

-- name: items_waiting
SELECT id, owner_id, path, model, launch_id, priority, attempts, deaths, expires_at
FROM items WHERE ended_at IS NULL ORDER BY id;

-- name: item_body
SELECT body FROM items WHERE id = :id AND ended_at IS NULL;

-- name: end_item
UPDATE items SET state = :state, record = :record, attempts = :attempts, ended_at = :ended_at, body = NULL
WHERE id = :id AND ended_at IS NULL;

-- name: note_item
UPDATE items SET attempts = :attempts, deaths = :deaths WHERE id = :id AND ended_at IS NULL;

-- name: delete_old_items
DELETE FROM items WHERE id IN (SELECT id FROM items WHERE ended_at < :before LIMIT :limit);
