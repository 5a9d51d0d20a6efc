-- Who held what, and what was used, is told for the past too.

-- When the latest of the requests ended that are forgotten, in microseconds since 1970: what was before that is not
-- all known any more.
INSERT INTO counter (name, value) VALUES ('forgotten', 0);
CREATE INDEX lease_released ON lease (released_at) WHERE released_at IS NOT NULL;
