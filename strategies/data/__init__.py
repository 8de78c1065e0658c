"""From files on disk to rows that an objective can train on."""
