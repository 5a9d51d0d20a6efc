-- The project that a workspace counts for, since its last start.
ALTER TABLE workspaces ADD COLUMN project TEXT;
