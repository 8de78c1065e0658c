"""An institution's node: joins a federation, trains on its own records, returns adapter updates."""
