-- Projects: users who share a quota. A project may lie in another, whose limits hold for it too.

CREATE TABLE projects (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    name            TEXT    NOT NULL UNIQUE,
    parent_id       BIGINT  REFERENCES projects (id),
    limit_slices    BIGINT,
    limit_gpu_memory_mib BIGINT,
    limit_gpu_seconds BIGINT,
    created_at      BIGINT  NOT NULL
);

CREATE TABLE project_members (
    project_id      BIGINT  NOT NULL REFERENCES projects (id) ON DELETE CASCADE,
    user_id         BIGINT  NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    added_at        BIGINT  NOT NULL,
    PRIMARY KEY (project_id, user_id)
);
CREATE INDEX project_members_user ON project_members (user_id);

ALTER TABLE users ADD COLUMN quota_gpu_seconds BIGINT;
-- The greatest priority their requests may have; 0 if absent.
ALTER TABLE users ADD COLUMN greatest_priority BIGINT;
-- What their requests count for that name no project.
ALTER TABLE users ADD COLUMN default_project_id BIGINT REFERENCES projects (id) ON DELETE SET NULL;
