-- Machines with GPUs and a daemon of their own. Times are microseconds since 1970, UTC.

-- A request may name the only node it may be served from.
ALTER TABLE request ADD COLUMN on_node TEXT;

-- machine tells it from others whatever its name, boot changes with every start; fence is the one under which its
-- daemon joined last, at the time of that, or of its loss.
CREATE TABLE node (
    name    TEXT   NOT NULL PRIMARY KEY,
    machine TEXT   NOT NULL,
    boot    TEXT   NOT NULL,
    fence   BIGINT NOT NULL,
    at      BIGINT NOT NULL,
    lost    BIGINT NOT NULL
);
