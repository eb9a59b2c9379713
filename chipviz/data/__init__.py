"""Tables become tasks, tasks become token ids."""
