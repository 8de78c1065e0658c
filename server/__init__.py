"""The coordinator: merges updates, keeps every round on disk, evaluates through its nodes. Never imports torch."""
