"""The pages' shared parts: state, links, status lines, drawings. Nothing here loads torch."""
