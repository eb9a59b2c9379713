"""Side-by-side measurements of chipviz against its peers; prints one table, asserts no time."""
