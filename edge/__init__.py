"""From adapter to device (export side and device runtime)."""
