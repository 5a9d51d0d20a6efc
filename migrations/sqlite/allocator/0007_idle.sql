-- A lease is over if it is not used for so many seconds; absent if it need not be used.
ALTER TABLE request ADD COLUMN idle_seconds BIGINT;
