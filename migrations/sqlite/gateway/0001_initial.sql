-- The gateway's wanted state. Times are microseconds since 1970 (UTC). Names of states are those of the API.

CREATE TABLE users (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    name            TEXT    NOT NULL UNIQUE,
    uid             BIGINT  NOT NULL UNIQUE,
    role            TEXT    NOT NULL CHECK (role IN ('user', 'admin')),
    enabled         BOOLEAN NOT NULL DEFAULT TRUE,
    quota_slices    BIGINT,
    quota_gpu_memory_mib BIGINT,
    quota_jobs      BIGINT,
    default_need    TEXT,
    created_at      BIGINT  NOT NULL,
    last_seen_at    BIGINT
);

-- Every uid ever given: files may lie about that still carry one, so none is given to somebody else.
CREATE TABLE given_uids (
    uid             BIGINT  NOT NULL PRIMARY KEY,
    name            TEXT    NOT NULL,
    automatic       BOOLEAN NOT NULL
);

CREATE TABLE ssh_keys (
    fingerprint     TEXT    NOT NULL PRIMARY KEY,
    user_id         BIGINT  NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    public_key      TEXT    NOT NULL,
    label           TEXT    NOT NULL,
    created_at      BIGINT  NOT NULL,
    last_used_at    BIGINT
);
CREATE INDEX ssh_keys_user ON ssh_keys (user_id);

-- One-time enrolment codes, hashed (SHA-256).
CREATE TABLE invites (
    code_hash       BLOB    NOT NULL PRIMARY KEY,
    user_id         BIGINT  NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    created_at      BIGINT  NOT NULL,
    expires_at      BIGINT  NOT NULL,
    used_at         BIGINT
);

-- Bearer tokens of the TCP API, hashed (SHA-256 of 256 random bits).
CREATE TABLE tokens (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    secret_hash     BLOB    NOT NULL UNIQUE,
    user_id         BIGINT  NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    label           TEXT    NOT NULL,
    created_at      BIGINT  NOT NULL,
    expires_at      BIGINT  NOT NULL,
    last_used_at    BIGINT
);

-- Images an administrator added or hid, beside those of catalog.toml.
CREATE TABLE images (
    name            TEXT    NOT NULL PRIMARY KEY,
    reference       TEXT    NOT NULL,
    description     TEXT    NOT NULL,
    min_gpu_memory_mib BIGINT NOT NULL DEFAULT 0,
    enabled         BOOLEAN NOT NULL DEFAULT TRUE,
    created_at      BIGINT  NOT NULL
);

-- generation counts the starts; the workload is w-<id>-<generation>.
CREATE TABLE workspaces (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id         BIGINT  NOT NULL REFERENCES users (id),
    name            TEXT    NOT NULL,
    image           TEXT    NOT NULL,
    need            TEXT    NOT NULL,
    state           TEXT    NOT NULL,
    detail          TEXT,
    generation      BIGINT  NOT NULL DEFAULT 0,
    fence           BIGINT,
    created_at      BIGINT  NOT NULL,
    started_at      BIGINT,
    idle_deadline   BIGINT,
    keep_until      BIGINT,
    UNIQUE (user_id, name)
);
CREATE INDEX workspaces_active ON workspaces (id) WHERE state <> 'stopped';

-- spec is the JobSpec as JSON, with the defaults filled in.
CREATE TABLE jobs (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id         BIGINT  NOT NULL REFERENCES users (id),
    name            TEXT    NOT NULL,
    state           TEXT    NOT NULL,
    reason          TEXT,
    detail          TEXT,
    spec            TEXT    NOT NULL,
    idempotency_key TEXT,
    attempt         BIGINT  NOT NULL DEFAULT 0,
    submitted_at    BIGINT  NOT NULL,
    started_at      BIGINT,
    ended_at        BIGINT,
    exit_code       BIGINT,
    signal          TEXT,
    cancelled_by    TEXT,
    UNIQUE (user_id, idempotency_key)
);
CREATE INDEX jobs_live ON jobs (user_id) WHERE ended_at IS NULL;
CREATE INDEX jobs_user ON jobs (user_id, id);

-- The workload of an attempt is j-<job>-<number>. lease is the Lease as JSON.
CREATE TABLE attempts (
    job_id          BIGINT  NOT NULL REFERENCES jobs (id),
    number          BIGINT  NOT NULL,
    fence           BIGINT  NOT NULL,
    lease           TEXT    NOT NULL,
    granted_at      BIGINT  NOT NULL,
    started_at      BIGINT,
    ended_at        BIGINT,
    PRIMARY KEY (job_id, number)
);

CREATE TABLE audit (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    at              BIGINT  NOT NULL,
    actor           TEXT    NOT NULL,
    action          TEXT    NOT NULL,
    target          TEXT    NOT NULL,
    detail          TEXT
);
