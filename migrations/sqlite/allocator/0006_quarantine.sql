-- GPUs that reported an error after which nothing is granted on them: since when, and since which start of their
-- machine. The next start ends it.
CREATE TABLE quarantine (
    gpu    TEXT   NOT NULL PRIMARY KEY,
    node   TEXT   NOT NULL,
    boot   TEXT   NOT NULL,
    reason TEXT   NOT NULL,
    at     BIGINT NOT NULL
);
