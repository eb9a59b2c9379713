"""The pages' shared parts: state, links, status lines, drawings; nothing here loads torch."""
