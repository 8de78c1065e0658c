"""What coordinator, node and device must agree on: adapters, plans, files, records and errors. Never imports torch."""
