-- When a key stops letting its user in; never if absent.
ALTER TABLE ssh_keys ADD COLUMN expires_at BIGINT;
-- The address that its last login came from.
ALTER TABLE ssh_keys ADD COLUMN last_used_from TEXT;
