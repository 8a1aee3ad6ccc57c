"""Neural modules that take plain numbers and tensors and import no other package of this repository."""
