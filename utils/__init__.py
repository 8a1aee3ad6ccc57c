"""What any part of the program may use; it knows no method by name."""
