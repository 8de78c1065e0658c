"""What is done with adapters after training: merged, extracted, combined, served and published."""
