"""Find, vet, load and run a frozen model."""
