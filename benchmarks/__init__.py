"""Side-by-side measurements of chipviz against its peers. Prints one table, asserts no time."""
