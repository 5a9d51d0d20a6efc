-- Whether the attempt was ended for a request of greater priority: that is no fault, and counts as none.
ALTER TABLE attempts ADD COLUMN preempted BOOLEAN NOT NULL DEFAULT FALSE;
