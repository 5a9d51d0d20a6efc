-- The allocator's ledger. Times are microseconds since 1970, UTC; memory is in MiB.

-- Every request for slices, one for each workload, in the order of arrival (seq). One that has no lease and
-- has not ended waits. Ended ones are kept as history.
CREATE TABLE request (
    workload         TEXT   NOT NULL PRIMARY KEY,
    seq              BIGINT NOT NULL UNIQUE,
    user_name        TEXT   NOT NULL,
    need             TEXT   NOT NULL,
    profile          TEXT   NOT NULL,
    limit_slices     BIGINT,
    limit_memory_mib BIGINT,
    expected_seconds BIGINT,
    requested_at     BIGINT NOT NULL,
    ended_at         BIGINT,
    reason           TEXT
);
CREATE INDEX request_open ON request (seq) WHERE ended_at IS NULL;
CREATE INDEX request_ended ON request (ended_at) WHERE ended_at IS NOT NULL;

-- Every lease. A slice is held from granted_at until released_at, whatever happens in between: expired_at
-- says that nobody renewed it in time, over_at that it may not be renewed any more.
-- The slice is known by GPU, profile and start; its UUID changes when it is made again.
CREATE TABLE lease (
    fence         BIGINT NOT NULL PRIMARY KEY,
    workload      TEXT   NOT NULL UNIQUE REFERENCES request (workload) ON DELETE CASCADE,
    node          TEXT   NOT NULL,
    granted       TEXT   NOT NULL,
    memory_mib    BIGINT NOT NULL,
    gpu           TEXT,
    gpu_index     BIGINT,
    profile_id    BIGINT,
    slice_start   BIGINT,
    slice_size    BIGINT,
    whole         BIGINT NOT NULL DEFAULT 0,
    uuid          TEXT,
    granted_at    BIGINT NOT NULL,
    renewed_at    BIGINT NOT NULL,
    expires_at    BIGINT NOT NULL,
    expired_at    BIGINT,
    over_at       BIGINT,
    over_reason   TEXT,
    released_at   BIGINT
);
CREATE INDEX lease_held ON lease (fence) WHERE released_at IS NULL;
-- No slice has two holders, whatever the program does.
CREATE UNIQUE INDEX lease_one_holder ON lease (gpu, profile_id, slice_start)
    WHERE released_at IS NULL AND gpu IS NOT NULL;

-- Changes of GPUs that are under way, written before the driver is touched.
CREATE TABLE repartition (
    id       BIGINT NOT NULL PRIMARY KEY,
    gpu      TEXT   NOT NULL,
    workload TEXT,
    destroys TEXT   NOT NULL,
    makes    TEXT,
    begun_at BIGINT NOT NULL
);

-- Numbers that only grow, also over restarts and when history is pruned.
CREATE TABLE counter (
    name  TEXT   NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO counter (name, value) VALUES ('fence', 0), ('seq', 0), ('repartition', 0);
