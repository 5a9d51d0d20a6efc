-- Leases of several slices, projects, priorities; whose share is what, and what was used.

-- A request is for so many slices, all at once, on so many nodes (wherever, if absent).
ALTER TABLE request ADD COLUMN slices            BIGINT NOT NULL DEFAULT 1;
ALTER TABLE request ADD COLUMN nodes             BIGINT;
ALTER TABLE request ADD COLUMN project           TEXT;
ALTER TABLE request ADD COLUMN priority          BIGINT NOT NULL DEFAULT 0;
ALTER TABLE request ADD COLUMN preemptible       BIGINT NOT NULL DEFAULT 0;
ALTER TABLE request ADD COLUMN limit_gpu_seconds BIGINT;

-- Every slice of every lease, held as long as the lease: released_at is that of the lease.
CREATE TABLE slice (
    fence         BIGINT NOT NULL REFERENCES lease (fence) ON DELETE CASCADE,
    position      BIGINT NOT NULL,
    node          TEXT   NOT NULL,
    gpu           TEXT   NOT NULL,
    gpu_index     BIGINT NOT NULL,
    profile_id    BIGINT NOT NULL,
    slice_start   BIGINT NOT NULL,
    slice_size    BIGINT NOT NULL,
    whole         BIGINT NOT NULL,
    uuid          TEXT   NOT NULL,
    released_at   BIGINT,
    PRIMARY KEY (fence, position)
);
INSERT INTO slice
    SELECT fence, 0, node, gpu, gpu_index, profile_id, slice_start, slice_size, whole, COALESCE(uuid, ''), released_at
    FROM lease WHERE gpu IS NOT NULL;
DROP INDEX lease_one_holder;
-- No slice has two holders, whatever the program does.
CREATE UNIQUE INDEX slice_one_holder ON slice (gpu, profile_id, slice_start) WHERE released_at IS NULL;
ALTER TABLE lease DROP COLUMN gpu;
ALTER TABLE lease DROP COLUMN gpu_index;
ALTER TABLE lease DROP COLUMN profile_id;
ALTER TABLE lease DROP COLUMN slice_start;
ALTER TABLE lease DROP COLUMN slice_size;
ALTER TABLE lease DROP COLUMN whole;
ALTER TABLE lease DROP COLUMN uuid;
-- What of a GPU each of its slices is, in millionths.
ALTER TABLE lease ADD COLUMN compute_share BIGINT NOT NULL DEFAULT 0;
ALTER TABLE lease ADD COLUMN memory_share  BIGINT NOT NULL DEFAULT 0;
-- Notice that it is going to end.
ALTER TABLE lease ADD COLUMN ends_at       BIGINT;
ALTER TABLE lease ADD COLUMN ends_reason   TEXT;
-- Who held what at a time.
CREATE INDEX lease_granted ON lease (granted_at);

-- Users (kind `user`) and projects (kind `project`): their fair shares and limits.
CREATE TABLE account (
    kind              TEXT   NOT NULL,
    name              TEXT   NOT NULL,
    parent            TEXT,
    shares            BIGINT NOT NULL DEFAULT 1,
    limit_slices      BIGINT,
    limit_memory_mib  BIGINT,
    limit_gpu_seconds BIGINT,
    PRIMARY KEY (kind, name)
);

-- What leases that are over have used, by day (since 1970, UTC), user and project ('' for none): microseconds of
-- slices, and of whole GPUs by compute, by memory, and by the larger of both.
CREATE TABLE usage (
    day          BIGINT NOT NULL,
    user_name    TEXT   NOT NULL,
    project      TEXT   NOT NULL,
    slice_us     BIGINT NOT NULL,
    compute_us   BIGINT NOT NULL,
    memory_us    BIGINT NOT NULL,
    gpu_us       BIGINT NOT NULL,
    leases       BIGINT NOT NULL,
    PRIMARY KEY (day, user_name, project)
);
