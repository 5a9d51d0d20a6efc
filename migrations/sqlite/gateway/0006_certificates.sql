-- Certificate authorities whose user certificates let people in.

CREATE TABLE certificate_authorities (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    fingerprint     TEXT    NOT NULL,
    public_key      TEXT    NOT NULL,
    label           TEXT    NOT NULL,
    -- Whom alone it may let in; anybody if absent.
    user_id         BIGINT  REFERENCES users (id) ON DELETE CASCADE,
    created_at      BIGINT  NOT NULL,
    last_used_at    BIGINT
);
CREATE UNIQUE INDEX certificate_authorities_trust ON certificate_authorities (fingerprint, COALESCE(user_id, 0));

-- Certificates that let nobody in any more, though they are valid.
CREATE TABLE certificate_revocations (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    kind            TEXT    NOT NULL CHECK (kind IN ('serial', 'key-id', 'key')),
    -- A number, a key id, or the fingerprint of the key that was certified.
    value           TEXT    NOT NULL,
    -- The fingerprint of the authority whose certificates are meant; '' for all of them.
    authority       TEXT    NOT NULL,
    created_at      BIGINT  NOT NULL,
    UNIQUE (kind, value, authority)
);

-- What may be forwarded over a user's connections, by themselves and by the projects they are a member of: what one
-- of them forbids is forbidden. Everything may where there is no row.
CREATE TABLE forwarding_policies (
    user_id         BIGINT  UNIQUE REFERENCES users (id) ON DELETE CASCADE,
    project_id      BIGINT  UNIQUE REFERENCES projects (id) ON DELETE CASCADE,
    local           BOOLEAN NOT NULL,
    remote          BOOLEAN NOT NULL,
    agent           BOOLEAN NOT NULL,
    x11             BOOLEAN NOT NULL,
    CHECK ((user_id IS NULL) <> (project_id IS NULL))
);
