-- name: insert_launch
INSERT INTO launches (
  id, node_id, owner_id, group_id, model, engine, served_model_name, spec, labels, restart, placement,
  state, step, why, attempt, created_at, changed_at, ended_at, failure, transitions
) VALUES (
  :id, :node_id, :owner_id, :group_id, :model, :engine, :served_model_name, :spec, :labels, :restart, :placement,
  :state, :step, :why, :attempt, :created_at, :changed_at, :ended_at, :failure, :transitions
);

-- name: launch
SELECT * FROM launches WHERE id = :id;

-- name: group_members
SELECT * FROM launches WHERE group_id = :group_id ORDER BY id;

-- name: launches_newest_first
SELECT * FROM launches WHERE (:after IS NULL OR id < :after) ORDER BY id DESC LIMIT :limit;

-- name: active_launches_newest_first
SELECT * FROM launches WHERE ended_at IS NULL AND (:after IS NULL OR id < :after) ORDER BY id DESC LIMIT :limit;

-- name: unfinished_launches
SELECT * FROM launches WHERE ended_at IS NULL AND node_id = :node_id ORDER BY id;

-- name: move_launch
UPDATE launches SET
  state = :to_state, step = :to_step, why = :to_why, attempt = :new_attempt, changed_at = :at, ended_at = :ended_at,
  failure = :failure, transitions = :transitions
WHERE id = :id AND state = :from_state AND step IS :from_step AND why IS :from_why AND attempt = :attempt;

-- name: hand_keys_on
-- The answer to a create that made a group is kept as long as any launch of the group is.
UPDATE idempotency_keys SET launch_id = (
  SELECT other.id FROM launches AS gone JOIN launches AS other ON other.group_id = gone.group_id
  WHERE gone.id = :id AND other.id <> :id ORDER BY other.id LIMIT 1
) WHERE launch_id = :id AND EXISTS (
  SELECT 1 FROM launches AS gone JOIN launches AS other ON other.group_id = gone.group_id
  WHERE gone.id = :id AND other.id <> :id
);

-- name: delete_launch
DELETE FROM launches WHERE id = :id;

-- name: ended_beyond
SELECT id FROM launches WHERE ended_at IS NOT NULL ORDER BY ended_at DESC, id DESC LIMIT -1 OFFSET :keep;

-- name: insert_event
INSERT INTO launch_events (launch_id, attempt, at, event, from_state, to_state, detail)
VALUES (:launch_id, :attempt, :at, :event, :from_state, :to_state, :detail);

-- name: events
SELECT * FROM launch_events WHERE launch_id = :launch_id AND seq > :after_seq ORDER BY seq LIMIT :limit;

-- name: group_events
SELECT * FROM launch_events WHERE launch_id IN (SELECT id FROM launches WHERE group_id = :group_id)
AND seq > :after_seq ORDER BY seq LIMIT :limit;

-- name: attempts
SELECT * FROM attempts WHERE launch_id = :launch_id ORDER BY attempt;

-- name: attempt
SELECT * FROM attempts WHERE launch_id = :launch_id AND attempt = :attempt;

-- name: save_attempt
INSERT OR REPLACE INTO attempts (
  launch_id, attempt, handle, engine, baseline, placement, endpoint, exit, sleep, started_at, ready_at, ended_at
) VALUES (
  :launch_id, :attempt, :handle, :engine, :baseline, :placement, :endpoint, :exit, :sleep, :started_at, :ready_at, :ended_at
);

-- name: insert_claim
INSERT INTO gpu_claims (node_id, gpu_uuid, owner_kind, owner_id, share_milli, shared)
VALUES (:node_id, :gpu_uuid, 'launch', :owner_id, :share_milli, :shared);

-- name: park_claim
INSERT INTO gpu_claims (node_id, gpu_uuid, owner_kind, owner_id, share_milli, shared, residue_bytes)
VALUES (:node_id, :gpu_uuid, 'parked', :owner_id, :share_milli, :shared, :residue_bytes);

-- name: release_claims
DELETE FROM gpu_claims WHERE owner_id = :owner_id;

-- name: claims_of
SELECT * FROM gpu_claims WHERE owner_kind = :owner_kind AND owner_id = :owner_id ORDER BY gpu_uuid;

-- name: claims
SELECT * FROM gpu_claims WHERE node_id = :node_id AND owner_kind = :owner_kind ORDER BY owner_id, gpu_uuid;

-- name: claim_owners
SELECT owner_id FROM gpu_claims
WHERE node_id = :node_id AND gpu_uuid = :gpu_uuid AND owner_kind = 'launch' ORDER BY owner_id;

-- name: mark_unsettled
INSERT OR REPLACE INTO unsettled_gpus (node_id, gpu_uuid, baseline_bytes, reason, at)
VALUES (:node_id, :gpu_uuid, :baseline_bytes, :reason, :at);

-- name: clear_unsettled
DELETE FROM unsettled_gpus WHERE node_id = :node_id AND gpu_uuid = :gpu_uuid;

-- name: unsettled
SELECT * FROM unsettled_gpus WHERE node_id = :node_id ORDER BY gpu_uuid;

-- name: remember_key
INSERT INTO idempotency_keys (owner_id, key, request_hash, launch_id, created_at)
VALUES (:owner_id, :key, :request_hash, :launch_id, :created_at);

-- name: remembered_key
SELECT request_hash, launch_id FROM idempotency_keys WHERE owner_id = :owner_id AND key = :key;

-- name: record_start
INSERT INTO start_durations (model, engine, device, args_hash, total_s, phases, at)
VALUES (:model, :engine, :device, :args_hash, :total_s, :phases, :at);

-- name: recent_starts
SELECT total_s FROM start_durations
WHERE model = :model AND engine = :engine AND device = :device AND args_hash = :args_hash
ORDER BY id DESC LIMIT :limit;

-- name: forget_old_starts
DELETE FROM start_durations
WHERE model = :model AND engine = :engine AND device = :device AND args_hash = :args_hash AND id NOT IN (
  SELECT id FROM start_durations
  WHERE model = :model AND engine = :engine AND device = :device AND args_hash = :args_hash
  ORDER BY id DESC LIMIT :limit
);

-- name: record_wake
INSERT INTO wake_durations (model, engine, device, args_hash, level, total_s, at)
VALUES (:model, :engine, :device, :args_hash, :level, :total_s, :at);

-- name: recent_wakes
SELECT total_s FROM wake_durations
WHERE model = :model AND engine = :engine AND device = :device AND args_hash = :args_hash AND level = :level
ORDER BY id DESC LIMIT :limit;

-- name: forget_old_wakes
DELETE FROM wake_durations
WHERE model = :model AND engine = :engine AND device = :device AND args_hash = :args_hash AND level = :level
AND id NOT IN (
  SELECT id FROM wake_durations
  WHERE model = :model AND engine = :engine AND device = :device AND args_hash = :args_hash AND level = :level
  ORDER BY id DESC LIMIT :limit
);
