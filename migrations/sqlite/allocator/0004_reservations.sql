-- Reservations: space on GPUs that is set aside for users and projects (JSON lists of names) from starts_at until
-- ends_at. over_at: it is past, or was cancelled. Its number (id) is one of those of requests (seq).
CREATE TABLE reservation (
    id        BIGINT NOT NULL PRIMARY KEY,
    name      TEXT   NOT NULL,
    need      TEXT   NOT NULL,
    slices    BIGINT NOT NULL,
    starts_at BIGINT NOT NULL,
    ends_at   BIGINT NOT NULL,
    users     TEXT   NOT NULL,
    projects  TEXT   NOT NULL,
    made_at   BIGINT NOT NULL,
    over_at   BIGINT
);
CREATE UNIQUE INDEX reservation_name ON reservation (name) WHERE over_at IS NULL;

-- Where it is: each of its slices, at one place after another if GPUs fail. left_at: it is somewhere else since.
CREATE TABLE reserved_slice (
    reservation BIGINT NOT NULL REFERENCES reservation (id) ON DELETE CASCADE,
    position    BIGINT NOT NULL,
    chosen_at   BIGINT NOT NULL,
    node        TEXT   NOT NULL,
    gpu         TEXT   NOT NULL,
    gpu_index   BIGINT NOT NULL,
    profile_id  BIGINT NOT NULL,
    slice_start BIGINT NOT NULL,
    slice_size  BIGINT NOT NULL,
    whole       BIGINT NOT NULL,
    left_at     BIGINT
);
CREATE INDEX reserved_slice_of ON reserved_slice (reservation, position);

-- The reservation that a request is for.
ALTER TABLE request ADD COLUMN reservation BIGINT;
