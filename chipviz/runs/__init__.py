"""What is queued and at work, and its processes."""
